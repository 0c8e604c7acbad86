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
    join_groups,
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
    mean,  # [M * units, C // GROUP]
    var,
    units,  # M * units
    C,
    chunks,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Combine the moments of all chunks, and of a group's channels, to mean and biased variance.

    As Chan, Golub and LeVeque 1983, MEMBERS moments at a time.
    """
    sizes = (units, C // GROUP, 1, 1)
    unit, _, groups = program_coords(tl.program_id(0), sizes, 1, BLOCK_G)
    inside = groups < C // GROUP
    origin = tl.load(partials + unit * C + groups * GROUP, mask=inside, other=0.0)
    count = tl.zeros([BLOCK_G, MEMBERS], tl.float64)
    total = tl.zeros([BLOCK_G, MEMBERS], tl.float64)
    for first in range(0, chunks * GROUP, MEMBERS):
        moment = _load_moments(partials, unit, groups, first, units, C, chunks, GROUP, MEMBERS)
        means, counts = moment[0], moment[2]
        count += counts
        total += counts * (means - origin[:, None])
    count = tl.sum(count, axis=1)
    joint = origin + tl.sum(total, axis=1) / count
    squares = tl.zeros([BLOCK_G, MEMBERS], tl.float64)
    for first in range(0, chunks * GROUP, MEMBERS):
        means, own, counts = _load_moments(partials, unit, groups, first, units, C, chunks, GROUP, MEMBERS)
        apart = means - joint[:, None]
        squares += own + counts * apart * apart
    row = unit * (C // GROUP) + groups
    tl.store(mean + row, joint.to(mean.dtype.element_ty), mask=inside)
    tl.store(var + row, (tl.sum(squares, axis=1) / count).to(var.dtype.element_ty), mask=inside)


@triton.jit
def _load_moments(
    partials, unit, groups, first, units, C, chunks, GROUP: tl.constexpr, MEMBERS: tl.constexpr
):
    """Load means, squares and counts ``[BLOCK_G, MEMBERS]`` of chunks and channels."""
    member = first + tl.arange(0, MEMBERS)
    channels = groups[:, None] * GROUP + (member % GROUP)[None, :]
    mask = (channels < C) & (member < chunks * GROUP)[None, :]
    at = partials + (member // GROUP * units + unit)[None, :] * C + channels
    plane = tl.full((), 1, tl.int64) * chunks * units * C
    means = tl.load(at, mask=mask, other=0.0)
    squares = tl.load(at + plane, mask=mask, other=0.0)
    counts = tl.load(at + 2 * plane, mask=mask, other=0.0)
    return means, squares, counts


@triton.jit
def forward_kernel(
    x,
    weight,  # [M, C]
    bias,
    mean,  # [M * units, C // GROUP], given or of x
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
    GROUP: tl.constexpr,
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
    routes, unread, _ = load_routes(
        weights, route, channels, C, M, RULE, THRESHOLD, OWN_REGION, SIGNED, GROUP > 1
    )
    biases = load_rows(bias, 0, 1, channels, C, M)
    means = zero_where(unread, load_rows(mean, unit, units, channels // GROUP, C // GROUP, M), M)
    variances = load_rows(var, unit, units, channels // GROUP, C // GROUP, M)
    scales = ()
    for m in tl.static_range(M):
        scales = scales + (inverse_std(variances[m], EPS) * weights[m],)
    for i in range(TILES):
        index = chunk * TILES + i
        tile = locate_tile(index, unit, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
        zs = ()
        for m in tl.static_range(M):
            d = load_centered(x, m, tile, means[m], unread[m], CHANNELS_LAST, 1)
            zs = zs + (d * scales[m][:, None] + biases[m][:, None],)
        store_y(y, zs, routes, residual, tile, M, RULE, ACTIVATION, SLOPE)


@triton.jit
def store_y(
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
    """Exchange, add the residual, activate and store."""
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
    mean,  # [M * units, C // GROUP], results
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
    GROUP: tl.constexpr,
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
    """Compute statistics and y with one read of x, for tiles that hold whole channels or groups."""
    sizes = (units, C, L, P)
    unit, _, channels = program_coords(tl.program_id(0), sizes, 1, BLOCK_C, GROUP)
    first = (channels < C) & (channels % GROUP == 0)
    weights = load_rows(weight, 0, 1, channels, C, M)
    routes, _, _ = load_routes(weights, route, channels, C, M, RULE, THRESHOLD, OWN_REGION, SIGNED, GROUP > 1)
    biases = load_rows(bias, 0, 1, channels, C, M)
    tile = locate_tile(0, unit, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
    zs = ()
    for m in tl.static_range(M):
        values = load_tile(x, m, tile, weights[m].dtype)
        average, variance, d = moments(values, tile.mask, GROUP * L * P, tl.float64, 1, GROUP)
        variance = variance.to(weights[m].dtype)
        row = (m * units + unit) * (C // GROUP) + channels // GROUP
        tl.store(mean + row, average.to(weights[m].dtype), mask=first)
        tl.store(var + row, variance, mask=first)
        scale = inverse_std(variance, EPS) * weights[m]
        zs = zs + (d * scale[:, None] + biases[m][:, None],)
    store_y(y, zs, routes, residual, tile, M, RULE, ACTIVATION, SLOPE)


@triton.jit
def moments(x, mask, count, wide: tl.constexpr, AXIS: tl.constexpr, GROUP: tl.constexpr):
    """Mean and biased variance of type ``wide`` over AXIS and groups of channels, and x - mean.

    A second step corrects the rounding of the mean, so that the mean of equal values is exactly that value.
    """
    sample = tl.full((1, 1), 1.0, x.dtype) / count
    rough = join_groups(tl.sum(x * sample, axis=AXIS), GROUP)
    apart = tl.where(mask, x - tl.expand_dims(rough, AXIS), 0.0)
    rest = join_groups(tl.sum(apart, axis=AXIS), GROUP)
    mean = rough.to(wide) + rest.to(wide) / count
    d = tl.where(mask, x - tl.expand_dims(mean.to(x.dtype), AXIS), 0.0)
    squares = join_groups(tl.sum(d * d, axis=AXIS), GROUP)
    variance = squares.to(wide) / count
    overflow = squares > _LARGEST
    if tl.max(overflow.to(tl.int32), axis=0) > 0:
        small = d * _SHRINK
        shrunk = join_groups(tl.sum(small * small, axis=AXIS), GROUP)
        variance = tl.where(overflow, (_unshrunk(shrunk) / count).to(wide), variance)
    return mean, variance, d
