"""Trained generators from files, with what they are to be fed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.arrays import Given, as_sources
from models.data import (
    DataError,
    Domain,
    InputSpec,
    Square,
    TranslationSample,
    collate_translation,
    differing_inputs,
    input_from_plain,
    to_plain,
)
from models.data.images import size_of
from models.data.taskonomy import find_domain
from models.networks.systems.unet import UNet
from models.sources import check_complete
from models.training import checkpoint, config
from models.training.devices import device_of
from models.training.errors import UsageError
from models.translation.build import build_generator, output_names
from models.translation.inference import translate, translating
from models.translation.settings import DataSettings, TranslationRecipe
from models.translation.visualize import stored


@dataclass(frozen=True)
class TrainedGenerator:
    """A generator and what was known where it was trained; ``load`` makes one.

    Attributes:
        net: in evaluation mode, on the device of ``recipe.run.device``; ``translate`` runs it as the paper
            evaluates it, which that mode does not.
        recipe: the settings of its training, changed by those given to ``load``.
        changed: what in ``recipe`` differs from the settings of the training, as ``path: old -> new``.
        path: the file.
        inputs: what it was fed, by domain in their order.
        domains: of the inputs.
        target: the domain that it makes.
    """

    net: UNet
    recipe: TranslationRecipe
    changed: tuple[str, ...]
    path: Path
    inputs: tuple[InputSpec, ...]
    domains: tuple[Domain, ...]
    target: Domain

    def read(self, **files: Given) -> Tensor:
        """The generator's input for one view, ``[M, 3, H, W]``, of its files: ``read(normal=..., ...)``.

        The shorter side becomes ``data.crop`` pixels, and the square in the middle is kept, as in evaluation.

        Args:
            files: by domain, paths or ``models.arrays.as_sources``'s arrays.

        Raises:
            UsageError: a domain's file is missing, or is of none of them.
            DataError: a broken image, not what its domain stores, or images of different size.
        """
        check_complete(files, [domain.name for domain in self.domains])
        found = as_sources(files)
        sources = [found[domain.name] for domain in self.domains]
        images = tuple(domain.read(source) for domain, source in zip(self.domains, sources, strict=True))
        for image, source in zip(images, sources, strict=True):
            if image.shape[:2] != images[0].shape[:2]:
                raise DataError(f"{source} is {size_of(image)}, but {sources[0]} is {size_of(images[0])}")
        # The first image stands in for a target.
        sample = TranslationSample(images, images[0], str(sources[0]), (*self.domains, self.domains[0]))
        batch = collate_translation([Square(self.recipe.data.crop)(sample)])
        return batch.images.to(next(self.net.parameters()).device)

    def translate(self, images: Tensor, name: str = "") -> dict[str, Tensor]:
        """Translate ``read``'s return by every branch, named after its domain, and by the ``ensemble``.

        Args:
            images: ``[M, 3, H, W]``.
            name: of the view; dropout draws the same for the same name. ``eval.dropout=false`` is without.

        Returns:
            Images ``[3, H, W]`` of the target's domain in [-1, 1]; ``target.decode`` gives stored values.
        """
        with translating(self.net, self.recipe.eval.dropout):
            outputs = translate(self.net, images, name, self.recipe)
        return {name: each[0] for name, each in zip(output_names(self.recipe), outputs, strict=True)}

    def predict(self, **files: Given) -> dict[str, NDArray[np.uint8] | NDArray[np.uint16]]:
        """Translate one view to what the target's files store; takes and raises as ``read``.

        Returns:
            By output ``[H, W, 3]`` of 8 bits, red first, or ``[H, W]`` of 16.
        """
        images = self.translate(self.read(**files))
        return {name: stored(image, self.target) for name, image in images.items()}


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainedGenerator:
    """A trained generator: of a run's best checkpoint, of the checkpoint given, or of an exported file.

    Args:
        path: run folder, checkpoint, or what ``export`` and ``import`` wrote.
        overrides: ``field=value`` assignments, such as ``eval.dropout=false`` or ``run.device=cpu`` (without:
            ``auto``, wherever it was trained).

    Raises:
        UsageError: no such file there; an override is wrong, or does not fit the weights.
    """
    path, contents = checkpoint.load(Path(path), checkpoint.BEST)
    trained = checkpoint.settings(contents)
    recipe, changed = checkpoint.settings_here(contents, overrides)
    for field in ("domains", "target"):
        before, now = getattr(trained.data, field), getattr(recipe.data, field)
        if before != now:
            raise UsageError(
                f"data.{field} must stay {config.show(before)}, as {path} was trained, got {config.show(now)}"
            )
    inputs = tuple(map(input_from_plain, contents["inputs"]))
    here = describe(recipe.data)
    if differences := differing_inputs(inputs, tuple(map(input_from_plain, here["inputs"]))):
        raise UsageError(f"{path} was trained on other inputs: {'; '.join(differences)}")
    net = build_generator(recipe)
    checkpoint.fill(net, path, contents)
    net = net.to(device_of(recipe.run.device)).eval()
    if recipe.run.channels_last:  # dropout draws in the order of memory: as in the training's evaluations
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own types leave it out
    domains = tuple(map(find_domain, recipe.data.domains))
    target = find_domain(recipe.data.target)
    return TrainedGenerator(net, recipe, tuple(changed), path, inputs, domains, target)


def describe(settings: DataSettings) -> dict[str, Any]:
    """A checkpoint's record of a generator beside its settings: ``inputs`` and ``target``."""
    return {
        "inputs": [to_plain(_spec(find_domain(name))) for name in settings.domains],
        "target": to_plain(_spec(find_domain(settings.target))),
    }


def _spec(domain: Domain) -> InputSpec:
    """Encoded values / 127.5 - 1, in words: see ``models.data.taskonomy``."""
    white = f"{255 / domain.scale:g}"
    unit = f"{white} of ln(1 + stored)" if domain.logarithmic else f"{white} as stored"
    order = "rgb" if domain.name == "rgb" else None
    return InputSpec(domain.name, unit, 1 if domain.bits == 16 else None, order, (0.5,), (0.5,))
