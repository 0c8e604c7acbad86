"""Image files to the numbers that networks are fed; what is wrong becomes a DataError that names the file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from models.data.stored import (
    DataError,
    Frame,
    frame_of,
    kind_of,
    read_label_values,
    read_stored,
    size_of,
)

__all__ = [
    "DataError",
    "Frame",
    "frame_of",
    "kind_of",
    "read_label_values",
    "read_stored",
    "size_of",
]  # the names of ``stored``, re-exported

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
FILE_SUFFIXES = IMAGE_SUFFIXES | {".npy"}  # the suffixes of a scene's files

# Stands in place of a depth scale where nobody has said what a stored unit is.
UNKNOWN_SCALE = "unknown"
DepthScale = float | str | None

Source = Path | Frame
Image = NDArray[np.float32]  # [H, W, C]

# Mean difference between two channels, of 255, that JPEG leaves in a gray image saved as color.
_GRAY_WITHIN = 2.0
_BRIGHTNESS = '; 8 bits are too coarse for meters, but brightness with "depth_scale": null in layout.json'
_UNLABELED = -1  # stands for no class in arrays of signed integers


def read_rgb(path: Source) -> Image:
    """Read an 8-bit color image (any suffix OpenCV knows) for a network with ImageNet weights.

    Returns:
        ``[H, W, 3]`` float32, red first, normalized by the mean and standard deviation of ImageNet.

    Raises:
        DataError: unreadable, broken or truncated file; not 8-bit with three channels.
    """
    return color_image(path, read_stored(path))


def color_image(
    path: Source,
    stored: NDArray[Any],
    gray: bool = False,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Image:
    """``read_rgb`` of what was read, by another mean and standard deviation of colors from 0 to 1 if given.

    With ``gray``, one channel stands for three equal ones.
    """
    if gray and stored.ndim == 2:
        stored = np.repeat(stored[:, :, None], 3, axis=2)
    if stored.dtype != np.uint8 or stored.ndim != 3 or stored.shape[2] != 3:
        raise DataError(
            f"{path}: expected a color image of 8 bits and 3 channels, found {kind_of(stored)}{_pick(stored)}"
        )
    return np.asarray(cv2.LUT(stored, _normalized(mean, std)), np.float32)


@lru_cache
def _normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """The normalized value of each 8-bit value of each color, ``[1, 256, 3]``.

    One look-up normalizes an image, four times as fast as the arithmetic on float32 (0.4 against 1.9 ms for
    640x480) and rounded once only.
    """
    return ((np.arange(256.0)[:, None] / 255 - mean) / std).astype(np.float32)[None]


def read_depth(path: Source, depth_scale: DepthScale, bit_shift: int = 0) -> Image:
    """Read a depth map; 0 stands for a missing value.

    Args:
        path: one channel. Floating point holds meters, whatever ``depth_scale`` says. Integers have 16 bits
            or more; 8 as well where there is no scale, and in frames of video.
        depth_scale: stored units per meter; None: brightness of 8 or 16 bits, whose largest value becomes 1.
        bit_shift: by how many bits stored values of 16 bits are rotated to the right first (SUN RGB-D: 3).

    Returns:
        ``[H, W, 1]`` float32 in meters, not normalized (as in the authors' released code). What is negative,
        not finite, 0 or, of more than 8 bits, the largest integer is missing.

    Raises:
        DataError: unreadable, broken or truncated file; other bits or channels; integers of unknown scale.
    """
    return depth_image(path, read_stored(path), depth_scale, bit_shift)


def depth_image(
    path: Source,
    stored: NDArray[Any],
    depth_scale: DepthScale,
    bit_shift: int = 0,
    missing: Sequence[float] = (),
) -> Image:
    """``read_depth`` of what was read; further stored values may be ``missing``."""
    if depth_scale is None and stored.ndim == 3:  # gray saved as color
        stored = _one_channel(path, stored, "depth")
    if depth_scale == UNKNOWN_SCALE and stored.dtype.kind != "f":
        raise DataError(
            f"{path}: depth_scale is not known: give the stored units per meter as data.depth_scale"
            ' or in layout.json, as "depth_scale": 1000 for millimeters, null for brightness without a scale'
        )
    if not _is_depth(path, stored, depth_scale):
        allowed = "16 bits" if depth_scale is not None else "8 or 16 bits"
        raise DataError(
            f"{path}: expected depth of {allowed} and 1 channel, found {kind_of(stored)}{_pick(stored)}"
            f"{_BRIGHTNESS * (stored.dtype == np.uint8)}"
        )
    absent = _absent(stored, missing)
    values, unit = stored, 1.0
    if stored.dtype.kind != "f":
        unit = np.iinfo(stored.dtype).max if depth_scale is None else float(depth_scale)
    if bit_shift and stored.dtype == np.uint16:
        values = stored >> bit_shift | stored << (16 - bit_shift)
    with np.errstate(over="ignore"):
        image = np.asarray(values / np.float32(unit), np.float32)
    image[absent] = 0
    return image[:, :, None]


def is_metric(stored: NDArray[Any], depth_scale: DepthScale) -> bool:
    """Whether depth stored so comes out in meters."""
    return depth_scale is not None or stored.dtype.kind == "f"


def _is_depth(path: Source, stored: NDArray[Any], depth_scale: DepthScale) -> bool:
    """Whether the type can hold depth: 8 bits are too coarse for meters, but all that video has."""
    if stored.ndim != 2:
        return False
    if depth_scale is None and stored.dtype.kind != "f":
        return stored.dtype in (np.uint8, np.uint16)
    return stored.dtype.kind == "f" or stored.itemsize > 1 or (isinstance(path, Frame) and path.is_video)


def _absent(stored: NDArray[Any], missing: Sequence[float]) -> NDArray[np.bool_]:
    """A mask of pixels without depth: sensors write 0, some the largest value, floating point NaN or less."""
    if stored.dtype.kind == "f":
        with np.errstate(over="ignore"):
            absent = ~(np.isfinite(stored.astype(np.float32)) & (stored > 0))
    else:
        absent = stored <= 0
        if stored.itemsize > 1:
            absent |= stored == np.iinfo(stored.dtype).max
    return absent | is_any_of(stored, missing)


def is_any_of(stored: NDArray[Any], values: Sequence[float]) -> NDArray[np.bool_]:
    """A mask of stored values, of their own precision, that are one of ``values``."""
    found = np.zeros(stored.shape, bool)
    for value in values:
        found |= stored == value  # unlike np.isin, which compares 32 bits with 64
    return found


def read_disparity(path: Source) -> Image:
    """Read a disparity map of Cityscapes: (stored - 1) / 256 pixels, 0 where it is missing.

    Returns:
        ``[H, W, 1]`` float32 in pixels.

    Raises:
        DataError: unreadable, broken or truncated file; not 16-bit with one channel.
    """
    return disparity_image(path, read_stored(path))


def disparity_image(path: Source, stored: NDArray[Any]) -> Image:
    """``read_disparity`` of what was read."""
    if stored.dtype != np.uint16 or stored.ndim != 2:
        raise DataError(f"{path}: expected disparity of 16 bits and 1 channel, found {kind_of(stored)}")
    return np.maximum((stored.astype(np.float32) - 1) / 256, 0)[:, :, None]


def intensity_image(
    path: Source,
    stored: NDArray[Any],
    limits: Sequence[float] | None = None,
    missing: Sequence[float] = (),
) -> Image:
    """One channel of any sensor, scaled so that ``limits`` become 0 and 1.

    Args:
        path: what messages name.
        stored: ``[H, W]``, or three equal channels.
        limits: None: 0 and the largest value that the type can hold.
        missing: stored values that become 0. Beside them are NaN and infinity, and where ``limits`` are given
            0 and the type's largest value if they lie outside: no sensor measures those.

    Returns:
        ``[H, W, 1]`` float32.

    Raises:
        DataError: channels that differ; floating point or signed integers without limits.
    """
    if stored.ndim == 3:
        stored = _one_channel(path, stored, "intensity")
    absent = is_any_of(stored, missing)
    if stored.dtype.kind == "f":
        absent |= ~np.isfinite(stored)
    if limits is None:
        if stored.dtype not in (np.uint8, np.uint16):
            raise DataError(
                f"{path}: expected one channel of 8 or 16 bits, found {kind_of(stored)}; give its range in"
                " layout.json"
            )
        limits = (0, np.iinfo(stored.dtype).max)
    elif stored.dtype.kind != "f":
        for extreme in (0, np.iinfo(stored.dtype).max):
            if not min(limits) <= extreme <= max(limits):
                absent |= stored == extreme
    low, high = limits
    image = (stored.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    image[absent] = 0
    return np.asarray(image, np.float32)[:, :, None]


def read_normals(path: Source) -> Image:
    """Read surface normals, stored as 127.5 + 127.5 times the component; black is missing and becomes 0.

    Returns:
        ``[H, W, 3]`` float32, x, y and z of the file's red, green and blue.

    Raises:
        DataError: unreadable, broken or truncated file; not 8-bit with three channels.
    """
    return normals_image(path, read_stored(path))


def normals_image(path: Source, stored: NDArray[Any]) -> Image:
    """``read_normals`` of what was read."""
    if stored.dtype != np.uint8 or stored.ndim != 3 or stored.shape[2] != 3:
        raise DataError(f"{path}: expected normals of 8 bits and 3 channels, found {kind_of(stored)}")
    known = stored.any(axis=-1, keepdims=True)
    return np.asarray((stored / np.float32(127.5) - 1) * known, np.float32)


def points_image(path: Source, stored: NDArray[Any]) -> Image:
    """Points in a camera's axes, x to the right, y down, z forward, in meters as they are stored.

    Returns:
        ``[H, W, 3]`` float32; 0 where a coordinate is not finite or z is not positive.

    Raises:
        DataError: not floating point with three channels.
    """
    if stored.dtype.kind != "f" or stored.ndim != 3 or stored.shape[2] != 3:
        raise DataError(
            f"{path}: expected points in meters, floating point with 3 channels, found {kind_of(stored)}"
        )
    with np.errstate(over="ignore"):
        image = stored.astype(np.float32)
    known = np.isfinite(image).all(axis=-1) & (image[:, :, 2] > 0)
    return np.asarray(np.where(known[:, :, None], image, 0), np.float32)


def read_labels(
    path: Path,
    num_classes: int,
    label_offset: int = 0,
    ignore_index: int = 255,
    label_map: Sequence[int] = (),
    void: int | None = None,
) -> NDArray[np.uint8]:
    """Read a label map and check every value of it.

    Args:
        path: an image of one channel or of palette indices, or an array of integers in a ``.npy`` file:
            class + ``label_offset``, or void, for which arrays may have -1.
        num_classes: classes are ``0 .. num_classes-1``.
        label_offset: what the file adds to the class; stored values below it are void.
        ignore_index: the value of void pixels in the result, and in the file as well.
        label_map: what each class of the file becomes, -1 for void; empty: itself.
        void: another value of void pixels in the file.

    Returns:
        ``[H, W]`` uint8 of classes and ``ignore_index``.

    Raises:
        DataError: unreadable, broken or truncated file; as ``read_label_values``; a value that is no class.
    """
    stored = read_label_values(path).values
    return classes_of(path, stored, num_classes, label_offset, ignore_index, label_map, void)


def classes_of(
    path: Path,
    stored: NDArray[Any],
    num_classes: int,
    label_offset: int = 0,
    ignore_index: int = 255,
    label_map: Sequence[int] = (),
    void: int | None = None,
) -> NDArray[np.uint8]:
    """``read_labels`` of what was read."""
    known = len(label_map) or num_classes
    voids = dict.fromkeys((ignore_index, ignore_index if void is None else void))
    is_void = np.isin(stored, list(voids))
    if stored.dtype.kind == "i":
        is_void |= stored == _UNLABELED
    outside = (stored >= known + label_offset) & ~is_void
    if stored.dtype.kind == "i":
        outside |= (stored < 0) & ~is_void
    if outside.any():
        raise DataError(_out_of_range(path, stored, outside, known, label_offset, list(voids)))
    if stored.dtype == np.uint8 and label_offset == 0 and not label_map and len(voids) == 1:
        return stored
    # The class that every checked stored value becomes; a value that is class and void at once is void.
    becomes = np.full(max(known + label_offset, *voids) + 1, ignore_index, np.uint8)
    classes = np.asarray(label_map or range(known))
    becomes[label_offset : label_offset + known] = np.where(classes < 0, ignore_index, classes)
    becomes[list(voids)] = ignore_index
    return becomes[np.where(stored < 0, ignore_index, stored) if stored.dtype.kind == "i" else stored]


def _out_of_range(
    path: Path,
    stored: NDArray[Any],
    outside: NDArray[np.bool_],
    known: int,
    label_offset: int,
    voids: Sequence[int],
) -> str:
    row, column = np.argwhere(outside)[0]
    signed = f", {_UNLABELED}" if stored.dtype.kind == "i" else ""
    message = (
        f"{path}: label {stored[row, column]} at row {row}, column {column} is out of range: expected"
        f" {label_offset} to {known + label_offset - 1}, or {' or '.join(map(str, voids))}{signed} for void"
        f" ({np.count_nonzero(outside)} such pixels)"
    )
    if label_offset == 0 and (stored[outside] == known).all():
        message += "; do the labels count from 1, with 0 for void? Then give label_offset=1"
    return message


def _one_channel(path: Source, stored: NDArray[Any], kind: str) -> NDArray[Any]:
    """The gray image that was stored as three equal channels, or nearly equal ones where JPEG was at work."""
    if stored.shape[2] != 3:
        raise DataError(f"{path}: expected 1 channel of {kind}, found {kind_of(stored)}{_pick(stored)}")
    if not is_gray(stored):
        raise DataError(
            f"{path}: expected gray, as its kind is {kind}, found colors; give another kind in"
            " layout.json, or the file without a color map"
        )
    return np.asarray(stored[:, :, 1])


def is_gray(stored: NDArray[Any]) -> bool:
    """Whether three channels of 8 or 16 bits hold one gray image."""
    values = stored.astype(np.float32)
    apart = max(np.abs(values[..., a] - values[..., b]).mean() for a, b in ((0, 1), (1, 2)))
    whole = np.iinfo(stored.dtype).max if stored.dtype.kind in "iu" else 1.0
    return bool(apart <= _GRAY_WITHIN / 255 * whole)


def _pick(stored: NDArray[Any]) -> str:
    """The remedy where a file has channels of several modalities."""
    if stored.ndim == 2 or stored.shape[2] in (1, 3):
        return ""
    return "; name those to read by channels in layout.json (of a modality, counted from 0)"
