"""The kind of a modality decides how it is read, filled, resized and mirrored; ``layout.json`` says so."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from models.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LAYOUTS,
    DataError,
    InputSpec,
    Reader,
    Sample,
    SegmentationSet,
    TrainTransform,
    differing_inputs,
    input_from_plain,
    input_specs,
    layout_from_plain,
    to_plain,
)
from models.data.images import intensity_image
from models.data.kinds import KINDS, SPARSE, Modality, is_mixed, mirrored, resized
from models.data.layout_file import read_layout
from models.segmentation import inference
from tests.helpers.raw_images import png

SIZE = (8, 10)
EVERY_KIND = (*KINDS, "disparity", "hha", SPARSE, None)
NAN = float("nan")


def color_of(stored: np.ndarray) -> np.ndarray:
    """The inputs of ImageNet's networks from 8-bit colors, in float64."""
    return (stored / 255.0 - IMAGENET_MEAN) / IMAGENET_STD


def own(root: Path, told: Any = None, name: str = "thermal", suffix: str = ".png", **fields: Any) -> Path:
    """A folder of two scenes whose second modality is told of so; its files are ``write``'s matter."""
    description = {
        "files": {"rgb": "rgb/{name}.png", name: f"{name}/{{name}}{suffix}", "labels": "labels/{name}.png"},
        **({} if told is None else {"modalities": {name: told}}),
        **fields,
    }
    root.mkdir(exist_ok=True)
    (root / "layout.json").write_text(json.dumps(description))
    (root / "train.txt").write_text("a\nb\n")
    for scene in "ab":
        write(
            root / f"rgb/{scene}.png",
            np.random.default_rng(ord(scene)).integers(0, 256, (*SIZE, 3), np.uint8),
        )
        labels = np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE) % 3
        write(root / f"labels/{scene}.png", labels)
    return root


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, image)
    else:
        assert cv2.imwrite(str(path), image if image.ndim == 2 else image[:, :, ::-1])


def read(root: Path, stored: np.ndarray, name: str = "thermal", suffix: str = ".png") -> np.ndarray:
    """The modality of a scene as it is read, where all scenes have these stored values."""
    for scene in "ab":
        write(root / f"{name}/{scene}{suffix}", stored)
    return opened(root, name)[0].images[0].astype(np.float64)


def opened(root: Path, *modalities: str) -> SegmentationSet:
    return SegmentationSet(root, "train", modalities=modalities or ("thermal",), num_classes=3)


def values(seed: int = 0, dtype: Any = np.uint8, channels: int | None = None) -> np.ndarray:
    shape = SIZE if channels is None else (*SIZE, channels)
    return np.random.default_rng(seed).integers(1, np.iinfo(dtype).max, shape, dtype)


