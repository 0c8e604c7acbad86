"""A network's labels of one scene, to look at and to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.segmentation.settings import SegmentationRecipe
from models.segmentation.visualize import colorize, overlay, scene_images, show_input
from models.visualize import Image, save_image, thumbnail

LABELS, COLORED, OVERLAYS = FOLDERS = (
    "labels",
    "coloured",
    "overlays",
)  # the old spelling, which scripts read


@dataclass(frozen=True)
class Prediction:
    """A network's labels of one scene.

    Attributes:
        recipe: the network's.
        images: ``[M, 3, H, W]`` its inputs, on the CPU.
        labels: by output ``[H, W]`` classes, uint8.
        palette: ``[K, 3]`` uint8, the classes' colors; None: ``models.data.palette``'s.
        present: the modalities that were there; None: all.
    """

    recipe: SegmentationRecipe
    images: Tensor
    labels: dict[str, Tensor]
    palette: NDArray[np.uint8] | None = None
    present: tuple[int, ...] | None = None

    def classes(self, which: str) -> NDArray[np.uint8]:
        """An output's label map."""
        return self.labels[which].cpu().numpy()

    def colored(self, which: str) -> Image:
        """An output's label map in the classes' colors."""
        return colorize(self.classes(which), self.recipe.data.num_classes, self.palette)

    def overlay(self, which: str) -> Image:
        """An output's colored label map laid over the color image, or the first input without one."""
        modalities = self.recipe.data.modalities
        there = range(len(modalities)) if self.present is None else self.present
        shown = next((m for m in there if modalities[m] == "rgb"), there[0])
        image = show_input(self.images[shown].numpy(), modalities[shown], self.recipe.data.normalization)
        return overlay(image, self.colored(which))

    def thumbnails(self) -> dict[str, Image]:
        """Small images of every ``input <modality>`` and of every output's colored label map."""
        images = scene_images(self.images, self.labels, self.recipe.data, self.palette, self.present)
        return {name: thumbnail(image) for name, image in images.items()}

    def write(self, folder: Path, name: str, which: str) -> None:
        """Write an output's label map, colored map and overlay below ``FOLDERS``, as ``<name>.png``."""
        save_image(folder / LABELS / f"{name}.png", self.classes(which))
        save_image(folder / COLORED / f"{name}.png", self.colored(which))
        save_image(folder / OVERLAYS / f"{name}.png", self.overlay(which))
