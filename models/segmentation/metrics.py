"""Pixel accuracy, mean accuracy and IoU of the branches, the ensemble and a constant prediction.

Not torchmetrics' confusion matrix, with which a test compares it: version 1.9.0 took 20.7 ms per call at 40
classes and 480x640 (70.1 ms with its validation), this 9.3 ms (2026-11-29, medians of 25, CPU time of one
thread on a shared machine). It also selects the counted pixels by a mask and calls ``bincount``, both of
which wait for the GPU.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from math import isnan
from pathlib import Path

import torch
from torch import Tensor

from models.training import distributed
from models.training.files import replacing

SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou", "weighted_iou")
SHARE = "share of pixels"

ClassRows = dict[str, dict[str, float | None]]


class SegmentationMetrics:
    """Counts confusions of several outputs over a data set, on the device, which is never waited for.

    Args:
        names: the outputs: the modalities, then ``ensemble``.
        num_classes: K.
        ignore_index: label of pixels that do not count.
        device: that of the labels.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_classes: int,
        ignore_index: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.names = tuple(names)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        # A row of cells an output; the last cell takes the pixels that do not count.
        self._counts = torch.zeros(len(names), num_classes**2 + 1, dtype=torch.long, device=device)

    @property
    def confusion(self) -> Tensor:
        """``[outputs, K, K]`` pixels of each true class (rows) that were taken for each class (columns)."""
        counts: Tensor = self._counts[:, :-1].unflatten(1, (self.num_classes, self.num_classes))
        return counts

    def update(self, labels: Sequence[Tensor], target: Tensor) -> None:
        """Count one batch: ``[N, H, W]`` predicted labels of every output, and the target of that shape."""
        counted = target != self.ignore_index
        for counts, predicted in zip(self._counts, labels, strict=True):
            cells = torch.where(counted, target * self.num_classes + predicted, self.num_classes**2).flatten()
            # Neither bincount nor a choice of pixels: on CUDA both wait for the device to know their sizes.
            counts.scatter_add_(0, cells, torch.ones_like(cells))

    def reduce(self) -> None:
        """Add up the counts of all processes, each of which has them then; alone, this does nothing.

        The processes are those of torch.distributed's default group, which all must call this.
        """
        self._counts = distributed.total(self._counts)

    def compute(self) -> dict[str, float]:
        """``<output>/<score>`` for every output and score, and for ``constant``, as fractions.

        ``constant`` predicts the most frequent class everywhere, the best without a look at the images.
        """
        confusion = self.confusion.cpu().double()
        constant = torch.zeros_like(confusion[0])
        truth = confusion[0].sum(1)
        constant[:, truth.argmax()] = truth
        tables = zip((*self.names, "constant"), (*confusion, constant), strict=True)
        return {f"{name}/{score}": value for name, table in tables for score, value in scores(table).items()}

    def class_iou(self, name: str) -> list[float]:
        """The IoU of every class in the output of that name, as ``class_iou``."""
        return class_iou(self.confusion[self.names.index(name)].cpu().double()).tolist()

    def class_shares(self) -> list[float]:
        """Every class's share of the pixels that count."""
        truth = self.confusion[0].sum(1).cpu().double()
        return (truth / truth.sum()).tolist()


def class_iou(confusion: Tensor) -> Tensor:
    """``[K]`` IoU of a ``[K, K]`` confusion matrix; NaN for classes in neither truth nor prediction."""
    hits = confusion.diag()
    return hits / (confusion.sum(1) + confusion.sum(0) - hits)


def scores(confusion: Tensor) -> dict[str, float]:
    """The scores of a ``[K, K]`` confusion matrix, rows the truth.

    Means are over the classes for which the score is defined: accuracy for those in the truth, IoU for
    those in the truth or the prediction. ``weighted_iou`` weights each class's IoU by its share of the pixels
    ("frequency weighted", Long et al., CVPR 2015).
    """
    hits, truth, iou = confusion.diag(), confusion.sum(1), class_iou(confusion)
    weighted = (truth / truth.sum() * iou.nan_to_num()).sum()  # a class without IoU has no pixels
    values = (hits.sum() / truth.sum(), (hits / truth).nanmean(), iou.nanmean(), weighted)
    return dict(zip(SCORES, map(float, values), strict=True))


def table(metrics: dict[str, float]) -> str:
    """The metrics as aligned text: one row per output, one column per score, in per cent."""
    names = list(dict.fromkeys(key.partition("/")[0] for key in metrics))
    width = max(map(len, names))
    lines = [" " * width + "".join(f"  {score.replace('_', ' '):>14}" for score in SCORES)]
    for name in names:
        cells = "".join(f"  {100 * metrics[f'{name}/{score}']:>14.2f}" for score in SCORES)
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)


def class_rows(counts: SegmentationMetrics, class_names: Sequence[str]) -> ClassRows:
    """Tabulate by class its share of the pixels that count and its IoU in every output, as fractions.

    The IoU is None for a class that is neither in the truth nor in the output.
    """
    columns = {SHARE: counts.class_shares(), **{name: counts.class_iou(name) for name in counts.names}}
    return {
        label: {column: None if isnan(values[index]) else values[index] for column, values in columns.items()}
        for index, label in enumerate(class_names)
    }


def class_table(rows: ClassRows) -> str:
    """The rows as aligned text, in per cent; ``-`` where there is no IoU."""
    columns = list(next(iter(rows.values())))
    width = max(map(len, ("IoU", *rows)))
    widths = [max(7, len(column)) for column in columns]

    def line(label: str, cells: Sequence[str]) -> str:
        return f"{label:<{width}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    body = [line(label, [shown(row[column]) for column in columns]) for label, row in rows.items()]
    return "\n".join([line("IoU", columns), *body])


def write_class_csv(path: Path, rows: ClassRows) -> None:
    """Write the rows as CSV, one line per class; nothing where there is no IoU."""
    columns = list(next(iter(rows.values())))
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["class", *columns])
        writer.writeheader()
        writer.writerows({"class": label, **row} for label, row in rows.items())
