"""Domains derived from depth and colours, against scenes of known geometry and formulas in float64."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import ndimage

from models.__main__ import main
from models.data import (
    DERIVED,
    DOMAINS,
    NYU40,
    DataError,
    SegmentationSet,
    TranslationSet,
    prepare_domains,
    prepare_synthetic,
    prepare_synthetic_domains,
    scenes,
)
from models.data.domains import (
    derive,
    normal_colors,
    occlusion_edges,
    reshading,
    stored_depth,
    texture_edges,
)
from models.data.geometry import Camera, plane_normals, surface_normals, surface_planes, without_steps
from models.data.images import read_stored
from models.data.layouts import KINECT
from tests.helpers import trees

SIZE = (240, 320)
CAMERA = Camera(260.0, 260.0, 159.5, 119.5)
STEP = 256 / 6528  # metres: depth from a copy of 8 bits
X, Y = CAMERA.directions(*SIZE)
JUMP = 65535 * (np.sqrt(3 / 128) - np.sqrt(2 / 128)) / np.sqrt(2)  # from 2 to 3 m, in edge_occlusion


def plane(*normal: float, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Everywhere the one plane n·P = 1."""
    return np.broadcast_to(np.float32(normal)[:, None, None], (3, *size)).copy()


def depth_of(planes: np.ndarray) -> np.ndarray:
    inverse = planes[0] * X + planes[1] * Y + planes[2]
    return np.divide(1, inverse, out=np.zeros(SIZE, np.float32), where=inverse > 0.02)


def degrees(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.einsum("...i,...i->...", a, b).clip(-1, 1)))


@pytest.fixture(scope="module")
def rooms() -> list[scenes.View]:
    return [scenes.view(SIZE, np.random.default_rng(seed)) for seed in range(3)]


