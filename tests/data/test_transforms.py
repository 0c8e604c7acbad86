"""Augmentation against the same steps written out one by one; broadening of channels."""

import cv2
import numpy as np
import pytest

from models.data import Sample, TrainTransform, broaden


def scene(height: int, width: int, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    rgb = rng.normal(size=(height, width, 3)).astype(np.float32)
    depth = rng.uniform(1, 9, (height, width, 1)).astype(np.float32)
    return Sample((rgb, depth), rng.integers(0, 40, (height, width), np.uint8), "scene", ("rgb", "depth"))


def located(height: int, width: int) -> Sample:
    """Pixels that tell where they come from: RGB holds row, column, 1; depth the pixel's number + 1."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    numbers = rows * width + columns
    rgb = np.stack([rows, columns, np.ones_like(rows)], -1)
    target = (numbers % 200).astype(np.uint8)
    return Sample((rgb, numbers[:, :, None] + 1), target, "located", ("rgb", "depth"))


def bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resizing in float64, pixel centres aligned, edges repeated."""
    out = image.astype(np.float64)
    for axis, new in enumerate(size):
        old = image.shape[axis]
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        share = (place - low).reshape([-1 if a == axis else 1 for a in range(image.ndim)])
        out = np.take(out, low, axis) * (1 - share) + np.take(out, np.minimum(low + 1, old - 1), axis) * share
    return out


def nearest(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The source pixel in which each new pixel's centre lies."""
    rows, columns = (
        ((2 * np.arange(new) + 1) * old // (2 * new)) for new, old in zip(size, image.shape, strict=False)
    )
    return image[rows][:, columns]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("height", "width"), [(49, 65), (51, 37), (31, 31)])
def test_written_out(height: int, width: int, seed: int) -> None:
    """Crops that are padded, cut, or one of each. Sides are odd: no pixel centre falls on a border of two."""
    sample, transform = scene(height, width), TrainTransform(crop=40, shorter_side=35)
    result = transform(sample, np.random.default_rng(seed))

    rng = np.random.default_rng(seed)  # the same draws in the same order
    scale = 35 * rng.uniform(0.5, 2) / min(height, width)
    size = (round(height * scale), round(width * scale))
    start = [int(rng.integers(length - 40 + 1)) if length > 40 else 0 for length in size]
    mirror = rng.random() < 0.5
    for image, resized, fill in (
        (result.images[0], bilinear(sample.images[0], size), 0),
        (result.images[1], nearest(sample.images[1], size), 0),
        (result.target, nearest(sample.target, size), 255),
    ):
        cropped = resized[start[0] : start[0] + 40, start[1] : start[1] + 40]
        margins = [((40 - n) // 2, 40 - n - (40 - n) // 2) for n in cropped.shape[:2]]
        margins += [(0, 0)] * (image.ndim - 2)
        expected = np.pad(cropped, margins, constant_values=fill)
        expected = expected[:, ::-1] if mirror else expected
        assert image.shape == expected.shape
        np.testing.assert_allclose(image, expected, atol=2e-3)
    assert (result.name, result.modalities) == (sample.name, sample.modalities)


def test_same_geometry_for_all() -> None:
    """Where depth and labels show a pixel, RGB shows the same place to within half a pixel."""
    sample, transform = located(60, 80), TrainTransform(crop=50, shorter_side=60, scales=(1.0, 2.0))
    mirrored = 0
    for seed in range(20):
        (rgb, depth), target = (
            (result := transform(sample, np.random.default_rng(seed))).images,
            result.target,
        )
        shown = depth[:, :, 0] > 0
        np.testing.assert_array_equal(shown, target != 255)
        number = depth[shown][:, 0] - 1
        np.testing.assert_array_equal(target[shown], (number % 200).astype(np.uint8))
        assert np.abs(rgb[shown][:, 0] - number // 80).max() <= 0.5 + 1e-3
        assert np.abs(rgb[shown][:, 1] - number % 80).max() <= 0.5 + 1e-3
        inner = rgb[25, 1:-1, 1]
        mirrored += bool(inner[0] > inner[-1])
    assert 4 <= mirrored <= 16


def test_scale_covers_its_range() -> None:
    """The padded height tells the scale: uniform between half and twice the shorter side."""
    sample, transform = scene(40, 40), TrainTransform(crop=80, shorter_side=40)
    heights = np.array(
        [(transform(sample, np.random.default_rng(seed)).target[:, 40] != 255).sum() for seed in range(400)]
    )
    assert heights.min() in (20, 21)
    assert heights.max() in (79, 80)
    assert abs(heights.mean() - 50) < 3  # its standard deviation is 0.87


def test_crop_reaches_every_corner() -> None:
    sample, transform = located(30, 30), TrainTransform(crop=28, shorter_side=30, scales=(1.0, 1.0))
    corners = {
        transform(sample, np.random.default_rng(seed)).images[0][:, :, :2].min((0, 1)).tobytes()
        for seed in range(200)
    }
    assert corners == {np.float32([row, column]).tobytes() for row in range(3) for column in range(3)}


def test_one_seed_one_result() -> None:
    sample, transform = scene(48, 64), TrainTransform(crop=40, shorter_side=35)
    first, again, other = (transform(sample, np.random.default_rng(seed)) for seed in (7, 7, 8))
    for a, b, c in zip(
        (*first.images, first.target), (*again.images, again.target), other.images, strict=False
    ):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_sample_is_left_alone() -> None:
    sample = scene(20, 20)
    before = [array.copy() for array in (*sample.images, sample.target)]
    result = TrainTransform(crop=20, shorter_side=20, scales=(1.0, 1.0))(sample, np.random.default_rng(0))
    result.images[0][:] = 0
    for array, copy in zip((*sample.images, sample.target), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_normals_of_a_mirrored_sample_are_mirrored() -> None:
    """Turned over twice, in the picture and in x, they are those of the mirrored scene."""
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(12, 12, 3)).astype(np.float32)
    sample = Sample((normals,), np.zeros((12, 12), np.uint8), "scene", ("normals",))
    transform = TrainTransform(crop=12, shorter_side=12, scales=(1.0, 1.0))
    results = [transform(sample, np.random.default_rng(seed)).images[0] for seed in range(8)]
    mirrored = normals[:, ::-1] * np.float32([-1, 1, 1])
    found = [np.array_equal(result, mirrored) for result in results]
    assert any(found)
    assert not all(found)
    for result, turned in zip(results, found, strict=True):
        np.testing.assert_array_equal(result, mirrored if turned else normals)


def test_ignore_index_pads_labels() -> None:
    sample = scene(10, 10)
    transform = TrainTransform(crop=20, shorter_side=10, scales=(1.0, 1.0), ignore_index=77)
    target = transform(sample, np.random.default_rng(0)).target
    assert set(np.unique(target[:5])) == {77}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 0}, "crop must be positive, got 0"),
        ({"shorter_side": -1}, "shorter_side must be positive, got -1"),
        ({"scale_of": "side"}, "scale_of must be 'shorter_side' or 'image', got 'side'"),
        ({"scales": (2.0, 0.5)}, "scales must be two positive factors"),
        ({"scales": (0.0, 1.0)}, "scales must be two positive factors"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainTransform(**options)


@pytest.mark.parametrize(("scales", "side"), [((1.5, 1.5), 45), ((0.5, 0.5), 24)])
def test_scale_of_the_image_is_raised_to_the_shorter_side(scales: tuple[float, float], side: int) -> None:
    """30 times 1.5, or the 24 below which it must not fall: what is padded tells the size."""
    transform = TrainTransform(crop=90, shorter_side=24, scales=scales, scale_of="image")
    target = transform(located(30, 40), np.random.default_rng(0)).target
    rows, columns = (np.flatnonzero((target != 255).any(axis)) for axis in (1, 0))
    assert (len(rows), len(columns)) == (side, side * 4 // 3)


def test_opencv_is_no_second_source_of_chance() -> None:
    """Threads do not change a bit."""
    sample, transform = scene(200, 300), TrainTransform(crop=300, shorter_side=250)
    threads = cv2.getNumThreads()
    results = []
    try:
        for number in (0, 4):
            cv2.setNumThreads(number)
            results.append(transform(sample, np.random.default_rng(3)).images[0])
    finally:
        cv2.setNumThreads(threads)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("counts", "channels", "expected"),
    [((3, 1), 1, 3), ((2, 3), 1, 6), ((1,), 1, 1), ((1,), 3, 3), ((2, 1), 3, 6)],
)
def test_broaden(counts: tuple[int, ...], channels: int, expected: int) -> None:
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(4, 5, count)) for count in counts]
    for image, broad in zip(images, broaden(images, channels), strict=True):
        assert broad.shape == (4, 5, expected)
        for channel in range(expected):
            np.testing.assert_array_equal(broad[:, :, channel], image[:, :, channel % image.shape[2]])
