"""The compiled CPU backend beyond the tests of every backend: float32, layouts, instruction sets, bits."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Shape, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cen_ext
from cen_ext import reference
from cen_ext.reference import Options

if cen_ext.available_backends()["cpu"] != "ok":
    pytest.skip(cen_ext.available_backends()["cpu"], allow_module_level=True)

from cen_ext import _C, compiled

UNIT = 2.0**-24  # float32's rounding unit
EXCHANGE = Options(threshold=0.02)


def run(x, weight, bias, mean, var, residual, options: Options, dy, forward=compiled.norm_exchange):
    """y, the statistics of x, and the gradients of x, weight, bias and residual."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    if residual is not None:
        leaves.append(residual.detach().requires_grad_())
    # A call of the compiled op takes the options one by one, the reference as they are.
    tail = (options,) if forward is reference.norm_exchange else options
    y, batch_mean, batch_var = forward(
        *leaves[:3], mean, var, leaves[3] if residual is not None else None, *tail
    )
    grads = torch.autograd.grad(y, leaves, dy)
    return y.detach(), batch_mean.detach(), batch_var.detach(), *grads


def check_float32(
    shape: Shape,
    channels_last: bool = False,
    statistics_given: bool = False,
    with_residual: bool = False,
    options: Options = EXCHANGE,
    x: Tensor | None = None,
) -> None:
    """float32 kernels against the definition evaluated in float64 on the same numbers.

    Bounds are a few rounding units times the largest term of the sum that a result is.
    """
    i = make_inputs(shape, torch.float32, channels_last)
    x = i.x if x is None else x
    stats = (i.mean, i.var) if statistics_given else (None, None)
    residual = i.residual if with_residual else None

    def double(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.double()

    wide = [double(t) for t in (x, i.weight, i.bias, *stats, residual)]
    # At the activation's kink a rounding error decides the gradient: none may come in there.
    u, mean, var = reference.norm_exchange(*wide, options._replace(activation="identity"))
    dy = torch.where(u.abs() < 1e-4, 0.0, i.dy.double()).float()
    expected = run(*wide, options, dy.double(), forward=reference.norm_exchange)
    found = run(x, i.weight, i.bias, *stats, residual, options, dy)

    table = (shape.num_modalities, 1, shape.channels, *(1,) * (x.dim() - 2))
    invstd = (var + options.eps).rsqrt()
    xhat = (wide[0].unflatten(0, (shape.num_modalities, -1)) - mean.view(table)) * invstd.view(table)
    reach, slope = 1 + xhat.abs().max(), (i.weight * invstd).abs().max()
    gradients = dy.abs().double().sum() / shape.channels
    y_bound = 8 * UNIT * (reach * i.weight.abs().max() + i.bias.abs().max() + i.residual.abs().max())
    bounds = {
        "y": y_bound,
        "mean": 2 * UNIT * mean.abs() + 4 * UNIT * var.sqrt(),
        "var": 16 * UNIT * var,
        "dx": 16 * UNIT * slope * reach**2 * dy.abs().max(),
        "dweight": 16 * UNIT * reach * gradients,
        "dbias": 16 * UNIT * gradients,
        "dresidual": 2 * UNIT * dy.abs().max(),
    }
    for (name, bound), a, b in zip(bounds.items(), found, expected, strict=False):
        if name in ("mean", "var") and statistics_given:
            assert a.shape == (0,)
            continue
        error = (a.double() - b).abs()
        assert bool((error <= bound).all()), f"{name}: off by {error.max().item():.3g}"


@st.composite
def calls(draw):
    channels_last = draw(st.booleans())
    spatial = tuple(draw(st.lists(st.integers(1, 12), min_size=0, max_size=3)))
    batch = draw(st.integers(1, 5))
    if batch == 1 and all(size == 1 for size in spatial):
        batch = 2
    shape = Shape(draw(st.integers(1, 5)), batch, draw(st.integers(1, 40)), spatial)
    options = Options(
        threshold=draw(st.sampled_from([0.0, 0.02])),
        region=draw(st.sampled_from(["own", "all"])),
        criterion=draw(st.sampled_from(["abs", "signed"])),
        activation=draw(st.sampled_from(["identity", "relu", "leaky_relu"])),
        negative_slope=draw(st.sampled_from([0.2, -0.5, 1.5])),
    )
    return shape, channels_last, draw(st.booleans()), draw(st.booleans()), options


@settings(max_examples=200, deadline=None)
@given(calls())
def test_float32_against_float64(call):
    check_float32(*call)


# More than one block of lines and of rows, and more work than one thread is given.
LARGE = [Shape(2, 2, 3, (130, 131)), Shape(3, 2, 20, (60, 61)), Shape(2, 3, 70, (23, 19))]


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_float32(shape, channels_last):
    check_float32(shape, channels_last, with_residual=True, options=Options(0.02, activation="relu"))


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_mean(shape, channels_last):
    x = 1e3 + 0.1 * make_inputs(shape, torch.float32, channels_last).x
    check_float32(shape, channels_last, x=x)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1.1, -1e3, 1e30])
