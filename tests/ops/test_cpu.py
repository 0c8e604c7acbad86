"""The compiled CPU backend beyond the tests of every backend: instruction sets, blocks, layouts, the ops."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import cen_ext
from bench.harness.machine import cache_sizes
from cen_ext.ops.activation import NAMES as ACTIVATIONS
from cen_ext.ops.norm_exchange.reference import DTYPES, Options
from cen_ext.ops.pixel_shift.functional import pixel_shift
from tests.helpers.alone import other_instruction_sets
from tests.helpers.cases import Shape, make_inputs, make_route
from tests.helpers.covered import NORMS
from tests.helpers.tolerance import Call, Results, check, run

if cen_ext.available_backends()["cpu"] != "ok":
    pytest.skip(cen_ext.available_backends()["cpu"], allow_module_level=True)

from cen_ext import _C
from cen_ext.ops.norm_exchange import native
from tests.helpers.paths import ROOT

THRESHOLD = 2.0**-6
every_norm = pytest.mark.parametrize("norm", NORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_layouts = pytest.mark.parametrize("channels_last", [False, True])


# --- instruction sets ---


def test_the_instruction_set_of_this_process():
    check_this_process()


@pytest.mark.parametrize("instruction_set", other_instruction_sets())
def test_every_other_instruction_set(instruction_set):
    result = subprocess.run(
        [sys.executable, "-c", "from tests.ops import test_cpu; test_cpu.check_this_process()"],
        cwd=ROOT,
        env={
            **os.environ,
            "CEN_EXT_CPU_CAPABILITY": instruction_set,
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
    )
    if "this processor runs" in result.stderr:
        pytest.skip(f"this processor does not run {instruction_set}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == instruction_set


# Channels that are no multiple of a vector or fewer than one, lines far shorter than one, many modalities.
NARROW = [Shape(2, 2, 21, (11, 13)), Shape(3, 2, 40, (5, 5)), Shape(2, 3, 3, (9,)), Shape(9, 1, 19, (2, 3))]


def check_this_process() -> None:
    """Every activation in calls of every kind; in processes of their own, too."""
    activations, orders = itertools.cycle(ACTIVATIONS), itertools.cycle(["modality", "sample", "sample"])
    for shape, dtype, norm, channels_last, given in itertools.product(
        NARROW, DTYPES, NORMS, [False, True], [False, True]
    ):
        torch.manual_seed(0)
        i = make_inputs(shape, dtype, channels_last)
        drawn = dict(activation=next(activations), order=next(orders))
        options = Options(THRESHOLD, "all", norm=norm, negative_slope=0.2, **drawn)
        statistics = (i.mean, i.var) if given else (None, None)
        # Half of the calls with a route of their own; a single modality has none.
        route = make_route(shape) if given else None
        check("cpu", Call(i.x, i.weight, i.bias, *statistics, i.residual, options, route), i.dy)
        if len(shape.spatial) == 2:
            calls = [
                pixel_shift(i.x, shape.num_modalities, base=i.dy, backend=b) for b in ("cpu", "reference")
            ]
            assert torch.equal(*calls)
    print(_C.build_info()["instruction_set"])


# --- blocks: how a large call is cut ---

# More than one block of lines, of pieces of a line, of rows; more work than one thread is given.
LARGE = [
    Shape(2, 2, 3, (130, 131)),
    Shape(3, 2, 20, (60, 61)),
    Shape(2, 3, 70, (23, 19)),
    Shape(2, 2000, 5, (4,)),
]


# More vectors of channels than wait for each other to be stored, the last one whole or not, in several parts.
WIDE = [Shape(2, 2, 208, (11, 9)), Shape(4, 1, 237, (17, 13))]


@every_dtype
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_many_channels_last(shape, routed, given, dtype):
    i = make_inputs(shape, dtype, channels_last=True)
    statistics = (i.mean, i.var) if given else (None, None)
    options = Options(0.0 if routed else THRESHOLD, activation="relu")
    route = make_route(shape) if routed else None
    check("cpu", Call(i.x, i.weight, i.bias, *statistics, i.residual, options, route), i.dy)


@both_layouts
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_mean_over_many_blocks(shape, channels_last):
    i = make_inputs(shape, torch.float32, channels_last)
    options = Options(THRESHOLD, activation="leaky_relu")
    check("cpu", Call(1e3 + 0.05 * i.x, i.weight, i.bias, options=options), i.dy)


@both_layouts
@pytest.mark.parametrize("spatial", [(2,), (5,), (4, 4), (7, 9), (40, 50)], ids=str)
def test_an_outlier_costs_the_same_whatever_the_length_of_lines(spatial, channels_last):
    """Sums of deviations from it would lose as many units as a block has values."""
    i = make_inputs(Shape(1, 20_000 // math.prod(spatial), 6, spatial), torch.float32)
    x = 1e-3 * i.x
    x.flatten(2)[0, :, 0] = 1e3
    if channels_last:
        x = LAYOUTS["channels last"](x)
    check("cpu", Call(x, i.weight, i.bias), i.dy)


@both_layouts
def test_constant_channels_of_many_blocks_are_exact(channels_last):
    i = make_inputs(Shape(2, 3, 20, (70, 71)), torch.float32, channels_last)
    found = run("cpu", Call(torch.full_like(i.x, 1.1), i.weight, i.bias), i.dy)
    assert torch.equal(found.mean, torch.full_like(found.mean, 1.1))
    assert torch.equal(found.var, torch.zeros_like(found.var))


def assert_same_bits(a: Results, b: Results, names: tuple[str, ...] = Results._fields) -> None:
    for name in names:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@both_layouts
@pytest.mark.parametrize("order", ["modality", "sample"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_same_bits_however_the_work_is_shared(shape, channels_last, order):
    i = make_inputs(shape, torch.float32, channels_last)
    options = Options(THRESHOLD, activation="relu", order=order)
    call = Call(i.x, i.weight, i.bias, residual=i.residual, options=options)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run("cpu", call, i.dy))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(results[0], other)


@every_norm
@both_layouts
def test_same_bits_wherever_x_lies(norm, channels_last):
    """Arrays of other libraries, and views, begin at addresses that are no multiple of a vector."""
    i = make_inputs(Shape(2, 3, 20, (17, 19)), torch.float32, channels_last)
    call = Call(i.x, i.weight, i.bias, residual=i.residual, options=Options(THRESHOLD, norm=norm))
    expected = run("cpu", call, i.dy)
    for offset in (1, 4):
        x = torch.empty(i.x.numel() + offset).as_strided(i.x.shape, i.x.stride(), offset).copy_(i.x)
        assert x.data_ptr() % 64 == 4 * offset
        assert_same_bits(run("cpu", call._replace(x=x), i.dy), expected)


# --- results that are larger than a share of the last cache, which are stored past it ---

# Bytes of x, as csrc/tensors.h has it, with the cache that csrc/cpu/dispatch.cpp takes to be these cores'.
STREAMED_FROM = min(cache_sizes().get(3, 2**25), (os.cpu_count() or 1) * 2**24) // 8


def streamed_shape(dtype: torch.dtype) -> Shape:
    """A pixel is a multiple of any vector long, and more than eight of any; its lines are not."""
    rows = STREAMED_FROM // (2 * 208 * 23 * 25 * dtype.itemsize) + 1
    if rows > 64:
        pytest.skip("the cache is too large to fill it in a test")
    return Shape(2, rows, 208, (23, 25))


@every_dtype
@both_layouts
@pytest.mark.parametrize("kind", ["given", "instance"])
def test_streamed_results_are_those_of_their_rows(kind, channels_last, dtype):
    shape = streamed_shape(dtype)
    i = make_inputs(shape, dtype, channels_last)
    norm, statistics = ("batch", (i.mean, i.var)) if kind == "given" else ("instance", (None, None))
    options = Options(THRESHOLD, norm=norm, activation="leaky_relu")
    whole = run("cpu", Call(i.x, i.weight, i.bias, *statistics, i.residual, options), i.dy)

    def row(t: Tensor, n: int) -> Tensor:
        return t.unflatten(0, (2, -1))[:, n].contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )

    for n in (0, shape.batch - 1):
        x, residual, dy = (row(t, n) for t in (i.x, i.residual, i.dy))
        part = run("cpu", Call(x, i.weight, i.bias, *statistics, residual, options), dy)
        for name in ("y", "dx", "dresidual"):
            assert torch.equal(row(getattr(whole, name), n), getattr(part, name)), name


@both_layouts
def test_streamed_results_with_batch_statistics(channels_last):
    i = make_inputs(streamed_shape(torch.float32), torch.float32, channels_last)
    options = Options(THRESHOLD, activation="relu")
    check("cpu", Call(i.x, i.weight, i.bias, residual=i.residual, options=options), i.dy)


# --- what the ops promise to compilers and to autograd ---

LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "rows inside": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "channels last, sliced": lambda t: LAYOUTS["channels last"](torch.cat([t, t], 1))[:, : t.shape[1]],
    "expanded": lambda t: t[:, :1].expand_as(t),
}
# The second has lines so short that they are worked on in another layout; then sizes of one.
SIZES = [(4, 6, 5, 4), (4, 18, 3, 2), (4, 18, 1, 1), (4, 1, 5, 4), (4, 6, 1, 5), (4, 6, 7), (4, 6)]


@every_norm
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_results_lie_in_memory_as_the_fake_kernels_say(size, layout, norm):
    x, residual, dy = LAYOUTS[layout](torch.randn(size)), torch.randn(size), torch.randn(size)
    weight, bias = torch.rand(2, size[1], 2).unbind(-1)  # no parameter need be contiguous
    mean, var = torch.rand(2, 2 if norm == "batch" else size[0], size[1])
    options = Options(0.5, norm=norm, activation="relu")
    for op, arguments in (
        (native.norm_exchange_op, (x, weight, bias, None, None, residual, *options)),
        (native.norm_exchange_op, (x, weight.t().contiguous().t(), bias, mean, var, None, *options)),
        (native.norm_exchange_backward_op, (dy, x, weight, bias, mean, var, residual, True, *options)),
        (
            native.norm_exchange_backward_op,
            (dy, x, weight.t().contiguous().t(), bias, mean, var, None, True, *options),
        ),
    ):
        with FakeTensorMode() as mode:
            fakes = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        for real, fake in zip(op(*arguments), fakes, strict=True):
            assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_compiles_without_a_break():
    i = make_inputs(Shape(2, 2, 18, (3, 4)), torch.float32)
    options = Options(THRESHOLD, activation="relu")

    def step(x, weight, bias):
        y = native.norm_exchange_op((x * 2).mT, weight.t(), bias, None, None, x.mT, *options)[0]
        return y.square().sum()

    leaves = [t.clone().requires_grad_() for t in (i.x, i.weight.t().contiguous(), i.bias)]
    expected = torch.autograd.grad(step(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("training", [True, False])
def test_saves_nothing_of_the_size_of_x_but_x(training, activation):
    i = make_inputs(Shape(2, 3, 8, (9, 9)), torch.float32)
    saved: list[Tensor] = []
    x, residual = i.x.requires_grad_(), i.residual.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cen_ext.norm_exchange(
            x,
            i.weight.requires_grad_(),
            i.bias.requires_grad_(),
            i.mean,
            i.var,
            residual=residual,
            training=training,
            threshold=THRESHOLD,
            activation=activation,
            backend="cpu",
        )
    large = {t.data_ptr() for t in saved if t.numel() >= x.numel()}
    assert large == {x.data_ptr()} | ({residual.data_ptr()} if activation == "relu" else set())
    assert all(t.numel() <= i.weight.numel() for t in saved if t.data_ptr() not in large)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norm="weight"), "unknown norm 'weight'"),
        (dict(region="mine"), "unknown region 'mine'"),
        (dict(criterion="l2"), "unknown criterion 'l2'"),
        (dict(activation="mish"), "unknown activation 'mish'"),
    ],
)
def test_the_op_refuses_unknown_options(change, message):
    i = make_inputs(Shape(2, 2, 6, (4, 5)))
    with pytest.raises(RuntimeError, match=message):
        native.norm_exchange_op(i.x, i.weight, i.bias, None, None, None, *Options()._replace(**change))


def test_the_op_refuses_more_modalities_than_its_tables_can_name():
    x, weight = torch.zeros(32767, 1), torch.ones(32767, 1)
    with pytest.raises(RuntimeError, match="more than 32766 modalities; use the reference backend"):
        native.norm_exchange_op(x, weight, weight, weight, weight, None, *Options())


def test_the_ops_refuse_tensors_that_do_not_fit():
    i = make_inputs(Shape(2, 2, 6, (4, 5)))
    for arguments in (
        (i.x[:3], i.weight, i.bias, None, None, None),
        (i.x, i.weight[:, :5], i.bias[:, :5], None, None, None),
        (i.x, i.weight, i.bias.float(), None, None, None),
        (i.x, i.weight, i.bias, i.mean, None, None),
        (i.x, i.weight, i.bias, i.mean[:, :3], i.var[:, :3], None),
        (i.x, i.weight, i.bias, None, None, i.residual[:, :3]),
    ):
        with pytest.raises(RuntimeError, match="cen_ext: "):
            native.norm_exchange_op(*arguments, *Options())
    for dy in (i.dy[:, :3], i.dy.float()):
        with pytest.raises(RuntimeError, match="cen_ext: dy "):
            native.norm_exchange_backward_op(dy, i.x, i.weight, i.bias, i.mean, i.var, None, True, *Options())
