"""The content of a file as it is stored: images, arrays, and the values of label maps.

Decoders like to help: OpenCV stretches gray of fewer than 8 bits to 255 and replaces palette indices by their
colors, and viewers turn photographs by their EXIF data. Labels and distances must survive all of that.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 0x0102  # tags of TIFF and EXIF
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
_PNG_GRAY, _PNG_PALETTE = 0, 3  # color types
_EXIF_WITHIN = 1 << 18  # bytes; in JPEG it is one of the first segments, each of at most 2**16


class DataError(ValueError):
    """A data set's file is missing, broken or not what its layout promises; the message names the file."""


class Frame(NamedTuple):
    """Pixels without a file of their own, of a video or in memory; read as if they were a file's."""

    name: str  # its name in messages
    pixels: NDArray[Any]  # [H, W] or [H, W, C], colors red first
    is_video: bool = False  # whose depth has 8 bits, and a scale given for it

    def __str__(self) -> str:
        return self.name


class LabelValues(NamedTuple):
    """A label map as it is stored.

    Attributes:
        values: ``[H, W]`` integers of the file's own type; of a palette image the indices.
        palette: ``[n, 3]`` uint8, red first, where the file has one.
    """

    values: NDArray[Any]
    palette: NDArray[np.uint8] | None = None


def size_of(image: NDArray[Any]) -> str:
    """``640x480``: width and height, as messages give them."""
    return f"{image.shape[1]}x{image.shape[0]}"


def kind_of(image: NDArray[Any]) -> str:
    """``8 bits and 3 channels`` or ``signed 16 bits and 1 channel``, as messages give what a file holds."""
    channels = 1 if image.ndim == 2 else image.shape[-1]
    signs = {"i": "signed ", "f": "floating point of ", "b": "boolean, "}
    bits = f"{signs.get(image.dtype.kind, '')}{8 * image.itemsize} bits"
    return f"{bits} and {channels} channel{'s' * (channels > 1)}"


def read_stored(path: Path | Frame) -> NDArray[Any]:
    """Read what an image or a ``.npy`` array holds.

    Returns:
        ``[H, W]``, or ``[H, W, C]`` with red first, of the file's own type. OpenCV's decoding: gray of fewer
        than 8 bits spans 0 to 255, a palette's colors take the place of its indices.

    Raises:
        DataError: unreadable, broken or truncated file; an array that is no image; EXIF data that asks for
            the image to be turned.
    """
    if isinstance(path, Frame):
        return _as_image(path, path.pixels)
    if path.suffix.lower() == ".npy":
        return _as_image(path, _load(path, path))
    return decode(path, _bytes_of(path))


def frame_of(name: str, data: bytes, *, values: bool = False) -> Frame:
    """The bytes of an image or a ``.npy`` array as a frame, which is read as the file would be.

    Args:
        name: the file's, for messages.
        data: its bytes; they say themselves whether they are an array.
        values: read them as ``read_label_values`` does: numbers of something, as of categorical modalities.

    Raises:
        DataError: as ``read_stored`` and, with ``values``, ``read_label_values``.
    """
    if data.startswith(NPY):
        return Frame(name, _as_image(name, _load(name, io.BytesIO(data))))
    return Frame(name, _label_values(name, data).values if values else decode(name, data))


def declared_size(name: str, data: bytes) -> tuple[int, ...]:
    """Height and width that a file's head declares, of an array its shape; nothing of it is decoded.

    Raises:
        DataError: the head is broken, or of a format whose head Pillow cannot read.
    """
    try:
        if not data.startswith(NPY):
            width, height = _opened(data).size
            return height, width
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read:
            raise ValueError(f"version {version[0]}.{version[1]} of the format")
        return tuple(read[version](file)[0])
    except (OSError, SyntaxError, ValueError, TypeError) as error:
        raise DataError(f"{name}: broken image, or one whose size its head does not tell ({error})") from None


def read_label_values(path: Path | Frame) -> LabelValues:
    """Read a label map, or another image whose values are numbers of something.

    Raises:
        DataError: as ``read_stored``; a lossy format (JPEG, lossy WebP), which changes classes along every
            edge; more than one channel, or values that are not whole.
    """
    if isinstance(path, Frame) or path.suffix.lower() == ".npy":
        found = LabelValues(read_stored(path))
    else:
        found = _label_values(path, _bytes_of(path))
    values = found.values
    if values.dtype.kind == "b":
        found = found._replace(values=values.astype(np.uint8))
    elif values.dtype.kind not in "iu" or values.ndim != 2:
        hint = " (colors do not say which class is which: save gray values, or a palette image)"
        raise DataError(
            f"{path}: expected labels of 8 or 16 bits and 1 channel, found {kind_of(values)}"
            f"{hint * (values.ndim == 3)}"
        )
    return found


