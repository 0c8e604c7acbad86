"""Pictures to look at, and rows and sheets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from models.training.errors import UsageError
from models.training.files import replacing

Picture = NDArray[np.uint8]  # [H, W, 3], red first

CELL = 240  # width of a contact sheet's pictures


def beside(pictures: Sequence[Picture]) -> Picture:
    """Pictures of one height in a row, a thin white line between them."""
    line = np.full((pictures[0].shape[0], 4, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, line)][:-1], axis=1)


def below(rows: Sequence[Picture]) -> Picture:
    """Rows of one width below each other, a thin white line between them."""
    line = np.full((4, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for row in rows for part in (row, line)][:-1])


def captioned(picture: Picture, caption: str) -> Picture:
    """A picture below a line of text."""
    band = np.full((20, picture.shape[1], 3), 255, np.uint8)
    write_text(band, caption, (2, 14))
    return np.concatenate([band, picture])


def contact_sheet(scenes: Mapping[str, Mapping[str, Picture]]) -> Picture:
    """A row of pictures a scene, captioned and brought to one width.

    Args:
        scenes: by name, each with pictures of the same names, in that order.
    """
    rows = []
    for scene, pictures in scenes.items():
        captions = [f"{scene}: {what}" if first == 0 else what for first, what in enumerate(pictures)]
        cells = zip(pictures.values(), captions, strict=True)
        rows.append(beside([captioned(thumbnail(picture), caption) for picture, caption in cells]))
    return below(rows)


def thumbnail(picture: Picture) -> Picture:
    """The picture ``CELL`` pixels wide."""
    size = (CELL, max(1, round(picture.shape[0] * CELL / picture.shape[1])))
    smaller = picture.shape[1] > CELL
    how = cv2.INTER_AREA if smaller else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(picture, size, interpolation=how), np.uint8)


def write_picture(path: Path, picture: NDArray[np.unsignedinteger[Any]]) -> None:
    """Write an ``[H, W, 3]`` picture, or an ``[H, W]`` map of 8 or 16 bits, as PNG.

    Raises:
        UsageError: it cannot be written there.
    """
    stored = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR) if picture.ndim == 3 else picture
    try:
        with replacing(path) as temporary:
            cv2.imencode(".png", stored)[1].tofile(temporary)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


def write_text(picture: Picture, text: str, at: tuple[int, int]) -> None:
    """Write a line of text whose left lower corner lies ``at`` column and row."""
    cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
