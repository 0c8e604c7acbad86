"""Metrics of a network on the validation images, and images of what it does there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from models.data import DataError, Loader, SegmentationSet, eval_loader
from models.data.loading import SampleSet, subset
from models.data.survey import spread
from models.networks.branches import running_with
from models.networks.segmentor import SegmentationNetwork
from models.segmentation.build import evaluated, open_validation, output_names
from models.segmentation.inference import predict_labels
from models.segmentation.load import TrainedNetwork, load
from models.segmentation.metrics import SegmentationMetrics, class_rows, class_table, table, write_class_csv
from models.segmentation.overview import overview
from models.segmentation.settings import SegmentationRecipe
from models.segmentation.visualize import contact_sheet, scene_images
from models.training import distributed
from models.training.config import show
from models.training.errors import writable
from models.training.files import write_json
from models.visualize import Image, save_image

_HOW = ("scales", "flip", "window", "overlap", "interpolation")


def evaluate(
    net: SegmentationNetwork,
    dataset: SampleSet,
    recipe: SegmentationRecipe,
    stop: Callable[[], bool] = lambda: False,
) -> SegmentationMetrics | None:
    """Count over a data set which classes the outputs take pixels of each class for.

    Args:
        net: in any mode, which is restored.
        dataset: the images, of which those of ``chosen_images`` count; or one process's part of those, after
            which ``SegmentationMetrics.reduce`` adds up the parts. A branch is counted where its modality is
            present.
        recipe: how to evaluate, and the outputs' names.
        stop: asked after every batch.

    Returns:
        The counts, or None once ``stop()`` was true.
    """
    device = next(net.parameters()).device
    metrics = SegmentationMetrics(
        output_names(recipe, evaluated(recipe)), recipe.data.num_classes, recipe.data.ignore_index, device
    )
    hidden = None if distributed.rank() == 0 else True  # None: shown on a terminal
    loader = _loader(dataset, recipe)
    without = _without(recipe)
    with evaluating(net):
        for batch in tqdm(loader, desc="evaluate", leave=False, disable=hidden):
            for present, part in batch.to(device, non_blocking=True).by_presence(without):
                with running_with(net, present):
                    labels = predict_labels(net, part.images, part.target.shape[-2:], recipe, part.kinds)
                metrics.update(labels, part.target, output_names(recipe, present))
            if stop():
                return None
    return metrics


def chosen_images(dataset: SampleSet, recipe: SegmentationRecipe) -> list[int]:
    """The indices of the images that evaluation looks at: ``eval.limit`` of them, spread evenly; or all."""
    return spread(len(dataset), recipe.eval.limit or len(dataset))


def example_scenes(dataset: SampleSet, count: int) -> list[int]:
    """The indices of the scenes that ``example_images`` draws: ``count``, or all, spread evenly."""
    return torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()


def example_images(
    net: SegmentationNetwork,
    dataset: SampleSet,
    recipe: SegmentationRecipe,
    count: int | None = None,
    colors: NDArray[np.uint8] | None = None,
) -> dict[str, dict[str, Image]]:
    """Draw a few images: every ``input <modality>``, the ``target``, and the labels of every output.

    Inputs and branches of modalities that are absent are left out.

    Args:
        net: in any mode, which is restored.
        dataset: the images; those chosen are spread evenly.
        recipe: how to evaluate, and the outputs' names.
        count: how many; None: ``eval.pictures``.
        colors: of the classes; None: ``models.data.palette``'s.
    """
    without = _without(recipe)
    device = next(net.parameters()).device
    chosen = example_scenes(dataset, recipe.eval.pictures if count is None else count)
    images = {}
    with evaluating(net):
        for batch in eval_loader(subset(dataset, chosen)):
            ((present, part),) = batch.by_presence(without)
            with running_with(net, present):
                size = part.target.shape[-2:]
                labels = predict_labels(net, part.images.to(device), size, recipe, part.kinds)
            found = dict(zip(output_names(recipe, present), (each[0] for each in labels), strict=True))
            maps = {"target": batch.target[0], **found}
            images[batch.names[0]] = scene_images(batch.images, maps, recipe.data, colors, present)
    return images


def evaluate_checkpoint(path: Path, overrides: Sequence[str], output: Path | None) -> dict[str, float]:
    """The evaluate command: print the metrics of every output, and its IoU by class, and write them.

    Settings and fields of the layout that were others in training are printed and written as well.

    Written are ``evaluation_<checkpoint>.json``, all of it and how it was found; ``.csv``, one row per class;
    and ``.png``, the contact sheet: the inputs, the target and the outputs of ``eval.sheet`` images.

    Args:
        path: run folder or checkpoint.
        overrides: ``field=value`` assignments.
        output: folder to write to; None: that of the checkpoint.

    Raises:
        UsageError, DataError: as ``load`` and ``open_split``; ``output`` cannot be written.
    """
    return report(*open_checkpoint(path, overrides), output)


def open_checkpoint(path: Path, overrides: Sequence[str]) -> tuple[TrainedNetwork, SegmentationSet]:
    """A trained network, and the images to evaluate it on.

    Raises:
        UsageError, DataError: as ``load`` and ``open_split``; there are no images.
    """
    trained = load(path, overrides)
    dataset = open_validation(trained.recipe)
    trained.check(dataset)
    if len(dataset) == 0:
        raise DataError(f"{trained.recipe.data.root}: there are no validation images")
    return trained, dataset


def report(trained: TrainedNetwork, dataset: SegmentationSet, output: Path | None) -> dict[str, float]:
    """``evaluate_checkpoint`` of what ``open_checkpoint`` returned."""
    net, recipe, path = trained.net, trained.recipe, trained.path
    file = writable((output or path.parent) / f"evaluation_{path.stem}.json", "--output")
    # Not among the results: who reads those may stop, as head does, and everything is to be written by then.
    overview(recipe.data, (dataset,)).show(sys.stderr)
    counts = evaluate(net, dataset, recipe)
    assert counts is not None  # nothing stops it
    metrics, classes = counts.compute(), class_rows(counts, dataset.class_names)
    chosen = chosen_images(dataset, recipe)
    count = len(chosen)
    with running_with(net, present := evaluated(recipe)):
        alpha = dict(zip(output_names(recipe, present), net.branch_weights(), strict=False))
    absences = dataset.absences
    how = {name: getattr(recipe.eval, name) for name in _HOW} | {"precision": recipe.run.precision}
    changed = trained.changes(dataset)
    found = {"images": count, "inference": how, "alpha": alpha, "metrics": metrics, "classes": classes}
    found |= {"without": list(absences.without), "missing": dict(absences.counts)}
    write_json(file, {"checkpoint": str(path), "changed": changed, **found})
    write_class_csv(file.with_suffix(".csv"), classes)
    if recipe.eval.sheet:
        seen = subset(dataset, chosen)
        examples = example_images(net, seen, recipe, recipe.eval.sheet, trained.palette)
        sheet = contact_sheet(examples, dataset.class_names, trained.palette)
        save_image(file.with_suffix(".png"), sheet)
    spread_over = f" spread over {len(dataset)}" if count < len(dataset) else ""
    ways = ", ".join(f"{name} {show(value)}" for name, value in how.items())
    print(f"{path}, {count} images{spread_over}, {ways}")
    for change in changed:
        print(f"other than in training: {change}")
    for note in absences.notes():
        print(f"note: {note}")
    if absences.filled:
        print("note: a branch's scores are those of the scenes that have its modality, the ensemble's of all")
    print(f"in per cent\n{table(metrics)}\n\n{class_table(classes)}\n")
    if alpha:
        print("ensemble of " + ", ".join(f"{weight:.2f} {name}" for name, weight in alpha.items()))
    print(f"written: {file.with_suffix('')}.json, .csv" + ", .png" * (recipe.eval.sheet > 0))
    return metrics


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, and back in the mode that it was in."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)


def _without(recipe: SegmentationRecipe) -> list[int]:
    return [recipe.data.modalities.index(name) for name in recipe.eval.without]


def _loader(dataset: SampleSet, recipe: SegmentationRecipe) -> Loader:
    settings = recipe.eval
    chosen = subset(dataset, chosen_images(dataset, recipe))
    # Windows fill the batches: images may be of any size then.
    return eval_loader(chosen, 1 if settings.window else settings.batch_size, recipe.run.workers)
