"""Pixel accuracy, mean accuracy and mean IoU of the branches, the ensemble and a constant prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou")


class SegmentationMetrics:
    """Counts confusions of several outputs over a data set, on the device.

    Args:
        names: the outputs: the modalities, then ``ensemble``.
        num_classes: K.
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, names: Sequence[str], num_classes: int, ignore_index: int) -> None:
        self.names = tuple(names)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.confusion = torch.zeros(len(names), num_classes, num_classes, dtype=torch.long)

    def update(self, labels: Sequence[Tensor], target: Tensor) -> None:
        """Count one batch: ``[N, H, W]`` predicted labels of every output, and the target of that shape."""
        counts = [
            multiclass_confusion_matrix(
                predicted, target, self.num_classes, ignore_index=self.ignore_index, validate_args=False
            )
            for predicted in labels
        ]
        self.confusion = self.confusion.to(target.device) + torch.stack(counts)

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


def class_iou(confusion: Tensor) -> Tensor:
    """``[K]`` IoU of a ``[K, K]`` confusion matrix; NaN for classes in neither truth nor prediction."""
    hits = confusion.diag()
    return hits / (confusion.sum(1) + confusion.sum(0) - hits)


def scores(confusion: Tensor) -> dict[str, float]:
    """The three scores of a ``[K, K]`` confusion matrix, rows the truth.

    Means are over the classes for which the score is defined: accuracy for those in the truth, IoU for
    those in the truth or the prediction.
    """
    hits, truth = confusion.diag(), confusion.sum(1)
    values = (hits.sum() / truth.sum(), (hits / truth).nanmean(), class_iou(confusion).nanmean())
    return dict(zip(SCORES, map(float, values), strict=True))


def table(metrics: dict[str, float]) -> str:
    """The metrics as aligned text: a row an output, a column a score, in per cent."""
    names = list(dict.fromkeys(key.partition("/")[0] for key in metrics))
    width = max(map(len, names))
    lines = [" " * width + "".join(f"  {score.replace('_', ' '):>14}" for score in SCORES)]
    for name in names:
        cells = "".join(f"  {100 * metrics[f'{name}/{score}']:>14.2f}" for score in SCORES)
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)
