"""Cross-entropy of logits at label resolution that keeps nothing of that resolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def resized_cross_entropies(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Summed cross-entropy of every output's logits, resized bilinearly (``align_corners=False``) to target.

    The gradient is computed in the forward pass, one output after the other, while the logits of label
    resolution are at hand: for 40 classes these and their softmax would be 2.5 times the images, three times
    over for two modalities and their ensemble. Half types are resized as they are and summed in float32.

    Args:
        logits: ``[outputs, N, K, h, w]``.
        target: ``[N, H, W]`` class indices; pixels of ``ignore_index`` do not count.

    Returns:
        ``[outputs]``.
    """
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    sums: Tensor = _ResizedCrossEntropies.apply(logits.to(wide), target, ignore_index)
    return sums


class _ResizedCrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        counted = (target != ignore_index).unsqueeze(-1)
        classes = target.unsqueeze(-1).where(counted, 0)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        size = target.shape[-2:]
        sums = []
        for index, small in enumerate(logits):
            large = F.interpolate(small, size, mode="bilinear", align_corners=False)
            # Classes last: as the logits lie in memory where the network runs in channels_last.
            rows = large.permute(0, 2, 3, 1)
            log_softmax = rows.log_softmax(-1)
            sums.append(-(log_softmax.gather(-1, classes) * counted).sum())
            if gradient is not None:
                difference = log_softmax.exp_().scatter_add_(
                    -1, classes, log_softmax.new_full((), -1).expand_as(classes)
                )
                difference *= counted
                gradient[index] = torch.ops.aten.upsample_bilinear2d_backward(
                    difference.permute(0, 3, 1, 2), size, small.shape, False, None, None
                )
        ctx.save_for_backward(gradient)
        return torch.stack(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsums: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * dsums.view(-1, 1, 1, 1, 1), None, None
