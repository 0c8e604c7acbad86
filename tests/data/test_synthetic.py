"""The procedural rooms: geometry by hand, what each modality can and cannot tell, the files on disk."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.data import SYNTHETIC_CLASSES, DataError, SegmentationSet, prepare_synthetic, scenes, synthetic
from models.data.scenes import Patch, Room, Sphere, Texture, X, Y

PLAIN = Texture(np.ones((1, 1, 3), np.float32), (1.0, 1.0))
ORIGIN = np.array([1.0, 1.0, 0.0], np.float32)


def rays(*directions: tuple[float, float, float]) -> np.ndarray:
    return np.array(directions, np.float32)


def test_patch() -> None:
    wall = Patch(0, PLAIN, np.float32([1, 1, 4]), X, Y, (2.0, 1.0), holes=((0.0, 0.5, 0.25, 0.25),))
    hit = wall.meet(
        ORIGIN, rays((0, 0, 1), (0.4, -0.2, 1), (0.6, 0, 1), (0, 0.125, 1), (1, 0, 0), (0, 0, -1))
    )
    np.testing.assert_allclose(hit.t, [4, 4, np.inf, np.inf, np.inf, np.inf])  # the third past, then the hole
    np.testing.assert_allclose(hit.u[:2], [0, 1.6], atol=1e-6)
    np.testing.assert_allclose(hit.v[:2], [0, -0.8], atol=1e-6)


def test_sphere() -> None:
    ball = Sphere(0, PLAIN, np.float32([1, 1, 5]), X, Y, 0.5, hollow=False)
    directions = rays((0, 0, 1), (0, 0, 2), (0.2, 0, 1), (0, 0, -1))
    np.testing.assert_allclose(ball.meet(ORIGIN, directions).t, [4.5, 2.25, np.inf, np.inf])
    np.testing.assert_allclose(
        replace(ball, hollow=True).meet(ORIGIN, directions).t, [5.5, 2.75, np.inf, np.inf]
    )
    hit = ball.meet(ORIGIN, rays((0.05, -0.08, 1)))
    np.testing.assert_allclose([hit.u[0], hit.v[0]], [0.05 * hit.t[0], -0.08 * hit.t[0]], rtol=1e-5)
    point = hit.t[0] * np.array([0.05, -0.08, 1]) - [0, 0, 5]
    np.testing.assert_allclose(np.linalg.norm(point), 0.5, rtol=1e-5)


def test_texture_repeats_about_its_middle() -> None:
    colours = np.arange(6, dtype=np.float32).reshape(2, 1, 3)
    texture = Texture(colours, (0.5, 0.25))
    v = np.float32([0.1, -0.1, 0.3, 0.6])
    found = texture(np.zeros_like(v), v)
    np.testing.assert_array_equal(found, colours[[1, 0, 0, 1], 0])
    np.testing.assert_allclose(
        texture._replace(glow=0.5)(np.float32([0.6]), np.float32([0.8])), colours[0] / 2
    )


@pytest.fixture(scope="module")
def seen() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For 25 rooms: label and depth of each ray, and its depth in the bare room."""
    directions = scenes._rays((48, 64))
    result = []
    for seed in range(25):
        room = scenes.random_room(np.random.default_rng(seed))
        bare = [replace(surface, holes=()) for surface in room.surfaces if surface.label in (0, 1, 2)]
        depth, owner, *_ = scenes.cast(room, directions @ room.axes)
        labels = np.array([surface.label for surface in room.surfaces])[owner]
        result.append(
            (labels, depth, scenes.cast(Room(bare, room.origin, room.axes), directions @ room.axes)[0])
        )
    return result


def relief(seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]], name: str) -> np.ndarray:
    """By how much a class's pixels are farther than the bare room, in metres."""
    label = SYNTHETIC_CLASSES.index(name)
    relief = np.concatenate([(depth - bare)[labels == label] for labels, depth, bare in seen])
    assert relief.size > 200
    return relief


@pytest.mark.parametrize("name", ["floor", "wall", "ceiling", "rug", "poster"])
def test_classes_that_depth_cannot_tell(seen: list, name: str) -> None:
    """Rug and poster stand out by less than the sensor's steps: 7 mm at 1.6 m."""
    assert np.abs(relief(seen, name)).max() < 2e-3


def test_niches_recede_and_all_else_protrudes(seen: list) -> None:
    assert np.median(relief(seen, "niche")) > 0.1
    for name in ("panel", "crate", "chest", "ball", "bowl"):
        assert relief(seen, name).max() <= 1e-5, name
        assert np.median(relief(seen, name)) < -0.1, name


@pytest.mark.parametrize(("one", "other"), [("niche", "panel"), ("ball", "bowl")])
def test_classes_that_rgb_cannot_tell(one: str, other: str) -> None:
    """Mean colours of a class's pixels differ by less than between two samples of one class."""
    means: dict[str, list[np.ndarray]] = {one: [], other: []}
    for seed in range(80):
        rgb, _, labels = scenes.render((24, 32), np.random.default_rng(seed))
        for name, found in means.items():
            mask = labels == SYNTHETIC_CLASSES.index(name)
            if mask.sum() >= 8:
                found.append(rgb[mask].mean(0))
    a, b = (np.array(means[name]) for name in (one, other))
    assert min(len(a), len(b)) >= 30
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error).all()


