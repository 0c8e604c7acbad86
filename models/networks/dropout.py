"""Dropout that keeps a byte per value for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """``torch.nn.Dropout``, which on a CPU would keep a mask in x's type; it draws other masks than that."""

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Drop values of x; ``inplace``, which saves a copy, where nothing else reads them."""
        if not self.training or self.p == 0:
            return x
        kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self.p)
        y = x.mul_(kept) if inplace else x * kept
        return y.mul_(1 / (1 - self.p) if self.p < 1 else 0)
