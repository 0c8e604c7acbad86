"""Metrics of a network on the validation images, and pictures of what it does there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isnan
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset
from tqdm import tqdm

from models.data import Batch, SegmentationSet, eval_loader
from models.segmentation.build import open_split, output_names
from models.segmentation.load import load_network
from models.segmentation.losses import outputs
from models.segmentation.metrics import SegmentationMetrics, table
from models.segmentation.network import SegmentationNetwork
from models.segmentation.pictures import Picture, colour, show_input
from models.segmentation.settings import SegmentationRecipe
from models.training.errors import writable
from models.training.files import write_json


@torch.no_grad()
def predict_labels(net: nn.Module, images: Tensor, size: Sequence[int], interpolation: str) -> list[Tensor]:
    """Labels ``[N, H, W]`` of every branch and of the ensemble, for stacked images ``[M*N, 3, h, w]``.

    Args:
        net: in evaluation mode.
        images: on the network's device.
        size: H and W; the logits are resized to it.
        interpolation: ``"bicubic"`` or ``"bilinear"``, ``align_corners=False``.
    """
    return [
        F.interpolate(logits, tuple(size), mode=interpolation, align_corners=False).argmax(1)
        for logits in outputs(net(images))
    ]


def evaluate(
    net: SegmentationNetwork,
    dataset: SegmentationSet,
    recipe: SegmentationRecipe,
    stop: Callable[[], bool] = lambda: False,
) -> SegmentationMetrics | None:
    """What the outputs take for what, over a data set.

    Args:
        net: in any mode, which is restored.
        dataset: the images.
        recipe: how to evaluate, and the outputs' names.
        stop: asked after every batch.

    Returns:
        The counts, or None once ``stop()`` was true.
    """
    metrics = SegmentationMetrics(output_names(recipe), recipe.data.num_classes, recipe.data.ignore_index)
    with evaluating(net):
        for batch in tqdm(_batches(dataset, recipe), desc="evaluate", leave=False, disable=None):
            batch = batch.to(next(net.parameters()).device)
            size = batch.target.shape[-2:]
            metrics.update(predict_labels(net, batch.images, size, recipe.eval.interpolation), batch.target)
            if stop():
                return None
    return metrics


def example_pictures(
    net: SegmentationNetwork, dataset: SegmentationSet, recipe: SegmentationRecipe
) -> dict[str, dict[str, Picture]]:
    """Of a few images: every ``input <modality>``, the ``target``, and what every output says."""
    modalities, classes = recipe.data.modalities, recipe.data.num_classes
    device = next(net.parameters()).device
    chosen = torch.linspace(0, len(dataset) - 1, min(recipe.eval.pictures, len(dataset))).long().tolist()
    pictures = {}
    with evaluating(net):
        for batch in eval_loader(Subset(dataset, chosen)):
            size = batch.target.shape[-2:]
            labels = predict_labels(net, batch.images.to(device), size, recipe.eval.interpolation)
            inputs = zip(modalities, batch.images.numpy(), strict=True)
            maps = zip(("target", *output_names(recipe)), (batch.target, *labels), strict=True)
            pictures[batch.names[0]] = {
                **{f"input {name}": show_input(image, name) for name, image in inputs},
                **{name: colour(label[0].cpu().numpy(), classes) for name, label in maps},
            }
    return pictures


def evaluate_checkpoint(path: Path, overrides: Sequence[str], output: Path | None) -> dict[str, float]:
    """The evaluate command: print the metrics and write them, with the ensemble's IoU by class, as JSON.

    Args:
        path: run folder or checkpoint.
        overrides: ``field=value`` assignments.
        output: the JSON file; None: beside the checkpoint, ``evaluation_<checkpoint>.json``.

    Raises:
        UsageError, DataError: as ``load_network`` and ``open_split``; ``output`` cannot be written.
    """
    net, recipe, path = load_network(path, overrides)
    dataset = open_split(recipe.data, "val")
    output = writable(output or path.with_name(f"evaluation_{path.stem}.json"), "--output")
    counts = evaluate(net, dataset, recipe)
    metrics = counts.compute()
    ious = zip(dataset.class_names, counts.class_iou("ensemble"), strict=True)
    classes = {name: None if isnan(iou) else iou for name, iou in ious}
    count = len(dataset) if recipe.eval.limit is None else min(recipe.eval.limit, len(dataset))
    alpha = dict(zip(recipe.data.modalities, net.branch_weights(), strict=False))
    print(f"{path}, {count} images, in per cent\n{table(metrics)}")
    if alpha:
        print("ensemble of " + ", ".join(f"{weight:.2f} {name}" for name, weight in alpha.items()))
    found = {"images": count, "alpha": alpha, "metrics": metrics, "classes": classes}
    write_json(output, {"checkpoint": str(path), **found})
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


def _batches(dataset: SegmentationSet, recipe: SegmentationRecipe) -> Iterable[Batch]:
    limit = recipe.eval.limit
    chosen = dataset if limit is None else Subset(dataset, range(min(limit, len(dataset))))
    return eval_loader(chosen, recipe.eval.batch_size, recipe.run.workers)
