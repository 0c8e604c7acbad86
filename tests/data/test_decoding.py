"""Stored values come out unchanged: indices, signs, floats, orientation, whatever way files store them."""

from __future__ import annotations

import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from models.__main__ import main
from models.data import DataError, SegmentationSet, palette, read_depth, read_labels, read_rgb
from models.data.images import depth_image, intensity_image, read_normals
from models.data.stored import Frame, read_label_values, read_stored
from models.segmentation.visualize import colorize
from tests.helpers.raw_images import png, tiff, with_orientation

SIZE = (9, 13)  # of odd width: no row of few bits ends with a byte
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "float32", "float64")


def indices(count: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, count, SIZE).astype(np.uint8)
    values[0, :2] = 0, count - 1
    return values


def colors_of(count: int) -> np.ndarray:
    """Strong colors, in no order that could be an index."""
    return np.random.default_rng(count).permutation(256 * 3)[: count * 3].reshape(count, 3).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def palette_image(values: np.ndarray, colors: np.ndarray) -> Image.Image:
    image = Image.fromarray(values)
    image.putpalette(colors.tobytes())
    return image


def labeled(root: Path, contents: bytes, suffix: str = ".png", **options) -> SegmentationSet:
    """A set of one scene with these bytes as its label map."""
    for folder in ("rgb", "labels"):
        (root / folder).mkdir(exist_ok=True)
    cv2.imwrite(str(root / "rgb/a.png"), np.zeros((*SIZE, 3), np.uint8))
    (root / f"labels/a{suffix}").write_bytes(contents)
    (root / "layout.json").write_text('{"files": {"rgb": "rgb/{name}.png", "labels": "labels/{name}.*"}}')
    (root / "train.txt").write_text("a")
    return SegmentationSet(root, "train", modalities=("rgb",), **{"num_classes": 4, **options})


# Labels: the stored numbers


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_png_of_any_bits_gives_its_stored_values(tmp_path: Path, bits: int, interlaced: bool) -> None:
    """OpenCV stretches fewer than 8 bits to 255; classes would become 85 and 170."""
    values = indices(min(2**bits, 200)).astype(np.uint16 if bits == 16 else np.uint8) * (bits == 16 or 1)
    path = tmp_path / "a.png"
    path.write_bytes(png(values, bits, interlaced=interlaced))
    found = read_label_values(path)
    np.testing.assert_array_equal(found.values, values)
    assert found.palette is None
    np.testing.assert_array_equal(read_labels(path, 200), values)


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_png_gives_indices_and_colors(
    tmp_path: Path, bits: int, interlaced: bool, transparent: bool
) -> None:
    count = min(2**bits, 21)
    values, colors = indices(count), colors_of(count)
    chunks = [(b"tRNS", b"\0\x80")] if transparent else []
    path = tmp_path / "a.png"
    path.write_bytes(png(values, bits, colors, chunks=chunks, interlaced=interlaced))
    found = read_label_values(path)
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(found.palette[:count], colors)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(
    "chunk", [(b"tRNS", b"\0\1"), (b"gAMA", (45455).to_bytes(4, "big")), (b"sBIT", b"\1")]
)
def test_chunks_beside_the_pixels_change_no_label(
    tmp_path: Path, bits: int, chunk: tuple[bytes, bytes]
) -> None:
    values = indices(2).astype(np.uint16 if bits == 16 else np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(png(values, bits, chunks=[chunk]))
    np.testing.assert_array_equal(read_labels(path, 4), values)


@pytest.mark.parametrize("suffix", [".bmp", ".tif"])
@pytest.mark.parametrize("mode", ["1", "L", "P"])
@pytest.mark.parametrize("compression", [None, "packed"])
def test_bmp_and_tiff_labels(tmp_path: Path, suffix: str, mode: str, compression: str | None) -> None:
    count = 2 if mode == "1" else 7
    values, colors = indices(count), colors_of(7)
    image = (
        palette_image(values, colors)
        if mode == "P"
        else Image.fromarray(values * (255 if mode == "1" else 1))
    )
    kind, options = ("BMP", {}) if suffix == ".bmp" else ("TIFF", {})
    if compression and kind == "TIFF":
        options = {"compression": "group4" if mode == "1" else "tiff_lzw"}
    path = tmp_path / f"a{suffix}"
    path.write_bytes(saved(image.convert(mode), kind, **options))
    found = read_label_values(path)
    np.testing.assert_array_equal(found.values, values)
    assert (found.palette is None) == (mode != "P")
    if mode == "P":
        np.testing.assert_array_equal(found.palette[:7], colors)


@pytest.mark.parametrize(("bits", "colored"), [(1, False), (8, False), (1, True), (4, True), (8, True)])
def test_tiff_labels_of_few_bits(tmp_path: Path, bits: int, colored: bool) -> None:
    count = min(2**bits, 5)
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(indices(count), bits, colors_of(count) if colored else None))
    np.testing.assert_array_equal(read_label_values(path).values, indices(count))