def test_exact_planes(rooms: list[scenes.View]) -> None:
    """A pixel's plane holds its point, and on flat surfaces its neighbour's as well."""
    camera = scenes.camera(SIZE)
    x, y = camera.directions(*SIZE)
    for seen in rooms:
        inverse = seen.planes[0] * x + seen.planes[1] * y + seen.planes[2]
        np.testing.assert_allclose(inverse * seen.depth, 1, atol=1e-4)
        floor = (seen.labels[:, 1:] == 0) & (seen.labels[:, :-1] == 0)
        assert floor.sum() > 1000
        beside = (inverse + seen.planes[0] / camera.fx)[:, :-1]
        np.testing.assert_allclose((beside * seen.depth[:, 1:])[floor], 1, atol=1e-4)
        steepness = plane_normals(seen.planes)[:, :, 1]
        assert (steepness[seen.labels == 0] < -0.9).all()  # up: the camera looks down by 20 degrees at most
        np.testing.assert_allclose(np.linalg.norm(plane_normals(seen.planes), axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("normal", "colour"),
    [
        ((0, 0, 0.5), (128, 128, 255)),  # a wall ahead
        ((0, 0.7, 0), (128, 0, 128)),  # a floor: it faces up, green counts down
        ((0, -0.7, 0), (128, 255, 128)),  # a ceiling
        ((0.4, 0, 0), (0, 128, 128)),  # a wall on the right, which faces left
        ((0.3, 0, 0.4), (51, 128, 230)),
        ((0, 0, 0), (128, 128, 128)),  # nothing known
    ],
)
def test_normal_colours(normal: tuple[float, ...], colour: tuple[int, ...]) -> None:
    assert (normal_colors(plane(*normal, size=(2, 3))) == colour).all()


def test_normals_read_back(rooms: list[scenes.View]) -> None:
    for seen in rooms:
        read = DOMAINS["normal"].encode(normal_colors(seen.planes)) * (1, 1, -1)
        np.testing.assert_allclose(read, plane_normals(seen.planes), atol=0.5 / 127.5 + 1e-6)


def test_reshading(rooms: list[scenes.View]) -> None:
    """255 max(0, n·v) / (1 + (r/8)²), point by point in float64."""
    camera = scenes.camera(SIZE)
    x, y = camera.directions(*SIZE)
    for seen in rooms:
        point = np.stack([seen.depth * x, seen.depth * y, seen.depth], -1).astype(np.float64)
        distance = np.linalg.norm(point, axis=-1)
        cosine = np.einsum("hwi,hwi->hw", plane_normals(seen.planes), -point) / distance
        expected = 255 * np.maximum(cosine, 0) / (1 + (distance / 8) ** 2)
        np.testing.assert_allclose(reshading(seen.planes, camera), expected, atol=0.51)
    wall = reshading(plane(0, 0, 1 / 8), CAMERA)
    assert wall.max() == wall[120, 160] == 127  # half its light is left at 8 m
    assert not reshading(plane(0, 0, 0), CAMERA).any()


def test_stored_depth() -> None:
    metres = np.float32([[0, 0.001, 1, 2.0009, 127.9, 128, 300]])
    np.testing.assert_array_equal(stored_depth(metres), [[65535, 1, 512, 1024, 65485, 65535, 65535]])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("fitted", [False, True])
def test_occlusion_edges_of_a_card(fitted: bool, turned: bool) -> None:
    """A card at 2 m before a wall at 3 m: the full jump on both sides of its edge, nothing elsewhere."""
    nearer = np.arange(SIZE[1])[None] < 150 if not turned else np.arange(SIZE[0])[:, None] < 90
    planes = np.where(nearer, plane(0, 0, 1 / 2), plane(0, 0, 1 / 3))
    edges = occlusion_edges(surface_planes(depth_of(planes), CAMERA) if fitted else planes, CAMERA)
    across = edges if not turned else edges.T
    at = 90 if turned else 150
    np.testing.assert_allclose(across[:, at - 1 : at + 1], JUMP, atol=2)
    assert np.delete(across, (at - 1, at), axis=1).max() <= (2 if fitted else 0)


@pytest.mark.parametrize("fitted", [False, True])
def test_no_occlusion_edges_where_nothing_is_hidden(fitted: bool) -> None:
    """A floor to 20 m, and a floor that meets two walls; Sobel's operator, Taskonomy's, finds edges there."""
    floor, left, ahead = plane(0, 1 / 1.4, 0), plane(-1 / 1.5, 0, 0.1), plane(0.05, 0, 1 / 4)
    corner = np.maximum.reduce([part[0] * X + part[1] * Y + part[2] for part in (floor, left, ahead)])
    nearest = np.stack(
        [part[0] * X + part[1] * Y + part[2] == corner for part in (floor, left, ahead)]
    )  # of what a ray meets in a room, the nearest
    room = np.select(nearest[:, None], (floor, left, ahead))
    slope = np.where(Y > 0.07, floor, 0).astype(np.float32)
    for planes in (room, slope):
        depth = depth_of(planes)
        edges = occlusion_edges(surface_planes(depth, CAMERA) if fitted else planes, CAMERA)
        root = np.sqrt(depth / 128)
        known = cv2.erode((depth > 0).astype(np.uint8), np.ones((3, 3))) > 0
        sobel = 65535 * np.hypot(*(ndimage.sobel(root, axis) / 4 for axis in (0, 1)))[known] / np.sqrt(2)
        assert edges.max() < (0.04 * JUMP if fitted else 3)  # three fitted faces hardly meet in one point
        assert np.percentile(edges, 99) < 3
        assert sobel.max() > 0.07 * JUMP


def test_occlusion_edges_of_rooms(rooms: list[scenes.View]) -> None:
    """From depth alone: where exact geometry has a jump, within a pixel, and hardly anywhere else."""
    camera = scenes.camera(SIZE)
    for seen in rooms:
        exact = occlusion_edges(seen.planes, camera)
        found = occlusion_edges(surface_planes(seen.depth, camera), camera)
        around = np.ones((3, 3), np.uint8)
        assert (cv2.dilate(found, around)[exact > 400] > 250).mean() > 0.99
        assert (cv2.dilate(exact, around)[found > 400] > 250).mean() > 0.97
        assert 200 < np.count_nonzero(exact > 400) < 0.1 * exact.size


@pytest.mark.parametrize(("hole", "edge"), [((150, 160), 150), ((140, 150), 140), ((150, 175), None)])
def test_occlusion_edges_beside_a_shadow(hole: tuple[int, int], edge: int | None) -> None:
    """A card at 2 m up to column 150, then a wall at 3 m; nothing is known of a hole beside the edge."""
    planes = np.where(np.arange(SIZE[1]) < 150, plane(0, 0, 1 / 2), plane(0, 0, 1 / 3))
    planes[:, :, slice(*hole)] = 0
    planes[:, :, -5:] = 0  # at the picture's rim there is one side only
    planes[:, :10] = 0  # and here none
    edges = occlusion_edges(planes, CAMERA)
    assert not edges[:10].any()
    at = [] if edge is None else [edge - 1, edge]
    np.testing.assert_allclose(edges[10:, at], JUMP, atol=2)
    assert not np.delete(edges, at, axis=1).any()


def test_occlusion_edges_of_measured_rooms() -> None:
    """A sensor's shadows lie beside the very edges: few are lost, and few are where none is."""
    camera, around = scenes.camera(SIZE), np.ones((3, 3), np.uint8)
    lost, false = [], []
    for seed in range(4):
        exact = occlusion_edges(scenes.view(SIZE, np.random.default_rng(seed)).planes, camera)
        _, stored, _ = scenes.render(SIZE, np.random.default_rng(seed))
        depth = (stored / np.float32(scenes.DEPTH_SCALE)).astype(np.float32)
        found = occlusion_edges(surface_planes(without_steps(depth), camera), camera)
        lost.append(found[exact > 800] <= 400)
        false.append(cv2.dilate(exact, around)[found > 800] <= 400)
    assert np.concatenate(lost).mean() < 0.08
    assert np.concatenate(false).mean() < 0.04


def test_texture_edges_written_out() -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (40, 32, 3), np.uint8)
    rgb = cv2.resize(small, (512, 640), interpolation=cv2.INTER_NEAREST)
    grey = (rgb @ (0.299, 0.587, 0.114)) / 255
    blurred = ndimage.gaussian_filter(grey, 3, mode="nearest")
    along = [ndimage.sobel(blurred, axis, mode="nearest") / 4 for axis in (0, 1)]
    expected = 65535 * np.hypot(*along) / np.sqrt(2)
    found = texture_edges(rgb)
    assert 3000 < expected.max() < 12000
    np.testing.assert_allclose(found[1:-1, 1:-1], expected[1:-1, 1:-1], atol=0.01 * expected.max())


