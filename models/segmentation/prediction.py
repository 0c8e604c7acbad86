"""A network's labels of one scene, to look at and to write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.outputs import ENSEMBLE, Outputs
from models.segmentation.build import output_names
from models.segmentation.inference import Scores
from models.segmentation.settings import SegmentationRecipe
from models.segmentation.visualize import colorize, overlay, scene_images, show_input
from models.visualize import Image, save_image, thumbnail

LABELS, COLORED, OVERLAYS = FOLDERS = (
    "labels",
    "coloured",
    "overlays",
)  # the old spelling, which scripts read


class Prediction(Outputs[np.uint8]):
    """A network's label maps ``[H, W]`` of one scene, uint8, by output: ``found["ensemble"]``.

    A label map is computed when it is first asked for, of the logits that the network left, and so are
    confidences, colors and overlays: a loop pays for what it uses. It stays valid as long as it is kept,
    whatever is predicted after it.

    Args:
        recipe: the network's.
        images: ``[M, 3, H, W]`` its inputs.
        scores: of its outputs, of one scene.
        palette: ``[K, 3]`` uint8, the classes' colors; None: ``models.data.palette``'s.
        present: the numbers of the modalities that there are; None: all.

    Attributes:
        images: as given.
    """

    def __init__(
        self,
        recipe: SegmentationRecipe,
        images: Tensor,
        scores: Scores,
        palette: NDArray[np.uint8] | None = None,
        present: Sequence[int] | None = None,
    ) -> None:
        super().__init__(output_names(recipe, present), recipe.data.modalities, present)
        self.images = images
        self._recipe, self._scores, self._palette, self._present = recipe, scores, palette, present

    def _make(self, index: int) -> NDArray[np.uint8]:
        return self._scores.labels(index)[0].to(torch.uint8).cpu().numpy()

    def probabilities(self, which: str = ENSEMBLE) -> NDArray[np.float32]:
        """An output's probabilities of the K classes, ``[K, H, W]``; computed in every call."""
        logits = self._scores.logits(self._index(which))[0]
        return logits.softmax(0).float().cpu().numpy()

    def confidence(self, which: str = ENSEMBLE) -> NDArray[np.float32]:
        """The probability ``[H, W]`` of the class that an output's label map has; computed in every call."""
        logits = self._scores.logits(self._index(which))[0]
        return (logits.amax(0) - logits.logsumexp(0)).exp().float().cpu().numpy()

    def colored(self, which: str = ENSEMBLE) -> Image:
        """An output's label map in the classes' colors, ``[H, W, 3]`` uint8, red first."""
        return colorize(self[which], self._recipe.data.num_classes, self._palette)

    def overlay(self, which: str = ENSEMBLE) -> Image:
        """An output's colored label map laid over the color image, or the first input without one."""
        shown = "rgb" if "rgb" in self.modalities else self.modalities[0]
        data = self._recipe.data
        image = self.images[data.modalities.index(shown)].cpu().numpy()
        return overlay(show_input(image, shown, data), self.colored(which))

    def thumbnails(self) -> dict[str, Image]:
        """Small images of every ``input <modality>`` and of every output's colored label map."""
        maps = {name: torch.from_numpy(labels) for name, labels in self.items()}
        images = scene_images(self.images.cpu(), maps, self._recipe.data, self._palette, self._present)
        return {name: thumbnail(image) for name, image in images.items()}

    def write(self, folder: Path, name: str, which: str = ENSEMBLE) -> None:
        """Write an output's label map, colored map and overlay below ``FOLDERS``, as ``<name>.png``.

        Args:
            folder: ``FOLDERS`` are made in it where they are missing.
            name: of the files, without suffix.
            which: the output.

        Raises:
            UsageError: they cannot be written there.
        """
        drawn = (self[which], self.colored(which), self.overlay(which))
        for kind, image in zip(FOLDERS, drawn, strict=True):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            save_image(folder / kind / f"{name}.png", image)
