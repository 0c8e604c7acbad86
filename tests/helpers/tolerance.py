"""How far from the definition a backend's results may be: bounds derived from the rounding units.

The definition is ``cen_ext.reference`` evaluated in float64 on the very numbers that the backend is given.
``u`` is the rounding unit of x's type (half the distance from 1 to the next number), ``v`` that of the
statistics' type, in which all is computed. Below, ``e(a)`` is the error allowed in a, to first order;
absolute values of factors are understood.

A sum of n terms, in whatever order, errs like a random walk: ``e(sum t) = sum e(t) + G v sum|t|`` with
``G = 4 + sqrt(n)``; the 4 is for the few roundings that make up a term.

Forward. The sums of the statistics are of deviations from a value no further from the mean than the standard
deviation is; none may be of x or x^2 themselves, whose errors would count in units of the mean. ``w`` is the
unit of float64: the definition's Welford recurrence takes every deviation from a rounded mean.

    e(mean) = v (mean + G average|x - mean|) + 4 t      t: the smallest number, for denormals
    e(var)  = 2 v G var + e(mean)^2 + w mean std / sqrt(n) + 4 t
    r       = e(var) / 2 (var + eps) + 4 v              relative error of invstd
    e(xhat) = xhat (r + 2 v) + t (1 + invstd)
    s       = e(mean) invstd                            moves all xhat of a channel the same way
    e(z)    = weight (e(xhat) + s) + 2 v (weight xhat + bias)
    e(u)    = mix (e(z) + M v z)                        mix: 1 for the channel itself, or 1 / (M - 1) for each
                                                        modality that takes its place
    e(y)    = L (e(u) + 2 v u) + A v u                  L: the activation's largest slope; u has the residual;
                                                        A: its own error, 0 where it is piecewise linear

Backward. ``K'`` is the activation's largest curvature. Where the argument lies within its error of a kink, dy
is put to 0 (``without_kinks``), since there a rounding error may decide for either side.

    e(g)       = dy (K' (e(u) + 2 v u) + A v)
    e(dz)      = mix ((M + 2) v |g| + e(g))
    e(dbias)   = sum e(dz) + G v sum dz
    e(dweight) = sum (e(dz) xhat + dz e(xhat)) + G v sum dz xhat + s (dbias + e(dbias))
    e(dx)      = weight invstd (e(dz) + (r + 4 v) dz)                               given statistics; further
                 + invstd / K (e(B) + xhat e(W) + (e(xhat) + s) W + (r + 4 v) (B + xhat W))  with those of x
                 + t |x - mean|                                    the factor of x - mean may be denormal

B and W are the sums of weight dz and weight dz xhat over the K values that share statistics; their errors are
those of dbias and dweight with weight in every term. In dweight, s moves together what shares statistics.

All of that is doubled, for what is of second order; and again in float64, where the definition errs as much.
To it comes what storing the result costs: u times the result, and one subnormal number of its type.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cen_ext.ops import dispatch
from cen_ext.ops.norm_exchange import reference
from cen_ext.ops.norm_exchange.options import ACROSS_CHANNELS, MEAN, OWN
from cen_ext.ops.norm_exchange.reference import Options
from tests.helpers import formulas


class Call(NamedTuple):
    """Arguments of one call; mean and var are ``[M, C]``, or None for the statistics of x."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor | None = None
    var: Tensor | None = None
    residual: Tensor | None = None
    options: Options = Options()
    route: Tensor | None = None  # [M, C]; None for M = 1, too

    def double(self) -> Call:
        """The same numbers, contiguous and in float64."""
        tensors = (t if t is None else t.detach().double().contiguous() for t in self[:6])
        return Call(*tensors, self.options, self.route)


class Results(NamedTuple):
    """The results of a call, or the bounds of each; without a residual the last is None."""

    y: Tensor
    mean: Tensor
    var: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    dresidual: Tensor | None = None


