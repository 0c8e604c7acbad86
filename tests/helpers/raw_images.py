"""Image files written by hand, bit by bit, so that no library's idea of their values is in them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"
GRAY, PALETTE = 0, 3  # PNG's color types
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_ORIENTATION = 274


def packed(values: np.ndarray, bits: int) -> bytes:
    """Rows of values of 1, 2, 4, 8 or 16 bits, each filled up to whole bytes, most significant bits first."""
    if bits == 16:
        return values.astype(">u2").tobytes()
    spread = (values[..., None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)
    return np.packbits(spread.reshape(len(values), -1), axis=1).tobytes()


def png(
    values: np.ndarray,
    bits: int,
    colors: np.ndarray | None = None,
    *,
    chunks: Sequence[tuple[bytes, bytes]] = (),
    interlaced: bool = False,
) -> bytes:
    """A PNG of gray values, or of indices of ``colors`` ``[n, 3]``; further chunks go before the pixels."""
    height, width = values.shape
    kind = GRAY if colors is None else PALETTE
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, int(interlaced))
    passes = [values[a::c, b::d] for a, b, c, d in _ADAM7] if interlaced else [values]
    rows = b"".join(b"\0" + packed(row[None], bits) for part in passes if part.size for row in part)
    palette = [(b"PLTE", np.asarray(colors, np.uint8).tobytes())] if colors is not None else []
    every = [(b"IHDR", header), *palette, *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return PNG + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in every
    )


def exif(orientation: int) -> bytes:
    """A block of EXIF that holds the orientation and nothing else."""
    return struct.pack("<2sHIHHHIIi", b"II", 42, 8, 1, _ORIENTATION, 3, 1, orientation, 0)


def with_orientation(image: np.ndarray, orientation: int, suffix: str) -> bytes:
    """An image whose file asks viewers to turn it: ``.png .jpg .webp .tif``; WebP is lossless."""
    if suffix == ".png" and image.ndim == 2:
        return png(image, 8 * image.itemsize, chunks=[(b"eXIf", exif(orientation))])
    file, picture = io.BytesIO(), Image.fromarray(image)
    if suffix == ".tif":
        picture.save(file, "TIFF", tiffinfo={_ORIENTATION: orientation})
    else:
        options = {".png": {}, ".jpg": {"quality": 95}, ".webp": {"lossless": True}}[suffix]
        kind = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[suffix]
        data = Image.Exif()
        data[_ORIENTATION] = orientation
        picture.save(file, kind, exif=data, **options)
    return file.getvalue()


def tiff(values: np.ndarray, bits: int | None = None, colors: np.ndarray | None = None) -> bytes:
    """An uncompressed little-endian TIFF: gray of 1, 2, 4 or 8 bits, or indices; or numbers of any type."""
    height, width = values.shape
    if bits is None:
        data, bits = values.astype(values.dtype.newbyteorder("<")).tobytes(), 8 * values.itemsize
        form = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    else:
        data, form = packed(values, bits), 1
    photometric = 1 if colors is None else 3
    tags: dict[int, tuple[int, Sequence[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits]),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, [8]),
        277: (3, [1]),
        278: (4, [height]),
        279: (4, [len(data)]),
        339: (3, [form]),
    }
    if colors is not None:
        full = np.zeros((2**bits, 3), int)
        full[: len(colors)] = colors
        tags[320] = (3, (257 * full.T).ravel().tolist())
    data += b"\0" * (len(data) % 2)
    start = 8 + len(data)
    beyond, entries = start + 2 + 12 * len(tags) + 4, b""
    extra = b""
    for tag, (kind, numbers) in sorted(tags.items()):
        content = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(content) > 4:
            place = struct.pack("<I", beyond + len(extra))
            extra += content
        else:
            place = content.ljust(4, b"\0")
        entries += struct.pack("<HHI", tag, kind, len(numbers)) + place
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return struct.pack("<2sHI", b"II", 42, start) + data + directory + extra
