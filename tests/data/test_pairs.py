"""Pairs of any modalities for translation: encodings and inverses, Taskonomy's files, views, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from models.data import (
    DataError,
    Jitter,
    LayoutDomain,
    SegmentationSet,
    Square,
    TranslationSet,
    collate_translation,
    prepare_synthetic_domains,
)
from models.data.modalities import File
from models.data.pairs import recorded_reader
from models.data.survey import Values
from tests.helpers.trees import write

SIZE = (24, 32)
RNG = np.random.default_rng(5)
THERMAL = {"kind": "intensity", "range": [27000, 31000], "missing": [0]}


def describe(root: Path, **fields: Any) -> Path:
    (root / "layout.json").write_text(json.dumps(fields))
    return root


def own(root: Path, stored: np.ndarray, told: dict[str, Any] | None = None, **fields: Any) -> Path:
    """Three pairs of ``visible`` and ``other``, the latter ``stored``; the third is for validation."""
    suffix = fields.pop("suffix", ".png")
    for name in ("a", "b", "c"):
        write(root / "visible" / f"{name}.png", RNG.integers(0, 256, (*SIZE, 3), np.uint8))
        write_any(root / "other" / f"{name}{suffix}", stored)
    (root / "train.txt").write_text("a\nb\n")
    (root / "val.txt").write_text("c\n")
    files = {"visible": "visible/{name}.png", "other": "other/{name}.*"}
    modalities = {"visible": {"kind": "color"}, "other": told or {}}
    return describe(root, **{"files": files, "modalities": modalities, **fields})


def write_any(path: Path, stored: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, stored)
    else:
        write(path, stored)


def opened(root: Path, split: str = "train", **options: Any) -> TranslationSet:
    return TranslationSet(root, split, **{"domains": ("visible",), "target": "other", **options})


def values(low: int, high: int, kind: type = np.uint16) -> np.ndarray:
    return RNG.integers(low, high, SIZE, kind, endpoint=True)


def holed(stored: np.ndarray, *missing: float) -> np.ndarray:
    """Some of the values missing."""
    stored = stored.copy()
    for row, value in enumerate(missing):
        stored[3 * row, ::2] = value
    return stored


def log_depth(meters: np.ndarray) -> np.ndarray:
    return 2 * np.log1p(512 * meters.astype(np.float64)) / 11.1 - 1


# ---- encodings and their inverse


INTENSITY = values(27000, 31000)
CELSIUS = RNG.uniform(-20, 60, SIZE).astype(np.float32)
MILLIMETERS = values(400, 9000)
COLORS = RNG.integers(1, 256, (*SIZE, 3), np.uint8)
METERS = RNG.uniform(0.5, 40, SIZE).astype(np.float32)
KINDS: dict[str, tuple[np.ndarray, dict[str, Any], dict[str, Any], np.ndarray, str]] = {
    # by case: stored, entry in layout.json, further fields, encoded in float64, suffix
    "thermal": (INTENSITY, THERMAL, {}, (INTENSITY - 27000.0) / 2000 - 1, ".png"),
    "white is cold": (
        INTENSITY,
        {"kind": "intensity", "range": [31000, 27000]},
        {},
        (31000.0 - INTENSITY) / 2000 - 1,
        ".png",
    ),
    "celsius": (CELSIUS, {"kind": "intensity", "range": [-20, 60]}, {}, (CELSIUS + 20.0) / 40 - 1, ".tiff"),
    "array": (CELSIUS, {"kind": "intensity", "range": [-20, 60]}, {}, (CELSIUS + 20.0) / 40 - 1, ".npy"),
    "signed": (
        (INTENSITY - 29000).astype(np.int16),
        {"kind": "intensity", "range": [-2000, 2000]},
        {},
        (INTENSITY - 29000.0) / 2000,
        ".npy",
    ),
    "SAR": (COLORS[..., 0], {"kind": "intensity"}, {}, COLORS[..., 0] / 127.5 - 1, ".png"),
    "16 bits": (INTENSITY, {"kind": "intensity"}, {}, INTENSITY / 32767.5 - 1, ".png"),
    "color": (COLORS, {"kind": "color"}, {}, COLORS / 127.5 - 1, ".png"),
    "normals": (COLORS, {"kind": "normals"}, {}, COLORS / 127.5 - 1, ".png"),
    "depth": (MILLIMETERS, {"kind": "depth"}, {"depth_scale": 1000}, log_depth(MILLIMETERS / 1000), ".png"),
    "rotated depth": (
        MILLIMETERS << 3 | MILLIMETERS >> 13,
        {"kind": "depth"},
        {"depth_scale": 1000, "bit_shift": 3},
        log_depth(MILLIMETERS / 1000),
        ".png",
    ),
    "floating depth": (METERS, {"kind": "depth"}, {}, log_depth(METERS), ".tiff"),
    "brightness": (
        COLORS[..., 1],
        {"kind": "depth"},
        {"depth_scale": None},
        COLORS[..., 1] / 127.5 - 1,
        ".png",
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_stored_values_come_back(tmp_path: Path, case: str) -> None:
    stored, told, fields, expected, suffix = KINDS[case]
    dataset = opened(own(tmp_path, stored, told, suffix=suffix, **fields))
    image, domain = dataset[0].target, dataset.domains[-1]
    assert isinstance(domain, LayoutDomain)
    assert (image.dtype, image.shape) == (np.float32, (*SIZE, domain.channels))
    assert domain.channels == (3 if stored.ndim == 3 else 1)
    np.testing.assert_allclose(image.reshape(stored.shape), expected, atol=3e-7, rtol=1e-6)
    back = domain.stored(torch.from_numpy(image).permute(2, 0, 1))
    assert (back.dtype, back.shape, domain.suffix) == (stored.dtype, stored.shape, suffix)
    if stored.dtype.kind == "f":
        np.testing.assert_allclose(back, stored, rtol=2e-6, atol=1e-5)
    else:
        np.testing.assert_array_equal(back, stored)


def test_what_no_file_of_the_kind_could_hold_becomes_the_nearest(tmp_path: Path) -> None:
    """Outputs lie anywhere from -1 to 1: those are a depth's extremes but the value for missing."""
    depth = opened(own(tmp_path / "depth", MILLIMETERS, {"kind": "depth"}, depth_scale=1000)).domains[-1]
    ends = torch.tensor([-1.0, 1.0]).view(1, 1, 2)
    np.testing.assert_array_equal(depth.stored(ends), [[0, 65534]])
    thermal = opened(own(tmp_path / "thermal", INTENSITY, THERMAL)).domains[-1]
    np.testing.assert_array_equal(thermal.stored(1.5 * ends), [[27000, 31000]])
    assert thermal.value_range == (27000, 31000)


