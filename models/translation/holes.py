"""Pixels of the target that were not measured, which no loss and no score is to count.

Where a domain has such pixels, their encoded value in all channels is its ``hole``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def measured(target: Tensor, hole: float | None) -> Tensor:
    """A mask ``[N, 1, H, W]`` of the measured pixels of targets ``[N, C, H, W]``; without a hole, of all."""
    if hole is None:
        return torch.ones_like(target[:, :1], dtype=torch.bool)
    return (target != hole).any(1, keepdim=True)


def filled(images: Tensor, target: Tensor, hole: float | None) -> Tensor:
    """Images ``[..., N, C, H, W]`` that have the target's own value wherever it was not measured.

    So neither a difference nor a discriminator tells anything of those pixels, and no gradient comes of them.
    """
    return images if hole is None else torch.where(measured(target, hole), images, target)
