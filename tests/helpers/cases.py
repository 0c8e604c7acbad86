"""Shapes and inputs that tests of the operator share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness.shapes import Shape
from cen_ext.ops.activation import NAMES as ACTIVATIONS
from cen_ext.ops.norm_exchange.options import MEAN, OWN

# Small, and each awkward in its own way: one modality, odd sizes, C not divisible by M, one row, 0 to 3-d.
SMALL = [
    Shape(1, 2, 4, (3, 5)),
    Shape(2, 3, 8, (7, 5)),
    Shape(3, 2, 7, (4, 4)),
    Shape(5, 1, 11, (3, 3)),
    Shape(2, 6, 5, ()),
    Shape(2, 2, 6, (9,)),
    Shape(3, 2, 3, (2, 3, 4)),
    Shape(2, 2, 64, (17, 19)),
]


LARGEST = 10_000  # values of x that every flag is tried on


def every_flag(shape: Shape) -> Iterator[tuple[str, str, str, bool]]:
    """Region, criterion, activation, and whether there is a residual: all; on a larger x every third."""
    flags = itertools.product(["own", "all"], ["abs", "signed"], ACTIVATIONS, [False, True])
    return itertools.islice(flags, 0, None, 1 if math.prod(shape.full) <= LARGEST else 3)


class Inputs(NamedTuple):
    """Tensors of one call."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    residual: Tensor
    dy: Tensor


def make_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float64,
    channels_last: bool = False,
    small_scales: float = 0.4,
) -> Inputs:
    """Random tensors of a case; a share ``small_scales`` of the scales lies in (-0.02, 0.02)."""
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    table = (shape.num_modalities, shape.channels)
    weight = torch.where(
        torch.rand(table) < small_scales,
        torch.empty(table).uniform_(-0.02, 0.02),
        torch.empty(table).uniform_(0.5, 1.5) * torch.randn(table).sign(),
    )

    def like_x() -> Tensor:
        t = torch.randn(shape.full, dtype=dtype)
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return t.contiguous(memory_format=formats[t.dim()]) if channels_last and t.dim() in formats else t

    return Inputs(
        x=like_x() * 2 + 0.5,
        weight=weight.to(parameters),
        bias=torch.randn(table, dtype=parameters) * 0.3,
        mean=torch.randn(table, dtype=parameters) * 0.3,
        var=torch.rand(table, dtype=parameters) + 0.5,
        residual=like_x(),
        dy=like_x(),
    )


def make_route(shape: Shape) -> Tensor:
    """A random route: two of five channels stay; the mean or another modality replaces the others."""
    m, c = shape.num_modalities, shape.channels
    lender = (torch.arange(m)[:, None] + torch.randint(1, max(m, 2), (m, c))) % m
    kind = torch.randint(0, 5, (m, c))
    return torch.where(kind < 2, OWN, torch.where(kind < 3, MEAN, lender)).to(torch.int32)


def in_order(t: Tensor, num_modalities: int, order: str) -> Tensor:
    """A modality-major tensor with its rows in the given order, and with its strides."""
    if order == "modality":
        return t
    return torch.empty_like(t).copy_(t.unflatten(0, (num_modalities, -1)).transpose(0, 1).flatten(0, 1))


def modality_major(t: Tensor, num_modalities: int, order: str) -> Tensor:
    """The inverse of ``in_order``."""
    return t if order == "modality" else in_order(t, len(t) // max(num_modalities, 1), order)


def reaching_six(i: Inputs) -> Inputs:
    """The inputs with all scales that are not small multiplied, so that arguments lie beyond 6."""
    return i._replace(weight=torch.where(i.weight.abs() < 0.1, i.weight, 4 * i.weight))
