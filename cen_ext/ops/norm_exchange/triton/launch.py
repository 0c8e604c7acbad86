"""The operator in Triton: division of a call into programs, kernel launches and registration of the ops.

    triton_norm_exchange(x, weight, bias, mean?, var?, residual?, *options, route?) -> (y, mean, var)
    triton_norm_exchange_backward(
        dy, x, weight, bias, mean, var, residual?, batch_statistics, *options, route?
    ) -> (dx, dweight, dbias, dresidual)

These have the signatures of the compiled ops in ``native``. With batch statistics, a channel that fits in one
program is read once, in one launch each for forward and backward. Otherwise either has three launches, of
which the first reads x for partial sums and the last reads it again. With given statistics either is one
pass. Partial sums are combined in a fixed order, so results are bitwise reproducible.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

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
from cen_ext.ops.norm_exchange.triton.tile import INTERPRETED


def wrap_kernel(kernel: Any) -> Any:
    """Make a kernel traceable by compilers, unless it is interpreted, which torch 2.11 refuses."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


# --- division into programs ---


@dataclass(frozen=True)
class Geometry:
    """Sizes of x in the kernels' terms (``tile``): units, channels, lines and positions."""

    modalities: int
    units: int  # per modality, each with its own statistics
    channels: int
    lines: int
    positions: int
    channels_last: bool
    step: int = 1  # rows from a sample to the next one of the same modality

    @staticmethod
    def of(x: Tensor, num_modalities: int, units: int, order: str) -> Geometry:
        rows, channels = int(x.shape[0]), int(x.shape[1])
        samples, spatial = rows // (num_modalities * units), math.prod(int(size) for size in x.shape[2:])
        last = memory_format(x) != torch.contiguous_format
        step = num_modalities if order == "sample" else 1
        lines, positions = (1, samples * spatial) if last and step == 1 else (samples, spatial)
        return Geometry(num_modalities, units, channels, lines, positions, last, step)

    @property
    def values(self) -> int:
        """Number of values of a unit."""
        return self.channels * self.lines * self.positions

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """``units, C, L, P``, the kernels' arguments."""
        return self.units, self.channels, self.lines, self.positions


@dataclass(frozen=True)
class Plan:
    """Extents of a tile, all powers of two, tiles per program and warps per program."""

    channels: int
    lines: int
    positions: int
    tiles: int
    warps: int

    def pieces(self, g: Geometry) -> int:
        """Number of tiles per channel."""
        return _divide_up(g.lines, self.lines) * _divide_up(g.positions, self.positions)

    def chunks(self, g: Geometry) -> int:
        """Number of programs per channel."""
        return _divide_up(self.pieces(g), self.tiles)

    def programs(self, g: Geometry) -> int:
        return g.units * _divide_up(g.channels, self.channels) * self.chunks(g)


# None of these numbers has been measured on a GPU. They follow from what ptxas reports for sm_90: with them,
# kernels use 40 to 130 registers per thread (180 with a residual, channels last, in half types) and spill
# only a few values of the largest whole channels. A thread has at least two 16-byte loads per tensor in
# flight, about 60 KB per multiprocessor, where 20 KB would hide the memory latency of an H100.
WHOLE_VALUES = 2**15  # float32 values that a program of 16 warps holds in registers, 64 per thread
FORWARD_VALUES = 4096  # values per tile, over all modalities, for four warps
BACKWARD_VALUES = 2048  # the counterpart for kernels that read two tensors of the size of x
STATISTICS_VALUES = 2048  # values per tile of one modality; each takes three registers
PROGRAMS_PER_MULTIPROCESSOR = 8  # programs per multiprocessor before a program processes more than one tile
MOST_TILES = 4  # per program without sums: several amortize the loads of tables, more unbalance the last wave


