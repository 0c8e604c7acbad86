"""The segmentation loss (Eq. 4): cross-entropy of every branch and of the ensemble, and sparsity."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext import sparsity_penalty
from models.segmentation.output import SegmentationOutput


def outputs(output: SegmentationOutput) -> Tensor:
    """``[M+1, N, K, h, w]``: the logits of the branches and, last, of the ensemble."""
    return torch.cat([output.branches, output.ensemble[None]])


def cross_entropies(output: SegmentationOutput, target: Tensor, ignore_index: int) -> Tensor:
    """Mean cross-entropy of every output at label resolution.

    Args:
        output: logits of any resolution; resized bilinearly, ``align_corners=False``.
        target: ``[N, H, W]`` class indices; pixels of ``ignore_index`` do not count.

    Returns:
        ``[M+1]``: the branches, then the ensemble; 0 where every pixel is ignored.
    """
    pixels = (target != ignore_index).sum().clamp(min=1)
    sums = [
        F.cross_entropy(
            F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False),
            target,
            ignore_index=ignore_index,
            reduction="sum",
        )
        for logits in outputs(output)
    ]
    return torch.stack(sums) / pixels


def segmentation_loss(
    net: nn.Module,
    output: SegmentationOutput,
    target: Tensor,
    *,
    sparsity: float,
    per_output: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The sum of ``cross_entropies`` plus ``sparsity`` times the penalty on net's scales.

    Args:
        net, output, target: the network, what it returned, ``[N, H, W]`` class indices.
        sparsity: λ.
        per_output: add the penalty once an output, M + 1 times, as the released code does; the paper
            adds it once.
        ignore_index: label of pixels that do not count.

    Returns:
        The 0-d loss and the ``[M+1]`` cross-entropies in it.
    """
    entropies = cross_entropies(output, target, ignore_index)
    times = len(entropies) if per_output else 1
    return entropies.sum() + sparsity * times * sparsity_penalty(net), entropies