# layout.json


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("intensity", r"modalities is .*expected an object of kind, missing, range and channels by modality"),
        (["color"], r"modalities is .*expected an object"),
        ({"kind": "thermal"}, r"kind of thermal is 'thermal'; expected one of color, intensity, depth, "),
        ({"kind": "intensty"}, r"kind of thermal is 'intensty'; .*did you mean 'intensity'"),
        ({"kind": "RGB"}, r"kind of thermal is 'RGB'"),
        ({"kind": 3}, r"kind of thermal is 3"),
        ({"kind": True}, r"kind of thermal is True"),
        ({"kind": []}, r"kind of thermal is \[\]"),
        ({"kind": {}}, r"kind of thermal is \{\}"),
        ({"kind": "disparity"}, r"kind of thermal is 'disparity'"),
        ({"kind": "sparse"}, r"kind of thermal is 'sparse'"),
        ({"kinds": "color"}, r"unknown field 'kinds' of the modality thermal; .*did you mean 'kind'"),
        ({"missing": "none"}, r"missing of thermal is 'none'; expected a stored value, NaN, or a list"),
        ({"missing": None}, r"missing of thermal is None"),
        ({"missing": True}, r"missing of thermal is True"),
        ({"missing": [0, "x"]}, r"missing of thermal is \[0, 'x'\]"),
        ({"missing": [[0]]}, r"missing of thermal is \[\[0\]\]"),
        ({"missing": {"0": 1}}, r"missing of thermal is \{"),
        ({"range": [1]}, r"range of thermal is \[1\]; expected two different numbers"),
        ({"range": [1, 1]}, r"range of thermal is \[1, 1\]"),
        ({"range": [1, 2, 3]}, r"range of thermal is \[1, 2, 3\]"),
        ({"range": ["0", "1"]}, r"range of thermal is \['0', '1'\]"),
        ({"range": [False, True]}, r"range of thermal is \[False, True\]"),
        ({"range": [0, NAN]}, r"range of thermal is \[0, nan\]"),
        ({"range": 5}, r"range of thermal is 5"),
        ({"channels": []}, r"channels of thermal is \[\]; expected a list of the file's channels"),
        ({"channels": 3}, r"channels of thermal is 3"),
        ({"channels": [-1]}, r"channels of thermal is \[-1\]"),
        ({"channels": [0.5]}, r"channels of thermal is \[0.5\]"),
        ({"channels": [True]}, r"channels of thermal is \[True\]"),
        ({"channels": ["0"]}, r"channels of thermal is \['0'\]"),
        ({"channels": [2**16]}, r"channels of thermal is \[65536\]"),
        ({"kind": "color", "range": [0, 9]}, r"range of thermal is for intensity .*but its kind is color"),
        ({"kind": "depth", "range": [0, 9]}, r"range of thermal is for intensity .*but its kind is depth"),
        ({"kind": "normals", "range": [0, 9]}, r"range of thermal is for intensity .*its kind is normals"),
    ],
)
def test_wrong_values_are_refused_naming_the_field(tmp_path: Path, told: Any, words: str) -> None:
    with pytest.raises(DataError, match=rf"layout\.json: {words}"):
        read_layout(own(tmp_path, told) / "layout.json")


@pytest.mark.parametrize("name", ["rgb2", "termal", "labels", "camera", "normals"])
def test_a_modality_without_files_is_refused(tmp_path: Path, name: str) -> None:
    own(tmp_path, modalities={name: {"kind": "color"}})
    with pytest.raises(
        DataError, match=rf"layout\.json: modalities of '{name}'; expected those of rgb, thermal"
    ):
        read_layout(tmp_path / "layout.json")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, Modality()),
        ({"kind": None}, Modality()),
        *[({"kind": kind}, Modality(kind)) for kind in KINDS],
        ({"kind": "colour"}, Modality("color")),
        ({"missing": 0}, Modality(missing=(0.0,))),
        ({"missing": [0, 65535, -1.5]}, Modality(missing=(0.0, 65535.0, -1.5))),
        ({"range": [9, 2]}, Modality(range=(9, 2))),
        ({"channels": [3]}, Modality(channels=(3,))),
        ({"channels": [2, 0, 1], "kind": "normals"}, Modality("normals", channels=(2, 0, 1))),
    ],
)
def test_what_is_told_of_a_modality(tmp_path: Path, told: Mapping[str, Any], expected: Modality) -> None:
    found = read_layout(own(tmp_path, told) / "layout.json").modality("thermal")
    assert found == expected


@pytest.mark.parametrize("missing", [NAN, [NAN, 3], "NaN", ["nan", 3], float("inf"), "-inf"])
@pytest.mark.parametrize("kind", ["intensity", "depth"])
def test_nan_may_be_missing(tmp_path: Path, missing: Any, kind: str) -> None:
    told = {"kind": kind, "missing": missing, **({"range": [1, 9]} if kind == "intensity" else {})}
    stored = np.array([NAN, 3, np.inf, 5, -np.inf], np.float32)[np.arange(80) % 5].reshape(SIZE)
    found = read(own(tmp_path, told, suffix=".npy", depth_scale=1000), stored, suffix=".npy")[:, :, 0]
    known = (stored == 5) | ((stored == 3) & ~isinstance(missing, list))
    expected = np.where(known, stored if kind == "depth" else (stored - 1.0) / 8, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_layout_with_kinds_survives_json(tmp_path: Path) -> None:
    told = {"kind": "intensity", "missing": [0, 7], "range": [1, 9], "channels": [3]}
    layout = read_layout(own(tmp_path, told) / "layout.json")
    assert layout_from_plain(json.loads(json.dumps(to_plain(layout)))) == layout


# Kinds: told, by name, guessed


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *[(kind, np.uint8) for kind in ("intensity", "color", "colour", None)],
        *[(kind, np.uint16) for kind in ("intensity", None)],
    ],
)
def test_gray_is_the_same_in_one_channel_as_in_three(tmp_path: Path, kind: str | None, dtype: type) -> None:
    """Programs differ in how they save gray; what a network is fed must not."""
    stored = values(dtype=dtype)
    found = []
    for number, image in enumerate((stored, np.repeat(stored[:, :, None], 3, axis=2))):
        root = own(tmp_path / str(number), None if kind is None else {"kind": kind})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(read(root, image))
    np.testing.assert_array_equal(found[0], found[1])
    if kind in ("color", "colour"):
        np.testing.assert_allclose(found[0], color_of(np.repeat(stored[:, :, None], 3, axis=2)), atol=1e-6)
    else:
        np.testing.assert_allclose(found[0][:, :, 0], stored / np.iinfo(dtype).max, atol=1e-6)