def test_constant_channel_gives_the_bias_exactly(value, dtype, channels_last):
    shape = Shape(2, 3, 20, (70, 71))
    i = make_inputs(shape, dtype, channels_last)
    x = torch.full_like(i.x, value)
    y, mean, var = compiled.norm_exchange(x, i.weight, i.bias, None, None, None, *Options())
    assert torch.equal(mean, torch.full_like(mean, value))
    assert torch.equal(var, torch.zeros_like(var))
    bias = i.bias.repeat_interleave(shape.batch, 0)
    assert torch.equal(y, bias[:, :, None, None].expand_as(y))


@pytest.mark.parametrize("instruction_set", _C.build_info()["instruction_sets"])
def test_every_instruction_set(instruction_set):
    script = "import test_cpu; test_cpu.check_all_of_this_process()"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        env={
            **os.environ,
            "CEN_EXT_CPU_CAPABILITY": instruction_set,
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
    )
    if "this processor runs" in result.stderr:
        pytest.skip(f"this processor does not run {instruction_set}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == instruction_set


def check_all_of_this_process() -> None:
    """What the processes of test_every_instruction_set do."""
    shapes = [Shape(2, 2, 21, (11, 13)), Shape(3, 2, 40, (5, 5)), Shape(2, 3, 3, (9,))]
    flags = itertools.product(shapes, [False, True], [False, True], ["identity", "relu", "leaky_relu"])
    for shape, channels_last, statistics_given, activation in flags:
        options = Options(0.02, "all", "abs", activation=activation)
        check_float32(shape, channels_last, statistics_given, with_residual=True, options=options)
        i = make_inputs(shape, torch.float64, channels_last)
        stats = (i.mean, i.var) if statistics_given else (None, None)
        inputs = (i.x, i.weight, i.bias, *stats, i.residual, options, i.dy)
        torch.testing.assert_close(
            run(*inputs)[3:], run(*inputs, forward=reference.norm_exchange)[3:], rtol=1e-11, atol=1e-11
        )
    print(_C.build_info()["instruction_set"])


@pytest.mark.parametrize("shape", [*LARGE, Shape(2, 2, 64, (40, 40))], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_same_bits_every_run_and_for_any_number_of_threads(shape, channels_last):
    i = make_inputs(shape, torch.float32, channels_last)
    options = Options(0.02, activation="relu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(i.x, i.weight, i.bias, None, None, i.residual, options, i.dy))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


STRIDES = {
    "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "channels of a wider tensor": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "transposed": lambda t: t.mT.contiguous().mT,
    "rows first": lambda t: t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "channels last, sliced": lambda t: torch.cat([t, t], 1).to(memory_format=torch.channels_last)[
        :, : t.shape[1]
    ],
}


@pytest.mark.parametrize("name", STRIDES)
@pytest.mark.parametrize("which", ["x", "residual", "dy"])
def test_any_strides(which, name):
    i = make_inputs(Shape(2, 3, 6, (5, 4)))
    options = Options(0.02, activation="leaky_relu")
    expected = run(i.x, i.weight, i.bias, None, None, i.residual, options, i.dy)
    i = i._replace(**{which: STRIDES[name](getattr(i, which))})
    found = run(i.x, i.weight, i.bias, None, None, i.residual, options, i.dy)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found[0].stride() == torch.empty_like(i.x).stride()


def test_expanded_gradient_and_weight():
    i = make_inputs(Shape(2, 3, 6, (5, 4)))
    weight = i.weight.t().contiguous().t()
    dy = torch.ones((), dtype=torch.float64).expand_as(i.x)
    inputs = (i.x, weight, i.bias, None, None, None, Options(0.02), dy)
    torch.testing.assert_close(run(*inputs)[0], run(*inputs, forward=reference.norm_exchange)[0])
    torch.testing.assert_close(run(*inputs)[3:], run(*inputs, forward=reference.norm_exchange)[3:])


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_replaced_channel_keeps_its_nans_to_itself(channels_last):
    i = make_inputs(Shape(3, 2, 20, (4, 5)), channels_last=channels_last, small_scales=0.0)
    weight = i.weight.clone()
    weight[0, 2] = 0.0
    x = i.x.clone()
    x.unflatten(0, (3, 2))[0, :, 2] = float("nan")
    y, _, _, dx, dweight, dbias = run(
        x, weight, i.bias, i.mean, i.var, None, Options(0.02, activation="relu"), i.dy
    )
    assert y.isfinite().all()
    assert dx.isfinite().all()
    assert dweight.isfinite().all()
    assert dbias.isfinite().all()
    assert not dx.unflatten(0, (3, 2))[0, :, 2].any()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (4, 0, 3, 3), (4, 4, 0, 3), (0, 4)])
def test_empty(shape):
    weight = torch.ones(2, shape[1])
    x, residual = torch.empty(shape), torch.empty(shape)
    found = run(x, weight, weight, None, None, residual, Options(), torch.empty(shape))
    y, mean, var, dx, dweight, dbias, dresidual = found
    assert y.shape == dx.shape == dresidual.shape == shape
    for table in (mean, var, dweight, dbias):
        assert torch.equal(table, torch.zeros_like(weight))


@pytest.mark.parametrize("statistics_given", [False, True])
@pytest.mark.parametrize("activation", ["identity", "leaky_relu"])
def test_gradcheck(activation, statistics_given):
    i = make_inputs(Shape(3, 2, 4, (2, 3)))
    stats = (i.mean, i.var) if statistics_given else (None, None)
    options = Options(0.02, "all", activation=activation, negative_slope=0.3)
    leaves = [t.clone().requires_grad_() for t in (i.x, i.weight, i.bias, i.residual)]
    # No scale may cross the threshold, no argument of the activation its kink, in a finite difference.
    u = reference.norm_exchange(
        i.x, i.weight, i.bias, *stats, i.residual, options._replace(activation="identity")
    )[0]
    assert u.abs().min() > 1e-4
    assert ((i.weight.abs() - 0.02).abs() > 1e-5).all()

    def forward(x, weight, bias, residual):
        return compiled.norm_exchange(x, weight, bias, *stats, residual, *options)[0]

    assert torch.autograd.gradcheck(forward, leaves)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("statistics_given", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(with_residual, statistics_given, channels_last):
    i = make_inputs(Shape(2, 2, 6, (4, 5)), torch.float32, channels_last)
    stats = (i.mean, i.var) if statistics_given else (None, None)
    residual = i.residual if with_residual else None
    options = Options(0.02, activation="relu")
    leaves = [t.clone().requires_grad_() for t in (i.x, i.weight, i.bias)]
    torch.library.opcheck(compiled.norm_exchange, (*leaves, *stats, residual, *options))
    torch.library.opcheck(compiled.norm_exchange, (i.x.mT, *leaves[1:], *stats, None, *options))
    inputs = (i.dy, i.x, i.weight, i.bias, i.mean, i.var, residual, not statistics_given, *options)
    torch.library.opcheck(compiled.norm_exchange_backward, inputs)


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
            threshold=0.02,
            activation=activation,
            backend="cpu",
        )
    large = {t.data_ptr() for t in saved if t.numel() >= x.numel()}
    assert large == {x.data_ptr()} | ({residual.data_ptr()} if activation == "relu" else set())
    assert all(t.numel() <= i.weight.numel() for t in saved if t.data_ptr() not in large)


def test_compiles_without_a_break():
    i = make_inputs(Shape(2, 2, 6, (4, 5)), torch.float32, channels_last=True)
    options = Options(0.02, activation="relu")

    def step(x, weight, bias):
        return compiled.norm_exchange(x * 2, weight, bias, None, None, x, *options)[0].square().sum()

    leaves = [t.clone().requires_grad_() for t in (i.x, i.weight, i.bias)]
    expected = torch.autograd.grad(step(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norm="layer"), "unknown norm 'layer'"),
        (dict(region="mine"), "unknown region 'mine'"),
        (dict(activation="gelu"), "unknown activation 'gelu'"),
    ],
)
def test_the_op_refuses_unknown_options(change, message):
    i = make_inputs(Shape(2, 2, 6, (4, 5)))
    with pytest.raises(RuntimeError, match=message):
        compiled.norm_exchange(i.x, i.weight, i.bias, None, None, None, *Options()._replace(**change))


def test_the_op_refuses_tensors_that_do_not_fit():
    i = make_inputs(Shape(2, 2, 6, (4, 5)))
    for arguments in (
        (i.x[:3], i.weight, i.bias, None, None, None),
        (i.x, i.weight[:, :5], i.bias[:, :5], None, None, None),
        (i.x, i.weight, i.bias.float(), None, None, None),
        (i.x, i.weight, i.bias, i.mean, None, None),
        (i.x, i.weight, i.bias, None, None, i.residual[:, :3]),
    ):
        with pytest.raises(RuntimeError, match="cen_ext: "):
            compiled.norm_exchange(*arguments, *Options())