def _label_values(path: Path | str, data: bytes) -> LabelValues:
    if lossy := _lossy_format(data):
        raise DataError(
            f"{path}: labels in {lossy}, which changes classes along edges; save them as PNG from the source"
        )
    return _indices(path, data)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def decode(path: Path | str, data: bytes) -> NDArray[Any]:
    """Decode an image file's bytes as ``read_stored`` does."""
    # imread fills the rest of a truncated JPEG with gray and says nothing; imdecode refuses it.
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    except cv2.error as error:
        raise DataError(f"{path}: cannot be decoded ({error.err})") from error
    if image is None:
        raise DataError(f"{path}: broken or truncated image, or none at all ({len(data)} bytes)")
    _check_orientation(path, data)
    if image.ndim == 2:
        return image
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)


def _load(path: Path | str, source: Path | io.BytesIO) -> NDArray[Any]:
    try:
        array = np.load(source, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of several")
        return array
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"{path}: broken or truncated array ({error})") from error


def _as_image(path: Path | str | Frame, array: NDArray[Any]) -> NDArray[Any]:
    """An array as decoders return images: one channel has no axis of its own."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or array.dtype.kind not in "biuf" or not array.size:
        raise DataError(
            f"{path}: expected an array [height, width] or [height, width, channels] of numbers, found"
            f" {array.dtype} {list(array.shape)}"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _opened(data: bytes) -> Image.Image:
    """An image as Pillow opens it, however large: the limit for strangers' files is the program's to set."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(io.BytesIO(data))
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_orientation(path: Path | str, data: bytes) -> None:
    """Refuse a file that is to be turned: doing so would part it from the others of its scene."""
    if (orientation := _orientation(data)) != 1:
        raise DataError(
            f"{path}: its EXIF data asks viewers to turn or mirror it (orientation {orientation}); turn the"
            " pixels of all files of a scene alike and remove the tag"
        )


def _orientation(data: bytes) -> int:
    """The EXIF orientation, 1 (as stored) where there is none."""
    if data.startswith(_JPEG):
        noted = b"Exif\0\0" in data[:_EXIF_WITHIN]
    else:
        noted = data.startswith(_TIFF) or b"eXIf" in data or b"EXIF" in data
    if not noted:
        return 1
    try:
        return int(_opened(data).getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError):  # the bytes only looked like EXIF
        return 1


def _lossy_format(data: bytes) -> str:
    if data.startswith(_JPEG):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP" and b"VP8L" not in data:
        return "lossy WebP"
    if data.startswith(_TIFF):
        try:
            compression = _opened(data).info.get("compression")
        except (OSError, SyntaxError, ValueError):  # what is no TIFF after all is said where it is decoded
            return ""
        return "JPEG within TIFF" if compression in ("jpeg", "tiff_jpeg") else ""
    return ""


def _indices(path: Path | str, data: bytes) -> LabelValues:
    if data.startswith((b"BM", *_TIFF)):
        try:
            found = _with_pillow(data)
        except (OSError, ValueError, SyntaxError):  # kinds that OpenCV knows and Pillow does not
            return LabelValues(decode(path, data))
        _check_orientation(path, data)
        return found
    decoded = decode(path, data)  # for PNG as well: Pillow does not check all sums of what it reads
    if data.startswith(_PNG):
        bits, color_type = data[24], data[25]
        if color_type == _PNG_PALETTE:
            return _with_pillow(data)
        return LabelValues(_unstretched(decoded, bits) if color_type == _PNG_GRAY else decoded)
    return LabelValues(decoded)


def _with_pillow(data: bytes) -> LabelValues:
    with _opened(data) as image:
        if image.mode == "P":
            colors = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            return LabelValues(np.asarray(image), colors)
        if image.mode == "1":
            return LabelValues(np.asarray(image).astype(np.uint8))
        values = np.asarray(image)
        bits = image.getexif().get(_BITS_PER_SAMPLE, 8) if image.format == "TIFF" else 8
        return LabelValues(_unstretched(values, bits[0] if isinstance(bits, tuple) else bits))


def _unstretched(image: NDArray[Any], bits: int) -> NDArray[Any]:
    """Values of fewer than 8 bits that a decoder has stretched to 0 ... 255."""
    return image // np.uint8(255 // (2**bits - 1)) if bits < 8 and image.dtype == np.uint8 else image