@pytest.mark.parametrize("name", ["depth", "depth_raw"])
def test_brightness_of_depth_is_the_same_in_three_channels(tmp_path: Path, name: str) -> None:
    stored = values()
    found = []
    for number, image in enumerate((stored, np.repeat(stored[:, :, None], 3, axis=2))):
        found.append(read(own(tmp_path / str(number), name=name, depth_scale=None), image, name))
    np.testing.assert_array_equal(*found)


def test_nearly_gray_is_gray(tmp_path: Path) -> None:
    """JPEG leaves differences between the channels of a gray image."""
    stored = cv2.resize(values()[:3, :4], SIZE[::-1]).astype(int).clip(5, 250)
    noisy = np.stack([stored, stored, stored - 1], axis=-1).astype(np.uint8)
    found = read(own(tmp_path, {"kind": "intensity"}), noisy)
    np.testing.assert_allclose(found[:, :, 0], stored / 255, atol=1e-6)


@pytest.mark.parametrize("files", ["gray", "color", "mixed", "mixed, gray first"])
def test_guessed_kinds_are_told_and_hold_for_all_files(tmp_path: Path, files: str) -> None:
    """If any file is colored, gray ones are read as color as well: channels must not change."""
    root = own(tmp_path)
    gray, colored = values(0), values(1, channels=3)
    scenes = {
        "gray": (gray, gray),
        "color": (colored, colored),
        "mixed": (colored, gray),
        "mixed, gray first": (gray, colored),
    }[files]
    for scene, image in zip("ab", scenes, strict=True):
        write(root / f"thermal/{scene}.png", image)
    dataset = opened(root)
    kind = "intensity" if files == "gray" else "color"
    assert dataset.guessed_kinds == ("thermal",)
    assert dataset.layout.modality("thermal").kind == kind
    with pytest.warns(UserWarning, match=rf"thermal: .*look like {kind} .* give its kind in layout\.json"):
        samples = [dataset[index] for index in range(2)]
    assert {sample.images[0].shape[2] for sample in samples} == {1 if files == "gray" else 3}
    for sample, image in zip(samples, scenes, strict=True):
        if kind == "color":
            image = image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
            np.testing.assert_allclose(sample.images[0], color_of(image), atol=1e-6)
        else:
            np.testing.assert_allclose(sample.images[0][:, :, 0], image / 255, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_is_told_is_no_guess(tmp_path: Path, kind: str) -> None:
    root = own(tmp_path, {"kind": kind}, depth_scale=1000)
    stored = values(channels=3) if kind in ("color", "normals") else values()
    stored = (stored.astype(np.uint16) + 1000) if kind == "depth" else stored
    for scene in "ab":
        write(root / f"thermal/{scene}.png", stored)
    dataset = opened(root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample = dataset[0]
    assert dataset.guessed_kinds == ()
    assert sample.kinds == (kind,)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"kind": "intensity"}, r"expected gray, as its kind is intensity, found colors; give another kind"),
        ({"kind": "categorical"}, r"expected labels .* 1 channel, found 8 bits and 3 channels"),
        ({"kind": "depth"}, r"expected depth of 16 bits and 1 channel, found 8 bits and 3 channels"),
    ],
)
def test_colored_files_where_one_channel_is_expected(
    tmp_path: Path, told: dict[str, str], words: str
) -> None:
    with pytest.raises(DataError, match=rf"thermal/a\.png: {words}"):
        read(own(tmp_path, told, depth_scale=1000), values(channels=3))


