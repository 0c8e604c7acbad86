"""The activations of ``norm_exchange``, by name: formulas and derivatives in plain PyTorch.

To add one, add it here, in ``norm_exchange/triton/activation.py``, and in csrc once for CPUs and once for
CUDA. Kernels recompute the argument in the backward pass, so a derivative may depend on it in any way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[[Tensor, float], Tensor]  # of the argument and negative_slope


class Activation(NamedTuple):
    """An activation as the definition computes it, and the derivative that autograd takes of it."""

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
