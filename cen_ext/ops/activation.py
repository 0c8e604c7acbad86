"""The activations of ``norm_exchange``, by name: formulas and derivatives in plain PyTorch.

To add one, add it here, in ``norm_exchange/triton/activation.py``, and in csrc once for CPUs and once for
CUDA. The backward kernels recompute the argument u, so a derivative may be any function of u.
"""

from __future__ import annotations

import math
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


def _distribution(u: Tensor) -> Tensor:
    """That of the standard normal distribution."""
    return 0.5 * torch.erfc(-u / math.sqrt(2))


def _gelu_tanh_derivative(u: Tensor) -> Tensor:
    scale = 2 * math.sqrt(2 / math.pi)
    share = torch.sigmoid(scale * (u + 0.044715 * u**3))
    return share + u * share * (1 - share) * scale * (1 + 3 * 0.044715 * u * u)


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
    "silu": Activation(
        lambda u, _: F.silu(u),
        lambda u, _: u.sigmoid() * (1 + u * (1 - u.sigmoid())),
    ),
    "gelu": Activation(
        lambda u, _: F.gelu(u),
        lambda u, _: _distribution(u) + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi),
    ),
    "gelu_tanh": Activation(
        lambda u, _: F.gelu(u, approximate="tanh"),
        lambda u, _: _gelu_tanh_derivative(u),
    ),
    "hardswish": Activation(
        lambda u, _: F.hardswish(u),
        lambda u, _: torch.where(u < 3, torch.where(u <= -3, 0.0, u / 3 + 0.5), 1.0),
    ),
}
NAMES = tuple(ACTIVATIONS)
