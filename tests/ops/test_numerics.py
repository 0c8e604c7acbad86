"""Hard numbers on every backend: large means, outliers, constants, overflow, denormals, NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cen_ext.ops.activation import NAMES
from cen_ext.ops.norm_exchange.reference import Options, memory_format
from tests.helpers import formulas
from tests.helpers.cases import Shape, make_inputs
from tests.helpers.covered import every_kind
from tests.helpers.tolerance import (
    Call,
    Results,
    check,
    exact_mean,
    rounding_unit,
    run,
    run_definition,
    smallest_number,
)

SHAPE = Shape(2, 3, 20, (23, 19))  # 1311 values per channel, 437 per row
THRESHOLD = 2.0**-6
SINGLE = [torch.float32]
HALF = [torch.float16, torch.bfloat16]

both_layouts = pytest.mark.parametrize("channels_last", [False, True])


def make_call(
    norm: str, dtype: torch.dtype, channels_last: bool, shape: Shape = SHAPE, **options: object
) -> tuple[Call, Tensor]:
    """A call with the statistics of x, and the gradient of its result; x is of mean 0.5 and deviation 2."""
    i = make_inputs(shape, dtype, channels_last)
    options = dict(threshold=THRESHOLD, activation="leaky_relu", negative_slope=0.2) | options
    return Call(i.x, i.weight, i.bias, options=Options(norm=norm, **options)), i.dy


def groups(x: Tensor, norm: str) -> Tensor:
    """``[M or M*N, values, C]``: what each statistic is of; a view of contiguous x."""
    count = SHAPE.num_modalities if norm == "batch" else x.shape[0]
    return x.unflatten(0, (count, -1)).flatten(3).transpose(2, 3).flatten(1, 2)


def assert_statistics(found: Results, call: Call, units: float = 16) -> None:
    """Mean and variance are those of float64, to so many rounding units of their magnitude.

    The magnitude of a mean is no less than the average deviation from it: nothing else can be asked of one
    that happens to be near 0. 16 units are what sums of 256 deviations in float32 come to.
    """
    x = groups(call.double().x, call.options.norm)
    mean = exact_mean(x, (1,))
    size = torch.maximum(mean.abs(), (x - mean).abs().mean(1, keepdim=True))
    var = (x - mean).square().mean(1, keepdim=True)
    unit, tiny = rounding_unit(found.mean.dtype), smallest_number(found.mean.dtype)
    for name, values, wanted, of in (("mean", found.mean, mean, size), ("var", found.var, var, var)):
        worst = ((values.double() - wanted[:, 0]).abs() / (unit * of[:, 0] + tiny)).max().item()
        assert worst <= units, f"{name} is off by {worst:.3g} rounding units"


@every_kind(SINGLE)
@both_layouts
def test_large_mean(backend, norm, dtype, channels_last):
    call, dy = make_call(norm, dtype, channels_last)
    call = call._replace(x=1e3 + 0.05 * call.x)  # deviation 0.1
    assert_statistics(check(backend, call, dy), call)


@every_kind([torch.bfloat16])
@both_layouts
def test_large_mean_of_bfloat16(backend, norm, dtype, channels_last):
    call, dy = make_call(norm, dtype, channels_last)
    call = call._replace(x=256 + 0.5 * call.x)  # deviation 1, where the type's numbers are 2 apart
    assert_statistics(check(backend, call, dy), call)


@every_kind(SINGLE)
@both_layouts
@pytest.mark.parametrize("place", [0, 200, -1])
def test_outlier(backend, norm, dtype, channels_last, place):
    """Sums of deviations from the outlier would lose as many units as there are values."""
    call, dy = make_call(norm, dtype, channels_last, Shape(2, 2, 20, (67, 71)))
    x = 1e-3 * call.x.contiguous()
    x.flatten(2)[:: 1 if norm == "instance" else 2, :, place] = 1e3
    x = x.contiguous(memory_format=memory_format(call.x))
    assert_statistics(check(backend, call._replace(x=x), dy), call._replace(x=x), units=64)


@every_kind([*SINGLE, torch.float64, *HALF])
@both_layouts
@pytest.mark.parametrize("value", [0.0, 1.1, -1e3, 6e4, 1e30])
def test_constant_channels(backend, norm, dtype, channels_last, value):
    call, dy = make_call(norm, dtype, channels_last, threshold=0.0, activation="identity")
    if dtype == torch.float16 and value > torch.finfo(dtype).max:
        value = 65504.0
    call = call._replace(x=torch.full_like(call.x, value))
    found = run(backend, call, dy)
    assert torch.equal(found.mean, torch.full_like(found.mean, call.x[0, 0, 0, 0].item()))
    assert torch.equal(found.var, torch.zeros_like(found.var))
    bias = call.bias.repeat_interleave(SHAPE.batch, 0).to(dtype)
    assert torch.equal(found.y, bias[:, :, None, None].expand_as(found.y))
    assert torch.equal(found.dweight, torch.zeros_like(found.dweight))
    check(backend, call, dy)
    check(backend, call, torch.ones_like(dy))  # of which nothing is left without its mean


@every_kind(SINGLE)
@both_layouts
def test_variance_overflows(backend, norm, dtype, channels_last):
    """float64's variance is inf once it is rounded to float32; so y is the bias, or, from the variance as it
    was before rounding, what it should be. Nothing is NaN."""
    call, dy = make_call(norm, dtype, channels_last, threshold=0.0, activation="identity")
    call = call._replace(x=1e30 * call.x)
    found, expected = run(backend, call, dy), run_definition(call, dy)
    assert torch.equal(found.var, torch.full_like(found.var, torch.inf))
    assert ((found.mean - expected.mean).abs() <= 1e-5 * 1e30).all()
    bias = call.bias.repeat_interleave(SHAPE.batch, 0)[:, :, None, None]
    assert ((found.y - bias).abs() <= 1e-5).all() or ((found.y - expected.y).abs() <= 1e-5).all()
    assert (found.dx.abs() <= 1e-28).all()
    assert found.dweight.isfinite().all()
    # A float32 sum is as good as one rounding of the sum of magnitudes, whatever order a processor adds in.
    magnitudes = dy.double().unflatten(0, (SHAPE.num_modalities, -1)).abs().sum((1, 3, 4))
    assert ((found.dbias.double() - expected.dbias).abs() <= 2.0**-23 * magnitudes).all()


@every_kind(SINGLE)
@both_layouts
@pytest.mark.parametrize("scale", [1e18, 4e18])
def test_squares_overflow_and_the_variance_does_not(backend, norm, dtype, channels_last, scale):
    call, dy = make_call(norm, dtype, channels_last)
    call = call._replace(x=scale * call.x)  # deviation 2, of which the sum of squares is beyond 3e38
    assert_statistics(check(backend, call, dy), call)


@every_kind([*SINGLE, torch.float64])
@both_layouts
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e-17])
def test_small_variance(backend, norm, dtype, channels_last, scale, eps):
    """Much smaller, and the derivative by the variance would be beyond float32."""
    call, dy = make_call(norm, dtype, channels_last, eps=eps)
    check(backend, call._replace(x=scale * call.x), dy)


@every_kind()
@both_layouts
def test_denormals(backend, norm, dtype, channels_last):
    call, dy = make_call(norm, dtype, channels_last)
    call = call._replace(x=(call.x.double() * 100 * smallest_number(dtype)).to(dtype))
    assert (call.x != 0).any()
    found = check(backend, call, dy)
    assert (found.mean != 0).any()


@every_kind([torch.float16])
@both_layouts
def test_float16_at_its_largest(backend, norm, dtype, channels_last):
    call, dy = make_call(norm, dtype, channels_last)
    call = call._replace(x=(call.x * 2e4).clamp(-65504, 65504))
    assert_statistics(check(backend, call, dy), call)


@every_kind(HALF)
@both_layouts
@pytest.mark.parametrize("activation", [name for name in NAMES if formulas.BENDS[name].own_error == 0])
def test_half_types_are_rounded_once(backend, norm, dtype, channels_last, activation):
    """x + residual and nothing else, so that every bit is known; beyond 65504 float16 has only inf."""
    call, dy = make_call(norm, dtype, channels_last, threshold=0.0, eps=0.0, activation=activation)
    one, zero = torch.ones_like(call.weight), torch.zeros_like(call.weight)
    x, residual = ((t * 2e4).clamp(-65504, 65504) for t in (call.x, torch.randn_like(call.x)))
    call = Call(x, one, zero, zero, one, residual, call.options)
    exact = x.float() + residual.float()
    expected = formulas.activated(exact, activation, call.options.negative_slope).to(dtype)
    assert expected.isinf().any() == (dtype == torch.float16 and activation != "relu6")
    assert torch.equal(run(backend, call, dy).y, expected)


@every_kind([torch.float16])
@both_layouts
def test_the_parts_of_a_half_gradient_may_overflow(backend, norm, dtype, channels_last):
    """Both terms of dx are beyond 65504, their difference is not."""
    call, dy = make_call(norm, dtype, channels_last, threshold=0.0, activation="identity")
    call = call._replace(weight=torch.full_like(call.weight, 8.0))
    assert check(backend, call, dy + 6e4).dx.isfinite().all()


@every_kind(SINGLE)
@both_layouts
def test_huge_gradients(backend, norm, dtype, channels_last):
    call, dy = make_call(norm, dtype, channels_last)
    check(backend, call, 1e34 * dy)


@every_kind(SINGLE)
@both_layouts
def test_long_channels(backend, norm, dtype, channels_last):
    """A million values at mean 1e3: sums one after the other would be off by a thousand units."""
    i = make_inputs(Shape(1, 1, 2, (1000, 1000)), dtype, channels_last)
    call = Call(1e3 + 0.05 * i.x, i.weight, i.bias, options=Options(norm=norm))
    dy = i.dy + 1
    found, x = run(backend, call, dy), call.x.double()
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    invstd = (var + call.options.eps).rsqrt()
    unit = rounding_unit(dtype)
    dbias = dy.double().sum((0, 2, 3))
    shift = unit * (mean * invstd).flatten() * dbias  # what rounding the mean costs, however it was found
    for name, values, terms, inherent in (
        ("mean", found.mean, x / 1e6, 0),
        ("var", found.var, (x - mean).square() / 1e6, 0),
        ("dbias", found.dbias, dy.double(), 0),
        ("dweight", found.dweight, dy.double() * (x - mean) * invstd, shift),
    ):
        error = (values[0].double() - terms.sum((0, 2, 3))).abs()
        assert (error <= 64 * unit * terms.abs().sum((0, 2, 3)) + inherent).all(), name


POISON = Shape(3, 2, 20, (5, 4))


def poisoned(norm: str, given: bool, channels_last: bool, activation: str) -> tuple[Call, Tensor]:
    """Channel 2 of modality 0 is replaced by the mean of the others', and no other channel is."""
    i = make_inputs(POISON, torch.float32, channels_last, small_scales=0.0)
    i.weight.abs_()[0, 2] = 0.5 * THRESHOLD
    statistics = (i.mean, i.var) if given else (None, None)
    options = Options(THRESHOLD, norm=norm, activation=activation)
    return Call(i.x, i.weight, i.bias, *statistics, options=options), i.dy


