"""Pictures to look at: inputs, label maps in colour, overlays, rows and sheets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.data import IMAGENET_MEAN, IMAGENET_STD, palette
from models.training.errors import UsageError
from models.training.files import replacing

Picture = NDArray[np.uint8]  # [H, W, 3], red first

CELL = 240  # width of a contact sheet's pictures


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
    _write(band, caption, (2, 14))
    return np.concatenate([band, picture])


def scene_pictures(
    images: Tensor, maps: Mapping[str, Tensor], modalities: Sequence[str], num_classes: int
) -> dict[str, Picture]:
    """A scene's inputs, as ``input <modality>``, and its label maps in colour.

    Args:
        images: ``[M, 3, H, W]`` network's inputs, on the CPU.
        maps: by name ``[H, W]`` labels, on any device.
        modalities: the M inputs' names.
        num_classes: K.
    """
    inputs = zip(modalities, images.numpy(), strict=True)
    return {
        **{f"input {name}": show_input(image, name) for name, image in inputs},
        **{name: colour(labels.cpu().numpy(), num_classes) for name, labels in maps.items()},
    }


def contact_sheet(scenes: Mapping[str, Mapping[str, Picture]], class_names: Sequence[str] = ()) -> Picture:
    """A row of pictures a scene, captioned and brought to one width; the classes' colours below.

    Args:
        scenes: by name, each with pictures of the same names, in that order.
        class_names: of all K classes; none: no colours below.
    """
    rows = []
    for scene, pictures in scenes.items():
        captions = [f"{scene}: {what}" if first == 0 else what for first, what in enumerate(pictures)]
        cells = zip(pictures.values(), captions, strict=True)
        rows.append(beside([captioned(thumbnail(picture), caption) for picture, caption in cells]))
    return below([*rows, legend(class_names, rows[0].shape[1])] if class_names else rows)


def thumbnail(picture: Picture) -> Picture:
    """The picture ``CELL`` pixels wide."""
    size = (CELL, max(1, round(picture.shape[0] * CELL / picture.shape[1])))
    smaller = picture.shape[1] > CELL
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_NEAREST)


def legend(class_names: Sequence[str], width: int) -> Picture:
    """The classes' names beside their colours, in rows of ``width`` pixels."""
    line, column = 20, 160
    columns = max(1, width // column)
    picture = np.full((line * -(-len(class_names) // columns), width, 3), 255, np.uint8)
    for index, (name, shade) in enumerate(zip(class_names, palette(len(class_names)).tolist(), strict=True)):
        top, left = line * (index // columns), column * (index % columns)
        cv2.rectangle(picture, (left + 2, top + 4), (left + 14, top + 16), shade, cv2.FILLED)
        _write(picture, name, (left + 20, top + 14))
    return picture


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


def _write(picture: Picture, text: str, at: tuple[int, int]) -> None:
    """Write a line of text whose left lower corner lies ``at`` column and row."""
    cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
