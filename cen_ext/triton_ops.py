"""The operator in Triton: how a call is cut into programs, the launches, the registration of the ops.

    triton_norm_exchange(x, weight, bias, mean?, var?, residual?, *options) -> (y, mean, var)
    triton_norm_exchange_backward(dy, x, weight, bias, mean, var, residual?, batch_statistics, *options)
        -> (dx, dweight, dbias, dresidual)

as the compiled ops of ``cen_ext.compiled``. With the statistics of x, a channel that fits one program is read
once (one launch each way); else the forward pass takes three launches, of which the first reads x for partial
sums and the last reads it again, and the backward pass likewise. Given statistics take one pass each way.
All partial sums are joined in a fixed order: the same inputs give the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from cen_ext import autograd
from cen_ext.reference import Options, memory_format, statistics_dtype
from cen_ext.triton_kernels import (
    backward_kernel,
    backward_sums_kernel,
    backward_whole_kernel,
    forward_kernel,
    forward_whole_kernel,
    join_kernel,
    statistics_kernel,
)

# --- how a call is cut ---


@dataclass(frozen=True)
class Geometry:
    """x as the kernels see it (``triton_kernels``): units of channels of lines of positions."""

    modalities: int
    units: int  # a modality, each with its own statistics
    channels: int
    lines: int
    positions: int
    channels_last: bool

    @staticmethod
    def of(x: Tensor, num_modalities: int, units: int) -> Geometry:
        rows, channels = int(x.shape[0]), int(x.shape[1])
        samples, spatial = rows // (num_modalities * units), math.prod(int(size) for size in x.shape[2:])
        last = memory_format(x) != torch.contiguous_format
        lines, positions = (1, samples * spatial) if last else (samples, spatial)
        return Geometry(num_modalities, units, channels, lines, positions, last)

    @property
    def values(self) -> int:
        """Of a unit."""
        return self.channels * self.lines * self.positions

    @property
    def sizes(self) -> tuple[int, int, int]:
        """C, L and P of the kernels."""
        return self.channels, self.lines, self.positions


@dataclass(frozen=True)
class Plan:
    """A tile's extent, all powers of two, how many of them a program walks, and its warps of 32 threads."""

    channels: int
    lines: int
    positions: int
    tiles: int
    warps: int

    def chunks(self, g: Geometry) -> int:
        """Programs that share the tiles of a unit's channels."""
        pieces = triton.cdiv(g.lines, self.lines) * triton.cdiv(g.positions, self.positions)
        return triton.cdiv(pieces, self.tiles)

    def blocks(self, g: Geometry) -> int:
        return triton.cdiv(g.channels, self.channels)


# Values that a program with 16 warps can hold in registers, 64 a thread, as float32.
WHOLE_VALUES = 2**15
# Values of a tile, all modalities, that four warps keep in flight; two tensors of x's size are read backward.
FORWARD_VALUES = 4096
BACKWARD_VALUES = 2048
PROGRAMS_A_MULTIPROCESSOR = 8
MOST_CHUNKS = 1024  # of which a program of join_kernel holds a channel's