def test_one_channel_of_a_file(tmp_path: Path) -> None:
    """RGB and thermal in one PNG: a domain and a target of the same file."""
    both = np.dstack([COLORS, COLORS[..., :1] // 2])
    told = {
        "visible": {"kind": "color", "channels": [0, 1, 2]},
        "other": {"kind": "intensity", "channels": [3]},
    }
    files = {"visible": "both/{name}.png", "other": "both/{name}.png"}
    for name in ("a", "c"):
        (tmp_path / "both").mkdir(exist_ok=True)
        assert cv2.imwrite(str(tmp_path / "both" / f"{name}.png"), both[:, :, [2, 1, 0, 3]])
    (tmp_path / "train.txt").write_text("a\n")
    dataset = opened(describe(tmp_path, files=files, modalities=told))
    np.testing.assert_allclose(dataset[0].images[0], COLORS / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(dataset[0].target[:, :, 0], both[..., 3] / 127.5 - 1, atol=1e-6)
    image = torch.from_numpy(dataset[0].target).permute(2, 0, 1)
    np.testing.assert_array_equal(dataset.domains[-1].stored(image), both[..., 3])


# ---- missing values


@pytest.mark.parametrize(
    ("stored", "told", "fields", "hole"),
    [
        (holed(INTENSITY, 0, 65535), THERMAL, {}, -1.0),
        (holed(CELSIUS, np.nan, np.inf), {"kind": "intensity", "range": [-20, 60], "missing": "nan"}, {}, -1),
        (holed(MILLIMETERS, 0, 65535), {"kind": "depth"}, {"depth_scale": 1000}, -1.0),
        (holed(COLORS, 0), {"kind": "normals"}, {}, 0.0),
        (holed(COLORS, 255), {"kind": "color", "missing": 255}, {}, 0.0),
    ],
)
def test_missing_pixels_are_told_from_measured_ones(
    tmp_path: Path, stored: np.ndarray, told: dict[str, Any], fields: dict[str, Any], hole: float
) -> None:
    suffix = ".tiff" if stored.dtype == np.float32 else ".png"
    dataset = opened(own(tmp_path, stored, told, suffix=suffix, **fields))
    domain, image = dataset.domains[-1], dataset[0].target
    gone = np.zeros(SIZE, bool)
    gone[0, ::2] = True
    gone[3, ::2] = stored.ndim == 2
    assert domain.hole == hole
    np.testing.assert_array_equal((image == hole).all(axis=-1), gone)
    # Enlarged or shrunk, none is averaged with others: nothing comes between the lowest value and the hole.
    lowest = image[~gone].min(axis=0)
    for size in ((48, 64), (12, 16)):
        found = domain.resized(image, size)
        known = (found != hole).any(axis=-1)
        assert known.any()
        assert (found[known] >= lowest - 1e-6).all()


def test_colder_than_the_range_is_not_missing(tmp_path: Path) -> None:
    stored = INTENSITY.copy()
    stored[0, 0], stored[0, 1], stored[0, 2] = 26000, 31999, 0
    image = opened(own(tmp_path, stored, THERMAL))[0].target[0, :3, 0]
    assert -1 < image[0] < -0.9999999
    np.testing.assert_array_equal(image[1:], [1, -1])


# ---- Taskonomy's own files


NAMES = ("rgb", "depth_zbuffer", "edge_texture", "normal", "reshading")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Generated domains in Taskonomy's layout, and the same files described by a layout.json."""
    folder = tmp_path_factory.mktemp("both")
    views = prepare_synthetic_domains(folder / "views", train=3, val=1, size=(40, 48), seed=1, processes=1)
    shutil.copytree(views, folder / "own")
    told = {
        "rgb": {"kind": "color"},
        "reshading": {"kind": "intensity"},
        "normal": {"kind": "normals"},
        "depth_zbuffer": {"kind": "depth"},
        "edge_texture": {"kind": "intensity", "range": [0, 11355]},
    }
    files = {name: f"{name}/{{name}}_domain_{name}.png" for name in NAMES}
    for split in ("train", "val"):
        lines = (views / f"{split}.txt").read_text().split()
        names = [Path(line).name.partition("_domain_")[0] for line in lines]
        (folder / "own" / f"own_{split}.txt").write_text("\n".join(names))
    describe(folder / "own", files=files, modalities=told, lists="own_{split}.txt", depth_scale=512)
    return views, folder / "own"


@pytest.mark.parametrize("target", NAMES)
def test_taskonomy_through_a_layout_is_taskonomy(both: tuple[Path, Path], target: str) -> None:
    domains = tuple(name for name in NAMES if name != target)
    theirs, ours = (TranslationSet(root, "train", domains=domains, target=target) for root in both)
    assert len(theirs) == len(ours) == 3
    for index in range(3):
        samples = [dataset[index] for dataset in (theirs, ours)]
        assert samples[0].name == samples[1].name
        same(*samples)
        # Transforms draw and resize alike; but normals are never averaged as a layout's.
        for transform in (Jitter(36, 32), Square(32)):
            jittered = [transform(sample, np.random.default_rng(index)) for sample in samples]
            same(*jittered, but=("normal",))
        batches = [collate_translation([sample]) for sample in samples]
        assert batches[1].target.shape[1] == (3 if target in ("rgb", "normal") else 1)
        assert batches[0].images.shape == batches[1].images.shape


def same(theirs: Any, ours: Any, but: tuple[str, ...] = ()) -> None:
    sources = zip((*theirs.images, theirs.target), (*ours.images, ours.target), theirs.domains, strict=True)
    for a, b, domain in sources:
        if domain.name not in but:
            np.testing.assert_allclose(b, a, atol=1e-6)


# ---- views


def test_whole_folders_without_labels(tmp_path: Path) -> None:
    for split, names in (("train", ("x/1", "x/2", "y/1")), ("test", ("x/3",))):
        for name in names:
            write(tmp_path / split / "sar" / f"{name}.png", COLORS[..., 0])
            write(tmp_path / split / "optical" / f"{name}.png", COLORS)
    (tmp_path / "train/sar/.hidden.png").touch()
    files = {"sar": "{split}/sar/{name}.png", "optical": "{split}/optical/{name}.*"}
    describe(tmp_path, files=files, lists="", splits=["train", "test"])
    names = {"domains": ("sar",), "target": "optical"}
    train, val = (TranslationSet(tmp_path, split, **names) for split in ("train", "val"))
    assert [train[index].name for index in range(3)] == ["x/1", "x/2", "y/1"]
    assert [val[index].name for index in range(len(val))] == ["x/3"]
    assert train.guessed_kinds == ("sar", "optical")
    assert [domain.spec().unit for domain in train.domains] == [
        "one channel from 0 to the largest",
        "full brightness",
    ]
    with pytest.raises(DataError, match="files must give the paths of labels and of every modality"):
        SegmentationSet(tmp_path, "train", modalities=("sar",))


def test_own_lists_and_computed_domains(tmp_path: Path) -> None:
    """Normals of depth need no files, but a camera."""
    files = {"visible": "visible/{name}.png", "depth": "other/{name}.png"}
    root = own(tmp_path, MILLIMETERS, files=files, modalities={}, depth_scale=1000, camera=[30, 30, 16, 12])
    (root / "mine.txt").write_text("c\nb\n")
    dataset = opened(root, domains=("normals", "depth"), target="visible", lists=("mine.txt", "val.txt"))
    assert [dataset[index].name for index in range(2)] == ["c", "b"]
    assert set(dataset.files(0)) == {"depth", "visible"}
    normals = dataset[0].images[0]
    known = (normals != 0).any(axis=-1)
    np.testing.assert_allclose(np.linalg.norm(normals[known], axis=-1), 1, atol=1e-5)


def test_a_reader_is_made_again_of_what_went_with_the_weights(tmp_path: Path) -> None:
    root = own(tmp_path / "a", holed(INTENSITY, 0), THERMAL)
    dataset = opened(root)
    record = json.loads(json.dumps(dataset.reader.record()))
    again = recorded_reader(record, ("visible", "other"))
    assert again.domains == dataset.domains
    for one, other in zip(again.read(dataset.files(0)), dataset.reader.read(dataset.files(0)), strict=True):
        np.testing.assert_array_equal(one, other)
    # A folder's layout.json says how its own files are stored; a kind that only files told is the training's.
    other = own(tmp_path / "b", INTENSITY, {"range": [0, 65535]})
    assert recorded_reader(record, ("other",), other).domains[0].spec().unit == "one channel from 0 to 65535"
    assert recorded_reader(record, ("other",), tmp_path).domains == dataset.domains[1:]


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "infrared"}, "unknown modality 'infrared': expected visible, other, segments, labels_of"),
        ({"target": "othr"}, "did you mean 'other'"),
        (
            {"domains": ("labels",)},
            "'labels' is no modality; for label maps as input, give them another name",
        ),
        ({"domains": ("camera",)}, "'camera' is no modality"),
        ({"target": "segments"}, "the target 'segments' is of the kind categorical"),
        ({"target": "disparity"}, "'disparity' is disparity, whose values have no upper end"),
        ({"domains": ("points",)}, "'points' is points, whose values have no upper end: give depth instead"),
        ({"target": "normals"}, "the target 'normals' is computed from depth: make files of it"),
        ({"target": "visible"}, "domains and target must differ"),
        ({"lists": ("one.txt",)}, "lists must be two paths"),
    ],
)
def test_what_cannot_be_a_domain_or_target(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    root = own(tmp_path, MILLIMETERS, {"kind": "depth"}, depth_scale=1000)
    told = json.loads((root / "layout.json").read_text())
    told["files"] |= {
        name: f"{name}/{{name}}.png" for name in ("segments", "labels_of_others", "labels", "camera", "depth")
    }
    told["modalities"] |= {"segments": {"kind": "categorical"}}
    (root / "layout.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=message):
        opened(root, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "other/b.png").unlink(), r"other/b\.\*: listed in train.txt, but there is no"),
        (lambda root: (root / "train.txt").unlink(), "train.txt: no such list"),
        (lambda root: write(root / "other/a.png", COLORS[:20, :, 0]), r"other/a\.png is 32x20, but .*32x24"),
        (lambda root: (root / "other/a.png").write_bytes(b"none"), r"other/a\.png: broken or truncated"),
        (
            lambda root: write(root / "other/a.png", COLORS),
            r"other/a\.png: expected gray, as its kind is int",
        ),
        (lambda root: describe(root, files={"labels": "a/{name}.png"}), "must give the paths of every modal"),
        (lambda root: describe(root, files={"a": "a/{nam}.png"}), r"'a/\{nam\}.png' \('nam' is unknown\)"),
    ],
)
def test_files_that_are_wrong_are_named(tmp_path: Path, change: Any, message: str) -> None:
    root = own(tmp_path, COLORS[..., 0], {"kind": "intensity"})
    change(root)
    with pytest.raises(DataError, match=message):
        opened(root)[0]


def test_the_range_of_signed_and_floating_targets_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"give its range in layout\.json"):
        opened(own(tmp_path, CELSIUS, {"kind": "intensity"}, suffix=".tiff"))[0]


def test_a_survey_counts_what_is_finite() -> None:
    values = Values()
    values.add(File(holed(CELSIUS, np.nan, np.inf), np.zeros((*SIZE, 1), np.float32)), False, False)
    assert (values.low, values.high) == (holed(CELSIUS, 0, 0).min(), holed(CELSIUS, 0, 0).max())
    assert values.pixels - values.known == SIZE[1]
