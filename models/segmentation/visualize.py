"""Images of a segmentation: inputs, label maps in color, overlays, sheets with a legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models import visualize
from models.data import palette
from models.data.kinds import kind_by_name
from models.segmentation.settings import DataSettings
from models.visualize import Image, below, write_text


def show_input(image: NDArray[np.float32], modality: str, data: DataSettings) -> Image:
    """A network's input ``[3, H, W]`` as an image; depth from dark (near, or missing) to bright (far).

    Points are gray at the camera, and where they are missing, and redder to the right, greener further down
    and bluer farther away.
    """
    pixels, normalization = image.transpose(1, 2, 0), data.normalization
    if kind_by_name(modality) == "depth":
        pixels = np.where(pixels == 0, 0, pixels * data.depth_std + data.depth_mean)
    if modality == "normals":
        pixels = (pixels + 1) / 2
    elif modality == "points":
        pixels = (pixels / max(float(np.abs(pixels).max()), 1e-6) + 1) / 2
    elif modality == "rgb" or pixels.min() < 0:  # normalized as color images are
        pixels = pixels * np.array(normalization.std) + np.array(normalization.mean)
    else:
        pixels = pixels / max(float(pixels.max()), 1e-6)
    return np.asarray((255 * pixels.clip(0, 1)).round(), np.uint8)


def colorize(labels: NDArray[np.integer], num_classes: int, colors: NDArray[np.uint8] | None = None) -> Image:
    """A label map ``[H, W]`` in the classes' colors, ``models.data.palette``'s or others ``[K, 3]``; what is
    no class is black."""
    known = palette(num_classes) if colors is None else colors
    colors = np.concatenate([known, np.zeros((1, 3), np.uint8)])
    return colors[np.where(labels < num_classes, labels, num_classes)]


def overlay(image: Image, colored: Image, strength: float = 0.5) -> Image:
    """A colored label map laid over an image of the same size."""
    return np.asarray(cv2.addWeighted(image, 1 - strength, colored, strength, 0), np.uint8)


def scene_images(
    images: Tensor,
    maps: Mapping[str, Tensor],
    data: DataSettings,
    colors: NDArray[np.uint8] | None = None,
    present: Sequence[int] | None = None,
) -> dict[str, Image]:
    """A scene's inputs, as ``input <modality>``, and its label maps in color.

    Args:
        images: ``[M, 3, H, W]`` network's inputs, on the CPU.
        maps: by name ``[H, W]`` labels, on any device.
        data: what the M inputs and the classes are.
        colors: as for ``colorize``.
        present: the inputs to show; None: all.
    """
    inputs = zip(data.modalities, images.numpy(), strict=True)
    chosen = [each for m, each in enumerate(inputs) if present is None or m in present]
    return {
        **{f"input {name}": show_input(image, name, data) for name, image in chosen},
        **{name: colorize(labels.cpu().numpy(), data.num_classes, colors) for name, labels in maps.items()},
    }


def contact_sheet(
    scenes: Mapping[str, Mapping[str, Image]],
    class_names: Sequence[str] = (),
    colors: NDArray[np.uint8] | None = None,
) -> Image:
    """``models.visualize.contact_sheet`` of the scenes, the classes' colors below.

    Args:
        scenes: by name, each with images of the same names, in that order.
        class_names: of all K classes; none: no colors below.
        colors: as for ``colorize``.
    """
    sheet = visualize.contact_sheet(scenes)
    return below([sheet, legend(class_names, sheet.shape[1], colors)] if class_names else [sheet])


def legend(class_names: Sequence[str], width: int, colors: NDArray[np.uint8] | None = None) -> Image:
    """The classes' names beside their colors, in rows of ``width`` pixels."""
    line, column = 20, 160
    columns = max(1, width // column)
    image = np.full((line * -(-len(class_names) // columns), width, 3), 255, np.uint8)
    shades = palette(len(class_names)) if colors is None else colors
    for index, (name, shade) in enumerate(zip(class_names, shades.tolist(), strict=True)):
        top, left = line * (index // columns), column * (index % columns)
        cv2.rectangle(image, (left + 2, top + 4), (left + 14, top + 16), shade, cv2.FILLED)
        write_text(image, name, (left + 20, top + 14))
    return image
