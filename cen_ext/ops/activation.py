"""The activations of ``norm_exchange``, by name: formulas and derivatives in plain PyTorch.

To add one, add it here, in ``norm_exchange/triton/activation.py``, and in csrc once for CPUs and once for
CUDA. The backward kernels recompute the argument u, so a derivative may be any function of u.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[[Tensor, float], Tensor]  # (u, negative_slope) to a tensor of u's shape


class Activation(NamedTuple):
    """The value of an activation, as in the reference, and the derivative that autograd computes for it."""

    value: Function
    derivative: Function


ACTIVATIONS = {
    "identity": Activation(
        lambda u, _: u,
        lambda u, _: torch.ones_like(u),
    ),
    "relu": Activation(
        lambda u, _: F.relu(u),
        lambda u, _: (u > 0).to(u.dtype),
    ),
    "relu6": Activation(
        lambda u, _: F.relu6(u),
        lambda u, _: ((u > 0) & (u < 6)).to(u.dtype),
    ),
    "leaky_relu": Activation(
        lambda u, slope: F.leaky_relu(u, slope),
        lambda u, slope: torch.where(u > 0, torch.ones_like(u), slope),
    ),
}
NAMES = tuple(ACTIVATIONS)
