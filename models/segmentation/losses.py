"""The segmentation loss (Eq. 4): cross-entropy of every branch and of the ensemble, and sparsity."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.networks.outputs import AuxiliaryOutput, SegmentationOutput
from models.networks.segmentor import SegmentationNetwork
from models.segmentation.cross_entropy import resized_cross_entropies


class SegmentationLoss(NamedTuple):
    """The loss and what it consists of, as it was added up.

    Attributes:
        total: 0-d, to be minimized: the sum of all the others.
        entropies: ``[M+1]`` cross-entropies of the branches, then of the ensemble.
        penalty: 0-d, that on the scales, with its weights.
        auxiliary: 0-d, the auxiliary logits' cross-entropies with their weight; 0 where there are none.
        fusion: 0-d, the fusion's own loss with its weight; 0 where it has none.
    """

    total: Tensor
    entropies: Tensor
    penalty: Tensor
    auxiliary: Tensor
    fusion: Tensor


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
    # Not as one tensor: torch.cat would make it contiguous, and the loss is faster in channels_last.
    parts = (output.branches, output.ensemble[None])
    return torch.cat([_cross_entropies(logits, target, ignore_index, pixels) for logits in parts])


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
    auxiliary: float = 0.4,
    pixels: Tensor | None = None,
) -> SegmentationLoss:
    """Add up ``cross_entropies``, the auxiliary logits', the penalty on scales and the fusion's loss.

    Args:
        net, output, target: the network, what it returned, ``[N, H, W]`` class indices.
        sparsity: λ, the weight of the penalty.
        per_output: add the penalty once an output, M + 1 times, as the released code does; the paper
            adds it once.
        ignore_index: label of pixels that do not count.
        auxiliary: weight of the auxiliary logits' cross-entropies, where there are any (Zhao et al.: 0.4).
        pixels: as in ``cross_entropies``; for a part of a batch, the mean over the parts, so that the mean of
            the parts' losses is the loss of the batch.
    """
    entropies = cross_entropies(output, target, ignore_index, pixels)
    times = len(entropies) if per_output else 1
    zero = entropies.new_zeros(())
    # Added to a zero on the device: where no scale is penalized, the penalty is one on the CPU.
    penalized = zero + sparsity * times * net.fusion.penalty_on_scales(net)
    total = entropies.sum() + penalized
    fusion = net.fusion.loss(net)
    if fusion is not None:
        total = total + fusion
    beside = zero
    if output.auxiliary is not None:
        beside = auxiliary * _cross_entropies(output.auxiliary, target, ignore_index, pixels).sum()
        total = total + beside
    return SegmentationLoss(total, entropies, penalized, beside, zero if fusion is None else fusion)


def _cross_entropies(
    logits: Tensor,  # [outputs, N, K, h, w]
    target: Tensor,
    ignore_index: int,
    pixels: Tensor | None,
) -> Tensor:
    sums = resized_cross_entropies(logits, target, ignore_index)
    if pixels is None:
        pixels = counted_pixels(target, ignore_index).clamp(min=1)
    return sums / pixels