def whole_plan(g: Geometry, dtype: torch.dtype, tensors: int) -> Plan | None:
    """Tiles that hold whole channels, ``tensors`` values for each of x's; None where they do not fit."""
    lines, positions = triton.next_power_of_2(g.lines), triton.next_power_of_2(g.positions)
    a_channel = lines * positions * g.modalities * tensors * (2 if dtype == torch.float64 else 1)
    most = WHOLE_VALUES // a_channel
    # Channels last, less than a sector of 32 bytes wastes bandwidth.
    sector = min(32 // dtype.itemsize, triton.next_power_of_2(g.channels)) if g.channels_last else 1
    if most < sector:
        return None
    wanted = _power_below(max(2 * sector, FORWARD_VALUES // a_channel))
    channels = min(wanted, _power_below(most), triton.next_power_of_2(g.channels))
    warps = min(_power_below(channels * a_channel // 1024), 16)
    return Plan(channels, lines, positions, 1, warps)


def pass_plan(g: Geometry, dtype: torch.dtype, values: int, most_tiles: int, multiprocessors: int) -> Plan:
    """Tiles of ``values`` values, all modalities; as many a program as leave all multiprocessors work."""
    values = max(_power_below(values // g.modalities), 256)
    channels, lines, positions = (triton.next_power_of_2(size) for size in g.sizes)
    if g.channels_last:  # 128 bytes along the channels, or more
        channels = min(channels, max(64, 128 // dtype.itemsize))
        positions = min(positions, values // channels)
    else:
        positions = min(positions, values)
        lines = min(lines, values // positions)
        channels = min(channels, values // (positions * lines))
    single = Plan(channels, lines, positions, 1, 4)
    programs = single.blocks(g) * single.chunks(g) * g.units
    tiles = _power_below(programs // (PROGRAMS_A_MULTIPROCESSOR * multiprocessors))
    return Plan(channels, lines, positions, min(tiles, most_tiles), 4)


def _power_below(n: int) -> int:
    """The largest power of two that is no larger, at least 1."""
    return 1 << max(n.bit_length() - 1, 0)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- launches ---


def _definition(options: Options, num_modalities: int) -> dict[str, float]:
    """The kernels' constants that say what is computed."""
    slopes = {"identity": 1.0, "relu": 0.0, "leaky_relu": float(options.negative_slope)}
    return dict(
        M=num_modalities,
        THRESHOLD=float(options.threshold) if num_modalities > 1 else 0.0,
        OWN=options.region == "own",
        SIGNED=options.criterion == "signed",
        EPS=float(options.eps),
        SLOPE=slopes[options.activation],
    )


def _cut(g: Geometry, plan: Plan) -> dict[str, Any]:
    """The kernels' constants that say how."""
    return dict(
        CHANNELS=plan.channels,
        LINES=plan.lines,
        POSITIONS=plan.positions,
        CHANNELS_LAST=g.channels_last,
        INDEX=tl.int32 if g.values < 2**31 else tl.int64,
        num_warps=plan.warps,
    )


def norm_exchange_forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and variance where they are those of x."""
    options = Options(threshold, region, criterion, norm, eps, activation, negative_slope)
    y, batch_mean, batch_var = _empty_results(x, weight, mean, var, residual, *options)
    if x.numel() == 0:
        return y, batch_mean.zero_(), batch_var.zero_()
    layout, num_modalities = memory_format(x), weight.shape[0]
    x, residual = _laid_out(x, layout), _laid_out(residual, layout)
    weight, bias = weight.contiguous(), bias.contiguous()
    given = mean is not None and var is not None
    mean, var = (mean.contiguous(), var.contiguous()) if given else (batch_mean, batch_var)
    g = Geometry.of(x, num_modalities, mean.shape[0] // num_modalities)
    definition = _definition(options, num_modalities)
    with _device_of(x):
        plan = None if given else whole_plan(g, x.dtype, tensors=1)
        if plan is not None:
            wrap_triton(forward_whole_kernel)[(g.units * plan.blocks(g),)](
                x, weight, bias, residual, y, mean, var, *g.sizes, g.units, **definition, **_cut(g, plan)
            )
            return y, batch_mean, batch_var
        if not given:
            _statistics(x, g, mean, var)
        plan = pass_plan(g, x.dtype, FORWARD_VALUES, 4, _multiprocessors(x.device))
        chunks = plan.chunks(g)
        wrap_triton(forward_kernel)[(g.units * plan.blocks(g) * chunks,)](
            x,
            weight,
            bias,
            mean,
            var,
            residual,
            y,
            *g.sizes,
            g.units,
            chunks,
            TILES=plan.tiles,
            **definition,
            **_cut(g, plan),
        )
    return y, batch_mean, batch_var


def _statistics(x: Tensor, g: Geometry, mean: Tensor, var: Tensor) -> None:
    """Mean and biased variance of every unit's channels, into tables ``[M * units, C]``."""
    rows = g.modalities * g.units
    each = replace(g, modalities=1, units=rows)
    plan = pass_plan(each, x.dtype, BACKWARD_VALUES, 32, _multiprocessors(x.device))
    chunks = plan.chunks(g)
    partials = mean.new_empty((3, chunks, rows, g.channels), dtype=torch.float64)
    wrap_triton(statistics_kernel)[(rows * plan.blocks(g) * chunks,)](
        x, partials, *g.sizes, chunks, rows, TILES=plan.tiles, **_cut(g, plan)
    )
    parts = triton.next_power_of_2(chunks)
    channels = max(1, min(32, 4096 // parts))
    wrap_triton(join_kernel)[(rows * triton.cdiv(g.channels, channels),)](
        partials, mean, var, g.channels, chunks, rows, CHANNELS=channels, CHUNKS=parts
    )


def norm_exchange_gradients(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and dresidual."""
    options = Options(threshold, region, criterion, norm, eps, activation, negative_slope)
    dx, dweight, dbias, dresidual = _empty_gradients(
        dy, x, weight, bias, mean, var, residual, batch_statistics, *options
    )
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    layout, num_modalities = memory_format(x), weight.shape[0]
    dy, x, residual = (_laid_out(t, layout) for t in (dy, x, residual))
    tables = [table.contiguous() for table in (weight, bias, mean, var)]
    g = Geometry.of(x, num_modalities, mean.shape[0] // num_modalities)
    definition = _definition(options, num_modalities)
    stored = None if residual is None else dresidual

    def empty_sums(chunks: int) -> list[Tensor]:
        return [table.new_empty((chunks, *mean.shape)) for table in (weight, bias)]

    def total(sums: Tensor) -> Tensor:
        return sums if g.units == 1 else sums.unflatten(0, (num_modalities, g.units)).sum(1)

    with _device_of(x):
        plan = whole_plan(g, x.dtype, tensors=2) if batch_statistics else None
        if plan is not None:
            sums = empty_sums(1)
            wrap_triton(backward_whole_kernel)[(g.units * plan.blocks(g),)](
                dy, x, *tables, residual, dx, *sums, stored, *g.sizes, g.units, **definition, **_cut(g, plan)
            )
            dweights, dbiases = (t[0] for t in sums)
            return dx, total(dweights), total(dbiases), dresidual
        plan = pass_plan(g, x.dtype, BACKWARD_VALUES, 32, _multiprocessors(x.device))
        chunks = plan.chunks(g)
        sums = empty_sums(chunks)
        wrap_triton(backward_sums_kernel)[(g.units * plan.blocks(g) * chunks,)](
            dy,
            x,
            *tables,
            residual,
            None if batch_statistics else dx,
            *sums,
            stored,
            *g.sizes,
            g.units,
            chunks,
            TILES=plan.tiles,
            **definition,
            **_cut(g, plan),
        )
        dweights, dbiases = (t[0] if chunks == 1 else t.sum(0) for t in sums)
        if batch_statistics:
            if stored is not None and (options.activation == "relu" or x.dtype == weight.dtype):
                # Stored without rounding: dy as it is after the activation, one tensor less to read.
                dy, residual, definition = stored, None, definition | dict(SLOPE=1.0)
            plan = pass_plan(g, x.dtype, BACKWARD_VALUES, 4, _multiprocessors(x.device))
            chunks = plan.chunks(g)
            wrap_triton(backward_kernel)[(g.units * plan.blocks(g) * chunks,)](
                dy,
                x,
                *tables,
                residual,
                dweights,
                dbiases,
                dx,
                *g.sizes,
                g.units,
                chunks,
                TILES=plan.tiles,
                **definition,
                **_cut(g, plan),
            )
    return dx, total(dweights), total(dbiases), dresidual


def _laid_out(t: Tensor | None, layout: torch.memory_format) -> Any:
    return None if t is None else t.contiguous(memory_format=layout)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; what is traced runs on no device."""
    return torch.cuda.device(x.device) if x.is_cuda and type(x) is Tensor else contextlib.nullcontext()


# --- registration ---


def _empty_results(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    units = weight.shape[0] if Options(*options).norm == "batch" else x.shape[0]
    shape = (units, x.shape[1]) if mean is None else (0,)
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
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=memory_format(x))
    dresidual = x.new_empty((0,)) if residual is None else torch.empty_like(dx)
    return dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape), dresidual


# Compilers trace into a triton_op; what Triton's interpreter runs they cannot.
_define = torch.library.custom_op if triton.knobs.runtime.interpret else torch.library.triton_op
norm_exchange = _define("cen_ext::triton_norm_exchange", norm_exchange_forward, mutates_args=())
norm_exchange_backward = _define(
    "cen_ext::triton_norm_exchange_backward", norm_exchange_gradients, mutates_args=()
)


def _gradients_once(*arguments: Any) -> tuple[Tensor, ...]:
    """Without the op's cost, unless its refusal to be differentiated is needed."""
    run = norm_exchange_backward if torch.is_grad_enabled() else norm_exchange_gradients
    gradients: tuple[Tensor, ...] = run(*arguments)
    return gradients


class NormExchange(torch.autograd.Function):
    """``norm_exchange`` with its gradient, for eager calls: calling an op made in Python costs more than
    the kernels of a small layer."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = norm_exchange_forward(*inputs)
        autograd.setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(autograd.gradient(_gradients_once))


norm_exchange.register_fake(_empty_results)
norm_exchange.register_autograd(
    autograd.gradient(norm_exchange_backward), setup_context=autograd.setup_context
)
norm_exchange_backward.register_fake(_empty_gradients)
norm_exchange_backward.register_autograd(autograd.refuse_second_gradient)
