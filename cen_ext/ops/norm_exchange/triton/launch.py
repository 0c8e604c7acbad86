"""The operator in Triton: kernel launches and registration of the ops.

    triton_norm_exchange(x, weight, bias, mean?, var?, residual?, *options, route?) -> (y, mean, var)
    triton_norm_exchange_backward(
        dy, x, weight, bias, mean, var, residual?, batch_statistics, *options, route?
    ) -> (dx, dweight, dbias, dresidual)

These have the signatures of the compiled ops in ``native``. With statistics of x, a channel (or, for group
norm, a group of them) that fits in one program is read once, in one launch each for forward and backward.
Otherwise either has three launches, of which the first reads x for partial sums and the last reads it again.
Layer norm has one launch each. With given statistics either is one pass. Partial sums are combined in a fixed
order, so results are bitwise reproducible.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cen_ext.ops import flops
from cen_ext.ops.norm_exchange import autograd
from cen_ext.ops.norm_exchange.options import Options
from cen_ext.ops.norm_exchange.reference import memory_format, statistics_dtype, statistics_shape
from cen_ext.ops.norm_exchange.triton import activation as activations
from cen_ext.ops.norm_exchange.triton.backward import (
    backward_kernel,
    backward_sums_kernel,
    backward_whole_kernel,
)
from cen_ext.ops.norm_exchange.triton.forward import (
    forward_kernel,
    forward_whole_kernel,
    join_kernel,
    statistics_kernel,
)
from cen_ext.ops.norm_exchange.triton.layer import (
    layer_backward_kernel,
    layer_backward_whole_kernel,
    layer_kernel,
    layer_whole_kernel,
)
from cen_ext.ops.norm_exchange.triton.plan import (
    BACKWARD_VALUES,
    FORWARD_VALUES,
    JOINED_VALUES,
    MOST_TILES,
    STATISTICS_VALUES,
    Geometry,
    divide_up,
    layer_plan,
    layer_programs,
    multiprocessors_of,
    pass_constants,
    pass_plan,
    power_above,
    tile_constants,
    whole_plan,
)
from cen_ext.ops.triton import define_op, device_of, wrap_kernel

# --- launches ---


def call_constants(options: Options, num_modalities: int, routed: bool) -> dict[str, Any]:
    """Constants of the kernels that define the operator."""
    by_threshold = num_modalities > 1 and options.threshold > 0
    return dict(
        M=num_modalities,
        RULE="route" if routed else "threshold" if by_threshold else "none",
        THRESHOLD=float(options.threshold),
        OWN_REGION=options.region == "own",
        SIGNED=options.criterion == "signed",
        EPS=float(options.eps),
        **activations.constants_of(options.activation, options.negative_slope),
    )


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    threshold: float,
    region: str,
    criterion: str,
    norm: str,
    eps: float,
    activation: str,
    negative_slope: float,
    order: str = "modality",
    num_groups: int = 1,
    route: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, and mean and variance of x unless given."""
    options = Options(threshold, region, criterion, norm, eps, activation, negative_slope, order, num_groups)
    y, batch_mean, batch_var = _empty_results(x, weight, bias, mean, var, residual, *options)
    if x.numel() == 0:
        return y, batch_mean.zero_(), batch_var.zero_()
    layout, num_modalities = memory_format(x), weight.shape[0]
    x, residual = _as_layout(x, layout), _as_layout(residual, layout)
    weight, bias, route = (_as_layout(t, torch.contiguous_format) for t in (weight, bias, route))
    given = mean is not None and var is not None
    if mean is None or var is None:
        mean, var = batch_mean, batch_var
    mean, var = mean.contiguous(), var.contiguous()
    g = _geometry(x, num_modalities, mean, options)
    definition = call_constants(options, num_modalities, route is not None)
    with device_of(x):
        if norm == "layer":
            multiprocessors = multiprocessors_of(x.device)
            tiles = layer_plan(g, x.dtype, 1, multiprocessors)
            kernel = layer_whole_kernel if tiles.channels >= g.channels else layer_kernel
            wrap_kernel(kernel)[(layer_programs(g, tiles, multiprocessors),)](
                x, weight, bias, residual, route, y, mean, var,
                *g.sizes, **definition, **tile_constants(g, tiles),
            )  # fmt: skip
            return y, batch_mean, batch_var
        definition |= dict(GROUP=g.group)
        plan = None if given else whole_plan(g, x.dtype, tensors=1)
        if plan is not None:
            wrap_kernel(forward_whole_kernel)[(plan.programs(g),)](
                x, weight, bias, residual, route, y, mean, var,
                *g.sizes, **definition, **tile_constants(g, plan),
            )  # fmt: skip
            return y, batch_mean, batch_var
        if not given:
            _statistics(x, g, mean, var)
        plan = pass_plan(g, x.dtype, FORWARD_VALUES, multiprocessors_of(x.device), MOST_TILES)
        wrap_kernel(forward_kernel)[(plan.programs(g),)](
            x, weight, bias, mean, var, residual, route, y, *g.sizes, **definition, **pass_constants(g, plan)
        )
    return y, batch_mean, batch_var