def test_colored_brightness_is_refused(tmp_path: Path) -> None:
    """A depth map drawn with a color map is no depth."""
    with pytest.raises(DataError, match=r"depth/a\.png: expected gray, as its kind is depth, found colors"):
        read(own(tmp_path, name="depth", depth_scale=None), values(channels=3), "depth")


def test_a_guess_that_later_files_break_is_refused_naming_kind(tmp_path: Path) -> None:
    """Of twelve scenes four are opened for the guess; the colored one is not among them."""
    root = own(tmp_path)
    names = [f"s{number:02d}" for number in range(12)]
    (root / "train.txt").write_text("\n".join(names))
    for number, name in enumerate(names):
        write(root / f"thermal/{name}.png", values(channels=3) if number == 5 else values())
        write(root / f"rgb/{name}.png", values(channels=3))
        write(root / f"labels/{name}.png", values() % 3)
    dataset = opened(root)
    with pytest.raises(
        DataError, match=r"thermal/s05\.png: expected gray, .*; give another kind in layout\.json"
    ):
        dataset[5]


# Missing values


def intensity_reference(stored: np.ndarray, limits: tuple[float, float], missing: list[float]) -> np.ndarray:
    low, high = limits
    image = (stored.astype(np.float64) - low) / (high - low)
    absent = np.isin(stored, missing) | ~np.isfinite(stored.astype(np.float64))
    if stored.dtype.kind != "f":
        for extreme in (0, np.iinfo(stored.dtype).max):
            if not min(limits) <= extreme <= max(limits):
                absent |= stored == extreme
    return np.where(absent, 0, image)


@pytest.mark.parametrize("suffix", [".png", ".npy", ".tif"])
@pytest.mark.parametrize("limits", [(1000, 4000), (0, 4000), (1000, 65535), (4000, 1000)])
@pytest.mark.parametrize("missing", [[], [1234], [0, 65535, 1234]])
def test_missing_intensity_is_zero(
    tmp_path: Path, suffix: str, limits: tuple[int, int], missing: list[int]
) -> None:
    """Listed values, and beside a range that has not them the extremes, which no sensor measures."""
    stored = np.random.default_rng(0).choice([0, 65535, 1234, 1000, 4000, 2500, 900], SIZE).astype(np.uint16)
    stored[0, :7] = 0, 65535, 1234, 1000, 4000, 2500, 900
    told = {"kind": "intensity", "range": list(limits), **({"missing": missing} if missing else {})}
    found = read(own(tmp_path, told, suffix=suffix), stored, suffix=suffix)
    np.testing.assert_allclose(found[:, :, 0], intensity_reference(stored, limits, missing), atol=1e-6)


@settings(max_examples=80)
@given(
    stored=arrays.arrays(
        st.sampled_from(["float32", "float64"]),
        (3, 4),
        elements=st.sampled_from([0.0, 0.1, 0.5, -9999.9, 37.5, NAN, np.inf, -np.inf]),
    ),
    missing=st.lists(st.sampled_from([0.1, -9999.9, 37.5, NAN, np.inf]), max_size=3),
)
def test_missing_values_of_floating_point(stored: np.ndarray, missing: list[float]) -> None:
    """People write in layout.json the decimal of what a file of 32 bits holds."""
    near = [stored.dtype.type(value) for value in missing]
    found = intensity_image(Path("a.npy"), stored, (0, 100), missing)
    np.testing.assert_allclose(
        found[:, :, 0], intensity_reference(stored, (0, 100), near), atol=1e-4, rtol=1e-6
    )


