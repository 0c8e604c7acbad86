"""Requests as they come over the network: read within limits, and into memory alone.

The forms of web frameworks keep large files on disk; here python-multipart's parser is used itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from models.data.stored import NPY
from models.serve.refusals import Refused

_MOST_PARTS = 64
_NAME_LENGTH = 80
_MAGIC = (
    *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", NPY),
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),  # TIFF
)
FORMATS = "PNG, JPEG, WebP, BMP, TIFF or .npy"


@dataclass
class Part:
    """A field of a form.

    Attributes:
        name: the field's.
        filename: as the client calls the file, shortened and printable; None of fields that are text.
        data: the content.
    """

    name: str = ""
    filename: str | None = None
    data: bytearray = field(default_factory=bytearray)

    @property
    def given(self) -> bool:
        """Whether it is more than the empty file that browsers send where none was chosen."""
        return bool(self.data or self.filename)


class _Form:
    """Collects what the parser calls it with."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.ended = False
        self._field, self._value = bytearray(), bytearray()

    def callbacks(self) -> dict[str, Any]:
        names = ("part_begin", "part_data", "header_field", "header_value", "header_end", "end")
        return {f"on_{name}": getattr(self, name) for name in names}

    def part_begin(self) -> None:
        if len(self.parts) == _MOST_PARTS:
            raise Refused(400, f"a form of more than {_MOST_PARTS} fields")
        self.parts.append(Part())

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].data += data[start:end]

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self.parts[-1].name = _printable(options.get(b"name", b""))
            if b"filename" in options:
                self.parts[-1].filename = _printable(options[b"filename"])
        self._field, self._value = bytearray(), bytearray()

    def end(self) -> None:
        self.ended = True


def _printable(name: bytes) -> str:
    text = name.decode("utf-8", "replace")
    return "".join(letter for letter in text if letter.isprintable())[:_NAME_LENGTH]


async def read_form(
    content_type: str, body: AsyncIterator[bytes], most_bytes: int, seconds: float
) -> list[Part]:
    """The fields of a multipart form.

    Args:
        content_type: the request's.
        body: its parts.
        most_bytes: of the body. Of a larger one as much again is read and thrown away, as many clients look
            for the answer only once they have sent all.
        seconds: until when all of it must have come.

    Raises:
        Refused: 415 no multipart form; 400 a broken one; 408 too slow; 413 too large.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        await _within(discard(body, most_bytes), seconds)
        raise Refused(415, f"expected multipart/form-data, got {_printable(kind) or 'no content type'}")
    form = _Form()
    try:
        await _within(_parse(options[b"boundary"], form, body, most_bytes), seconds)
    except FormParserError:
        form.ended = False
    if not form.ended:
        await _within(discard(body, most_bytes), seconds)
        raise Refused(400, "a multipart form that is broken or ends early")
    return form.parts


async def _parse(boundary: bytes, form: _Form, body: AsyncIterator[bytes], most_bytes: int) -> None:
    parser = MultipartParser(boundary, form.callbacks())
    received = 0
    async for chunk in body:
        received += len(chunk)
        if received > most_bytes:
            form.parts.clear()
            await discard(body, most_bytes)
            raise Refused(413, f"larger than the {most_bytes / 2**20:g} MB that this server takes")
        parser.write(chunk)


async def _within(work: Any, seconds: float) -> None:
    try:
        await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        raise Refused(408, f"the upload took longer than {seconds:g} seconds") from None


async def discard(body: AsyncIterator[bytes], most_bytes: int) -> None:
    """Read and forget the rest of a body, or ``most_bytes`` of it."""
    async for chunk in body:
        most_bytes -= len(chunk)
        if most_bytes < 0:
            return


def check_type(name: str, data: bytes) -> None:
    """Refuse what does not begin as an image or array does, whatever it is called.

    Raises:
        Refused: 415.
    """
    if not data.startswith(_MAGIC) and not (data.startswith(b"RIFF") and data[8:12] == b"WEBP"):
        raise Refused(415, f"{name}: expected {FORMATS}, found none of them")
