"""Triton kernels of the forward pass; ``tile`` defines the sizes and constants."""

# The language is Triton; see tile.py.
# mypy: ignore-errors
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from cen_ext.ops.norm_exchange.triton.activation import activate
from cen_ext.ops.norm_exchange.triton.tile import (
    exchange,
    inverse_std,
    load_centered,
    load_routes,
    load_rows,
    load_tile,
    locate_tile,
    program_coords,
    store_tile,
    zero_where,
)

_LARGEST = tl.constexpr(3.4028234663852886e38)
# Float32 values times this have squares that do not overflow, nor underflow where the originals overflowed.
_SHRINK = tl.constexpr(2.0**-80)
_UNSHRINK = tl.constexpr(2.0**160)


@triton.jit
def statistics_kernel(
    x,
    partials,  # [3, chunks, M * units, C] float64: mean, centered sum of squares, number of values
    units,  # M * units: every modality's units are separate here
    C,
    L,
    P,
    chunks,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
):
    """Compute the moments of a chunk of TILES tiles from sums about the mean of its first tile.

    By Cauchy-Schwarz ``n (shift - mean)^2 <= TILES * sum (x - mean)^2`` for any values, so that subtracting
    the shift cancels at most log2(TILES) bits.
    """
    sizes = (units, C, L, P)
    unit, chunk, channels = program_coords(tl.program_id(0), sizes, chunks, BLOCK_C)
    first = chunk * TILES
    per_modality = units // STEP
    m, own = unit // per_modality, unit % per_modality
    real: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    tile = locate_tile(first, own, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
    sample = (1.0 / count_values(first, sizes, BLOCK_L, BLOCK_P)).to(real)
    shift = tl.sum(load_tile(x, m, tile, real) * sample, axis=1)

    total, squares = _shifted_sums(
        x, m, own, first, channels, sizes, shift, 1.0, BLOCK_L, BLOCK_P, TILES, STEP, CHANNELS_LAST, INT64
    )
    total, wide = total.to(tl.float64), squares.to(tl.float64)
    overflow = squares > _LARGEST
    if tl.max(overflow.to(tl.int32), axis=0) > 0:
        _, small = _shifted_sums(
            x,
            m,
            own,
            first,
            channels,
            sizes,
            shift,
            _SHRINK,
            BLOCK_L,
            BLOCK_P,
            TILES,
            STEP,
            CHANNELS_LAST,
            INT64,
        )
        wide = tl.where(overflow, _unshrunk(small), wide)

    count = tl.zeros([BLOCK_C], tl.float64)
    for i in range(TILES):
        count += count_values(first + i, sizes, BLOCK_L, BLOCK_P)
    squares = wide - total * total / count
    at = partials + (chunk * units + unit) * C + channels
    plane = tl.full((), 1, tl.int64) * chunks * units * C
    tl.store(at, shift.to(tl.float64) + total / count, mask=channels < C)
    tl.store(at + plane, tl.where(squares < 0.0, 0.0, squares), mask=channels < C)
    tl.store(at + 2 * plane, count, mask=channels < C)


@triton.jit
def _shifted_sums(
    x,
    m,
    unit,
    first,
    channels,
    sizes,
    shift,
    SCALE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
):
    """Sums of ``d = (x - shift) * SCALE`` and of its squares over a chunk of tiles, ``[BLOCK_C]`` each."""
    total = tl.zeros([channels.shape[0], BLOCK_L * BLOCK_P], shift.dtype)
    squares = tl.zeros([channels.shape[0], BLOCK_L * BLOCK_P], shift.dtype)
    for i in range(TILES):
        tile = locate_tile(first + i, unit, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
        d = tl.where(tile.mask, load_tile(x, m, tile, shift.dtype) - shift[:, None], 0.0) * SCALE
        total += d
        squares += d * d
    return tl.sum(total, axis=1), tl.sum(squares, axis=1)


@triton.jit
def _unshrunk(squares):
    return squares.to(tl.float64) * tl.full((), _UNSHRINK, tl.float64)


@triton.jit
def count_values(tile, sizes, BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr):
    """Number of values per channel in a tile."""
    _, _, L, P = sizes
    pieces = tl.cdiv(P, BLOCK_P)
    lines = tl.minimum(L - tile // pieces * BLOCK_L, BLOCK_L)
    return tl.maximum(lines, 0) * tl.minimum(P - tile % pieces * BLOCK_P, BLOCK_P)


@triton.jit
def join_kernel(
    partials,  # of statistics_kernel
    mean,  # [M * units, C]
    var,
    units,  # M * units
    C,
    chunks,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Combine the moments of all chunks to mean and biased variance (Chan, Golub and LeVeque 1983)."""
    unit, _, channels = program_coords(tl.program_id(0), (units, C, 1, 1), 1, BLOCK_C)
    chunk = tl.arange(0, CHUNKS)
    mask = (channels < C)[:, None] & (chunk < chunks)[None, :]
    at = partials + (chunk * units + unit)[None, :] * C + channels[:, None]
    plane = tl.full((), 1, tl.int64) * chunks * units * C
    means = tl.load(at, mask=mask, other=0.0)
    squares = tl.load(at + plane, mask=mask, other=0.0)
    counts = tl.load(at + 2 * plane, mask=mask, other=0.0)

    count = tl.sum(counts, axis=1)
    origin = tl.sum(tl.where((chunk == 0)[None, :], means, 0.0), axis=1)
    joint = origin + tl.sum(counts * (means - origin[:, None]), axis=1) / count
    apart = means - joint[:, None]
    variance = tl.sum(squares + counts * apart * apart, axis=1) / count
    row = unit * C + channels
    tl.store(mean + row, joint.to(mean.dtype.element_ty), mask=channels < C)
    tl.store(var + row, variance.to(var.dtype.element_ty), mask=channels < C)


@triton.jit
def forward_kernel(
    x,
    weight,  # [M, C]
    bias,
    mean,  # [M * units, C], given or of x
    var,
    residual,  # as x, or None
    route,  # [M, C], or None
    y,
    units,
    C,
    L,
    P,
    chunks,
    M: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    OWN_REGION: tl.constexpr,
    SIGNED: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
):
    """Compute y from the statistics."""
    sizes = (units, C, L, P)
    # In reverse order of statistics_kernel, whose last reads are still in the L2 cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    unit, chunk, channels = program_coords(pid, sizes, chunks, BLOCK_C)
    weights = load_rows(weight, 0, 1, channels, C, M)
    routes, unread = load_routes(weights, route, channels, C, M, RULE, THRESHOLD, OWN_REGION, SIGNED)
    biases = load_rows(bias, 0, 1, channels, C, M)
    means = zero_where(unread, load_rows(mean, unit, units, channels, C, M), M)
    variances = load_rows(var, unit, units, channels, C, M)
    scales = ()
    for m in tl.static_range(M):
        scales = scales + (inverse_std(variances[m], EPS) * weights[m],)
    for i in range(TILES):
        index = chunk * TILES + i
        tile = locate_tile(index, unit, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
        zs = ()
        for m in tl.static_range(M):
            d = load_centered(x, m, tile, means[m], unread[m], CHANNELS_LAST)
            zs = zs + (d * scales[m][:, None] + biases[m][:, None],)
        _store_y(y, zs, routes, residual, tile, M, RULE, ACTIVATION, SLOPE)


@triton.jit
def _store_y(
    y,
    zs,
    routes,
    residual,
    tile,
    M: tl.constexpr,
    RULE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    us = exchange(zs, routes, M, RULE)
    for m in tl.static_range(M):
        u = us[m]
        if residual is not None:
            u += load_tile(residual, m, tile, u.dtype)
        store_tile(y, m, tile, activate(u, ACTIVATION, SLOPE))


@triton.jit
def forward_whole_kernel(
    x,
    weight,
    bias,
    residual,
    route,
    y,
    mean,  # [M * units, C], results
    var,
    units,
    C,
    L,
    P,
    M: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    OWN_REGION: tl.constexpr,
    SIGNED: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
):
    """Compute statistics and y with one read of x, for tiles that hold whole channels."""
    sizes = (units, C, L, P)
    unit, _, channels = program_coords(tl.program_id(0), sizes, 1, BLOCK_C)
    weights = load_rows(weight, 0, 1, channels, C, M)
    routes, _ = load_routes(weights, route, channels, C, M, RULE, THRESHOLD, OWN_REGION, SIGNED)
    biases = load_rows(bias, 0, 1, channels, C, M)
    tile = locate_tile(0, unit, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
    zs = ()
    for m in tl.static_range(M):
        average, variance, d = _moments(load_tile(x, m, tile, weights[m].dtype), tile.mask, L * P)
        row = (m * units + unit) * C + channels
        tl.store(mean + row, average, mask=channels < C)
        tl.store(var + row, variance, mask=channels < C)
        scale = inverse_std(variance, EPS) * weights[m]
        zs = zs + (d * scale[:, None] + biases[m][:, None],)
    _store_y(y, zs, routes, residual, tile, M, RULE, ACTIVATION, SLOPE)


@triton.jit
def _moments(x, mask, count):
    """Mean and biased variance ``[BLOCK_C]`` of whole channels, and x - mean.

    A second step corrects the rounding of the mean, so that the mean of equal values is exactly that value.
    """
    rough = tl.sum(x * (tl.full((1, 1), 1.0, x.dtype) / count), axis=1)
    rest = tl.sum(tl.where(mask, x - rough[:, None], 0.0), axis=1)
    mean = (rough.to(tl.float64) + rest.to(tl.float64) / count).to(x.dtype)
    d = tl.where(mask, x - mean[:, None], 0.0)
    squares = tl.sum(d * d, axis=1)
    wide = squares.to(tl.float64)
    overflow = squares > _LARGEST
    if tl.max(overflow.to(tl.int32), axis=0) > 0:
        small = d * _SHRINK
        wide = tl.where(overflow, _unshrunk(tl.sum(small * small, axis=1)), wide)
    return mean, (wide / count).to(x.dtype), d
