"""Images to look at, and rows and sheets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from models.training.errors import UsageError
from models.training.files import replacing

Image = NDArray[np.uint8]  # [H, W, 3], red first

CELL = 240  # width of a contact sheet's images
_ENSEMBLE = "#c8401f"  # stands out among the branches
_BRANCHES = ("#2b6cb0", "#7fb0de", "#98a2ac", "#d9c27a")


def output_color(name: str, number: int) -> str:
    """The color that an output has in figures: its name, or its number among the branches, tells it."""
    return _ENSEMBLE if name == "ensemble" else _BRANCHES[number % len(_BRANCHES)]


def beside(images: Sequence[Image]) -> Image:
    """Images of one height in a row, a thin white line between them."""
    line = np.full((images[0].shape[0], 4, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, line)][:-1], axis=1)


def below(rows: Sequence[Image]) -> Image:
    """Rows of one width below each other, a thin white line between them."""
    line = np.full((4, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for row in rows for part in (row, line)][:-1])


def captioned(image: Image, caption: str) -> Image:
    """An image below a line of text."""
    band = np.full((20, image.shape[1], 3), 255, np.uint8)
    write_text(band, caption, (2, 14))
    return np.concatenate([band, image])


def contact_sheet(scenes: Mapping[str, Mapping[str, Image]]) -> Image:
    """One row of images per scene, captioned and brought to one width.

    Args:
        scenes: by name, each with images by their names, of which the order is the same in all scenes. Where
            one lacks an image that others have, its place is black.
    """
    columns: list[str] = []
    for images in scenes.values():
        place = 0
        for what in images:
            if what not in columns:
                columns.insert(place, what)
            place = columns.index(what) + 1
    rows = []
    for scene, images in scenes.items():
        nothing = np.zeros_like(next(iter(images.values())))
        cells = []
        for what in columns:
            caption = what if what in images else f"{what}: absent"
            caption = f"{scene}: {caption}" if what == columns[0] else caption
            cells.append(captioned(thumbnail(images.get(what, nothing)), caption))
        rows.append(beside(cells))
    return below(rows)


def thumbnail(image: Image) -> Image:
    """The image ``CELL`` pixels wide."""
    size = (CELL, max(1, round(image.shape[0] * CELL / image.shape[1])))
    smaller = image.shape[1] > CELL
    how = cv2.INTER_AREA if smaller else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(image, size, interpolation=how), np.uint8)


def save_image(path: Path, image: NDArray[np.unsignedinteger[Any]]) -> None:
    """Write an ``[H, W, 3]`` image, or an ``[H, W]`` map of 8 or 16 bits, as PNG.

    Raises:
        UsageError: it cannot be written there.
    """
    _save(path, ".png", image)


def save_numbers(path: Path, image: NDArray[Any]) -> None:
    """Write ``[H, W, 3]`` or ``[H, W]`` numbers to ``.npy`` (any), ``.tiff`` (float32) or ``.png``.

    Raises:
        UsageError: it cannot be written there.
    """
    _save(path, path.suffix, image)


def _save(path: Path, suffix: str, image: NDArray[Any]) -> None:
    """Write numbers as files of the suffix hold them."""
    stored = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 and suffix != ".npy" else image
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            if suffix == ".npy":
                np.save(file, stored)
            else:
                cv2.imencode(suffix, stored)[1].tofile(file)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


def write_text(image: Image, text: str, at: tuple[int, int]) -> None:
    """Write a line of text whose left lower corner lies ``at`` column and row."""
    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
