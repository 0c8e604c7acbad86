"""Metrics against a count in numpy."""

import math

import numpy as np
import pytest
import torch

from models.segmentation.metrics import SegmentationMetrics, scores, table

K, IGNORE = 5, 255


def by_hand(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The scores by their definitions, from the pixels."""
    valid = target != IGNORE
    predicted, target = predicted[valid], target[valid]
    accuracies, ious = [], []
    for k in range(K):
        hits = np.sum((predicted == k) & (target == k))
        union = np.sum((predicted == k) | (target == k))
        if np.any(target == k):
            accuracies.append(hits / np.sum(target == k))
        if union > 0:
            ious.append(hits / union)
    return {
        "pixel_accuracy": np.mean(predicted == target),
        "mean_accuracy": np.mean(accuracies),
        "mean_iou": np.mean(ious),
    }


@pytest.mark.parametrize("absent", [None, 1])
def test_metrics_over_batches(absent: int | None) -> None:
    rng = np.random.default_rng(0)
    target = rng.choice(K, (4, 6, 7), p=[0.1, 0.2, 0.4, 0.2, 0.1])
    if absent is not None:
        target[target == absent] = 2
    outputs = [
        np.where(rng.random(target.shape) < 0.6, target, rng.integers(0, K, target.shape)) for _ in "abc"
    ]
    target[rng.random(target.shape) < 0.2] = IGNORE
    metrics = SegmentationMetrics(("rgb", "depth", "ensemble"), K, IGNORE)
    for part in (slice(0, 1), slice(1, 4)):
        metrics.update([torch.from_numpy(x[part]) % K for x in outputs], torch.from_numpy(target[part]))
    computed = metrics.compute()
    for name, predicted in zip(("rgb", "depth", "ensemble"), outputs, strict=True):
        for score, value in by_hand(predicted % K, target).items():
            assert computed[f"{name}/{score}"] == pytest.approx(value, rel=1e-12)
    for score, value in by_hand(np.full_like(target, 2), target).items():
        assert computed[f"constant/{score}"] == pytest.approx(value, rel=1e-12)


def test_class_iou_of_one_output() -> None:
    target = torch.tensor([[[0, 0, 1, 1, 2, IGNORE]]])
    wrong, predicted = torch.full_like(target, 3), torch.tensor([[[0, 1, 1, 1, 0, 4]]])
    metrics = SegmentationMetrics(("rgb", "ensemble"), K, IGNORE)
    metrics.update([wrong, predicted], target)
    assert metrics.class_iou("ensemble") == pytest.approx([1 / 3, 2 / 3, 0, math.nan, math.nan], nan_ok=True)


def test_perfect_prediction_with_absent_classes() -> None:
    confusion = torch.diag(torch.tensor([3.0, 0.0, 5.0]))
    assert scores(confusion) == {"pixel_accuracy": 1.0, "mean_accuracy": 1.0, "mean_iou": 1.0}


def test_a_class_that_is_only_predicted_lowers_the_iou_alone() -> None:
    confusion = torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    assert scores(confusion) == {"pixel_accuracy": 0.5, "mean_accuracy": 0.5, "mean_iou": 0.25}


def test_no_pixel_counted_is_not_a_number() -> None:
    metrics = SegmentationMetrics(("rgb", "ensemble"), K, IGNORE)
    nothing = torch.full((1, 2, 2), IGNORE)
    metrics.update([torch.zeros_like(nothing)] * 2, nothing)
    assert all(math.isnan(value) for value in metrics.compute().values())


def test_table_aligns_outputs_and_scores() -> None:
    values = {f"{name}/{score}": 0.5 for name in ("rgb", "ensemble") for score in scores(torch.eye(2))}
    lines = table(values).splitlines()
    assert [line.split() for line in lines[1:]] == [["rgb", *["50.00"] * 3], ["ensemble", *["50.00"] * 3]]
    assert len({len(line) for line in lines}) == 1
