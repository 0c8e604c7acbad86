"""The segmentation loss (Eq. 4): cross-entropy of every branch and of the ensemble, and sparsity.

In the place of the cross-entropy stands what a ``Criterion`` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.networks.outputs import AuxiliaryOutput, SegmentationOutput
from models.networks.segmentor import SegmentationNetwork
from models.segmentation.criteria import PLAIN, Criterion, resized_losses

AuxiliarySize = Literal["labels", "logits"]


class SegmentationLoss(NamedTuple):
    """The loss and what it consists of, as it was added up.

    Attributes:
        total: 0-d, to be minimized: the sum of all the others.
        entropies: ``[M+1]`` cross-entropies of the branches, then of the ensemble; or OHEM or focal losses.
        penalty: 0-d, that on the scales, with its weights.
        auxiliary: 0-d, the auxiliary logits' losses with their weight; 0 where there are none.
        fusion: 0-d, the fusion's own loss with its weight; 0 where it has none.
        dice: 0-d, the Dice losses of branches and ensemble with their weight; 0 where they are not wanted.
    """

    total: Tensor
    entropies: Tensor
    penalty: Tensor
    auxiliary: Tensor
    fusion: Tensor
    dice: Tensor


def outputs(output: SegmentationOutput | AuxiliaryOutput) -> Tensor:
    """``[M+1, N, K, h, w]``: the logits of the branches and, last, of the ensemble."""
    return torch.cat([output.branches, output.ensemble[None]])


def cross_entropies(
    output: SegmentationOutput | AuxiliaryOutput,
    target: Tensor,
    ignore_index: int,
    pixels: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of every output at label resolution.

    Args:
        output: logits of any resolution; resized bilinearly, ``align_corners=False``.
        target: ``[N, H, W]`` class indices; pixels of ``ignore_index`` do not count.
        pixels: 0-d, what the sums are divided by; None: the pixels of target that count.

    Returns:
        ``[M+1]``: the branches, then the ensemble; 0 where every pixel is ignored.
    """
    counts = Counts.complete(pixels, None, target, ignore_index)
    return _losses(output, target, ignore_index, counts)[0]


class Counts(NamedTuple):
    """What sums are divided by, of a whole batch even where a part is at hand: a mean count of its parts.

    Attributes:
        pixels: 0-d, the number of pixels that count; with class weights, the sum of their classes'.
        images: 0-d, the number of images that have such pixels.
    """

    pixels: Tensor
    images: Tensor

    @classmethod
    def of(cls, target: Tensor, ignore_index: int, weights: Tensor | None = None) -> Counts:
        """The counts of ``[N, H, W]`` class indices, float64."""
        counted = target != ignore_index
        pixels = counted.sum()
        if weights is not None:
            pixels = weights.double()[target.where(counted, 0)].where(counted, 0).sum()
        return cls(pixels.double(), counted.flatten(1).any(1).sum().double())

    @classmethod
    def complete(
        cls,
        pixels: Tensor | None,
        images: Tensor | None,
        target: Tensor,
        ignore_index: int,
        weights: Tensor | None = None,
    ) -> Counts:
        """The counts that are given, those that are None of target, where 0 becomes 1."""
        if pixels is not None and images is not None:
            return cls(pixels, images)
        own = (count.where(count > 0, 1) for count in cls.of(target, ignore_index, weights))
        return cls(*(a if b is None else b for a, b in zip(own, (pixels, images), strict=True)))


def counted_pixels(target: Tensor, ignore_index: int) -> Tensor:
    """0-d: the number of pixels that count."""
    return (target != ignore_index).sum()