def test_depth_is_that_of_a_pinhole_camera() -> None:
    """Points of the floor, put back into space, lie in one plane as far as the sensor's noise lets."""
    _, depth, labels = scenes.render((96, 128), np.random.default_rng(1))
    focal = 64 / np.tan(np.radians(32.5))
    rows, columns = np.nonzero((labels == 0) & (depth > 0))
    assert len(rows) > 500
    z = depth[rows, columns] / scenes.DEPTH_SCALE
    points = np.stack([(columns + 0.25 - 64) / focal * z, (rows + 0.25 - 48) / focal * z, z], -1)
    offsets = points - points.mean(0)
    normal = np.linalg.svd(offsets, full_matrices=False)[2][2]
    assert np.sqrt(np.mean((offsets @ normal) ** 2)) < 0.02
    assert abs(normal[1]) > 0.9  # the camera looks a little down


def test_render() -> None:
    rgb, depth, labels = scenes.render((48, 64), np.random.default_rng(0))
    assert (rgb.shape, rgb.dtype) == ((48, 64, 3), np.uint8)
    assert (depth.shape, depth.dtype) == ((48, 64), np.uint16)
    assert (labels.shape, labels.dtype) == ((48, 64), np.uint8)
    assert 0 < np.mean(depth == 0) < 0.2
    assert depth.max() < 10 * scenes.DEPTH_SCALE
    again = scenes.render((48, 64), np.random.default_rng(0))
    other = scenes.render((48, 64), np.random.default_rng(1))
    for a, b, c in zip((rgb, depth, labels), again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


SMALL = {"train": 5, "val": 3, "size": (24, 32)}


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_data_set(tmp_path: Path) -> None:
    root = prepare_synthetic(tmp_path / "new/rooms", **SMALL, seed=3)
    for split, count in (("train", 5), ("val", 3)):
        dataset = SegmentationSet(root, split, num_classes=len(SYNTHETIC_CLASSES))
        assert len(dataset) == count
        assert dataset.class_names == SYNTHETIC_CLASSES
    rgb, depth, labels = scenes.render((24, 32), np.random.default_rng((3, 1, 2)))
    sample = dataset[2]
    np.testing.assert_array_equal(sample.target, labels)
    np.testing.assert_allclose(sample.images[1][:, :, 0], depth / 5000, rtol=1e-6)
    red = sample.images[0][:, :, 0] * 0.229 + 0.485
    np.testing.assert_allclose(red * 255, rgb[:, :, 0], atol=1e-4)
    assert json.loads((root / "synthetic.json").read_text())["seed"] == 3
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rooms"]


def test_same_files_from_any_number_of_processes(tmp_path: Path) -> None:
    one = prepare_synthetic(tmp_path / "one", **SMALL, processes=1)
    two = prepare_synthetic(tmp_path / "two", **SMALL, processes=3)
    other = prepare_synthetic(tmp_path / "other", **SMALL, seed=1)
    assert contents(one) == contents(two)
    assert contents(one)["rgb/000001.png"] != contents(other)["rgb/000001.png"]


def test_splits_are_independent(tmp_path: Path) -> None:
    long = contents(prepare_synthetic(tmp_path / "long", **SMALL))
    short = contents(prepare_synthetic(tmp_path / "short", train=2, val=3, size=SMALL["size"]))
    assert short["rgb/000002.png"] == long["rgb/000002.png"]
    assert short["depth/000003.png"] == long["depth/000006.png"]
    assert len({long[name] for name in long if name.startswith("rgb/")}) == 8


def test_finished_set_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = prepare_synthetic(tmp_path / "rooms", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    capsys.readouterr()
    assert prepare_synthetic(root, **SMALL) == root
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_an_older_set_is_told_its_camera(tmp_path: Path) -> None:
    root = prepare_synthetic(tmp_path / "rooms", **SMALL)
    whole = contents(root)
    assert (
        SegmentationSet(root, "val", num_classes=11).layout.camera
        == scenes.camera((24, 32))[:4] + (None,) * 2
    )
    (root / "layout.json").unlink()
    assert contents(prepare_synthetic(root, **SMALL)) == whole


def test_anything_else_is_left_alone(tmp_path: Path) -> None:
    root = prepare_synthetic(tmp_path / "rooms", **SMALL)
    with pytest.raises(
        DataError, match=r"rooms: holds a data set of other parameters: .*'seed': 0.*'seed': 1"
    ):
        prepare_synthetic(root, **SMALL, seed=1)
    (root / "depth/000004.png").rename(root / "depth/mine.png")
    with pytest.raises(DataError, match=r"depth/000004\.png: missing or not of this data set, like 1 other"):
        prepare_synthetic(root, **SMALL)
    (root / "synthetic.json").write_text("{")
    with pytest.raises(DataError, match=r"synthetic\.json: broken"):
        prepare_synthetic(root, **SMALL)
    (root / "synthetic.json").unlink()
    with pytest.raises(DataError, match=r"rooms: not empty, and no synthetic data set"):
        prepare_synthetic(root, **SMALL)
    assert (root / "depth/mine.png").is_file()


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "rooms").mkdir()
    assert "synthetic.json" in contents(prepare_synthetic(tmp_path / "rooms", **SMALL))


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "_render_all", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare_synthetic(tmp_path / "rooms", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"file: no folder can be made there \("):
        prepare_synthetic(tmp_path / "file" / "rooms", **SMALL)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train must be at least 1, got 0"),
        ({"val": 0}, "val must be at least 1, got 0"),
        ({"size": (8, 32)}, "height must be at least 16, got 8"),
        ({"size": (32, 8)}, "width must be at least 16, got 8"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_synthetic(tmp_path / "rooms", **{**SMALL, **options})
    assert list(tmp_path.iterdir()) == []
