"""Metrics against a count in numpy and against torchmetrics, alone and in two processes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed
from torchmetrics.functional.classification import multiclass_confusion_matrix

from models.segmentation.metrics import BY_IMAGE, SCORES, SegmentationMetrics, image_iou, scores, table
from tests.helpers.training_runs import spawn_two

K, IGNORE = 5, 255


def image_by_hand(predicted: np.ndarray, target: np.ndarray) -> float:
    """The mean IoU of one image over the classes in its truth; NaN where it has none."""
    valid = target != IGNORE
    predicted, target = predicted[valid], target[valid]
    ious = [
        np.sum((predicted == k) & (target == k)) / np.sum((predicted == k) | (target == k))
        for k in np.unique(target)
    ]
    return float(np.mean(ious)) if ious else math.nan


def by_hand(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The scores by their definitions, from the pixels."""
    by_image = np.nanmean([image_by_hand(*pair) for pair in zip(predicted, target, strict=True)])
    valid = target != IGNORE
    predicted, target = predicted[valid], target[valid]
    accuracies, ious, weighted = [], [], 0.0
    for k in range(K):
        hits = np.sum((predicted == k) & (target == k))
        union = np.sum((predicted == k) | (target == k))
        if np.any(target == k):
            accuracies.append(hits / np.sum(target == k))
        if union > 0:
            ious.append(hits / union)
            weighted += np.mean(target == k) * hits / union
    return {
        "pixel_accuracy": np.mean(predicted == target),
        "mean_accuracy": np.mean(accuracies),
        "mean_iou": np.mean(ious),
        "weighted_iou": weighted,
        BY_IMAGE: by_image,
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
    target[2] = IGNORE  # an image without labels
    metrics = SegmentationMetrics(("rgb", "depth", "ensemble"), K, IGNORE)
    for part in (slice(0, 1), slice(1, 4)):
        metrics.update([torch.from_numpy(x[part]) % K for x in outputs], torch.from_numpy(target[part]))
    computed = metrics.compute()
    assert {key.partition("/")[2] for key in computed} == set(SCORES)
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
    assert scores(confusion) == dict.fromkeys(SCORES[:4], 1.0)
    assert image_iou(confusion[None]).tolist() == [1.0]


def test_a_class_that_is_only_predicted_lowers_the_iou_alone() -> None:
    confusion = torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    assert scores(confusion) == dict(zip(SCORES[:4], (0.5, 0.5, 0.25, 0.5), strict=True))
    assert image_iou(confusion[None]).tolist() == [0.5]


def test_images_count_alike_by_image() -> None:
    """One image of a class that fills it, and one of another class, small and missed for the most part."""
    target = torch.full((2, 4, 4), IGNORE)
    target[0], target[1, 0] = 0, 1
    predicted = torch.where(target == 1, 2, target)
    predicted[1, 0, 0] = 1
    metrics = SegmentationMetrics(("ensemble",), K, IGNORE)
    metrics.update([predicted % K], target)
    found = metrics.compute()
    assert found[f"ensemble/{BY_IMAGE}"] == (1 + 1 / 4) / 2
    assert found["ensemble/mean_iou"] == pytest.approx((1 + 1 / 4 + 0) / 3)
    assert found[f"constant/{BY_IMAGE}"] == (1 + 0) / 2


def test_no_pixel_counted_is_not_a_number() -> None:
    metrics = SegmentationMetrics(("rgb", "ensemble"), K, IGNORE)
    nothing = torch.full((1, 2, 2), IGNORE)
    metrics.update([torch.zeros_like(nothing)] * 2, nothing)
    assert all(math.isnan(value) for value in metrics.compute().values())


def test_table_aligns_outputs_and_scores() -> None:
    values = {f"{name}/{score}": 0.5 for name in ("rgb", "ensemble") for score in SCORES}
    lines = table(values).splitlines()
    assert [line.split() for line in lines[1:]] == [["rgb", *["50.00"] * 5], ["ensemble", *["50.00"] * 5]]
    assert len({len(line) for line in lines}) == 1


def random_labels(seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = [torch.randint(0, K, (2, 30, 40), generator=generator) for _ in range(2)]
    target = torch.randint(-1, K, (2, 30, 40), generator=generator)
    return outputs, target.where(target >= 0, IGNORE)


def test_confusion_is_torchmetrics() -> None:
    outputs, target = random_labels(0)
    metrics = SegmentationMetrics(("rgb", "ensemble"), K, IGNORE)
    metrics.update(outputs, target)
    for confusion, labels in zip(metrics.confusion, outputs, strict=True):
        expected = multiclass_confusion_matrix(labels, target, K, ignore_index=IGNORE)
        torch.testing.assert_close(confusion, expected, rtol=0, atol=0)


def test_class_shares() -> None:
    metrics = SegmentationMetrics(("ensemble",), K, IGNORE)
    target = torch.tensor([[[0, 0, 1, 4, IGNORE]]])
    metrics.update([torch.zeros_like(target)], target)
    assert metrics.class_shares() == [0.5, 0.25, 0, 0, 0.25]


def _count(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metrics = SegmentationMetrics(("rgb", "ensemble"), K, IGNORE)
    if rank == 0:  # parts of unequal size
        metrics.update(*random_labels(0))
    metrics.update(*random_labels(1))
    metrics.reduce()
    torch.save((metrics.confusion, metrics.compute()), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_reduce_adds_up_what_two_processes_counted(tmp_path: Path) -> None:
    spawn_two(_count, tmp_path)
    whole = SegmentationMetrics(("rgb", "ensemble"), K, IGNORE)
    for seed in (0, 1, 1):
        whole.update(*random_labels(seed))
    for rank in range(2):
        confusion, computed = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(confusion, whole.confusion)
        assert computed == pytest.approx(whole.compute(), rel=1e-12)
    whole.reduce()  # without a group
    assert int(whole.confusion.sum()) == 2 * sum(
        (random_labels(seed)[1] != IGNORE).sum() for seed in (0, 1, 1)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_counting_waits_for_no_device() -> None:
    outputs, target = random_labels(0)
    metrics = SegmentationMetrics(("rgb", "ensemble"), K, IGNORE, "cuda")
    outputs, target = [labels.cuda() for labels in outputs], target.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.update(outputs, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = SegmentationMetrics(("rgb", "ensemble"), K, IGNORE)
    expected.update(*random_labels(0))
    assert torch.equal(metrics.confusion.cpu(), expected.confusion)
