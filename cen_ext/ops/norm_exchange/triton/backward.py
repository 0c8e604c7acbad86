"""Triton kernels of the backward pass; ``tile`` defines the sizes and constants."""

# The language is Triton; see tile.py.
# mypy: ignore-errors
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from cen_ext.ops.norm_exchange.triton.activation import activate_backward
from cen_ext.ops.norm_exchange.triton.tile import (
    exchange,
    exchange_back,
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


@triton.jit
def backward_sums_kernel(
    dy,
    x,
    weight,  # [M, C]
    bias,
    mean,  # [M * units, C // GROUP], given or of x
    var,
    residual,  # as x, or None
    route,  # [M, C], or None
    dx,  # as x, or None for batch statistics, with which dx depends on the sums
    dresidual,  # as x, or None
    dweight,  # [chunks, M * units, C]
    dbias,
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
    """Sum dz * xhat and dz over a chunk of tiles; write dresidual and, with given statistics, dx."""
    sizes = (units, C, L, P)
    unit, chunk, channels = program_coords(tl.program_id(0), sizes, chunks, BLOCK_C)
    affine, statistics, masks = _load_tables(
        weight,
        bias,
        mean,
        var,
        route,
        unit,
        units,
        channels,
        C,
        M,
        RULE,
        THRESHOLD,
        OWN_REGION,
        SIGNED,
        GROUP,
        EPS,
    )
    scales = _scales(affine, statistics, M)
    dweights, dbiases = (), ()
    for m in tl.static_range(M):
        dweights = dweights + (tl.zeros([BLOCK_C, BLOCK_L * BLOCK_P], scales[m].dtype),)
        dbiases = dbiases + (tl.zeros([BLOCK_C, BLOCK_L * BLOCK_P], scales[m].dtype),)
    for i in range(TILES):
        index = chunk * TILES + i
        tile = locate_tile(index, unit, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
        dzs, xhats = load_gradients(
            dy,
            x,
            residual,
            dresidual,
            affine,
            statistics,
            masks,
            tile,
            M,
            RULE,
            ACTIVATION,
            SLOPE,
            CHANNELS_LAST,
            1,
        )
        dweight_sums, dbias_sums = (), ()
        for m in tl.static_range(M):
            if dx is not None:
                store_tile(dx, m, tile, scales[m][:, None] * dzs[m])
            dweight_sums = dweight_sums + (dweights[m] + dzs[m] * xhats[m],)
            dbias_sums = dbias_sums + (dbiases[m] + dzs[m],)
        dweights, dbiases = dweight_sums, dbias_sums
    for m in tl.static_range(M):
        row = (chunk.to(tl.int64) * M + m) * units + unit
        dweight_sum, dbias_sum = tl.sum(dweights[m], axis=1), tl.sum(dbiases[m], axis=1)
        store_sums(dweight, dbias, row, channels, C, masks[2][m], dweight_sum, dbias_sum)


@triton.jit
def backward_kernel(
    dy,
    x,
    weight,
    bias,
    mean,
    var,
    residual,
    route,
    dx,
    dweight,  # the sums, [M * units, C]; of weight times both over a group, [M * units, C // GROUP]
    dbias,
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
    """Compute dx from the sums, with batch statistics."""
    sizes = (units, C, L, P)
    # In reverse order of backward_sums_kernel, whose last reads are still in the L2 cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    unit, chunk, channels = program_coords(pid, sizes, chunks, BLOCK_C)
    affine, statistics, masks = _load_tables(
        weight,
        bias,
        mean,
        var,
        route,
        unit,
        units,
        channels,
        C,
        M,
        RULE,
        THRESHOLD,
        OWN_REGION,
        SIGNED,
        GROUP,
        EPS,
    )
    dweights = load_rows(dweight, unit, units, channels // GROUP, C // GROUP, M)
    dbiases = load_rows(dbias, unit, units, channels // GROUP, C // GROUP, M)
    for i in range(TILES):
        index = chunk * TILES + i
        tile = locate_tile(index, unit, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
        dzs, xhats = load_gradients(
            dy,
            x,
            residual,
            None,
            affine,
            statistics,
            masks,
            tile,
            M,
            RULE,
            ACTIVATION,
            SLOPE,
            CHANNELS_LAST,
            1,
        )
        for m in tl.static_range(M):
            dz, scale = _factored(dzs[m], affine[0][m], statistics[1][m], GROUP)
            count = tl.full((), GROUP, scale.dtype) * L * P
            store_dx(dx, m, tile, dz, xhats[m], scale, dweights[m] / count, dbiases[m] / count, 1)


@triton.jit
def backward_whole_kernel(
    dy,
    x,
    weight,
    bias,
    mean,
    var,
    residual,
    route,
    dx,
    dresidual,
    dweight,  # [M * units, C]
    dbias,
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
    """Compute all gradients with one read of x and dy, for tiles that hold whole channels or groups."""
    sizes = (units, C, L, P)
    unit, _, channels = program_coords(tl.program_id(0), sizes, 1, BLOCK_C, GROUP)
    affine, statistics, masks = _load_tables(
        weight,
        bias,
        mean,
        var,
        route,
        unit,
        units,
        channels,
        C,
        M,
        RULE,
        THRESHOLD,
        OWN_REGION,
        SIGNED,
        GROUP,
        EPS,
    )
    tile = locate_tile(0, unit, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
    dzs, xhats = load_gradients(
        dy,
        x,
        residual,
        dresidual,
        affine,
        statistics,
        masks,
        tile,
        M,
        RULE,
        ACTIVATION,
        SLOPE,
        CHANNELS_LAST,
        1,
    )
    for m in tl.static_range(M):
        dweight_sum, dbias_sum = tl.sum(dzs[m] * xhats[m], axis=1), tl.sum(dzs[m], axis=1)
        store_sums(dweight, dbias, m * units + unit, channels, C, masks[2][m], dweight_sum, dbias_sum)
        if GROUP > 1:
            dweight_sum = join_groups(affine[0][m] * dweight_sum, GROUP)
            dbias_sum = join_groups(affine[0][m] * dbias_sum, GROUP)
        dz, scale = _factored(dzs[m], affine[0][m], statistics[1][m], GROUP)
        count = tl.full((), GROUP, scale.dtype) * L * P
        store_dx(dx, m, tile, dz, xhats[m], scale, dweight_sum / count, dbias_sum / count, 1)


@triton.jit
def _load_tables(
    weight,
    bias,
    mean,
    var,
    route,
    unit,
    units,
    channels,
    C,
    M: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    OWN_REGION: tl.constexpr,
    SIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    EPS: tl.constexpr,
):
    """Load (weight, bias), (mean, 1 / std), the masks of load_routes, all tuples of ``[BLOCK_C]``."""
    weights = load_rows(weight, 0, 1, channels, C, M)
    masks = load_routes(weights, route, channels, C, M, RULE, THRESHOLD, OWN_REGION, SIGNED, GROUP > 1)
    unread = masks[1]
    variances = load_rows(var, unit, units, channels // GROUP, C // GROUP, M)
    invstds = ()
    for m in tl.static_range(M):
        invstds = invstds + (inverse_std(variances[m], EPS),)
    means = zero_where(unread, load_rows(mean, unit, units, channels // GROUP, C // GROUP, M), M)
    affine = (zero_where(unread, weights, M), load_rows(bias, 0, 1, channels, C, M))
    return affine, (means, zero_where(unread, invstds, M)), masks


@triton.jit
def _scales(affine, statistics, M: tl.constexpr):
    """Compute weight / standard deviation."""
    scales = ()
    for m in tl.static_range(M):
        scales = scales + (affine[0][m] * statistics[1][m],)
    return scales


@triton.jit
def load_gradients(
    dy,
    x,
    residual,
    dresidual,
    affine,
    statistics,
    masks,
    tile,
    M: tl.constexpr,
    RULE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    AXIS: tl.constexpr,  # of a tile, over which the statistics are
):
    """Compute dz and xhat of all modalities, with the activation's argument recomputed from x."""
    xhats, zs, gs = (), (), ()
    for m in tl.static_range(M):
        d = load_centered(x, m, tile, statistics[0][m], masks[1][m], CHANNELS_LAST, AXIS)
        xhat = tl.where(tile.mask, d * tl.expand_dims(statistics[1][m], AXIS), 0.0)
        xhats = xhats + (xhat,)
        zs = zs + (xhat * affine[0][m][:, None] + affine[1][m][:, None],)
    us = exchange(zs, masks[0], M, RULE)
    for m in tl.static_range(M):
        g = load_tile(dy, m, tile, xhats[m].dtype)
        if ACTIVATION != "identity":
            u = us[m]
            if residual is not None:
                u += load_tile(residual, m, tile, u.dtype)
            g = activate_backward(g, u, ACTIVATION, SLOPE)
        if dresidual is not None:
            store_tile(dresidual, m, tile, g)
        gs = gs + (g,)
    return exchange_back(gs, masks[0], M, RULE), xhats


@triton.jit
def store_sums(dweight, dbias, row, channels, C, unlent, dweight_sum, dbias_sum):
    """Store a row of the sums over channels; shared statistics need x where no gradient depends on it."""
    tl.store(dweight + row * C + channels, tl.where(unlent, 0.0, dweight_sum), mask=channels < C)
    tl.store(dbias + row * C + channels, dbias_sum, mask=channels < C)


@triton.jit
def _factored(dz, weight, invstd, GROUP: tl.constexpr):
    """dz and its factor in dx; only a single channel's weight is a factor of the means, too."""
    if GROUP > 1:
        return weight[:, None] * dz, invstd
    return dz, weight * invstd


@triton.jit
def store_dx(dx, m, tile, dz, xhat, scale, slope, constant, AXIS: tl.constexpr):
    """Store ``dx = scale * (dz - constant - xhat * slope)``; slope and constant are means over AXIS."""
    inner = dz - tl.expand_dims(constant, AXIS) - xhat * tl.expand_dims(slope, AXIS)
    store_tile(dx, m, tile, tl.expand_dims(scale, AXIS) * inner)
