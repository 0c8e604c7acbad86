"""The segmentation loss (Eq. 4): cross-entropy of every branch and of the ensemble, and sparsity."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.networks.outputs import AuxiliaryOutput, SegmentationOutput
from models.networks.segmentor import SegmentationNetwork


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
        per_output: add the penalty once per output, M + 1 times, as the released code does; the paper
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


def resized_cross_entropies(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Summed cross-entropy of every output's logits, resized bilinearly (``align_corners=False``) to target.

    Nothing of label resolution is kept: the gradient is computed in the forward pass, image by image, while
    the logits of that resolution are at hand. For 40 classes these and their softmax would be 2.5 times the
    images, three times over for two modalities and their ensemble. Half types are resized and summed in
    float32.

    Args:
        logits: ``[outputs, N, K, h, w]``.
        target: ``[N, H, W]`` class indices; pixels of ``ignore_index`` do not count.

    Returns:
        ``[outputs]``.
    """
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    sums: Tensor = _ResizedCrossEntropies.apply(logits.to(wide), target, ignore_index)  # type: ignore[no-untyped-call]
    return sums


class _ResizedCrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        counted = (target != ignore_index).unsqueeze(-1)
        classes = target.unsqueeze(-1).where(counted, 0)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        sums = logits.new_empty(logits.shape[:2])
        # One image at a time: a training step's memory is at its peak here.
        for output, image in product(*map(range, sums.shape)):
            here = slice(image, image + 1)
            log_softmax = _resized_log_softmax(logits[output, here], target.shape[-2:])
            # Not a product: what is not counted may be NaN.
            sums[output, image] = -log_softmax.gather(-1, classes[here]).where(counted[here], 0).sum()
            if gradient is not None:
                gradient[output, here] = _slope(log_softmax, classes[here], counted[here], logits.shape[-2:])
            del log_softmax  # before the next one's
        ctx.save_for_backward(gradient)
        return sums.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsums: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * dsums.view(-1, 1, 1, 1, 1), None, None


def _resized_log_softmax(logits: Tensor, size: torch.Size) -> Tensor:
    """``[1, K, h, w]`` to ``[1, H, W, K]``: classes last, as in memory where the network is channels_last."""
    large = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    large = large.permute(0, 2, 3, 1).contiguous()  # log_softmax would keep both while it runs
    return large.log_softmax(-1)


def _slope(
    log_softmax: Tensor,  # [1, H, W, K]; overwritten
    classes: Tensor,  # [1, H, W, 1]
    counted: Tensor,  # [1, H, W, 1]
    size: torch.Size,  # h, w
) -> Tensor:
    """The summed cross-entropy's gradient by the logits before resizing, ``[1, K, h, w]``."""
    minus_one = log_softmax.new_full((), -1).expand_as(classes)
    difference = log_softmax.exp_().scatter_add_(-1, classes, minus_one)
    difference = difference.masked_fill_(~counted, 0).permute(0, 3, 1, 2)
    gradient: Tensor = torch.ops.aten.upsample_bilinear2d_backward(
        difference, difference.shape[-2:], [*difference.shape[:2], *size], False, None, None
    )
    return gradient
