"""The operator's contract on every backend, over shapes, memory layouts, types and flags."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Shape, make_inputs
from covered import every_kind
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import Call, check, run, run_definition
from torch import Tensor

import cen_ext
from cen_ext.functional import DTYPES
from cen_ext.reference import Options, memory_format

# A number of every type, so that a scale can lie exactly on it.
THRESHOLD = 2.0**-6
LARGEST = 6000  # values of one tensor, for the sake of speed


@st.composite
def shapes(draw) -> Shape:
    modalities, batch, channels = draw(st.integers(1, 8)), draw(st.integers(1, 5)), draw(st.integers(1, 40))
    room = LARGEST // (modalities * batch * channels)
    spatial = []
    for _ in range(draw(st.integers(0, 3))):
        spatial.append(draw(st.integers(1, max(1, min(12, room)))))
        room //= spatial[-1]
    return Shape(modalities, batch, channels, tuple(spatial))


@st.composite
def layouts(draw, tensor: Tensor) -> Tensor:
    """Numbers like the tensor's (the same, but where expanded) at other places in memory."""
    axis = draw(st.integers(0, tensor.dim() - 1))
    kind = draw(
        st.sampled_from(["contiguous", "channels last", "permuted", "strided", "sliced", "odd", "expanded"])
    )
    if kind == "channels last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == "permuted":
        order = draw(st.permutations(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute([order.index(d) for d in range(tensor.dim())])
    if kind == "strided":
        return tensor.repeat_interleave(2, axis).unflatten(axis, (-1, 2)).select(axis + 1, 1)
    if kind == "sliced":
        return torch.cat([tensor, tensor, tensor], axis).narrow(axis, tensor.shape[axis], tensor.shape[axis])
    if kind == "odd":  # starts at an address that no vector does
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if kind == "expanded":
        return tensor.narrow(axis, 0, 1).expand_as(tensor)
    return tensor


@st.composite
def calls(draw, norm: str, dtype: torch.dtype) -> tuple[Call, Tensor]:
    """A call and the gradient of its result."""
    shape = draw(shapes())
    torch.manual_seed(draw(st.integers(0, 2**32)))
    i = make_inputs(shape, dtype)
    on_threshold = torch.rand_like(i.weight) < 0.1
    weight = torch.where(on_threshold, THRESHOLD * i.weight.sign(), i.weight)
    options = Options(
        threshold=draw(st.sampled_from([0.0, THRESHOLD, 1.0])),
        region=draw(st.sampled_from(["own", "all"])),
        criterion=draw(st.sampled_from(["abs", "signed"])),
        norm=norm,
        eps=draw(st.sampled_from([1e-5, 0.1])),
        activation=draw(st.sampled_from(["identity", "relu", "leaky_relu"])),
        negative_slope=draw(st.sampled_from([0.2, -0.5, 1.5])),
    )
    values = math.prod(shape.spatial) * (shape.batch if norm == "batch" else 1)
    given_statistics = values == 1 or draw(st.booleans())
    call = Call(
        x=draw(layouts(i.x)),
        weight=weight,
        bias=i.bias,
        mean=i.mean if given_statistics else None,
        var=i.var if given_statistics else None,
        residual=draw(st.none() | layouts(i.residual)),
        options=options,
    )
    return call, draw(layouts(i.dy))


@every_kind()
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_values_and_gradients(backend, norm, dtype, data):
    call, dy = data.draw(calls(norm, dtype))
    found = check(backend, call, dy)
    assert found.y.dtype == found.dx.dtype == dtype
    assert found.dweight.dtype == found.dbias.dtype == call.weight.dtype
    if call.x.is_contiguous() or memory_format(call.x) != torch.contiguous_format:
        assert found.y.is_contiguous(memory_format=memory_format(call.x))