def test_texture_edges_of_a_step() -> None:
    """Strongest at the edge, of Taskonomy's order in every size, nothing where nothing changes."""
    for side in (128, 256, 512):
        rgb = np.zeros((side, side, 3), np.uint8)
        rgb[:, side // 2 :] = 255
        found = texture_edges(rgb)
        assert (found.argmax(axis=1) == side // 2 - 1).all()
        assert {512: 11900, 256: 11000, 128: 8600}[side] < found.max() < 12325
        assert not found[:, : side // 4].any()
    assert not texture_edges(np.full((64, 64, 3), 200, np.uint8)).any()


def test_steps_are_smoothed_away(rooms: list[scenes.View]) -> None:
    """Nowhere by more than half a step; normals gain, edges stay, depth stored finely does, too."""
    camera, rng = scenes.camera(SIZE), np.random.default_rng(0)
    for seen in rooms:
        noise = 0.003 * seen.depth**2 * cv2.GaussianBlur(rng.normal(size=SIZE), (0, 0), 2)
        coarse = (np.rint((seen.depth + noise) / STEP) * STEP).astype(np.float32)
        coarse[20:40, 30:50] = 0
        smooth = without_steps(coarse)
        assert np.abs(smooth - coarse).max() <= STEP / 2 + 1e-5
        assert not smooth[20:40, 30:50].any()
        true = plane_normals(seen.planes)
        before, after = (degrees(surface_normals(depth, camera), true) for depth in (coarse, smooth))
        assert np.median(after) < 0.85 * np.median(before)
        assert (after < 11.25).mean() > (before < 11.25).mean()
        np.testing.assert_allclose(without_steps(seen.depth), seen.depth, rtol=1e-4)
    flat = np.full((20, 30), 2, np.float32)
    assert without_steps(flat) is flat
    card = np.where(np.arange(30) < 15, 2, 3).astype(np.float32) * np.ones((20, 1), np.float32)
    assert np.abs(without_steps(card) - card).max() <= 0.05 + 1e-6


def test_mirrored_domains_are_those_of_the_mirrored_scene(rooms: list[scenes.View]) -> None:
    seen, camera = rooms[0], scenes.camera(SIZE)
    reversed_planes = (seen.planes[:, :, ::-1] * np.float32([-1, 1, 1])[:, None, None]).astype(np.float32)
    mirror = camera._replace(cx=SIZE[1] - 1 - camera.cx)
    made = derive(seen.rgb, seen.depth, seen.planes, camera)
    other = derive(seen.rgb[:, ::-1].copy(), seen.depth[:, ::-1], reversed_planes, mirror)
    for name in DERIVED:
        domain = DOMAINS[name]
        images = [domain.encode(files[name].reshape(*SIZE, -1)) for files in (made, other)]
        np.testing.assert_allclose(domain.mirrored(images[0]), images[1], atol=0.011, err_msg=name)


def read(root: Path, domain: str, point: int) -> np.ndarray:
    return read_stored(root / domain / f"point_{point}_view_0_domain_{domain}.png")


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_rgbd_to_domains(tmp_path: Path) -> None:
    """Copied files read back; the rest is what ``derive`` makes of it."""
    tree = trees.nyu_cen(tmp_path / "rgbd")
    out = prepare_domains(tmp_path / "domains", tree.root, processes=1)
    every = [*tree.scenes["train"], *tree.scenes["val"]]
    camera = KINECT.scaled(*trees.SIZE)
    ray = np.sqrt(1 + camera.directions(*trees.SIZE)[0] ** 2 + camera.directions(*trees.SIZE)[1] ** 2)
    for point, scene in enumerate(every):
        np.testing.assert_array_equal(read(out, "rgb", point), scene.rgb)
        known = scene.depth > 0
        for domain, metres in (("depth_zbuffer", scene.depth), ("depth_euclidean", scene.depth * ray)):
            stored = read(out, domain, point)
            assert (stored[~known] == 65535).all()
            np.testing.assert_allclose(stored[known] / 512, metres[known], atol=0.5 / 512 + 1e-5)
        planes = surface_planes(without_steps(scene.depth.astype(np.float32)), camera)
        files = derive(scene.rgb, scene.depth.astype(np.float32), planes, camera)
        for domain in ("normal", "reshading", "edge_occlusion", "edge_texture"):
            difference = read(out, domain, point).astype(int) - files[domain]
            assert np.abs(difference).max() <= 1, domain
    for split, count in trees.COUNTS.items():
        dataset = TranslationSet(out, split, domains=DERIVED[1:])
        assert len(dataset) == count
        first = 0 if split == "train" else trees.COUNTS["train"]
        sample = dataset[count - 1]
        assert sample.name == f"point_{first + count - 1}_view_0"
        np.testing.assert_allclose(sample.target, every[first + count - 1].rgb / 127.5 - 1, atol=1e-6)
    assert (out / "sources.txt").read_text().splitlines()[3] == "point_3_view_0\trgb/000004.png"


def test_resumed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = trees.nyu_cen(tmp_path / "rgbd")
    whole = contents(prepare_domains(tmp_path / "one", tree.root, processes=1))
    out = prepare_domains(tmp_path / "two", tree.root, processes=2)
    assert contents(out) == whole
    lost = out / "normal/point_1_view_0_domain_normal.png"
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*_2_view_*.png")}
    capsys.readouterr()
    assert contents(prepare_domains(out, tree.root)) == whole
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*_2_view_*.png")} == kept
    assert "already there" not in capsys.readouterr().out
    prepare_domains(out, tree.root)
    assert "already there, complete; kept" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"two: made from something else"):
        prepare_domains(out, tree.root, depth_scale=1000)


@pytest.mark.parametrize("name", ["sun_original", "cityscapes", "nyu_esanet"])
def test_other_layouts(tmp_path: Path, name: str) -> None:
    """Cameras of every picture's own, depth of disparity, folders of splits."""
    tree = trees.TREES[name](tmp_path / "rgbd")
    out = prepare_domains(tmp_path / "domains", tree.root, processes=1)
    dataset = TranslationSet(out, "val", domains=("depth_zbuffer", "normal"))
    reference = SegmentationSet(
        tree.root, "val", modalities=("depth", "normals"), num_classes=tree.num_classes
    )
    assert len(dataset) == len(reference) == trees.COUNTS["val"]
    metres, normals = reference[1].images
    known = metres[:, :, 0] > 0
    stored = read(out, "depth_zbuffer", trees.COUNTS["train"] + 1)
    np.testing.assert_allclose(stored[known] / 512, metres[known, 0], atol=0.5 / 512 + 1e-5)
    off = degrees(dataset[1].images[1] * (1, 1, -1), normals)[known]
    assert np.median(off) < 2  # but for the stored millimetres, smoothed for the one and not for the other


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("nyu_lwrf", {}, ValueError, "unknown modality 'depth': expected rgb of the layout nyu_lwrf"),
        ("nyu_dformer", {}, DataError, "gives no scale of depth; give depth_scale"),
        ("sun_handa", {}, DataError, "does not tell the camera; give camera=fx,fy,cx,cy"),
        ("nyu_cen", {"camera": (1.0,)}, ValueError, "camera must be fx,fy,cx,cy in pixels, got 1.0"),
        ("nyu_cen", {"layout": "nyu"}, ValueError, "unknown layout 'nyu'"),
    ],
)
def test_what_cannot_be_derived_from(
    tmp_path: Path, name: str, options: dict, error: type, message: str
) -> None:
    tree = trees.TREES[name](tmp_path / "rgbd")
    with pytest.raises(error, match=message):
        prepare_domains(tmp_path / "domains", tree.root, **options)
    assert not (tmp_path / "domains").exists()


