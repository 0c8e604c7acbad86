"""The operator's contract on every backend, over shapes, memory layouts, types and flags."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cen_ext
from cen_ext.ops.activation import NAMES as ACTIVATIONS
from cen_ext.ops.norm_exchange.options import ACROSS_CHANNELS
from cen_ext.ops.norm_exchange.reference import Options, memory_format
from tests.helpers.cases import Shape, make_inputs, make_route
from tests.helpers.covered import BACKENDS, NORMS, every_kind
from tests.helpers.tolerance import Call, check, run

# A number of every type, so that a scale can lie exactly on it.
THRESHOLD = 2.0**-6
LARGEST = 6000  # values of one tensor, for the sake of speed
ORDERS = ("modality", "sample")


@st.composite
def shapes(draw, most_modalities: int, most_rows: int) -> Shape:
    modalities, batch = draw(st.integers(1, most_modalities)), draw(st.integers(1, most_rows))
    channels = draw(st.integers(1, 40))
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


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def calls(
    draw, norm: str, dtype: torch.dtype, most_modalities: int = 8, most_rows: int = 5
) -> tuple[Call, Tensor]:
    """A call and the gradient of its result."""
    shape = draw(shapes(most_modalities, most_rows))
    torch.default_generator.manual_seed(draw(st.integers(0, 2**32)))
    i = make_inputs(shape, dtype)
    on_threshold = torch.rand_like(i.weight) < 0.1
    weight = torch.where(on_threshold, THRESHOLD * i.weight.sign(), i.weight)
    options = Options(
        threshold=draw(st.sampled_from([0.0, THRESHOLD, 1.0])),
        region=draw(st.sampled_from(["own", "all"])),
        criterion=draw(st.sampled_from(["abs", "signed"])),
        norm=norm,
        eps=draw(st.sampled_from([1e-5, 0.1])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        negative_slope=draw(st.sampled_from([0.2, -0.5, 1.5])),
        order=draw(st.sampled_from(ORDERS)),
        num_groups=draw(st.sampled_from(divisors(shape.channels))) if norm == "group" else 1,
    )
    values = math.prod(shape.spatial) * (shape.batch if norm == "batch" else 1)
    given_statistics = norm not in ACROSS_CHANNELS and (values == 1 or draw(st.booleans()))
    call = Call(
        x=draw(layouts(i.x)),
        weight=draw(layouts(weight)),
        bias=draw(layouts(i.bias)),
        mean=draw(layouts(i.mean)) if given_statistics else None,
        var=draw(layouts(i.var)) if given_statistics else None,
        residual=draw(st.none() | layouts(i.residual)),
        options=options,
        route=make_route(shape) if shape.num_modalities > 1 and draw(st.booleans()) else None,
    )
    return call, draw(layouts(i.dy))


@every_kind()
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_values_and_gradients(backend, norm, dtype, data):
    check_any_call(backend, *data.draw(calls(norm, dtype)))


def check_any_call(backend: str, call: Call, dy: Tensor) -> None:
    """Values, types and layouts."""
    found = check(backend, call, dy)
    assert found.y.dtype == found.dx.dtype == call.x.dtype
    assert found.dweight.dtype == found.dbias.dtype == call.weight.dtype
    if call.x.is_contiguous() or memory_format(call.x) != torch.contiguous_format:
        assert found.y.is_contiguous(memory_format=memory_format(call.x))


# More than one block of a kernel's, of lines and of rows, and work for more than one thread.
LARGE = [Shape(2, 2, 3, (130, 131)), Shape(3, 2, 20, (60, 61)), Shape(2, 3, 70, (23, 19))]


@every_kind()
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(backend, norm, dtype, shape, channels_last, order):
    i = make_inputs(shape, dtype, channels_last)
    options = Options(THRESHOLD, norm=norm, activation="relu", order=order)
    check(backend, Call(i.x, i.weight, i.bias, residual=i.residual, options=options), i.dy)


EMPTY = [(0, 6), (4, 0), (4, 6, 0), (0, 6, 3, 4), (4, 0, 3, 4), (4, 6, 0, 4), (4, 6, 3, 0), (4, 6, 2, 0, 3)]


@every_kind()
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_empty(backend, norm, dtype, shape, training):
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual = (torch.empty(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias, running_mean, running_var = torch.rand(4, 2, shape[1], dtype=parameters)
    before = running_mean.clone(), running_var.clone()
    leaves = [x, weight.requires_grad_(), bias.requires_grad_(), residual]
    y = cen_ext.norm_exchange(
        *leaves[:3],
        running_mean,
        running_var,
        residual=residual,
        threshold=1.0,
        norm=norm,
        training=training,
        activation="relu",
        backend=backend,
    )
    assert (y.shape, y.dtype) == (shape, dtype)
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
    assert torch.equal(running_mean, before[0])
    assert torch.equal(running_var, before[1])


@every_kind()
@pytest.mark.parametrize("channels_last", [False, True])
def test_same_bits_every_run_and_for_any_number_of_threads(backend, norm, dtype, channels_last):
    i = make_inputs(Shape(2, 3, 20, (33, 31)), dtype, channels_last)
    options = Options(THRESHOLD, norm=norm, activation="relu")
    call = Call(i.x, i.weight, i.bias, residual=i.residual, options=options)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(backend, call, i.dy))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


COMPILED = [name for name in BACKENDS if name != "reference"]


@every_kind(names=COMPILED)
@pytest.mark.parametrize("statistics_given", [False, True])
def test_opcheck(backend, norm, dtype, statistics_given):
    i = make_inputs(Shape(2, 2, 6, (4, 5)), dtype, channels_last=statistics_given)
    mean, var = (i.mean, i.var) if statistics_given else (None, None)
    options = Options(THRESHOLD, norm=norm, activation="relu", order=ORDERS[statistics_given])
    leaves = [t.clone().requires_grad_() for t in (i.x, i.weight, i.bias)]
    residual = i.residual.requires_grad_()
    forward = torch.ops.cen_ext.norm_exchange.default
    torch.library.opcheck(forward, (*leaves, mean, var, residual, *options))
    if mean is None or var is None:
        _, mean, var = forward(i.x, i.weight, i.bias, None, None, None, *options)
    torch.library.opcheck(
        torch.ops.cen_ext.norm_exchange_backward.default,
        (i.dy, i.x, i.weight, i.bias, mean, var, i.residual.detach(), not statistics_given, *options),
    )


@every_kind(names=[name for name in BACKENDS if name == "cpu"])
def test_the_op_that_updates_running_statistics(backend, norm, dtype):
    """Results are those of the op that does not, to the last bit; statistics are updated as PyTorch's."""
    i = make_inputs(Shape(2, 3, 6, (4, 5)), dtype)
    op, options = torch.ops.cen_ext.norm_exchange_updating.default, Options(THRESHOLD, norm=norm)
    arguments = (i.x, i.weight, i.bias, i.mean.clone(), i.var.clone(), i.residual, 0.3, *options)
    torch.library.opcheck(op, arguments)
    found = op(*arguments)
    expected = torch.ops.cen_ext.norm_exchange(i.x, i.weight, i.bias, None, None, i.residual, *options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    values = i.x[0, 0].numel() * (3 if norm == "batch" else 1)
    for running, before, batch, factor in (
        (arguments[3], i.mean, found[1], 1.0),
        (arguments[4], i.var, found[2], values / (values - 1)),
    ):
        wanted = 0.7 * before + 0.3 * factor * batch.view(2, -1, 6).double().mean(1)
        torch.testing.assert_close(running.double(), wanted.double(), rtol=1e-6, atol=1e-7)
    running_mean = i.mean.clone()
    version = running_mean._version
    cen_ext.norm_exchange(i.x, i.weight, i.bias, running_mean, i.var, training=True, backend=backend)
    assert running_mean._version > version


@every_kind(dtypes=[torch.float32], names=COMPILED)
@pytest.mark.parametrize("statistics_given", [False, True])
def test_compiled_backends_refuse_to_be_differentiated_twice(backend, norm, dtype, statistics_given):
    i = make_inputs(Shape(2, 2, 6, (3, 3)), dtype)
    statistics = (i.mean, i.var) if statistics_given else ()
    leaves = [t.requires_grad_() for t in (i.x, i.weight, i.bias)]
    y = cen_ext.norm_exchange(*leaves, *statistics, norm=norm, training=not statistics_given, backend=backend)
    for gradient in torch.autograd.grad(y.square().sum(), leaves, create_graph=True):
        with pytest.raises(RuntimeError, match=r"twice .*use backend='reference'"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("norm", NORMS)
def test_the_reference_can_be_differentiated_twice(norm):
    i = make_inputs(Shape(2, 2, 3, (2, 2)))

    def call(x, weight, bias):
        return cen_ext.norm_exchange(
            x, weight, bias, threshold=THRESHOLD, norm=norm, training=True, backend="reference"
        )

    assert ((i.weight.abs() - THRESHOLD).abs() > 1e-5).all()
    assert torch.autograd.gradgradcheck(call, [t.requires_grad_() for t in (i.x, i.weight, i.bias)])


@every_kind(dtypes=[torch.bfloat16, torch.float32])
def test_autocast_leaves_types_as_they_are(backend, norm, dtype):
    i = make_inputs(Shape(2, 2, 6, (3, 3)), dtype)
    leaves = [t.requires_grad_() for t in (i.x, i.weight, i.bias)]
    options = dict(norm=norm, training=True, threshold=THRESHOLD, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        y = cen_ext.norm_exchange(*leaves, **options)
    assert torch.equal(y, cen_ext.norm_exchange(*leaves, **options))
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y, leaves, i.dy)
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
