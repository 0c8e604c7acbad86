"""Triton kernels of layer norm; ``tile`` defines the sizes and constants.

A position's channels share statistics, so a tile has all of them where they fit: then x is read once each
way. Otherwise a program has a few positions and walks their channels twice, BLOCK_C at a time.
"""

# The language is Triton; see tile.py.
# mypy: ignore-errors
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from cen_ext.ops.norm_exchange.triton.backward import load_gradients, store_dx, store_sums
from cen_ext.ops.norm_exchange.triton.forward import moments, store_y
from cen_ext.ops.norm_exchange.triton.tile import (
    inverse_std,
    load_routes,
    load_rows,
    load_tile,
    locate_tile,
    locate_values,
)


@triton.jit
def layer_whole_kernel(
    x,
    weight,  # [M, C]
    bias,
    residual,  # as x, or None
    route,  # [M, C], or None
    y,
    mean,  # [M, L, P], results
    var,
    units,  # 1
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
    """Compute statistics and y with one read of x, for tiles that hold all channels."""
    sizes = (units, C, L, P)
    real: tl.constexpr = mean.dtype.element_ty
    channels = tl.arange(0, BLOCK_C)
    affine, masks = _load_parameters(weight, bias, route, channels, C, M, RULE, THRESHOLD, OWN_REGION, SIGNED)
    for index in range(tl.program_id(0), _pieces(sizes, BLOCK_L, BLOCK_P), tl.num_programs(0)):
        tile = locate_tile(index, 0, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
        at, inside = _locate_statistics(index, sizes, BLOCK_L, BLOCK_P, INT64)
        zs = ()
        for m in tl.static_range(M):
            average, variance, d = moments(load_tile(x, m, tile, real), tile.mask, C, real, 0, 1)
            _store_statistics(mean, var, m, at, inside, average, variance, sizes)
            zs = zs + (_affine(d, inverse_std(variance, EPS), affine, m),)
        store_y(y, zs, masks[0], residual, tile, M, RULE, ACTIVATION, SLOPE)


@triton.jit
def layer_kernel(
    x,
    weight,
    bias,
    residual,
    route,
    y,
    mean,
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
    """The same with two reads of x, for any number of channels; a program has one tile."""
    sizes = (units, C, L, P)
    index = tl.program_id(0)
    at, inside = _locate_statistics(index, sizes, BLOCK_L, BLOCK_P, INT64)
    real: tl.constexpr = mean.dtype.element_ty
    means, invstds = (), ()
    for m in tl.static_range(M):
        # In float64, so that joining the moments of blocks does not depend on the rounding of their means.
        average = tl.zeros([BLOCK_L * BLOCK_P], tl.float64)
        variance = tl.zeros([BLOCK_L * BLOCK_P], tl.float64)
        for first in range(0, C, BLOCK_C):
            channels = first + tl.arange(0, BLOCK_C)
            tile = locate_tile(index, 0, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
            size = tl.minimum(C - first, BLOCK_C)
            values = load_tile(x, m, tile, real)
            other, own, _ = moments(values, tile.mask, size, tl.float64, 0, 1)
            share = size.to(tl.float64) / (first + size)
            apart = other - average
            average += apart * share
            variance += (own - variance) * share + apart * apart * (share * (1.0 - share))
        average, variance = average.to(real), variance.to(real)
        _store_statistics(mean, var, m, at, inside, average, variance, sizes)
        means, invstds = means + (average,), invstds + (inverse_std(variance, EPS),)
    for first in range(0, C, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        affine, masks = _load_parameters(
            weight, bias, route, channels, C, M, RULE, THRESHOLD, OWN_REGION, SIGNED
        )
        tile = locate_tile(index, 0, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
        zs = ()
        for m in tl.static_range(M):
            d = load_tile(x, m, tile, real) - means[m][None, :]
            zs = zs + (_affine(d, invstds[m], affine, m),)
        store_y(y, zs, masks[0], residual, tile, M, RULE, ACTIVATION, SLOPE)


@triton.jit
def layer_backward_whole_kernel(
    dy,
    x,
    weight,
    bias,
    mean,
    var,
    residual,
    route,
    dx,
    dresidual,  # as x, or None
    dweight,  # [programs, M, C]
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
    """Compute all gradients with one read of x and dy, for tiles that hold all channels."""
    sizes = (units, C, L, P)
    channels = tl.arange(0, BLOCK_C)
    affine, masks = _load_parameters(weight, bias, route, channels, C, M, RULE, THRESHOLD, OWN_REGION, SIGNED)
    dweights, dbiases = (), ()
    for m in tl.static_range(M):
        dweights = dweights + (tl.zeros([BLOCK_C], affine[0][m].dtype),)
        dbiases = dbiases + (tl.zeros([BLOCK_C], affine[0][m].dtype),)
    for index in range(tl.program_id(0), _pieces(sizes, BLOCK_L, BLOCK_P), tl.num_programs(0)):
        tile = locate_tile(index, 0, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
        statistics = _load_statistics(mean, var, index, sizes, M, EPS, BLOCK_L, BLOCK_P, INT64)
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
            0,
        )
        dweight_sums, dbias_sums = (), ()
        for m in tl.static_range(M):
            dz = affine[0][m][:, None] * dzs[m]
            count = tl.full((), 1.0, dz.dtype) * C
            slope, constant = tl.sum(dz * xhats[m], axis=0) / count, tl.sum(dz, axis=0) / count
            store_dx(dx, m, tile, dz, xhats[m], statistics[1][m], slope, constant, 0)
            dweight_sums = dweight_sums + (dweights[m] + tl.sum(dzs[m] * xhats[m], axis=1),)
            dbias_sums = dbias_sums + (dbiases[m] + tl.sum(dzs[m], axis=1),)
        dweights, dbiases = dweight_sums, dbias_sums
    for m in tl.static_range(M):
        row = tl.program_id(0).to(tl.int64) * M + m
        store_sums(dweight, dbias, row, channels, C, masks[2][m], dweights[m], dbiases[m])


@triton.jit
def layer_backward_kernel(
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
    dweight,
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
    """The same with two reads of x and dy, for any number of channels; a program has one tile."""
    sizes = (units, C, L, P)
    index = tl.program_id(0)
    statistics = _load_statistics(mean, var, index, sizes, M, EPS, BLOCK_L, BLOCK_P, INT64)
    slopes, constants = (), ()
    for m in tl.static_range(M):
        slopes = slopes + (tl.zeros([BLOCK_L * BLOCK_P], statistics[0][m].dtype),)
        constants = constants + (tl.zeros([BLOCK_L * BLOCK_P], statistics[0][m].dtype),)
    for first in range(0, C, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        affine, masks = _load_parameters(
            weight, bias, route, channels, C, M, RULE, THRESHOLD, OWN_REGION, SIGNED
        )
        tile = locate_tile(index, 0, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
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
            0,
        )
        slope_sums, constant_sums = (), ()
        for m in tl.static_range(M):
            dz = affine[0][m][:, None] * dzs[m]
            count = tl.full((), 1.0, dz.dtype) * C
            slope_sums = slope_sums + (slopes[m] + tl.sum(dz * xhats[m], axis=0) / count,)
            constant_sums = constant_sums + (constants[m] + tl.sum(dz, axis=0) / count,)
            row = index.to(tl.int64) * M + m
            dweight_sum, dbias_sum = tl.sum(dzs[m] * xhats[m], axis=1), tl.sum(dzs[m], axis=1)
            store_sums(dweight, dbias, row, channels, C, masks[2][m], dweight_sum, dbias_sum)
        slopes, constants = slope_sums, constant_sums
    for first in range(0, C, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        affine, masks = _load_parameters(
            weight, bias, route, channels, C, M, RULE, THRESHOLD, OWN_REGION, SIGNED
        )
        tile = locate_tile(index, 0, channels, sizes, BLOCK_L, BLOCK_P, STEP, CHANNELS_LAST, INT64)
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
            0,
        )
        for m in tl.static_range(M):
            dz = affine[0][m][:, None] * dzs[m]
            store_dx(dx, m, tile, dz, xhats[m], statistics[1][m], slopes[m], constants[m], 0)


@triton.jit
def _pieces(sizes, BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr):
    """Number of tiles."""
    _, _, L, P = sizes
    return tl.cdiv(L, BLOCK_L) * tl.cdiv(P, BLOCK_P)


@triton.jit
def _load_parameters(
    weight,
    bias,
    route,
    channels,
    C,
    M: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    OWN_REGION: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Load (weight, bias), (routes, unread), all tuples of ``[BLOCK_C]``."""
    weights = load_rows(weight, 0, 1, channels, C, M)
    masks = load_routes(weights, route, channels, C, M, RULE, THRESHOLD, OWN_REGION, SIGNED, True)
    return (weights, load_rows(bias, 0, 1, channels, C, M)), masks


@triton.jit
def _locate_statistics(index, sizes, BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, INT64: tl.constexpr):
    """Where a tile's statistics are in a modality's ``[L, P]``, and whether there are any."""
    line, position, inside = locate_values(index, sizes, BLOCK_L, BLOCK_P, INT64)
    return line * sizes[3] + position, inside


@triton.jit
def _store_statistics(mean, var, m, at, inside, average, variance, sizes):
    row = tl.full((), 1, tl.int64) * m * sizes[2] * sizes[3]
    tl.store(mean + row + at, average, mask=inside)
    tl.store(var + row + at, variance, mask=inside)


@triton.jit
def _load_statistics(
    mean,
    var,
    index,
    sizes,
    M: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INT64: tl.constexpr,
):
    """Load (mean, 1 / std), tuples of a value per position."""
    at, inside = _locate_statistics(index, sizes, BLOCK_L, BLOCK_P, INT64)
    means, invstds = (), ()
    for m in tl.static_range(M):
        row = tl.full((), 1, tl.int64) * m * sizes[2] * sizes[3]
        means = means + (tl.load(mean + row + at, mask=inside, other=0.0),)
        variance = tl.load(var + row + at, mask=inside, other=0.0)
        invstds = invstds + (inverse_std(variance, EPS),)
    return means, invstds


@triton.jit
def _affine(d, invstd, affine, m):
    """z of modality m from x - mean."""
    return d * invstd[None, :] * affine[0][m][:, None] + affine[1][m][:, None]