def run(backend: str, call: Call, dy: Tensor) -> Results:
    """y, the statistics that the backend reports, and the gradients."""
    forward = dispatch.choose("norm_exchange", backend, call.x, call.options).run
    leaves = [t.detach().requires_grad_() for t in (call.x, call.weight, call.bias)]
    residual = None if call.residual is None else call.residual.detach().requires_grad_()
    y, mean, var = forward(*leaves, call.mean, call.var, residual, call.options, call.route)
    gradients = torch.autograd.grad(y, leaves if residual is None else [*leaves, residual], dy)
    return Results(y.detach(), mean.detach(), var.detach(), *gradients)


def check(backend: str, call: Call, dy: Tensor) -> Results:
    """Asserts that the backend's results lie within the bounds; returns them."""
    dy = without_kinks(call, dy)
    found = run(backend, call, dy)
    assert_within(found, run_definition(call, dy), bounds(call, dy))
    return found


def run_definition(call: Call, dy: Tensor) -> Results:
    """The definition in float64 on the same numbers."""
    return run("reference", call.double(), dy.double())


def assert_within(found: Results, expected: Results, allowed: Results) -> None:
    """NaN fails; statistics that were given are not compared (some backends return none then)."""
    for name in Results._fields:
        values, wanted, bound = (getattr(results, name) for results in (found, expected, allowed))
        if bound is None:
            continue
        ratio = (values.double() - wanted).abs() / bound
        worst = ratio.nan_to_num(nan=math.inf).max().item()
        assert worst <= 1, f"{name} is off by {worst:.3g} times what is allowed"


def without_kinks(call: Call, dy: Tensor) -> Tensor:
    """dy with zeros where a rounding error decides which side of the activation's kink the argument is on."""
    kinks = formulas.BENDS[call.options.activation].kinks
    if not kinks:
        return dy
    forward = _Forward(call)
    near = torch.zeros_like(forward.u, dtype=torch.bool)
    for kink in kinks:
        near |= (forward.u - kink).abs() <= _slack(call) * forward.u_error
    near = _as_x(near, call)
    # Only where it must be: an expanded dy keeps its strides.
    return torch.where(near, 0.0, dy) if near.any() else dy


def bounds(call: Call, dy: Tensor) -> Results:
    """The largest error that each of the results may have; the module's text derives them."""
    forward = _Forward(call)
    backward = _Backward(forward, call, dy)
    mean = var = None
    if call.mean is None:
        mean, var = (_statistics_table(error, call) for error in (forward.mean_error, forward.var_error))
    return Results(
        y=_stored(forward.y_error, forward.y, call),
        mean=mean,
        var=var,
        dx=_stored(backward.dx_error, backward.dx, call),
        dweight=_table(backward.dweight_error.sum((1, 3)), call),
        dbias=_table(backward.dbias_error.sum((1, 3)), call),
        dresidual=None if call.residual is None else _stored(backward.g_error, backward.g, call),
    )


