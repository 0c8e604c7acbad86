"""Trained generators from files, with what they are to be fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.arrays import Given, advising, as_sources
from models.data import (
    AnyDomain,
    DataError,
    InputSpec,
    TranslationSample,
    TranslationSet,
    collate_translation,
    differing_inputs,
    input_from_plain,
    to_plain,
)
from models.data.images import Frame
from models.data.layouts import CAMERA
from models.data.pairs import LayoutReader, recorded_reader
from models.data.taskonomy import find_domain
from models.data.translation import TaskonomyReader, ViewReader
from models.networks.branches import running_with
from models.networks.systems.unet import UNet
from models.sources import check_complete
from models.training import checkpoint, config
from models.training.devices import device_of
from models.training.errors import UsageError
from models.translation.build import build_generator, eval_transform, output_names
from models.translation.inference import translate, translating
from models.translation.prediction import Prediction
from models.translation.settings import TranslationRecipe


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
        reader: makes the images that it takes of a view's files, as in training.
        target: the domain that it makes.
    """

    net: UNet
    recipe: TranslationRecipe
    changed: tuple[str, ...]
    path: Path
    inputs: tuple[InputSpec, ...]
    reader: ViewReader
    target: AnyDomain

    @property
    def domains(self) -> tuple[AnyDomain, ...]:
        """Of the inputs."""
        return self.reader.domains

    def read(self, **files: Given) -> Tensor:
        """The generator's input for one view, ``[M, 3, H, W]``, of its files: ``read(normal=..., ...)``.

        The shorter side becomes ``data.crop`` pixels, and the square in the middle is kept, as in evaluation;
        with ``eval.size=full`` images stay as large as they are.

        Args:
            files: by what they hold (domains, or what they are computed from), paths or
                ``models.arrays.as_sources``'s arrays.

        Raises:
            UsageError: a domain's file is missing, or is of none of them.
            DataError: a broken image, not what its domain stores, or images of different size.
        """
        check_complete(files, self.reader.files())
        return self.read_some(files)[0]

    def read_some(self, files: Mapping[str, Given]) -> tuple[Tensor, tuple[int, ...] | None]:
        """As ``read`` of a view that may lack domains, though not all; and those that it has.

        Returns:
            ``[M', 3, H, W]``; and the numbers of the domains that are there, None for all of them.
        """
        sources = as_sources(files)
        if isinstance(sources.get(CAMERA), Frame):
            raise UsageError(f"{CAMERA}: expected the path of a camera's file, got an array")
        absent = self.reader.absent(sources)
        there = tuple(m for m in range(len(self.domains)) if m not in absent)
        domains = [self.domains[m] for m in there]
        with advising(sources):
            images = self.reader.read(sources)
        # The first image stands in for a target.
        name = str(next(iter(sources.values())))
        sample = TranslationSample(images, images[0], name, (*domains, domains[0]))
        batch = collate_translation([eval_transform(self.recipe)(sample)])
        return batch.images.to(next(self.net.parameters()).device), there if absent else None

    def translate(
        self, images: Tensor, name: str = "", present: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Translate ``read``'s return by every branch, named after its domain, and by the ``ensemble``.

        Args:
            images: ``[M, 3, H, W]``, or of the present domains alone.
            name: of the view; dropout draws the same for the same name. ``eval.dropout=false`` is without.
            present: the numbers of the domains that there are; None: all.

        Returns:
            Images ``[C, H, W]`` of the target's domain in [-1, 1]; ``target.stored`` gives stored values.

        Raises:
            ValueError: a domain is absent, and the fusion needs all.
        """
        with translating(self.net, self.recipe.eval.dropout), running_with(self.net, present):
            outputs = translate(self.net, images, name, self.recipe)
        names = output_names(self.recipe, present)
        return {name: each[0] for name, each in zip(names, outputs, strict=True)}

    def predict(self, **files: Given) -> Prediction:
        """Translate one view to what the target's files store; takes and raises as ``read``.

        Returns:
            By output ``[H, W, 3]``, red first, or ``[H, W]``, of the files' type.
        """
        check_complete(files, self.reader.files())
        return self.predict_some(files)

    def predict_some(self, files: Mapping[str, Given], name: str = "") -> Prediction:
        """As ``predict`` of a view that may lack domains, though not all.

        Args:
            files: as for ``read``.
            name: of the view, as for ``translate``.

        Raises:
            DataError: as ``read``.
            ValueError: a domain is absent, and the fusion needs all.
        """
        images, present = self.read_some(files)
        outputs = self.translate(images, name, present)
        return Prediction(self.recipe, images, outputs, self.target, present)

    def warm_up(self, size: Sequence[int], present: Sequence[int] | None = None) -> None:
        """Translate an empty view, so that the first one of its size takes no longer than the others.

        Args:
            size: height and width of the images.
            present: as for ``translate``.
        """
        if self.recipe.eval.size == "square":
            size = [self.recipe.data.crop] * 2
        count = len(self.domains) if present is None else len(present)
        device = next(self.net.parameters()).device
        self.translate(torch.zeros(count, 3, *size, device=device), present=present)

    def check(self, dataset: TranslationSet) -> None:
        """Refuse a data set that feeds the generator otherwise than its training did, or has another target.

        Raises:
            UsageError: it does.
        """
        here = [domain.spec() for domain in dataset.domains]
        if differences := differing_inputs([*self.inputs, self.target.spec()], here):
            raise UsageError(
                f"{self.path} was trained on others than {dataset.root} has: {'; '.join(differences)}"
            )


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
    told = recipe.data.root != trained.data.root
    try:
        reader, target = _readers(contents, recipe, recipe.data.root if told else None)
    except DataError:
        raise
    except ValueError as error:
        raise UsageError(f"data: {error}") from None
    if differences := differing_inputs(inputs, [domain.spec() for domain in reader.domains]):
        raise UsageError(f"{path} was trained on other inputs: {'; '.join(differences)}")
    net = build_generator(recipe, target.channels)
    checkpoint.fill(net, path, contents)
    net = net.to(device_of(recipe.run.device)).eval()
    if recipe.run.channels_last:  # dropout draws in the order of memory: as in the training's evaluations
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own types leave it out
    return TrainedGenerator(net, recipe, tuple(changed), path, inputs, reader, target)


def describe(reader: ViewReader) -> dict[str, Any]:
    """A checkpoint's record of a generator beside its settings: ``inputs``, ``target``, how pairs are read.

    Args:
        reader: of the inputs and, last, of the target.
    """
    *inputs, target = (to_plain(domain.spec()) for domain in reader.domains)
    pairs = {"pairs": reader.record()} if isinstance(reader, LayoutReader) else {}
    return {"inputs": inputs, "target": target, **pairs}


def _readers(
    contents: dict[str, Any], recipe: TranslationRecipe, root: Path | None
) -> tuple[ViewReader, AnyDomain]:
    """The reader of the inputs that a checkpoint's network takes, and its target's domain.

    Args:
        contents: of the checkpoint.
        recipe: its settings.
        root: a folder that may say how inputs are stored.
    """
    data = recipe.data
    if "pairs" not in contents:
        return TaskonomyReader(data.domains), find_domain(data.target)
    record = contents["pairs"]
    return recorded_reader(record, data.domains, root), recorded_reader(record, [data.target]).domains[0]
