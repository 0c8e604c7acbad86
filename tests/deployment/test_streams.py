"""Modalities that are kept apart: the same values as their stack, by every road."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cen_ext
from cen_ext.ops.streams import Streams

M, N, C = 2, 3, 4


def stack(seed: int = 0) -> Tensor:
    return torch.randn(M * N, C, 6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = torch.randn(5, C, 3, 3, dtype=torch.float64)
APART: dict[str, Callable[[Any], Any]] = {
    "relu": F.relu,
    "relu in place": F.relu_,
    "method": lambda x: x.sigmoid().clamp(min=0.25),
    "operators": lambda x: 2 - (x + x) * 3 / 4 + -x,
    "where": lambda x: torch.where(x <= 0, 0, x),
    "convolution": lambda x: F.conv2d(x, WEIGHT, padding=1),
    "module": nn.Conv2d(C, 2, 1).double(),
    "transposed": lambda x: F.conv_transpose2d(x, WEIGHT[:C, :2].contiguous()),
    "pooling": nn.MaxPool2d(3, 2, padding=1),
    "resized": lambda x: F.interpolate(x, x.shape[-2:], mode="bilinear", align_corners=True),
    "means": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[-2:]),
    "channels": lambda x: torch.cat([x, x[:, :2]], 1),
    "beside a stack": lambda x: x.add_(stack(1)),
    "a stack beside": lambda x: stack(1) * x,
    "a vector beside": lambda x: x * torch.arange(8.0, dtype=torch.float64),
    "transposition": lambda x: F.linear(x, WEIGHT.new_ones(2, 8)).mT,
    "ours": lambda x: cen_ext.max_pool_same(x, 3),
    "convolution of ours": cen_ext.Conv3x3(C, 2).double(),
}
JOINED: dict[str, Callable[[Any], Any]] = {
    "rows": lambda x: x.unflatten(0, (M, N)).mean(0),
    "row": operator.itemgetter(3),
    "batch": lambda x: torch.cat([x, x]),
    "all": lambda x: x.sum(),
    "norm exchange": lambda x: cen_ext.norm_exchange(
        x, torch.ones(M, C).double(), torch.zeros(M, C).double(), training=True, residual=x
    ),
    "data": lambda x: x.data,
    "shift": lambda x: cen_ext.pixel_shift(x, M, groups=4),
    "product": lambda x: torch.matmul(torch.ones(2, 6, dtype=torch.float64), x),
}


@pytest.mark.parametrize("name", APART)
def test_functions_of_rows_act_on_the_parts(name):
    with torch.no_grad():
        found = APART[name](Streams(stack().chunk(M)))
        expected = APART[name](stack())
    assert isinstance(found, Streams)
    torch.testing.assert_close(found.stacked(), expected)


@pytest.mark.parametrize("name", JOINED)
def test_other_functions_act_on_the_stack(name):
    found = JOINED[name](Streams(stack().chunk(M)))
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, JOINED[name](stack()))


def test_streams_tell_what_their_stack_would():
    x = Streams(stack().chunk(M))
    assert x.shape == stack().shape
    assert x.dtype == torch.float64
    assert x.dim() == 4
    assert x.chunk(M) == x.parts
    assert [len(part) for part in x.chunk(3)] == [2, 2, 2]
    assert Streams.of(x, M) is x
    with pytest.raises(AttributeError):
        x.no_such_thing  # noqa: B018


def test_what_would_write_to_a_copy_is_refused():
    x = Streams(stack().chunk(M))
    with pytest.raises(NotImplementedError, match="cumsum_ cannot act in place"):
        x.cumsum_(0)


def test_changes_in_place_reach_the_parts():
    parts = [part.clone() for part in stack().chunk(M)]
    Streams(parts).mul_(2)
    torch.testing.assert_close(torch.cat(parts), stack() * 2)