def modalities(t: Tensor) -> Tensor:
    """``[M, C, N or 1, ...]`` of a result as x, or of a table ``[M or M*N, C]``."""
    return t.unflatten(0, (POISON.num_modalities, -1)).transpose(1, 2)


@every_kind(SINGLE)
@both_layouts
@pytest.mark.parametrize("statistics_given", [False, True])
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_channel_keeps_what_is_not_finite(
    backend, norm, dtype, channels_last, statistics_given, activation, value
):
    call, dy = poisoned(norm, statistics_given, channels_last, activation)
    x = call.x.clone()
    x[3, 2, 1, 1] = value  # modality 1, which modality 0 borrows from
    clean, found = run(backend, call, dy), run(backend, call._replace(x=x), dy)
    other = torch.arange(20) != 2
    for name in ("y", "dx", "dweight", "dbias") if statistics_given else Results._fields[:-1]:
        before, after = (modalities(getattr(results, name)) for results in (clean, found))
        assert torch.equal(before[:, other], after[:, other]), name
    assert torch.equal(modalities(clean.y)[2], modalities(found.y)[2])
    if formulas.BENDS[activation].curvature == 0:  # else the derivative at NaN may be NaN
        assert modalities(found.dx)[2].isfinite().all()
    poisoned_values = modalities(found.y)[:2, 2, 1, 1, 1]
    if value == -torch.inf and activation in ("relu", "relu6") and statistics_given:
        assert not poisoned_values.any()
    elif value == torch.inf and activation == "relu6" and statistics_given:
        assert (poisoned_values == 6).all()
    else:
        assert not poisoned_values.isfinite().any()


@every_kind(SINGLE)
@both_layouts
@pytest.mark.parametrize("statistics_given", [False, True])
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_channel_that_nobody_reads_may_be_anything(
    backend, norm, dtype, channels_last, statistics_given, activation, value
):
    """It is replaced, and no other modality borrows it: no part in y, no gradient."""
    call, dy = poisoned(norm, statistics_given, channels_last, activation)
    x = call.x.clone()
    x[0, 2] = value
    clean, found = run(backend, call, dy), run(backend, call._replace(x=x), dy)
    for name in ("y", "dx", "dweight", "dbias"):
        assert torch.equal(getattr(clean, name), getattr(found, name)), name
    assert not modalities(found.dx)[0, 2].any()
