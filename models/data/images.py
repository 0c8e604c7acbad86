"""Reading of single image files; whatever is wrong with one becomes a DataError that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What each 8-bit value of each colour becomes, [1, 256, 3]: one look-up normalises a picture, four times as
# fast as the arithmetic on float32 (0.4 against 1.9 ms for 640x480) and rounded once only.
_NORMALISED = ((np.arange(256.0)[:, None] / 255 - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32)[None]


class DataError(ValueError):
    """A data set's file is missing, broken or not what its layout promises; the message names the file."""


def size_of(image: NDArray[Any]) -> str:
    """``640x480``: width and height, as messages give them."""
    return f"{image.shape[1]}x{image.shape[0]}"


def read_rgb(path: Path) -> NDArray[np.float32]:
    """Read an 8-bit colour picture (any suffix OpenCV knows) for a network with ImageNet weights.

    Returns:
        ``[H, W, 3]`` float32, red first, normalised by the mean and standard deviation of ImageNet.

    Raises:
        DataError: unreadable, broken or truncated file; not 8-bit with three channels.
    """
    image = _decode(path)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"{path}: expected a colour picture of 8 bits and 3 channels, found {_kind(image)}")
    return np.asarray(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), _NORMALISED), np.float32)


def read_depth(path: Path, depth_scale: float) -> NDArray[np.float32]:
    """Read a 16-bit depth map; ``depth_scale`` stored units are one metre, 0 stands for a missing value.

    Returns:
        ``[H, W, 1]`` float32 in metres, not normalised (as in the authors' released code).

    Raises:
        DataError: unreadable, broken or truncated file; not 16-bit with one channel.
    """
    image = _decode(path)
    if image.dtype != np.uint16 or image.ndim != 2:
        raise DataError(f"{path}: expected depth of 16 bits and 1 channel, found {_kind(image)}")
    return np.asarray(image / np.float32(depth_scale), np.float32)[:, :, None]


def read_labels(
    path: Path, num_classes: int, label_offset: int = 0, ignore_index: int = 255
) -> NDArray[np.uint8]:
    """Read a label map and check every value of it.

    Args:
        path: a picture of 8 or 16 bits and one channel: class + ``label_offset``, or ``ignore_index``.
        num_classes: classes are ``0 .. num_classes-1``.
        label_offset: what the file adds to the class; stored values below it are void.
        ignore_index: the value of void pixels, in the file and in the result.

    Returns:
        ``[H, W]`` uint8 of classes and ``ignore_index``.

    Raises:
        DataError: unreadable, broken or truncated file; more than one channel; a value that is no class.
    """
    stored = _decode(path)
    if stored.dtype not in (np.uint8, np.uint16) or stored.ndim != 2:
        raise DataError(
            f"{path}: expected labels of 8 or 16 bits and 1 channel, found {_kind(stored)}"
            " (a palette picture is to be saved as grey values)"
        )
    outside = (stored >= num_classes + label_offset) & (stored != ignore_index)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise DataError(
            f"{path}: label {stored[row, column]} at row {row}, column {column} is out of range: expected"
            f" {label_offset} to {num_classes + label_offset - 1}, or {ignore_index} for void"
            f" ({np.count_nonzero(outside)} such pixels)"
        )
    if label_offset == 0:
        return stored.astype(np.uint8, copy=False)
    void = (stored < label_offset) | (stored == ignore_index)
    return np.where(void, ignore_index, stored.astype(np.int32) - label_offset).astype(np.uint8)


def _decode(path: Path) -> NDArray[Any]:
    """The stored values, colours blue first; a turn noted in a photograph's EXIF data is not carried out."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    # imread fills the rest of a truncated JPEG with grey and says nothing; imdecode refuses it.
    try:
        image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    except cv2.error as error:
        raise DataError(f"{path}: cannot be decoded ({error.err})") from error
    if image is None:
        raise DataError(f"{path}: broken or truncated image, or none at all ({data.size} bytes)")
    return image


def _kind(image: NDArray[Any]) -> str:
    channels = 1 if image.ndim == 2 else image.shape[2]
    return f"{8 * image.itemsize} bits and {channels} channel{'s' * (channels > 1)}"