@pytest.mark.parametrize("bits", [2, 4])
def test_gray_tiff_that_opencv_does_not_know_is_not_called_broken(tmp_path: Path, bits: int) -> None:
    """Gray TIFF of 2 and 4 bits is whole, and Pillow reads it."""
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(indices(4), bits))
    np.testing.assert_array_equal(read_label_values(path).values, indices(4))


@pytest.mark.parametrize("big", [False, True])
def test_palette_tiff_in_either_format(tmp_path: Path, big: bool) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(saved(palette_image(indices(5), colors_of(5)), "TIFF", big_tiff=big))
    found = read_label_values(path)
    np.testing.assert_array_equal(found.values, indices(5))
    np.testing.assert_array_equal(found.palette[:5], colors_of(5))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".tif", ".dat"])
@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        ("JPEG", {"quality": 100}, "JPEG"),
        ("JPEG", {"quality": 70, "progressive": True}, "JPEG"),
        ("WEBP", {"quality": 90}, "WebP"),
        ("TIFF", {"compression": "jpeg"}, "JPEG"),
    ],
)
def test_lossy_labels_are_refused_by_name_whatever_their_suffix(
    tmp_path: Path, kind: str, options: dict, word: str, suffix: str
) -> None:
    """Classes change along every edge; the bytes tell the format, and not the name."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(
        saved(Image.fromarray(np.kron(indices(4), np.ones((8, 8), np.uint8)) * 60), kind, **options)
    )
    with pytest.raises(DataError, match=rf"a\{suffix}: labels in .*{word}.* PNG"):
        read_labels(path, 255)


def test_lossless_labels_pass_under_a_lossy_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(png(indices(4), 4))
    np.testing.assert_array_equal(read_labels(path, 4), indices(4))


@pytest.mark.parametrize("channels", [3, 4])
def test_colored_label_maps_are_refused_with_the_reason(tmp_path: Path, channels: int) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((*SIZE, channels), np.uint8))
    with pytest.raises(
        DataError, match=rf"a\.png: .*found 8 bits and {channels} channels \(colors do not say"
    ):
        read_labels(tmp_path / "a.png", 4)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("colored", [False, True])
def test_truncated_label_maps_are_refused(tmp_path: Path, bits: int, colored: bool, kept: float) -> None:
    """Pillow alone, which reads palettes, fills what is missing where it is told to."""
    values = np.random.default_rng(0).integers(0, 2**bits, (60, 80)).astype(np.uint8)
    whole = png(values, bits, colors_of(2**bits) if colored else None)
    (tmp_path / "a.png").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(DataError, match=r"a\.png: broken or truncated"):
        read_labels(tmp_path / "a.png", 255)


# Palettes


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_a_palette_becomes_the_classes_colors(tmp_path: Path, suffix: str, offset: int) -> None:
    values, colors = indices(4), colors_of(6)
    kind = {".png": "PNG", ".tif": "TIFF", ".bmp": "BMP"}[suffix]
    contents = saved(palette_image(values, colors), kind)
    found = labeled(tmp_path, contents, suffix, label_offset=offset).palette
    np.testing.assert_array_equal(found, colors[offset : offset + 4])


@pytest.mark.parametrize(
    "case", ["gray values", "gray ramp", "too few colors", "too few after the offset", "array", "merged"]
)
def test_label_maps_without_a_palette_of_their_own(tmp_path: Path, case: str) -> None:
    ramp = np.repeat(np.arange(16, dtype=np.uint8)[:, None] * 17, 3, axis=1)
    contents, suffix, options = {
        "gray values": (png(indices(4), 8), ".png", {}),
        "gray ramp": (png(indices(4), 4, ramp), ".png", {}),
        "too few colors": (png(indices(3), 2, colors_of(3)), ".png", {}),
        "too few after the offset": (png(indices(4), 2, colors_of(4)), ".png", {"label_offset": 1}),
        "array": (b"", ".npy", {}),
        "merged": (png(indices(13), 8, colors_of(41)), ".png", {"merge": "nyu13", "num_classes": 13}),
    }[case]
    dataset = labeled(tmp_path, contents, suffix, **options)
    if suffix == ".npy":
        np.save(tmp_path / "labels/a.npy", indices(4))
    assert dataset.palette is None


@given(labels=arrays.arrays(np.uint8, (3, 5), elements=st.integers(0, 255)), count=st.integers(2, 8))
def test_predictions_are_drawn_in_the_palettes_colors(labels: np.ndarray, count: int) -> None:
    colors = colors_of(count)
    for found, expected in (
        (colorize(labels, count, colors), colors),
        (colorize(labels, count), palette(count)),
    ):
        for at in np.ndindex(labels.shape):
            label = int(labels[at])
            assert found[at].tolist() == (expected[label].tolist() if label < count else [0, 0, 0])


def test_a_trained_networks_predictions_have_the_palettes_colors(tmp_path: Path) -> None:
    """From the label maps of the training to the colored maps that predict writes."""
    root, colors = tmp_path / "set", colors_of(4)
    rng = np.random.default_rng(0)
    for folder in ("rgb", "labels"):
        (root / folder).mkdir(parents=True)
    for name in "abc":
        cv2.imwrite(str(root / f"rgb/{name}.png"), rng.integers(0, 256, (32, 40, 3), np.uint8))
        labels = np.kron(rng.integers(0, 4, (4, 5)), np.ones((8, 8), int)).astype(np.uint8)
        (root / f"labels/{name}.png").write_bytes(png(labels, 4, colors))
    (root / "layout.json").write_text('{"files": {"rgb": "rgb/{name}.png", "labels": "labels/{name}.png"}}')
    (root / "train.txt").write_text("a\nb\n")
    (root / "val.txt").write_text("c\n")
    settings = [f"data.root={root}", "data.modalities=rgb", "data.num_classes=4", "model.width=4"]
    settings += [
        "model.frozen_statistics=false",
        "model.encoder=resnet18",
        "data.batch_size=2",
        "data.crop=32",
    ]
    settings += ["data.shorter_side=32", "eval.pictures=0", "run.steps=1", "run.workers=0", "run.device=cpu"]
    settings += [f"run.output={tmp_path / 'run'}"]
    assert main(["train", "nyudv2_cen_refinenet101", *settings]) == 0
    out = tmp_path / "out"
    assert main(["predict", str(tmp_path / "run"), "--rgb", str(root / "rgb"), "--output", str(out)]) == 0
    for name in "abc":
        labels = cv2.imread(str(out / f"labels/{name}.png"), cv2.IMREAD_UNCHANGED)
        colored = cv2.imread(str(out / f"coloured/{name}.png"))[:, :, ::-1]
        np.testing.assert_array_equal(colored, colors[labels])
        assert len(np.unique(labels)) > 1


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("what", "suffix"),
    [
        *[(what, suffix) for what in ("rgb", "normals") for suffix in (".jpg", ".png", ".webp", ".tif")],
        *[(what, suffix) for what in ("depth", "labels") for suffix in (".png", ".tif")],
    ],
)
def test_files_that_ask_to_be_turned_are_refused(
    tmp_path: Path, what: str, suffix: str, orientation: int
) -> None:
    """Turned alone it would part from the other files of its scene; left alone people see another picture."""
    rng = np.random.default_rng(0)
    image = {
        "rgb": rng.integers(0, 256, (*SIZE, 3), np.uint8),
        "normals": rng.integers(0, 256, (*SIZE, 3), np.uint8),
        "depth": rng.integers(0, 2**16, SIZE, np.uint16),
        "labels": indices(4),
    }[what]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(with_orientation(image, orientation, suffix))
    read = {
        "rgb": read_rgb,
        "normals": read_normals,
        "depth": lambda path: read_depth(path, 1000),
        "labels": lambda path: read_labels(path, 4),
    }[what]
    if orientation == 1:
        assert read(path).shape[:2] == SIZE
        if suffix != ".jpg":
            np.testing.assert_array_equal(read_stored(path), image)
    else:
        with pytest.raises(DataError, match=rf"a\{suffix}: its EXIF data .*\(orientation {orientation}\)"):
            read(path)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_big_tiff_that_asks_to_be_turned(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(saved(Image.fromarray(indices(4)), "TIFF", big_tiff=True, tiffinfo={274: orientation}))
    if orientation == 1:
        np.testing.assert_array_equal(read_labels(path, 4), indices(4))
    else:
        with pytest.raises(DataError, match=rf"orientation {orientation}"):
            read_labels(path, 4)


def test_bytes_that_look_like_exif_are_none(tmp_path: Path) -> None:
    """A PNG may hold the letters anywhere, as in its text."""
    (tmp_path / "a.png").write_bytes(
        png(indices(4), 8, chunks=[(b"tEXt", b"Comment\0eXIf EXIF Exif\0\0II*\0")])
    )
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png", 4), indices(4))


# Labels in arrays


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("offset", [0, 1])
def test_labels_in_arrays_of_any_integers(tmp_path: Path, dtype: str, offset: int, order: str) -> None:
    """-1 is void where a type has it, whatever the classes count from."""
    stored = indices(4).astype(np.dtype(dtype).newbyteorder(order))
    expected = indices(4).astype(int) - offset
    if stored.dtype.kind == "i":
        stored[3:5] = -1
        expected[3:5] = -1
    np.save(tmp_path / "a.npy", stored)
    found = read_labels(tmp_path / "a.npy", 4, label_offset=offset)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.where(expected < 0, 255, expected))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(INTEGERS),
    value=st.one_of(st.integers(-300, 300), st.integers(-(2**63), 2**64 - 1)),
    classes=st.integers(1, 200),
    offset=st.integers(0, 3),
    shape=st.sampled_from([(2, 3), (2, 3, 1)]),
)
def test_a_value_that_is_no_class_is_refused_and_named(
    tmp_path: Path, dtype: str, value: int, classes: int, offset: int, shape: tuple[int, ...]
) -> None:
    limits = np.iinfo(dtype)
    value = min(max(value, int(limits.min)), int(limits.max))
    stored = np.full(shape, offset, dtype)
    stored[1, 2] = value
    path = tmp_path / "a.npy"
    np.save(path, stored)
    signed = stored.dtype.kind == "i"
    if value == 255 or (value == -1 and signed) or 0 <= value < offset + classes:
        void = value in (255, -1) or value < offset
        found = read_labels(path, classes, offset)
        assert found[1, 2] == (255 if void else value - offset)
        assert (np.delete(found.ravel(), 5) == 0).all()
    else:
        with pytest.raises(DataError, match=rf"a\.npy: label {value} at row 1, column 2 is out of range"):
            read_labels(path, classes, offset)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_that_count_from_one_are_told_the_remedy(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", indices(4).astype(dtype) + np.ones((), dtype))
    with pytest.raises(DataError, match=r"a\.npy: label 4 .*count from 1.*label_offset=1"):
        read_labels(tmp_path / "a.npy", 4)
    np.save(tmp_path / "a.npy", indices(9).astype(dtype))
    with pytest.raises(DataError) as caught:
        read_labels(tmp_path / "a.npy", 4)
    assert "label_offset" not in str(caught.value)


@pytest.mark.parametrize("dtype", FLOATS)
def test_labels_in_floating_point_are_refused_as_such(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", indices(4).astype(dtype))
    bits = 8 * np.dtype(dtype).itemsize
    with pytest.raises(DataError, match=rf"a\.npy: expected labels .*found floating point of {bits} bits"):
        read_labels(tmp_path / "a.npy", 4)


@pytest.mark.parametrize(
    "contents", [np.zeros((2, 3, 4, 1)), np.zeros(5), np.zeros((0, 4)), np.zeros((2, 2), complex)]
)
def test_arrays_that_are_no_images_are_refused_by_type_and_shape(
    tmp_path: Path, contents: np.ndarray
) -> None:
    np.save(tmp_path / "a.npy", contents)
    where = rf"a\.npy: .*{contents.dtype} {re.escape(str(list(contents.shape)))}"
    with pytest.raises(DataError, match=where):
        read_depth(tmp_path / "a.npy", 1000)


@pytest.mark.parametrize("contents", [b"", b"\x93NUMPY", b"PK\3\4", b"not an array"])
def test_broken_arrays_are_named(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(contents)
    with pytest.raises(DataError, match=r"a\.npy: (broken or truncated array|cannot be read)"):
        read_depth(tmp_path / "a.npy", 1000)


# Depth


def metres(stored: np.ndarray, scale: float | None) -> np.ndarray:
    """The expected depth in float64."""
    values = stored.astype(np.float64)
    if stored.dtype.kind == "f":
        return np.where(np.isfinite(values) & (values > 0), values, 0)
    full = np.iinfo(stored.dtype).max
    absent = (stored <= 0) | ((stored == full) & (stored.itemsize > 1))
    return np.where(absent, 0, values / (full if scale is None else scale))


STORED = (*(name for name in INTEGERS if not name.endswith("8")), *FLOATS)


@st.composite
def stored_depth(draw: st.DrawFn) -> np.ndarray:
    """Depth of any type that may hold it, with the values that are none in it."""
    dtype = np.dtype(draw(st.sampled_from(STORED)))
    if dtype.kind == "f":
        most = 2.0**15 if dtype.itemsize == 2 else 2.0**100
        odd = st.sampled_from([0.0, np.nan, np.inf, -np.inf, -1.5])
        usual = st.floats(2.0**-9, most, width=8 * dtype.itemsize)
    else:
        limits = np.iinfo(dtype)
        odd = st.sampled_from([0, int(limits.max), -1 if limits.min else 0, int(limits.min)])
        usual = st.integers(1, min(int(limits.max), 2**31))
    values = draw(st.lists(st.one_of(odd, usual), min_size=6, max_size=6))
    return np.array(values, dtype).reshape(2, 3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stored=stored_depth(), scale=st.sampled_from([1.0, 1000.0, 5000.0, 25.5]), swapped=st.booleans())
def test_depth_of_any_type_in_arrays(tmp_path: Path, stored: np.ndarray, scale: float, swapped: bool) -> None:
    """Floats are metres whatever the scale; what is no distance is 0; the order of bytes does not count."""
    np.save(tmp_path / "a.npy", stored.astype(stored.dtype.newbyteorder()) if swapped else stored)
    found = read_depth(tmp_path / "a.npy", scale)
    assert (found.dtype, found.shape) == (np.float32, (2, 3, 1))
    np.testing.assert_allclose(found[:, :, 0], metres(stored, scale), rtol=3e-7)


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint16", "uint32", "float32", "float64"])
def test_depth_of_any_type_in_tiff(tmp_path: Path, dtype: str) -> None:
    stored = (np.random.default_rng(0).random(SIZE) * 9000 + 1).astype(dtype)
    stored[0, :2] = 0, 1
    if stored.dtype.kind == "f":
        stored = stored / np.dtype(dtype).type(1000)
        stored[1, :4] = np.nan, np.inf, -np.inf, -2
    elif stored.dtype.kind == "i":
        stored[1, :2] = -1, np.iinfo(dtype).min
    (tmp_path / "a.tif").write_bytes(tiff(stored))
    found = read_depth(tmp_path / "a.tif", 1000)
    np.testing.assert_allclose(found[:, :, 0], metres(stored, 1000), rtol=3e-7)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
@pytest.mark.parametrize("scale", [1000.0, None])
def test_the_extremes_of_sixteen_bits_are_missing(tmp_path: Path, suffix: str, scale: float | None) -> None:
    stored = np.array([[0, 1, 65534, 65535]], np.uint16)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, stored)
    else:
        cv2.imwrite(str(path), stored)
    unit = 65535 if scale is None else scale
    np.testing.assert_allclose(read_depth(path, scale)[0, :, 0], [0, 1 / unit, 65534 / unit, 0], rtol=1e-6)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("shift", [0, 3, 15])
@pytest.mark.parametrize("scale", [1000.0, None])
def test_the_order_of_bytes_changes_no_depth(
    tmp_path: Path, order: str, shift: int, scale: float | None
) -> None:
    stored = np.array([[8, 24000, 1000, 3]])
    np.save(tmp_path / "a.npy", stored.astype(f"{order}u2"))
    rotated = (stored >> shift | stored << (16 - shift)) & 0xFFFF
    expected = rotated / (65535 if scale is None else scale)
    np.testing.assert_allclose(read_depth(tmp_path / "a.npy", scale, shift)[:, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_order_of_bytes_changes_no_intensity(tmp_path: Path, order: str) -> None:
    np.save(tmp_path / "a.npy", np.array([[0, 65535, 257]]).astype(f"{order}u2"))
    found = intensity_image(tmp_path / "a.npy", read_stored(tmp_path / "a.npy"))
    np.testing.assert_allclose(found[0, :, 0], [0, 1, 257 / 65535], rtol=1e-6)


def test_distances_beyond_what_networks_compute_in_are_missing() -> None:
    """Some write the largest double for no measurement; as float32 it is infinite."""
    stored = np.array([[np.finfo(np.float64).max, 1e39, 2.5]])
    assert depth_image(Path("a.npy"), stored, 1000.0)[0, :, 0].tolist() == [0, 0, 2.5]


@pytest.mark.parametrize("scale", [1000.0, None])
@pytest.mark.parametrize(
    ("dtype", "words"),
    [("int8", "signed 8 bits and 1 channel"), ("bool", "boolean, 8 bits and 1 channel")],
)
def test_types_that_hold_no_depth_are_told_apart(
    tmp_path: Path, dtype: str, words: str, scale: float | None
) -> None:
    np.save(tmp_path / "a.npy", np.ones(SIZE, dtype))
    with pytest.raises(DataError, match=rf"a\.npy: expected depth of .*found {words}"):
        read_depth(tmp_path / "a.npy", scale)


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint32"])
def test_without_a_scale_the_message_says_signed(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.ones(SIZE, dtype))
    sign = "signed " if dtype[0] == "i" else ""
    with pytest.raises(DataError, match=rf"found {sign}{8 * np.dtype(dtype).itemsize} bits and 1 channel"):
        read_depth(tmp_path / "a.npy", None)


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_depth_of_several_channels_is_refused(tmp_path: Path, channels: int, dtype: str) -> None:
    stored = np.ones((*SIZE, channels), dtype)
    np.save(tmp_path / "a.npy", stored)
    with pytest.raises(DataError, match=rf"a\.npy: expected depth .* {channels} channels"):
        read_depth(tmp_path / "a.npy", 1000)


# Video


def test_only_video_has_metric_depth_of_8_bits() -> None:
    """255 is a distance there, and 0 is missing; files and arrays of 8 bits are none."""
    stored = np.array([[0, 1, 128, 255]], np.uint8)
    frame = Frame("film.mp4, frame 3", stored, is_video=True)
    np.testing.assert_allclose(read_depth(frame, 25.5)[0, :, 0], np.array([0, 1, 128, 255]) / 25.5, rtol=1e-6)
    with pytest.raises(
        DataError, match=r"depth in memory: expected depth of 16 bits and 1 channel, found 8 bits"
    ):
        read_depth(Frame("depth in memory", stored), 25.5)
    with pytest.raises(DataError, match=r"film\.mp4, frame 3: depth_scale is not known"):
        read_depth(frame, "unknown")


@pytest.mark.parametrize("is_video", [False, True])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_deeper_frames_are_read_as_files_are(dtype: str, is_video: bool) -> None:
    stored = np.array([[0, 1, 300]], dtype)
    unit = 1 if dtype == "float32" else 1000
    found = read_depth(Frame("frame", stored, is_video=is_video), 1000)
    np.testing.assert_allclose(found[0, :, 0], [0, 1 / unit, 300 / unit], rtol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_a_palette_that_tells_no_classes_apart_is_none(tmp_path: Path, padded: bool) -> None:
    """Programs pad palettes with black: maps drawn in it would show nothing."""
    colors = np.array([[0, 0, 0], [200, 0, 0], [0, 0, 0] if padded else [0, 200, 0]], np.uint8)
    root = a_set(tmp_path, colors)
    found = SegmentationSet(root, "train", modalities=("rgb",), num_classes=3).palette
    if padded:
        assert found is None
    else:
        np.testing.assert_array_equal(found, colors)


def a_set(root: Path, colors: np.ndarray) -> Path:
    """One scene whose labels have a palette."""
    (root / "rgb").mkdir()
    (root / "masks").mkdir()
    assert cv2.imwrite(str(root / "rgb/a.png"), np.zeros((6, 6, 3), np.uint8))
    image = Image.fromarray((np.arange(36).reshape(6, 6) % 3).astype(np.uint8), "P")
    image.putpalette(colors.ravel().tolist())
    image.save(root / "masks/a.png")
    (root / "train.txt").write_text("rgb/a.png masks/a.png\n")
    return root


def test_large_label_maps_are_read_and_pillows_limit_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is the program's; its own label maps are no stranger's files."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    root = a_set(tmp_path, np.array([[0, 0, 0], [200, 0, 0], [0, 200, 0]], np.uint8))
    np.testing.assert_array_equal(
        read_label_values(root / "masks/a.png").values, np.arange(36).reshape(6, 6) % 3
    )
    assert Image.MAX_IMAGE_PIXELS == 10