def whole_plan(g: Geometry, dtype: torch.dtype, tensors: int) -> Plan | None:
    """Plan of tiles that hold whole channels of ``tensors`` tensors, or None if they do not fit."""
    lines, positions = _power_above(g.lines), _power_above(g.positions)
    a_channel = lines * positions * g.modalities * tensors * (2 if dtype == torch.float64 else 1)
    most = WHOLE_VALUES // a_channel
    # For channels last, the smallest memory transaction is a sector of 32 bytes along the channels.
    sector = min(32 // dtype.itemsize, _power_above(g.channels)) if g.channels_last else 1
    if most < sector:
        return None
    wanted = max(sector, _power_below(FORWARD_VALUES // a_channel))
    channels = min(wanted, _power_below(most), _power_above(g.channels))
    warps = min(_power_below(channels * a_channel // 1024), 16)
    return Plan(channels, lines, positions, 1, warps)


def pass_plan(
    g: Geometry, dtype: torch.dtype, values: int, multiprocessors: int, most_tiles: int = 2**30
) -> Plan:
    """Plan of tiles of ``values`` values over all modalities, with tiles per program to fill the device."""
    values = max(_power_below(values // g.modalities), 256)
    channels, lines, positions = (_power_above(size) for size in g.sizes[1:])
    if g.channels_last:  # at least 128 bytes along the channels
        channels = min(channels, max(64, 128 // dtype.itemsize))
        positions = min(positions, values // channels)
        lines = min(lines, values // (channels * positions))
    else:
        positions = min(positions, values)
        lines = min(lines, values // positions)
        channels = min(channels, values // (positions * lines))
    plan = Plan(channels, lines, positions, tiles=1, warps=4)
    spare = plan.programs(g) // (PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)
    return replace(plan, tiles=_power_below(min(spare, plan.pieces(g), most_tiles)))


def _divide_up(n: int, by: int) -> int:
    return -(-n // by)


def _power_above(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _power_below(n: int) -> int:
    """Largest power of two that is at most n, but at least 1."""
    return 1 << max(n.bit_length() - 1, 0)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


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


def tile_constants(g: Geometry, plan: Plan) -> dict[str, Any]:
    """Constants of the kernels that define a tile."""
    return dict(
        BLOCK_C=plan.channels,
        BLOCK_L=plan.lines,
        BLOCK_P=plan.positions,
        STEP=g.step,
        CHANNELS_LAST=g.channels_last,
        INT64=g.step * g.values >= 2**31,
        num_warps=plan.warps,
    )


def pass_constants(g: Geometry, plan: Plan) -> dict[str, Any]:
    """Constants and arguments of kernels whose programs process several tiles."""
    return dict(chunks=plan.chunks(g), TILES=plan.tiles, **tile_constants(g, plan))


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
    g = Geometry.of(x, num_modalities, mean.shape[0] // num_modalities, order)
    definition = call_constants(options, num_modalities, route is not None)
    with device_of(x):
        plan = None if given else whole_plan(g, x.dtype, tensors=1)
        if plan is not None:
            wrap_kernel(forward_whole_kernel)[(plan.programs(g),)](
                x, weight, bias, residual, route, y, mean, var,
                *g.sizes, **definition, **tile_constants(g, plan),
            )  # fmt: skip
            return y, batch_mean, batch_var
        if not given:
            _statistics(x, g, mean, var)
        plan = pass_plan(g, x.dtype, FORWARD_VALUES, _multiprocessors(x.device), MOST_TILES)
        wrap_kernel(forward_kernel)[(plan.programs(g),)](
            x, weight, bias, mean, var, residual, route, y, *g.sizes, **definition, **pass_constants(g, plan)
        )
    return y, batch_mean, batch_var


def _statistics(x: Tensor, g: Geometry, mean: Tensor, var: Tensor) -> None:
    """Write mean and biased variance per unit and channel to tables ``[M * units, C]``."""
    apart = replace(g, modalities=1, units=g.modalities * g.units)
    plan = pass_plan(apart, x.dtype, STATISTICS_VALUES, _multiprocessors(x.device))
    chunks = plan.chunks(g)
    partials = mean.new_empty((3, chunks, *mean.shape), dtype=torch.float64)
    wrap_kernel(statistics_kernel)[(plan.programs(apart),)](
        x, partials, *apart.sizes, **pass_constants(apart, plan)
    )
    parts = _power_above(chunks)
    channels = max(1, min(32, 4096 // parts))
    wrap_kernel(join_kernel)[(apart.units * _divide_up(g.channels, channels),)](
        partials, mean, var, apart.units, g.channels, chunks, BLOCK_C=channels, CHUNKS=parts
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
    g = Geometry.of(x, num_modalities, mean.shape[0] // num_modalities, order)
    definition = call_constants(options, num_modalities, route is not None)
    stored = None if residual is None else dresidual

    def total(sums: Tensor) -> Tensor:  # [M * units, C] -> [M, C]
        return sums if g.units == 1 else sums.view(num_modalities, g.units, g.channels).sum(1)

    with device_of(x):
        plan = whole_plan(g, x.dtype, tensors=2) if batch_statistics else None
        if plan is not None:
            dweight, dbias = (weight.new_empty(mean.shape) for _ in range(2))
            wrap_kernel(backward_whole_kernel)[(plan.programs(g),)](
                dy, x, *tables, residual, route, dx, stored, dweight, dbias,
                *g.sizes, **definition, **tile_constants(g, plan),
            )  # fmt: skip
            return dx, total(dweight), total(dbias), dresidual
        plan = pass_plan(g, x.dtype, BACKWARD_VALUES, _multiprocessors(x.device))
        dweights, dbiases = (weight.new_empty((plan.chunks(g), *mean.shape)) for _ in range(2))
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
            plan = pass_plan(g, x.dtype, BACKWARD_VALUES, _multiprocessors(x.device), MOST_TILES)
            wrap_kernel(backward_kernel)[(plan.programs(g),)](
                dy, x, *tables, residual, route, dx, dweight, dbias,
                *g.sizes, **definition, **pass_constants(g, plan),
            )  # fmt: skip
    return dx, total(dweight), total(dbias), dresidual


def _as_layout(t: Tensor | None, layout: torch.memory_format) -> Any:
    return None if t is None else t.contiguous(memory_format=layout)


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context that makes the device of x current, where Triton launches; none while tracing."""
    return (
        torch.cuda.device(x.device)
        if x.is_cuda and type(x) in (Tensor, Parameter)
        else contextlib.nullcontext()
    )


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


# Compilers trace into a triton_op, but not if its kernels are interpreted.
define_op: Any = torch.library.custom_op if INTERPRETED else torch.library.triton_op
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
