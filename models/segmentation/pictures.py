"""Pictures to look at: inputs, label maps in colour, overlays, rows of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from models.data import IMAGENET_MEAN, IMAGENET_STD, palette
from models.training.errors import UsageError
from models.training.files import replacing

Picture = NDArray[np.uint8]  # [H, W, 3], red first


def show_input(image: NDArray[np.float32], modality: str) -> Picture:
    """A network's input ``[3, H, W]`` as a picture; depth from dark (near, or missing) to bright (far)."""
    pixels = image.transpose(1, 2, 0)
    if modality == "normals":
        pixels = (pixels + 1) / 2
    elif modality == "rgb" or pixels.min() < 0:  # normalised as colour pictures are
        pixels = pixels * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    else:
        pixels = pixels / max(float(pixels.max()), 1e-6)
    return (255 * pixels.clip(0, 1)).round().astype(np.uint8)


def colour(labels: NDArray[np.integer], num_classes: int) -> Picture:
    """A label map ``[H, W]`` in the classes' colours; whatever is no class is black."""
    colours = np.concatenate([palette(num_classes), np.zeros((1, 3), np.uint8)])
    return colours[np.where(labels < num_classes, labels, num_classes)]


def overlay(picture: Picture, coloured: Picture, strength: float = 0.5) -> Picture:
    """A coloured label map laid over a picture of the same size."""
    return cv2.addWeighted(picture, 1 - strength, coloured, strength, 0)


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
    cv2.putText(band, caption, (2, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([band, picture])


def write_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write an ``[H, W, 3]`` picture, or an ``[H, W]`` label map, as PNG.

    Raises:
        UsageError: it cannot be written there.
    """
    stored = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR) if picture.ndim == 3 else picture
    try:
        with replacing(path) as temporary:
            cv2.imencode(".png", stored)[1].tofile(temporary)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
