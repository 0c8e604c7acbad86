"""A generator's images of one view, to look at and to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from models.data import AnyDomain
from models.outputs import ENSEMBLE, Outputs
from models.translation.build import output_names
from models.translation.settings import TranslationRecipe
from models.translation.visualize import show, view_images
from models.visualize import Image, save_numbers, thumbnail


class Prediction(Outputs[Any]):
    """What the target's files store of one view, by output: ``[H, W, 3]``, red first, or ``[H, W]``.

    They are converted when they are first asked for, and stay valid as long as they are kept.

    Args:
        recipe: the generator's.
        images: ``[M', 3, H, W]``, its inputs of the domains that there are.
        outputs: by output an image ``[C, H, W]`` in [-1, 1].
        target: the domain that it makes.
        present: the numbers of the domains that there are; None: all.

    Attributes:
        images, outputs: as given.
    """

    def __init__(
        self,
        recipe: TranslationRecipe,
        images: Tensor,
        outputs: Mapping[str, Tensor],
        target: AnyDomain,
        present: Sequence[int] | None = None,
    ) -> None:
        super().__init__(output_names(recipe, present), recipe.data.domains, present)
        self.images, self.outputs = images, outputs
        self._target = target

    def _make(self, index: int) -> NDArray[Any]:
        return self._target.stored(self.outputs[self._names[index]])

    def shown(self, which: str = ENSEMBLE) -> Image:
        """An output as an image to look at, ``[H, W, 3]`` uint8, red first, whatever its files store."""
        return show(self.outputs[self._names[self._index(which)]])

    def thumbnails(self) -> dict[str, Image]:
        """Small images of every ``input <domain>`` and of every output."""
        drawn = view_images(self.images, list(self.outputs.values()), tuple(self))
        return {name: thumbnail(image) for name, image in drawn.items()}

    def write(self, folder: Path, name: str, which: str = ENSEMBLE) -> None:
        """Write an output to ``<folder>/<which>/<name>`` with the suffix of the target's files.

        Args:
            folder: ``<which>`` is made in it if it is missing.
            name: of the file, without suffix.
            which: the output.

        Raises:
            UsageError: it cannot be written there.
        """
        (folder / which).mkdir(parents=True, exist_ok=True)
        save_numbers(folder / which / f"{name}{self._target.suffix}", self[which])