def _geometry(x: Tensor, num_modalities: int, mean: Tensor, options: Options) -> Geometry:
    """The sizes of x, whose units and groups are those that mean has values of."""
    if options.norm == "layer":
        return Geometry.of(x, num_modalities, 1, options.order)
    units, group = mean.shape[0] // num_modalities, x.shape[1] // mean.shape[1]
    return Geometry.of(x, num_modalities, units, options.order, group)


def _statistics(x: Tensor, g: Geometry, mean: Tensor, var: Tensor) -> None:
    """Write mean and biased variance per unit and group to tables ``[M * units, C // group]``."""
    apart = replace(g, modalities=1, units=g.modalities * g.units)
    plan = pass_plan(apart, x.dtype, STATISTICS_VALUES, multiprocessors_of(x.device))
    chunks = plan.chunks(g)
    partials = mean.new_empty((3, chunks, mean.shape[0], g.channels), dtype=torch.float64)
    wrap_kernel(statistics_kernel)[(plan.programs(apart),)](
        x, partials, *apart.sizes, **pass_constants(apart, plan)
    )
    members = min(power_above(chunks * g.group), JOINED_VALUES)
    groups = min(32, JOINED_VALUES // members)
    wrap_kernel(join_kernel)[(apart.units * divide_up(mean.shape[1], groups),)](
        partials, mean, var, apart.units, g.channels, chunks, GROUP=g.group, BLOCK_G=groups, MEMBERS=members
    )


def launch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    batch_statistics: bool,
    threshold: float,
    region: str,
    criterion: str,
    norm: str,
    eps: float,
    activation: str,
    negative_slope: float,
    order: str = "modality",
    num_groups: int = 1,
    route: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute dx, dweight, dbias and dresidual."""
    options = Options(threshold, region, criterion, norm, eps, activation, negative_slope, order, num_groups)
    layout, num_modalities = memory_format(x), weight.shape[0]
    dx = torch.empty_like(x, memory_format=layout)
    dresidual = x.new_empty((0,)) if residual is None else torch.empty_like(dx)
    if x.numel() == 0:
        return dx, weight.new_zeros(weight.shape), weight.new_zeros(weight.shape), dresidual
    dy, x, residual = (_as_layout(t, layout) for t in (dy, x, residual))
    tables = [table.contiguous() for table in (weight, bias, mean, var)]
    route = _as_layout(route, torch.contiguous_format)
    g = _geometry(x, num_modalities, mean, options)
    definition = call_constants(options, num_modalities, route is not None)
    stored = None if residual is None else dresidual

    def total(sums: Tensor) -> Tensor:  # [M * units, C] -> [M, C]
        return sums if g.units == 1 else sums.view(num_modalities, g.units, g.channels).sum(1)

    def grouped(sums: Tensor) -> Tensor:  # [M * units, C] -> [M * units, C // group], times weight
        if g.group == 1:
            return sums
        weighted = sums.view(num_modalities, g.units, g.channels) * weight[:, None]
        return weighted.view(*mean.shape, g.group).sum(2)

    with device_of(x):
        if norm == "layer":
            multiprocessors = multiprocessors_of(x.device)
            tiles = layer_plan(g, x.dtype, 2, multiprocessors)
            kernel = layer_backward_whole_kernel if tiles.channels >= g.channels else layer_backward_kernel
            programs = layer_programs(g, tiles, multiprocessors)
            dweights, dbiases = (weight.new_empty((programs, *weight.shape)) for _ in range(2))
            wrap_kernel(kernel)[(programs,)](
                dy, x, *tables, residual, route, dx, stored, dweights, dbiases,
                *g.sizes, **definition, **tile_constants(g, tiles),
            )  # fmt: skip
            return dx, dweights.sum(0), dbiases.sum(0), dresidual
        definition |= dict(GROUP=g.group)
        plan = whole_plan(g, x.dtype, tensors=2) if batch_statistics else None
        if plan is not None:
            dweight, dbias = (weight.new_empty((mean.shape[0], g.channels)) for _ in range(2))
            wrap_kernel(backward_whole_kernel)[(plan.programs(g),)](
                dy, x, *tables, residual, route, dx, stored, dweight, dbias,
                *g.sizes, **definition, **tile_constants(g, plan),
            )  # fmt: skip
            return dx, total(dweight), total(dbias), dresidual
        plan = pass_plan(g, x.dtype, BACKWARD_VALUES, multiprocessors_of(x.device))
        sums = (plan.chunks(g), mean.shape[0], g.channels)
        dweights, dbiases = (weight.new_empty(sums) for _ in range(2))
        wrap_kernel(backward_sums_kernel)[(plan.programs(g),)](
            dy, x, *tables, residual, route, None if batch_statistics else dx, stored, dweights, dbiases,
            *g.sizes, **definition, **pass_constants(g, plan),
        )  # fmt: skip
        dweight, dbias = (t[0] if t.shape[0] == 1 else t.sum(0) for t in (dweights, dbiases))
        if batch_statistics:
            if stored is not None and (options.activation in activations.SELECTS or x.dtype == weight.dtype):
                # dresidual holds dy behind the activation exactly, so the residual need not be read.
                dy, residual = stored, None
                definition |= activations.constants_of("identity", 0.0)
            plan = pass_plan(g, x.dtype, BACKWARD_VALUES, multiprocessors_of(x.device), MOST_TILES)
            wrap_kernel(backward_kernel)[(plan.programs(g),)](
                dy, x, *tables, residual, route, dx, grouped(dweight), grouped(dbias),
                *g.sizes, **definition, **pass_constants(g, plan),
            )  # fmt: skip
    return dx, total(dweight), total(dbias), dresidual


def _as_layout(t: Tensor | None, layout: torch.memory_format) -> Any:
    return None if t is None else t.contiguous(memory_format=layout)


# --- registration ---


def _empty_results(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    shape: tuple[int, ...] = (0,)
    if mean is None:
        shape = statistics_shape(x, weight.shape[0], autograd.split(rest)[0])
    dtype = statistics_dtype(x.dtype)
    y = torch.empty_like(x, memory_format=memory_format(x))
    return y, x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _empty_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    batch_statistics: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=memory_format(x))
    dresidual = x.new_empty((0,)) if residual is None else torch.empty_like(dx)
    return dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape), dresidual


triton_norm_exchange = define_op("cen_ext::triton_norm_exchange", launch_forward, mutates_args=())
triton_norm_exchange_backward = define_op(
    "cen_ext::triton_norm_exchange_backward", launch_backward, mutates_args=()
)


def _gradients_once(*arguments: Any) -> tuple[Tensor, ...]:
    """Call the kernels directly; go through the op only under grad mode, so that double backward raises."""
    run = triton_norm_exchange_backward if torch.is_grad_enabled() else launch_backward
    gradients: tuple[Tensor, ...] = run(*arguments)
    return gradients


class TritonNormExchange(torch.autograd.Function):
    """Autograd function of ``norm_exchange``, for eager calls.

    Calling an op defined in Python costs more than the kernels of a small layer.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = launch_forward(*inputs)
        autograd.setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(autograd.gradient(_gradients_once))


triton_norm_exchange.register_fake(_empty_results)
triton_norm_exchange.register_autograd(
    autograd.gradient(triton_norm_exchange_backward), setup_context=autograd.setup_context
)
triton_norm_exchange_backward.register_fake(_empty_gradients)
triton_norm_exchange_backward.register_autograd(autograd.refuse_second_gradient)
flops.register("triton_norm_exchange", "triton_norm_exchange_backward")