def rounding_unit(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number of the type."""
    return torch.finfo(dtype).eps / 2


def smallest_number(dtype: torch.dtype) -> float:
    """The smallest positive (subnormal) number of the type."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def exact_mean(x: Tensor, over: tuple[int, ...]) -> Tensor:
    """Mean with the dimensions kept; of equal values it is just that value."""
    value = x
    for d in over:
        value = value.narrow(d, 0, 1)
    return value + (x - value).mean(over, keepdim=True)


def rows_of(t: Tensor, call: Call) -> Tensor:
    """The values of a tensor such as x, float64 ``[M, N, C, spatial]``."""
    m, c = call.weight.shape
    size = (c, math.prod(call.x.shape[2:]))
    if call.options.order == "sample":
        return t.double().reshape(-1, m, *size).transpose(0, 1)
    return t.double().reshape(m, -1, *size)


def _as_x(rows: Tensor, call: Call) -> Tensor:
    """The inverse of ``rows_of``."""
    return (rows.transpose(0, 1) if call.options.order == "sample" else rows).reshape(call.x.shape)


def _stored(error: Tensor, value: Tensor, call: Call) -> Tensor:
    """The error that storing a result such as x may add."""
    dtype = call.x.dtype
    bound = _slack(call) * error + rounding_unit(dtype) * value.abs() + smallest_number(dtype)
    return _as_x(bound, call)


def _table(error: Tensor, call: Call) -> Tensor:
    """The same for a table; e() of these counts their rounding already."""
    return _slack(call) * error + smallest_number(call.weight.dtype)


def _statistics_table(error: Tensor, call: Call) -> Tensor:
    """The same for mean or var, of which each value stands in the first place that shares it."""
    if call.options.norm == "group":
        error = error[:, :, :: call.weight.shape[1] // call.options.num_groups]
    shape = reference.statistics_shape(call.x, len(call.weight), call.options)
    return _table(error.reshape(shape), call)


def _per_share(average: Callable[..., Tensor], t: Tensor, call: Call) -> Tensor:
    """An average over the values that share statistics, of ``[M, N, C, spatial]`` and for its places."""
    if call.options.norm == "group":
        groups = call.options.num_groups
        averages = average(t.unflatten(2, (groups, -1)), (3, 4)).squeeze(4)
        return averages.repeat_interleave(t.shape[2] // groups, 2)
    return average(t, {"batch": (1, 3), "instance": (3,), "layer": (2,)}[call.options.norm])


def _average(t: Tensor, call: Call) -> Tensor:
    return _per_share(lambda t, over: t.mean(over, keepdim=True), t, call)


def _sharing(x: Tensor, call: Call) -> int:
    """How many values of ``[M, N, C, spatial]`` share statistics."""
    _, samples, channels, spatial = x.shape
    sizes = {
        "batch": samples * spatial,
        "instance": spatial,
        "layer": channels,
        "group": channels // call.options.num_groups * spatial,
    }
    return sizes[call.options.norm]


def _slack(call: Call) -> int:
    return 4 if call.x.dtype == torch.float64 else 2


class _Forward:
    """Values of the forward pass, and their errors; tensors are float64 ``[M, N, C, spatial]``."""

    def __init__(self, call: Call) -> None:
        m, c = call.weight.shape
        self.v = v = rounding_unit(call.weight.dtype)
        self.x = rows_of(call.x, call)
        self.weight, bias = (t.double().view(m, 1, c, 1) for t in (call.weight, call.bias))
        self._set_statistics(call)

        scaled = self.weight * self.xhat
        z = scaled + bias
        z_error = self.weight.abs() * (self.xhat_error + self.shift) + 2 * v * (scaled.abs() + bias.abs())
        self.mix = _mix(call)
        self.u = torch.einsum("mkc,kncs->mncs", self.mix, z)
        self.u_error = torch.einsum("mkc,kncs->mncs", self.mix, z_error + m * v * z.abs())
        if call.residual is not None:
            self.u = self.u + rows_of(call.residual, call)
        self.u_error = self.u_error + 2 * v * self.u.abs()
        activation = call.options.activation, call.options.negative_slope
        self.slope = formulas.derivative(self.u, *activation)
        bend = formulas.BENDS[call.options.activation]
        steepest = abs(call.options.negative_slope) if call.options.activation == "leaky_relu" else 0.0
        own_error = bend.own_error * v
        self.y = formulas.activated(self.u, *activation)
        self.y_error = max(bend.steepest, steepest) * self.u_error + own_error * self.u.abs()
        self.slope_error = bend.curvature * self.u_error + own_error

    def _set_statistics(self, call: Call) -> None:
        v, w, tiny = self.v, rounding_unit(torch.float64), smallest_number(call.weight.dtype)
        if call.mean is not None and call.var is not None:
            mean, var = (t.double().view(self.weight.shape) for t in (call.mean, call.var))
            self.mean_error = self.var_error = torch.zeros_like(mean)
        else:
            n = _sharing(self.x, call)
            growth = _growth(n)
            mean = _per_share(exact_mean, self.x, call)
            deviation = (self.x - mean).abs()
            var = _average(deviation.square(), call)
            self.mean_error = v * (mean.abs() + growth * _average(deviation, call)) + 4 * tiny
            welford = w * mean.abs() * (var / n).sqrt()
            self.var_error = 2 * v * growth * var + self.mean_error**2 + welford + 4 * tiny
        self.centred = self.x - mean
        self.invstd = (var + call.options.eps).rsqrt()
        self.invstd_error = self.var_error / (2 * (var + call.options.eps)) + 4 * v  # relative
        self.xhat = self.centred * self.invstd
        self.xhat_error = self.xhat.abs() * (self.invstd_error + 2 * v) + tiny * (1 + self.invstd)
        self.shift = self.mean_error * self.invstd


class _Backward:
    """The same for the backward pass; sums are those of a row or of a modality, as the statistics are."""

    def __init__(self, f: _Forward, call: Call, dy: Tensor) -> None:
        v, m = f.v, f.x.shape[0]
        self.g = rows_of(dy, call) * f.slope
        dz = torch.einsum("mkc,mncs->kncs", f.mix, self.g)
        size = torch.einsum("mkc,mncs->kncs", f.mix, self.g.abs())  # >= |dz|
        through_slope = rows_of(dy, call).abs() * f.slope_error
        self.g_error = v * self.g.abs() + through_slope
        dz_error = (m + 2) * v * size + torch.einsum("mkc,mncs->kncs", f.mix, through_slope)

        growth, xhat = _growth(f.x.shape[1] * f.x.shape[3]), f.xhat.abs()

        def total(t: Tensor) -> Tensor:  # over the values of a channel that share statistics
            over = {"batch": (1, 3), "layer": None}.get(call.options.norm, (3,))
            return t if over is None else t.sum(over, keepdim=True)

        self.dbias_error = total(dz_error) + growth * v * total(size)
        self.dweight_error = (
            total(dz_error * xhat + size * f.xhat_error)
            + growth * v * total(size * xhat)
            + f.shift * (total(dz).abs() + self.dbias_error)
        )
        inner, inner_error = f.weight * dz, f.weight.abs() * (dz_error + (f.invstd_error + 4 * v) * size)
        if call.mean is None:
            if call.options.norm in ACROSS_CHANNELS:
                growth = _growth(_sharing(f.x, call))
            constant, slope = (_average(f.weight * t, call) for t in (dz, dz * f.xhat))
            constant_error = _average(f.weight.abs() * (dz_error + growth * v * size), call)
            of_slope = dz_error * xhat + size * f.xhat_error + growth * v * size * xhat
            slope_error = _average(f.weight.abs() * of_slope, call) + f.shift * (
                constant.abs() + constant_error
            )
            inner = inner - constant - f.xhat * slope
            inner_error = (
                inner_error
                + constant_error
                + xhat * slope_error
                + (f.xhat_error + f.shift) * slope.abs()
                + (f.invstd_error + 4 * v) * (constant.abs() + xhat * slope.abs())
            )
        self.dx = f.invstd * inner
        underflow = smallest_number(call.weight.dtype) * f.centred.abs()
        self.dx_error = f.invstd * inner_error + underflow


def _growth(terms: int) -> float:
    return 4 + math.sqrt(terms)


def _mix(call: Call) -> Tensor:
    """``[M, M, C]``: the share of modality k's z in modality m's place."""
    m = call.weight.shape[0]
    own = torch.eye(m, dtype=torch.float64)[:, :, None]
    mean = (1 - own) / max(m - 1, 1)
    if call.route is None:
        return torch.where(reference.replaced_channels(call.weight, call.options)[:, None], mean, own)
    route = call.route[:, None]
    alone = (route == torch.arange(m)[:, None]).double()
    return torch.where(route == OWN, own, torch.where(route == MEAN, mean, alone))
