"""Pixel accuracy, mean accuracy and IoU, of all images and of each, of the outputs and a constant prediction.

Not torchmetrics' confusion matrix, with which a test compares it: version 1.9.0 took 20.7 ms per call at 40
classes and 480x640 (70.1 ms with its validation), this 9.3 ms (2026-11-29, medians of 25, CPU time of one
thread on a shared machine), to which the IoU by image has added a tenth since. It also selects the counted
pixels by a mask and calls ``bincount``, both of which wait for the GPU.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path

import torch
from torch import Tensor

from models.training import distributed
from models.training.files import replacing

_OF_CONFUSION = ("pixel_accuracy", "mean_accuracy", "mean_iou", "weighted_iou")
BY_IMAGE = "image_mean_iou"
SCORES = (*_OF_CONFUSION, BY_IMAGE)
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
        self._confusion = torch.zeros(len(names), num_classes, num_classes, dtype=torch.long, device=device)
        # Sums over images, from some of which a branch may be absent: of an output's IoU, and of 1; and of
        # the IoU that each class has, predicted everywhere.
        self._iou, self._images = torch.zeros(2, len(names), dtype=torch.float64, device=device)
        self._constant_iou = torch.zeros(num_classes, dtype=torch.float64, device=device)

    @property
    def confusion(self) -> Tensor:
        """``[outputs, K, K]`` pixels of each true class (rows) that were taken for each class (columns)."""
        return self._confusion

    def update(self, labels: Sequence[Tensor], target: Tensor, outputs: Sequence[str] | None = None) -> None:
        """Count one batch: ``[N, H, W]`` predicted labels of every output, and the target of that shape.

        Args:
            outputs: the names of those that there are labels of, the last of all among them; None: all.
        """
        each = torch.stack([self._of_images(predicted, target) for predicted in labels])
        truth = each[-1].sum(2)
        pixels = truth.sum(1)
        names = self.names if outputs is None else outputs
        for name, confusions, iou in zip(names, each, image_iou(each), strict=True):
            row = self.names.index(name)
            self._confusion[row] += confusions.sum(0)
            self._iou[row] += iou.sum()
            self._images[row] += (pixels > 0).sum()
        classes = (truth > 0).sum(1)
        self._constant_iou += (truth / (classes * pixels).clamp(min=1).double().unsqueeze(1)).sum(0)

    def _of_images(self, predicted: Tensor, target: Tensor) -> Tensor:
        """``[N, K, K]`` confusions of one output."""
        cells = self.num_classes**2  # and one more takes the pixels that do not count
        counted = target != self.ignore_index
        found = torch.where(counted, target * self.num_classes + predicted, cells).flatten(1)
        counts = found.new_zeros(len(target), cells + 1)
        # Neither bincount nor a choice of pixels: on CUDA both wait for the device to know their sizes.
        counts.scatter_add_(1, found, torch.ones_like(found))
        return counts[:, :-1].reshape(-1, self.num_classes, self.num_classes)

    def reduce(self) -> None:
        """Add up the counts of all processes, each of which has them then; alone, this does nothing.

        The processes are those of torch.distributed's default group, which all must call this.
        """
        self._confusion = distributed.total(self._confusion)
        self._iou, self._images = map(distributed.total, (self._iou, self._images))
        self._constant_iou = distributed.total(self._constant_iou)

    def compute(self) -> dict[str, float]:
        """``<output>/<score>`` for every output and score, and for ``constant``, as fractions.

        ``image_mean_iou`` is the mean of ``image_iou`` over the images with labels.

        ``constant`` predicts the most frequent class everywhere, the best without a look at the images.
        """
        confusion = self.confusion.cpu().double()
        constant = torch.zeros_like(confusion[0])
        truth = confusion[-1].sum(1)  # a branch may be absent from some scenes, the ensemble is from none
        constant[:, truth.argmax()] = truth
        tables = zip((*self.names, "constant"), (*confusion, constant), strict=True)
        sums = [*self._iou.tolist(), self._constant_iou[truth.argmax()].item()]
        counts = [*self._images.tolist(), self._images[-1].item()]
        by_image = [total / images if images else nan for total, images in zip(sums, counts, strict=True)]
        return {
            f"{name}/{score}": value
            for (name, table), own in zip(tables, by_image, strict=True)
            for score, value in {**scores(table), BY_IMAGE: own}.items()
        }

    def class_iou(self, name: str) -> list[float]:
        """The IoU of every class in the output of that name, as ``class_iou``."""
        return class_iou(self.confusion[self.names.index(name)].cpu().double()).tolist()

    def class_shares(self) -> list[float]:
        """Every class's share of the pixels that count."""
        truth = self.confusion[-1].sum(1).cpu().double()
        return (truth / truth.sum()).tolist()


def class_iou(confusion: Tensor) -> Tensor:
    """``[K]`` IoU of a ``[K, K]`` confusion matrix; NaN for classes in neither truth nor prediction."""
    hits = confusion.diag()
    return hits / (confusion.sum(1) + confusion.sum(0) - hits)


def image_iou(confusion: Tensor) -> Tensor:
    """``[..., N]`` mean IoU of each of ``[..., N, K, K]`` images, over the classes in its truth; float64.

    That of an image without labels is 0. The mean over the others is mIoU^I of Wang et al. (NeurIPS 2023):
    images count alike, whereas the IoU of the set is that of its large objects for the most part.
    """
    hits, truth = confusion.diagonal(dim1=-2, dim2=-1), confusion.sum(-1)
    there = truth > 0
    iou = (hits.double() / (truth + confusion.sum(-2) - hits)).where(there, 0)
    return iou.sum(-1) / there.sum(-1).clamp(min=1)


def scores(confusion: Tensor) -> dict[str, float]:
    """The scores of a ``[K, K]`` confusion matrix, rows the truth.

    Means are over the classes for which the score is defined: accuracy for those in the truth, IoU for
    those in the truth or the prediction. ``weighted_iou`` weights each class's IoU by its share of the pixels
    ("frequency weighted", Long et al., CVPR 2015).
    """
    hits, truth, iou = confusion.diag(), confusion.sum(1), class_iou(confusion)
    weighted = (truth / truth.sum() * iou.nan_to_num()).sum()  # a class without IoU has no pixels
    values = (hits.sum() / truth.sum(), (hits / truth).nanmean(), iou.nanmean(), weighted)
    return dict(zip(_OF_CONFUSION, map(float, values), strict=True))


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
