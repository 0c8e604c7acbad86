"""Points of depth: where a pinhole camera saw them, missing where depth is, as far apart when mirrored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.__main__ import main
from models.data import LAYOUTS, DataError, Layout, Reader, SegmentationSet, TrainTransform
from models.data.corruption import noisy
from models.data.dataset import Sample
from models.data.geometry import Camera
from models.data.images import Frame
from models.data.inputs import InputSpec
from models.segmentation.settings import DataSettings
from models.segmentation.visualize import show_input
from tests.helpers.planes import phone
from tests.helpers.trees import write

CAMERA = Camera(58.0, 61.0, 31.2, 22.9)
SIZE = (48, 64)
LAYOUT = Layout("own", {"depth": "d", "labels": "l"}, camera=CAMERA, depth_scale=1000.0)


def measured(seed: int = 0) -> np.ndarray:
    """Meters, a tenth of them missing."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(0.5, 8, SIZE) * (rng.random(SIZE) > 0.1)).astype(np.float32)


def read(depth: np.ndarray, layout: Layout = LAYOUT, size: tuple[int, int] | None = None) -> np.ndarray:
    return Reader(layout, ("points",)).read({"depth": Frame("depth", depth)}, size)[0]


def test_a_point_is_seen_at_its_pixel() -> None:
    """In float64: projected back, every point falls on the pixel that it is of."""
    depth = measured()
    found = read(depth).astype(np.float64)
    known = depth > 0
    rows, columns = np.nonzero(known)
    x, y, z = found[known].T
    np.testing.assert_array_equal(z, depth[known])
    np.testing.assert_allclose(CAMERA.fx * x / z + CAMERA.cx, columns, atol=1e-5)
    np.testing.assert_allclose(CAMERA.fy * y / z + CAMERA.cy, rows, atol=1e-5)
    assert not found[~known].any()
    assert found.shape == (*SIZE, 3)


def test_points_of_a_plane_lie_on_it() -> None:
    normal = np.array([0.2, -0.6, 0.2])  # n P = 1
    x = (np.arange(SIZE[1]) - CAMERA.cx) / CAMERA.fx
    y = (np.arange(SIZE[0])[:, None] - CAMERA.cy) / CAMERA.fy
    share = normal[0] * x + normal[1] * y + normal[2]
    depth = np.where(share > 0.1, 1 / np.maximum(share, 0.1), 0).astype(np.float32)
    found = read(depth)
    assert 0.5 < (depth > 0).mean() < 1
    np.testing.assert_allclose(found[depth > 0] @ normal, 1, atol=1e-5)


@pytest.mark.parametrize("factor", [0.5, 3])
def test_points_are_those_of_the_nearest_pixel(factor: float) -> None:
    """Of depth at the size in which it is stored."""
    depth, size = measured(), tuple(int(factor * side) for side in SIZE)
    found, whole = read(depth, size=size), read(depth)
    rows, columns = (((np.arange(side) + 0.5) / factor).astype(int) for side in size)
    np.testing.assert_array_equal(found, whole[np.ix_(rows, columns)])


def test_the_camera_is_scaled_with_its_images() -> None:
    """Depth of half as many pixels in each direction shows the same points."""
    layout = replace(LAYOUT, camera=CAMERA._replace(size=(2 * SIZE[1], 2 * SIZE[0])))
    x, y = (read(np.full(SIZE, 2.0, np.float32), layout)[5, 9, axis] for axis in (0, 1))
    assert x == pytest.approx(2 * (2 * 9 + 0.5 - CAMERA.cx) / CAMERA.fx, rel=1e-5)
    assert y == pytest.approx(2 * (2 * 5 + 0.5 - CAMERA.cy) / CAMERA.fy, rel=1e-5)


def test_mirrored_points_are_as_far_apart_as_those_of_the_mirrored_scene() -> None:
    """With the signs that they had: those of the mirrored scene but for the camera's axes."""
    points = read(measured())[:, :48]
    sample = Sample((points,), np.zeros((48, 48), np.uint8), "scene", ("points",))
    transform = TrainTransform(crop=48, shorter_side=48, scales=(1.0, 1.0))
    results = [transform(sample, np.random.default_rng(seed)).images[0] for seed in range(8)]
    mirrored = [result for result in results if not np.array_equal(result, points)]
    assert 0 < len(mirrored) < len(results)
    scene = (points[:, ::-1] * np.float32([-1, 1, 1])).reshape(-1, 3)[::7]
    for result in mirrored:
        np.testing.assert_array_equal(result, points[:, ::-1])
        found = result.reshape(-1, 3)[::7]
        apart, expected = (np.linalg.norm(each[:, None] - each, axis=-1) for each in (found, scene))
        np.testing.assert_array_equal(apart, expected)


def test_noisy_points_lie_on_all_sides() -> None:
    image = read(measured())
    found = noisy(image, 0.1, InputSpec("points", "metre", 3), "points", np.random.default_rng(0))
    known = image.any(axis=-1)
    assert not found[~known].any()
    off = (found - image)[known]
    assert off.std() == pytest.approx(0.1, rel=0.05)
    assert (found[:, :, 0] < 0).mean() == pytest.approx((image[:, :, 0] < 0).mean(), abs=0.02)


def test_points_of_files(tmp_path: Path) -> None:
    files = {"points": "points/{name}.npy", "labels": "labels/{name}.png"}
    (tmp_path / "layout.json").write_text(json.dumps({"files": files, "lists": "", "classes": ["a", "b"]}))
    stored = np.random.default_rng(0).normal((0, 0, 9), size=(*SIZE, 3))
    stored[0] = np.nan
    stored[1, :, 2] = 0
    (tmp_path / "points").mkdir()
    np.save(tmp_path / "points/a.npy", stored)
    write(tmp_path / "labels/a.png", np.zeros(SIZE, np.uint8))
    dataset = SegmentationSet(tmp_path, "train", modalities=("points",), num_classes=2)
    found = dataset.sample(0)
    assert found.kinds == ("points",)
    np.testing.assert_allclose(found.images[0][2:], stored[2:], rtol=1e-6)
    assert not found.images[0][:2].any()
    np.save(tmp_path / "points/a.npy", np.zeros((*SIZE, 3), np.uint8))
    with pytest.raises(DataError, match=r"a\.npy: expected points in meters, .* found 8 bits and 3 channels"):
        dataset.sample(0)


def test_what_points_need_is_said() -> None:
    depth = measured()
    with pytest.raises(DataError, match="depth: its camera is not known to the layout own"):
        read(depth, replace(LAYOUT, camera=None))
    layout = replace(LAYOUTS["nyu_dformer"], camera=CAMERA)
    with pytest.raises(DataError, match="depth: points needs depth in meters, and the layout nyu_dformer"):
        read((100 * depth).clip(0, 255).astype(np.uint8), layout)


def test_points_as_colors() -> None:
    points = np.zeros((3, 1, 3), np.float32)
    points[:, 0, 1] = (-4, 2, 1)
    points[:, 0, 2] = (0, 0, 4)
    found = show_input(points, "points", DataSettings())
    np.testing.assert_array_equal(found[0], [[128] * 3, [0, 191, 159], [128, 128, 255]])


def test_a_look_at_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a camera beside the color camera, registered; on the contact sheet as well."""
    root, sheet = phone(tmp_path / "set"), tmp_path / "sheet.png"
    given = [f"data.root={root}", "data.num_classes=2", "data.modalities=rgb,points", "data.crop=32"]
    assert main(["data", "synthetic_demo", "--output", str(sheet), *given]) == 0
    assert "depth registered: " in capsys.readouterr().out
    assert sheet.is_file()
