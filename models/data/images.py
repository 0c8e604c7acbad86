"""Reading of single image files; whatever is wrong with one becomes a DataError that names it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})

# What each 8-bit value of each colour becomes, [1, 256, 3]: one look-up normalises a picture, four times as
# fast as the arithmetic on float32 (0.4 against 1.9 ms for 640x480) and rounded once only.
_NORMALISED = ((np.arange(256.0)[:, None] / 255 - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32)[None]


class DataError(ValueError):
    """A data set's file is missing, broken or not what its layout promises; the message names the file."""


class Frame(NamedTuple):
    """A decoded picture without a file of its own, of a video for example; read as if it were a file."""

    name: str  # what messages call it
    pixels: NDArray[Any]  # as OpenCV decodes it, colours blue first

    def __str__(self) -> str:
        return self.name


def size_of(image: NDArray[Any]) -> str:
    """``640x480``: width and height, as messages give them."""
    return f"{image.shape[1]}x{image.shape[0]}"


def read_rgb(path: Path | Frame) -> NDArray[np.float32]:
    """Read an 8-bit colour picture (any suffix OpenCV knows) for a network with ImageNet weights.

    Returns:
        ``[H, W, 3]`` float32, red first, normalised by the mean and standard deviation of ImageNet.

    Raises:
        DataError: unreadable, broken or truncated file; not 8-bit with three channels.
    """
    return _normalise(path, _decode(path))


def read_depth(path: Path | Frame, depth_scale: float | None, bit_shift: int = 0) -> NDArray[np.float32]:
    """Read a depth map; 0 stands for a missing value.

    Args:
        path: a picture of 16 bits and one channel; of 8 or 16 bits where there is no scale, and of frames,
            whose bits are video's.
        depth_scale: stored units in one metre; None: a brightness, whose largest possible value becomes 1.
        bit_shift: by how many bits the stored values are rotated to the right first (SUN RGB-D: 3).

    Returns:
        ``[H, W, 1]`` float32 in metres, not normalised (as in the authors' released code).

    Raises:
        DataError: unreadable, broken or truncated file; other bits or channels.
    """
    image = _decode(path)
    if depth_scale is None and image.ndim == 3:  # grey saved as colour
        image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    metric_file = depth_scale is not None and isinstance(path, Path)
    allowed = (np.uint16,) if metric_file else (np.uint8, np.uint16)
    if image.dtype not in allowed or image.ndim != 2:
        bits = " or ".join(f"{8 * np.dtype(kind).itemsize}" for kind in allowed)
        raise DataError(f"{path}: expected depth of {bits} bits and 1 channel, found {kind_of(image)}")
    if bit_shift and image.dtype == np.uint16:
        image = image >> bit_shift | image << (16 - bit_shift)
    unit = np.iinfo(image.dtype).max if depth_scale is None else depth_scale
    return np.asarray(image / np.float32(unit), np.float32)[:, :, None]


def read_stored(path: Path) -> NDArray[Any]:
    """Read what a picture's file holds, as it is.

    Returns:
        ``[H, W]``, or ``[H, W, C]`` with red first, of the file's own type.

    Raises:
        DataError: unreadable, broken or truncated file.
    """
    image = _decode(path)
    if image.ndim == 2:
        return image
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)


def read_disparity(path: Path | Frame) -> NDArray[np.float32]:
    """Read a disparity map of Cityscapes: (stored - 1) / 256 pixels, 0 where it is missing.

    Returns:
        ``[H, W, 1]`` float32 in pixels.

    Raises:
        DataError: unreadable, broken or truncated file; not 16-bit with one channel.
    """
    image = _decode(path)
    if image.dtype != np.uint16 or image.ndim != 2:
        raise DataError(f"{path}: expected disparity of 16 bits and 1 channel, found {kind_of(image)}")
    return np.maximum((image.astype(np.float32) - 1) / 256, 0)[:, :, None]