def test_a_layout_without_colours(tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text('{"files": {"depth": "d/{name}.png", "labels": "l/{name}.png"}}')
    with pytest.raises(DataError, match="has no files of rgb"):
        prepare_domains(tmp_path / "out", tmp_path)


def test_broken_source(tmp_path: Path) -> None:
    """Named, also from another process; what was made stays, and the rest follows once it is mended."""
    tree = trees.nyu_cen(tmp_path / "rgbd")
    path = tree.root / "depth/000004.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"depth/000004\.png: broken or truncated"):
        prepare_domains(tmp_path / "domains", tree.root, processes=2)
    trees.write(path, np.zeros((10, 10), np.uint16))
    with pytest.raises(DataError, match=r"rgb/000004\.png is 64x48, but its depth is 10x10"):
        prepare_domains(tmp_path / "domains", tree.root, processes=1)
    path.write_bytes(whole)
    assert len(TranslationSet(prepare_domains(tmp_path / "domains", tree.root), "val")) == 2


def test_measured_rooms_tell_their_camera(tmp_path: Path) -> None:
    """Not NYUDv2's, which is that of pictures of 4:3."""
    rooms = prepare_synthetic(tmp_path / "rooms", train=1, val=1, size=(48, 48))
    out = prepare_domains(tmp_path / "out", rooms, processes=1)
    record = json.loads((out / "prepared.json").read_text())
    assert record["camera"][:4] == list(scenes.camera((48, 48))[:4])


def test_rooms_to_domains(tmp_path: Path) -> None:
    options = {"train": 3, "val": 2, "size": (32, 40), "seed": 7}
    out = prepare_synthetic_domains(tmp_path / "one", **options, processes=1)
    assert contents(out) == contents(prepare_synthetic_domains(tmp_path / "two", **options, processes=2))
    assert [len(TranslationSet(out, split)) for split in ("train", "val")] == [3, 2]
    seen = scenes.view((32, 40), np.random.default_rng((7, 1, 0)))
    files = derive(seen.rgb, seen.depth, seen.planes, scenes.camera((32, 40)))
    for domain, image in files.items():
        np.testing.assert_array_equal(read(out, domain, 3), image)
    rgb, *_ = scenes.render((32, 40), np.random.default_rng((7, 1, 0)))
    np.testing.assert_array_equal(rgb, seen.rgb)  # the rooms that segmentation trains on
    with pytest.raises(ValueError, match="train must be at least 1, got 0"):
        prepare_synthetic_domains(tmp_path / "three", **{**options, "train": 0})


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = trees.sun_handa(tmp_path / "rgbd")
    command = ["prepare", "domains", str(tmp_path / "out"), "--source", str(tree.root)]
    assert main(command) == 2
    assert "give camera=fx,fy,cx,cy" in capsys.readouterr().err
    assert main([*command, "--camera", "60,60,31.5,23.5"]) == 0
    assert f"data.root={tmp_path / 'out'}" in capsys.readouterr().out
    assert len(TranslationSet(tmp_path / "out", "train")) == trees.COUNTS["train"]
    rooms = ["prepare", "synthetic", str(tmp_path / "rooms"), "--domains", "--train", "2", "--val", "1"]
    assert main([*rooms, "--height", "24", "--width", "32"]) == 0
    assert TranslationSet(tmp_path / "rooms", "val")[0].target.shape == (24, 32, 3)


def test_real_rooms(shared: Path) -> None:
    """Of what people labelled in coarse depth: floors face up, ceilings down, walls neither."""
    folder = shared / "data/nyudv2_384"
    if not folder.is_dir():
        pytest.skip("needs the real images nyudv2_384 beside the checkout")
    dataset = SegmentationSet(folder, "train", modalities=("depth",), depth_scale=6528)
    camera = KINECT.scaled(288, 384)
    green: dict[str, list[float]] = {"floor": [], "wall": [], "ceiling": []}
    for index in range(0, len(dataset), 25):
        (depth,), target, *_ = dataset[index]
        planes = surface_planes(without_steps(depth[:, :, 0]), camera)
        colours = normal_colors(planes)[:, :, 1]
        for name, found in green.items():
            pixels = target == NYU40.index(name)
            if pixels.mean() > 0.02:
                found.append(float(np.median(colours[pixels])))
        edges = occlusion_edges(planes, camera)
        assert 0.001 < (edges > 500).mean() < 0.1
    assert np.median(green["floor"]) < 15
    assert abs(np.median(green["wall"]) - 128) < 25
    assert np.median(green["ceiling"]) > 200