def segmentation_loss(
    net: SegmentationNetwork,
    output: SegmentationOutput | AuxiliaryOutput,
    target: Tensor,
    *,
    sparsity: float,
    per_output: bool,
    ignore_index: int,
    auxiliary: float | Sequence[float] = 0.4,
    auxiliary_size: AuxiliarySize = "labels",
    pixels: Tensor | None = None,
    images: Tensor | None = None,
    criterion: Criterion = PLAIN,
    weights: Tensor | None = None,
) -> SegmentationLoss:
    """Add up the outputs' losses, the auxiliary logits', the penalty on scales and the fusion's loss.

    Args:
        net, output, target: the network, what it returned, ``[N, H, W]`` class indices.
        sparsity: λ, the weight of the penalty.
        per_output: add the penalty once per output, M + 1 times, as the released code does; the paper
            adds it once.
        ignore_index: label of pixels that do not count.
        auxiliary: weight of the losses of auxiliary logits, where there are any (Zhao et al.: 0.4), or one
            for each head.
        auxiliary_size: where auxiliary logits meet labels: logits are resized to the ``labels``, bilinearly,
            or labels to the ``logits``, to the nearest; what the sum over pixels is divided by shrinks as
            the labels do.
        pixels, images: ``Counts``'; None: those of target. For a part of a batch, the mean over the parts, so
            that the mean of the parts' losses is the loss of the batch.
        criterion, weights: how logits are compared with labels; the weights ``[K]`` of the classes.
    """
    counts = Counts.complete(pixels, images, target, ignore_index, weights)
    entropies, *dices = _losses(output, target, ignore_index, counts, criterion, weights)
    times = len(entropies) if per_output else 1
    zero = entropies.new_zeros(())
    # Added to a zero on the device: where no scale is penalized, the penalty is one on the CPU.
    penalized = zero + sparsity * times * net.fusion.penalty_on_scales(net)
    total = entropies.sum() + penalized
    dice = dices[0].sum() if dices else zero
    if dices:
        total = total + dice
    fusion = net.fusion.loss(net)
    if fusion is not None:
        total = total + fusion
    beside = zero
    factors = auxiliary if isinstance(auxiliary, Sequence) else [auxiliary] * len(output.auxiliary)
    factors = factors if output.auxiliary else ()  # in evaluation there are none
    for logits, factor in zip(output.auxiliary, factors, strict=True):
        labels, own = target, counts
        if auxiliary_size == "logits":
            labels = _nearest(target, logits.shape[-2:])
            own = Counts(counts.pixels * (labels[0].numel() / target[0].numel()), counts.images)
        beside = beside + factor * _means(logits, labels, ignore_index, own, criterion, weights).sum()
    total = total + beside
    return SegmentationLoss(total, entropies, penalized, beside, zero if fusion is None else fusion, dice)


def _losses(
    output: SegmentationOutput | AuxiliaryOutput,
    target: Tensor,
    ignore_index: int,
    counts: Counts,
    criterion: Criterion = PLAIN,
    weights: Tensor | None = None,
) -> Tensor:
    """``_means`` of the branches, then of the ensemble."""
    # Not as one tensor: torch.cat would make it contiguous, and the loss is faster in channels_last.
    parts = (output.branches, output.ensemble[None])
    means = [_means(logits, target, ignore_index, counts, criterion, weights) for logits in parts]
    return torch.cat(means, 1)


def _means(
    logits: Tensor,  # [outputs, N, K, h, w]
    target: Tensor,
    ignore_index: int,
    counts: Counts,
    criterion: Criterion,
    weights: Tensor | None,
) -> Tensor:
    """``[1, outputs]`` mean losses of pixels, or ``[2, outputs]`` with Dice, which has its weight."""
    sums = resized_losses(logits, target, ignore_index, criterion, weights)
    means = sums[:1] / (counts.images if criterion.kind == "ohem" else counts.pixels)
    if criterion.dice == 0:
        return means
    return torch.cat([means, criterion.dice * sums[1:] / counts.images])


def _nearest(target: Tensor, size: torch.Size) -> Tensor:
    """``[N, H, W]`` class indices, resized to the nearest."""
    resized = F.interpolate(target[:, None].float(), size, mode="nearest")  # exact for classes below 2^24
    return resized[:, 0].to(target.dtype)


def resized_cross_entropies(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """``resized_losses``' sums of cross-entropies, ``[outputs]``."""
    return resized_losses(logits, target, ignore_index)[0]