@pytest.mark.parametrize("missing", [0, 65535, 17, [17, 4000], [], NAN])
def test_missing_depth_is_zero(tmp_path: Path, missing: Any) -> None:
    stored = np.random.default_rng(0).choice([0, 65535, 17, 4000, 2500], SIZE).astype(np.uint16)
    listed = [*(missing if isinstance(missing, list) else [missing]), 0, 65535]
    root = own(tmp_path, {"kind": "depth", "missing": missing}, depth_scale=1000)
    expected = np.where(np.isin(stored, listed), 0, stored / 1000)
    np.testing.assert_allclose(read(root, stored)[:, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["color", "normals"])
@pytest.mark.parametrize("missing", [0, 255, [128, 255]])
def test_missing_color_is_missing_in_all_channels(tmp_path: Path, kind: str, missing: Any) -> None:
    """A pixel whose every channel is missing is; one of a color that has the value in one is not."""
    listed = missing if isinstance(missing, list) else [missing]
    stored = values(channels=3).clip(1, 250)
    stored[0, :3] = listed[0]
    stored[1, :3, 0] = listed[0]
    found = read(own(tmp_path, {"kind": kind, "missing": missing}), stored)
    expected = color_of(stored) if kind == "color" else stored / 127.5 - 1
    absent = np.isin(stored, listed).all(axis=-1) | ((stored == 0).all(axis=-1) & (kind == "normals"))
    assert absent[0, :3].all()
    np.testing.assert_allclose(found, np.where(absent[:, :, None], 0, expected), atol=1e-6)


def test_missing_categories_are_zero(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).choice([1, 2, 7, 255], SIZE).astype(np.uint8)
    root = own(tmp_path, {"kind": "categorical", "missing": [7], "range": [0, 4]})
    expected = np.select([np.isin(stored, [7, 255])], [0], stored / 4.0)
    np.testing.assert_allclose(read(root, stored)[:, :, 0], expected, atol=1e-6)


def test_categories_in_a_palette_are_their_indices(tmp_path: Path) -> None:
    root, stored = own(tmp_path, {"kind": "categorical", "range": [0, 8]}), values() % 8
    (root / "thermal").mkdir()
    colors = np.random.default_rng(1).integers(0, 256, (8, 3))
    for scene in "ab":
        (root / f"thermal/{scene}.png").write_bytes(png(stored, 4, colors))
    np.testing.assert_allclose(opened(root)[0].images[0][:, :, 0], stored / 8.0, atol=1e-6)


# Resizing and mirroring


def sample_of(image: np.ndarray, kind: str | None, name: str = "thermal") -> Sample:
    return Sample((image,), np.zeros(image.shape[:2], np.uint8), "a", (name,), (kind,))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["depth", "categorical", "disparity", "hha", "normals", "points"]),
    side=st.integers(5, 40),
)
def test_kinds_that_are_never_averaged_keep_their_values(seed: int, kind: str, side: int) -> None:
    """After training's scale, mirror and crop every pixel is one of the image, or padding."""
    rng = np.random.default_rng(seed)
    image = rng.random((12, 15, 3 if kind in ("hha", "normals", "points") else 1)).astype(np.float32)
    image[rng.random((12, 15)) < 0.3] = 0
    transformed = TrainTransform(crop=33, shorter_side=side, ignore_index=255)(sample_of(image, kind), rng)
    pixels = {tuple(pixel) for pixel in image.reshape(-1, image.shape[2]).tolist()}
    allowed = pixels | {tuple([0.0] * image.shape[2])}
    if kind == "normals":
        allowed |= {(-x, y, z) for x, y, z in pixels}
    assert {tuple(pixel) for pixel in transformed.images[0].reshape(-1, image.shape[2]).tolist()} <= allowed


def bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``[H, W]`` at another size in float64, pixel centers at halves, edges repeated."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
        for new, old in zip(size, image.shape, strict=True)
    )
    low = [np.floor(axis).astype(int) for axis in (rows, columns)]
    high = [np.minimum(axis + 1, old - 1) for axis, old in zip(low, image.shape, strict=True)]
    down, right = (rows - low[0])[:, None], (columns - low[1])[None]
    top = image[low[0]][:, low[1]] * (1 - right) + image[low[0]][:, high[1]] * right
    bottom = image[high[0]][:, low[1]] * (1 - right) + image[high[0]][:, high[1]] * right
    return top * (1 - down) + bottom * down


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.tuples(st.integers(2, 40), st.integers(2, 40)))
def test_sparse_intensity_is_averaged_over_known_pixels_only(seed: int, size: tuple[int, int]) -> None:
    """Against float64: a neighbor that is missing has no weight, and a missing pixel stays missing."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(0.5, 1, (11, 14))
    image[rng.random(image.shape) < 0.4] = 0
    known = (image > 0).astype(np.float64)
    weights = bilinear(known, size)
    mean = np.divide(bilinear(image, size), weights, out=np.zeros(size), where=weights > 0)
    found = resized(image[:, :, None].astype(np.float32), size, SPARSE)[:, :, 0]
    nearest = cv2.resize(known, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT) > 0
    np.testing.assert_allclose(found, np.where(nearest & (weights > 1e-6), mean, 0), atol=1e-3)
    assert not found.any() or found[found > 0].min() > 0.49  # no known value is that low


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_kind_of_one_value_stays_it(kind: str | None, channels: int) -> None:
    """No kind makes up values where all pixels are the same."""
    image = np.full((7, 9, channels), 0.625, np.float32)
    for size in ((14, 18), (3, 5), (8, 9)):
        np.testing.assert_allclose(resized(image, size, kind), np.full((*size, channels), 0.625), rtol=1e-6)


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [0.5, 0.75, 1.25, 2.0])
def test_networks_look_at_images_as_training_made_them(kind: str | None, channels: int, scale: float) -> None:
    """Evaluation's tensors and training's arrays are resized and mirrored alike, for every kind.

    Where two pixels are equally near, OpenCV and torch round otherwise: either is right there.
    """
    rng = np.random.default_rng(7)
    image = rng.uniform(0.2, 1, (12, 17, channels)).astype(np.float32)
    image[rng.random((12, 17)) < 0.3] = 0
    size = tuple(round(side * scale) for side in image.shape[:2])
    clear = [
        (2 * np.arange(new) + 1) * old % (2 * new) != 0
        for new, old in zip(size, image.shape[:2], strict=True)
    ]
    if kind in (None, "color", "intensity") or scale in (0.5, 2.0):
        clear = [np.ones(new, bool) for new in size]
    tensor = torch.from_numpy(np.tile(image, (1, 1, 3 // channels)).transpose(2, 0, 1))[None, None]
    expected = np.tile(resized(image, size, kind), (1, 1, 3 // channels))
    found = inference.resized(tensor, scale, [kind])[0, 0].numpy().transpose(1, 2, 0)
    assert found.shape == expected.shape
    assert min(each.sum() for each in clear) >= 6
    np.testing.assert_allclose(found[np.ix_(*clear)], expected[np.ix_(*clear)], atol=1e-5)
    flipped = inference.mirrored(tensor, [kind])[0, 0].numpy().transpose(1, 2, 0)
    turned = image if channels == 3 else np.tile(image, (1, 1, 3))
    np.testing.assert_array_equal(flipped, mirrored(turned, kind))


@pytest.mark.parametrize("name", ["normals", "normal", "slope"])
def test_normals_of_any_name_flip_their_sign_when_mirrored(tmp_path: Path, name: str) -> None:
    """Taskonomy calls them normal; any other name needs its kind told."""
    stored = values(channels=3)
    root = own(tmp_path, {"kind": "normals"} if name == "slope" else None, name=name)
    found = read(root, stored, name)
    np.testing.assert_allclose(found, stored / 127.5 - 1, atol=1e-6)
    sample = opened(root, name)[0]
    assert sample.kinds == ("normals",)
    transform = TrainTransform(crop=8, shorter_side=8, scales=(1, 1))
    turned = {}
    for seed in range(30):
        image = transform(sample, np.random.default_rng(seed)).images[0].astype(np.float64)
        straight = [np.abs(image - found[:, left : left + 8]).max() < 1e-6 for left in range(SIZE[1] - 8 + 1)]
        flipped = found[:, ::-1] * [-1, 1, 1]
        opposite = [
            np.abs(image - flipped[:, left : left + 8]).max() < 1e-6 for left in range(SIZE[1] - 8 + 1)
        ]
        assert any(straight) or any(opposite)
        turned[any(opposite)] = True
    assert turned == {True: True, False: True}


@pytest.mark.parametrize("kind", [kind for kind in EVERY_KIND if kind != "normals"])
def test_mirrored_twice_is_the_image_and_once_its_reverse(kind: str | None) -> None:
    image = values(channels=3).astype(np.float32)
    np.testing.assert_array_equal(mirrored(image, kind), image[:, ::-1])
    np.testing.assert_array_equal(mirrored(mirrored(image, "normals"), "normals"), image)


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        (None, "intensity"),
        ({"kind": "intensity"}, "intensity"),
        ({"kind": "intensity", "missing": 0}, SPARSE),
        ({"kind": "intensity", "range": [1, 200]}, SPARSE),
        ({"kind": "categorical", "missing": 0}, "categorical"),
        ({"kind": "depth", "missing": 3}, "depth"),
    ],
)
def test_the_kind_that_samples_are_resized_as(tmp_path: Path, told: Any, kind: str) -> None:
    root = own(tmp_path, told, depth_scale=1000)
    deep = (told or {}).get("kind") == "depth"
    for scene in "ab":
        write(root / f"thermal/{scene}.png", values(dtype=np.uint16) if deep else values())
    dataset = opened(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert dataset[0].kinds == (kind,)
    assert is_mixed(kind) == (kind in ("intensity", SPARSE))


# Several modalities in one file


@pytest.mark.parametrize("suffix", [".png", ".npy"])
@pytest.mark.parametrize("guessed", [False, True])
def test_color_and_thermal_in_four_channels(tmp_path: Path, suffix: str, guessed: bool) -> None:
    """As RGB-T sets store them: three channels are one modality and the fourth another."""
    told = {"rgb": {"channels": [0, 1, 2]}, "thermal": {"channels": [3], "kind": "intensity"}}
    if guessed:
        del told["thermal"]["kind"]
    root = own(tmp_path)
    description = json.loads((root / "layout.json").read_text())
    description["files"] |= {"rgb": f"rgbt/{{name}}{suffix}", "thermal": f"rgbt/{{name}}{suffix}"}
    (root / "layout.json").write_text(json.dumps({**description, "modalities": told}))
    stored = values(channels=4)
    (root / "rgbt").mkdir()
    for scene in "ab":
        if suffix == ".npy":
            np.save(root / f"rgbt/{scene}.npy", stored)
        else:
            Image.fromarray(stored, "RGBA").save(root / f"rgbt/{scene}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thermal, rgb = opened(root, "thermal", "rgb")[0].images
    np.testing.assert_allclose(rgb, color_of(stored[:, :, :3]), atol=1e-6)
    np.testing.assert_allclose(thermal, stored[:, :, 3:] / 255, atol=1e-6)


@pytest.mark.parametrize("name", ["rgb", "thermal"])
def test_four_channels_without_a_choice_are_refused_naming_channels(tmp_path: Path, name: str) -> None:
    root = own(tmp_path, {"kind": "color"})
    write(root / "thermal/a.png", values(channels=3))
    for scene in "ab":
        (root / name).mkdir(exist_ok=True)
        Image.fromarray(values(channels=4), "RGBA").save(root / f"{name}/{scene}.png")
    with pytest.raises(
        DataError, match=rf"{name}/a\.png: .*found 8 bits and 4 channels; .*channels in layout\.json"
    ):
        opened(root, name)[0]


@pytest.mark.parametrize(("channels", "count"), [([3], 3), ([1], 1), ([0, 1, 4], 3)])
def test_channels_that_a_file_has_not(tmp_path: Path, channels: list[int], count: int) -> None:
    root = own(tmp_path, {"kind": "intensity", "channels": channels})
    words = (
        rf"thermal/a\.png: layout\.json reads its channels {', '.join(map(str, channels))}, .* has {count}"
    )
    with pytest.raises(DataError, match=words):
        read(root, values() if count == 1 else values(channels=3))


@pytest.mark.parametrize("kind", ["depth", "categorical"])
def test_depth_and_categories_in_a_channel_of_their_own(tmp_path: Path, kind: str) -> None:
    """The channels told are those that are read, whatever the kind is."""
    stored = np.stack([values(seed, np.uint16) % 100 + 300 for seed in range(3)], axis=-1)
    root = own(tmp_path, {"kind": kind, "channels": [1], **({"range": [0, 1]} if kind != "depth" else {})})
    (root / "layout.json").write_text(
        (root / "layout.json").read_text().replace("{", '{"depth_scale": 1, ', 1)
    )
    np.testing.assert_allclose(read(root, stored)[:, :, 0], stored[:, :, 1], rtol=1e-6)


# What networks are told of their inputs


COLOR = {"order": "rgb", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def spec_of(told: Modality | None, name: str = "thermal", **options: Any) -> InputSpec:
    files = {**LAYOUTS["nyu_cen"].files, name: f"{name}/{{name}}.png"}
    modalities = {} if told is None else {name: told}
    layout = replace(LAYOUTS["nyu_cen"], files=files, modalities=modalities, **options)
    (spec,) = input_specs(Reader(layout, (name,)))
    return spec


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (Modality("color"), InputSpec("thermal", "full brightness", 3, **COLOR)),
        (Modality("intensity"), InputSpec("thermal", "one channel from 0 to the largest")),
        (Modality("intensity", range=(7, 9)), InputSpec("thermal", "one channel from 7 to 9")),
        (Modality("categorical"), InputSpec("thermal", "one channel from 0 to the largest")),
        (Modality("depth"), InputSpec("thermal", "metre")),
        (Modality("normals"), InputSpec("thermal", "length of the normal", 3)),
        (
            None,
            InputSpec("thermal", "full brightness, or one channel from 0 to the largest", None, **COLOR),
        ),
    ],
)
def test_what_a_modality_of_each_kind_means(told: Modality | None, expected: InputSpec) -> None:
    assert spec_of(told) == expected
    assert input_from_plain(json.loads(json.dumps(to_plain(expected)))) == expected


OLD = InputSpec("thermal", "full brightness, or one channel from 0 to the largest", None, **COLOR)
OLD_RANGE = replace(OLD, unit="full brightness, or one channel from 7 to 9")


@pytest.mark.parametrize(
    ("old", "told", "agrees"),
    [
        (OLD, Modality("color"), True),
        (OLD, Modality("intensity"), True),
        (OLD, Modality("depth"), False),
        (OLD, Modality("normals"), False),
        (OLD, Modality("intensity", range=(7, 9)), False),
        (OLD_RANGE, Modality("intensity", range=(7, 9)), True),
        (OLD_RANGE, Modality("intensity", range=(7, 8)), False),
        (spec_of(Modality("color")), Modality("intensity"), False),
        (spec_of(Modality("intensity")), Modality("color"), False),
        (spec_of(Modality("intensity")), Modality("intensity"), True),
        (spec_of(Modality("depth")), Modality("normals"), False),
        (spec_of(Modality("depth")), Modality("depth"), True),
    ],
)
def test_specs_of_runs_before_kinds_are_accepted_where_they_agree(
    old: InputSpec, told: Modality, agrees: bool
) -> None:
    differences = differing_inputs([old], [spec_of(told)])
    assert (differences == []) == agrees
    assert all(difference.startswith("thermal: ") for difference in differences)


@pytest.mark.parametrize("name", ["rgb", "depth", "depth_raw", "hha", "normals", "points"])
def test_known_names_need_no_kind(name: str) -> None:
    """As they were before kinds could be told."""
    expected = {
        "rgb": InputSpec("rgb", "full brightness", 3, **COLOR),
        "depth": InputSpec("depth", "metre"),
        "depth_raw": InputSpec("depth_raw", "metre"),
        "hha": InputSpec("hha", "255 of HHA's encoding", 3, **COLOR),
        "normals": InputSpec("normals", "length of the normal", 3),
        "points": InputSpec("points", "metre", 3),
    }[name]
    assert spec_of(None, name) == expected


def test_another_kind_than_the_names_is_a_difference() -> None:
    told = spec_of(Modality("intensity"), "rgb")
    assert differing_inputs([spec_of(None, "rgb")], [told]) != []


def test_a_range_that_is_the_types_own_changes_nothing(tmp_path: Path) -> None:
    """0 lies within it and is black, not missing: it counts among its neighbors as without the range."""
    stored = np.where(np.random.default_rng(0).random(SIZE) < 0.4, 0, values())
    found = []
    for number, told in enumerate(({"kind": "intensity"}, {"kind": "intensity", "range": [0, 255]})):
        root = own(tmp_path / str(number), told)
        for scene in "ab":
            write(root / f"thermal/{scene}.png", stored)
        sample = opened(root)[0]
        transform = TrainTransform(crop=13, shorter_side=13, scales=(1, 1))
        found.append(transform(sample, np.random.default_rng(0)).images[0])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