def read_picture(path: Path | Frame, limits: Sequence[float] | None = None) -> NDArray[np.float32]:
    """Read a picture of any modality: colour as ``read_rgb``, one channel scaled to 0 ... 1.

    Args:
        path: 8 bits and 3 channels, or 8 or 16 bits and 1.
        limits: the stored values of a single channel that become 0 and 1; None: 0 and the largest possible.

    Returns:
        ``[H, W, 3]`` or ``[H, W, 1]`` float32.

    Raises:
        DataError: unreadable, broken or truncated file; other bits or channels.
    """
    image = _decode(path)
    if image.ndim == 3:
        return _normalise(path, image)
    if image.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{path}: expected one channel of 8 or 16 bits, found {kind_of(image)}")
    low, high = limits or (0, np.iinfo(image.dtype).max)
    return ((image.astype(np.float32) - np.float32(low)) / np.float32(high - low))[:, :, None]


def read_normals(path: Path | Frame) -> NDArray[np.float32]:
    """Read surface normals, stored as 127.5 + 127.5 times the component; black is missing and becomes 0.

    Returns:
        ``[H, W, 3]`` float32, x, y and z of the file's red, green and blue.

    Raises:
        DataError: unreadable, broken or truncated file; not 8-bit with three channels.
    """
    image = _decode(path)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"{path}: expected normals of 8 bits and 3 channels, found {kind_of(image)}")
    known = image.any(axis=-1, keepdims=True)
    return (image[:, :, ::-1] / np.float32(127.5) - 1) * known


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
        path: a picture of 8 or 16 bits and one channel, or an array of integers in a ``.npy`` file:
            class + ``label_offset``, or void.
        num_classes: classes are ``0 .. num_classes-1``.
        label_offset: what the file adds to the class; stored values below it are void.
        ignore_index: the value of void pixels in the result, and in the file as well.
        label_map: what each class of the file becomes, -1 for void; empty: itself.
        void: another value of void pixels in the file.

    Returns:
        ``[H, W]`` uint8 of classes and ``ignore_index``.

    Raises:
        DataError: unreadable, broken or truncated file; more than one channel; a value that is no class.
    """
    stored = _load(path) if path.suffix == ".npy" else _decode(path)
    if stored.dtype not in (np.uint8, np.uint16) or stored.ndim != 2:
        raise DataError(
            f"{path}: expected labels of 8 or 16 bits and 1 channel, found {kind_of(stored)}"
            " (a palette picture is to be saved as grey values)"
        )
    known = len(label_map) or num_classes
    voids = dict.fromkeys((ignore_index, ignore_index if void is None else void))
    outside = (stored >= known + label_offset) & ~np.isin(stored, list(voids))
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise DataError(
            f"{path}: label {stored[row, column]} at row {row}, column {column} is out of range: expected"
            f" {label_offset} to {known + label_offset - 1}, or {' or '.join(map(str, voids))} for void"
            f" ({np.count_nonzero(outside)} such pixels)"
        )
    if label_offset == 0 and not label_map and len(voids) == 1:
        return stored.astype(np.uint8, copy=False)
    # What every stored value that has passed becomes; a value that is class and void at once is void.
    becomes = np.full(max(known + label_offset, *voids) + 1, ignore_index, np.uint8)
    classes = np.asarray(label_map or range(known))
    becomes[label_offset : label_offset + known] = np.where(classes < 0, ignore_index, classes)
    becomes[list(voids)] = ignore_index
    return becomes[stored]


def _load(path: Path) -> NDArray[Any]:
    """An array of small integers."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: broken or truncated array ({error})") from error
    if array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() < 2**16:
        return np.asarray(array, np.uint16)
    return array


def _normalise(path: Path | Frame, image: NDArray[Any]) -> NDArray[np.float32]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"{path}: expected a colour picture of 8 bits and 3 channels, found {kind_of(image)}")
    return np.asarray(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), _NORMALISED), np.float32)


def _decode(path: Path | Frame) -> NDArray[Any]:
    """The stored values, colours blue first; a turn noted in a photograph's EXIF data is not carried out."""
    if isinstance(path, Frame):
        return path.pixels
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


def kind_of(image: NDArray[Any]) -> str:
    """``8 bits and 3 channels``, as messages give what a file holds."""
    channels = 1 if image.ndim == 2 else image.shape[2]
    return f"{8 * image.itemsize} bits and {channels} channel{'s' * (channels > 1)}"
