"""Cross-entropy of logits at label resolution that keeps nothing of that resolution."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def resized_cross_entropies(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Summed cross-entropy of every output's logits, resized bilinearly (``align_corners=False``) to target.

    The gradient is computed in the forward pass, image by image, while the logits of label
    resolution are at hand: for 40 classes these and their softmax would be 2.5 times the images, three times
    over for two modalities and their ensemble. Half types are resized and summed in float32.

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
    return large.permute(0, 2, 3, 1).log_softmax(-1)


def _slope(
    log_softmax: Tensor,  # [1, H, W, K]; overwritten
    classes: Tensor,  # [1, H, W, 1]
    counted: Tensor,  # [1, H, W, 1]
    size: torch.Size,  # h, w
) -> Tensor:
    """The summed cross-entropy's gradient by the logits before resizing, ``[1, K, h, w]``."""
    minus_one = log_softmax.new_full((), -1).expand_as(classes)
    difference = log_softmax.exp_().scatter_add_(-1, classes, minus_one).where(counted, 0).permute(0, 3, 1, 2)
    gradient: Tensor = torch.ops.aten.upsample_bilinear2d_backward(
        difference, difference.shape[-2:], [*difference.shape[:2], *size], False, None, None
    )
    return gradient
