"""Code that the Triton kernels share: addresses of tiles, and ``reference.py`` on a tile of all modalities.

x consists of ``M * units`` units, each with its own statistics: one per modality for batch norm (or given
statistics), one per row for instance and group norm. Group norm has GROUP channels share statistics. Layer
norm has one unit per modality, and statistics of each of its values, over channels. A channel of a unit is
``L`` lines of ``P`` positions: for contiguous x the rows of the unit with their spatial positions, for
channels_last a single line of both. STEP is 1 or, in order ``"sample"``, M: a unit has every M-th row of x
then, and a line is a row in either format. A tile is ``BLOCK_C`` channels by ``BLOCK_L * BLOCK_P`` values,
``[BLOCK_C, values]``, at the same offsets in every modality, because modalities exchange values. Tables
(parameters, statistics, sums) are ``[M, C]``, ``[M * units, C]`` or ``[M * units, C // GROUP]``, with
arithmetic in their dtype, float32 or float64. Tuples have an element per modality.

The numbers that define the operator are compile-time constants, because a float argument would be rounded to
float32. RULE names what decides on the exchange: ``"none"``, ``"threshold"`` (Eq. 6, by THRESHOLD, OWN_REGION
and SIGNED) or ``"route"`` (a table of modalities, as in ``reference.py``). ``activation`` defines ACTIVATION
and SLOPE.
"""

# The language is Triton, whose parameters have no type annotations and whose tuples grow only by addition.
# mypy: ignore-errors
# ruff: noqa: RUF005

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from cen_ext.ops.norm_exchange import options

OWN, MEAN = tl.constexpr(options.OWN), tl.constexpr(options.MEAN)


class Tile(NamedTuple):
    """Addresses of a tile: ``base + m * stride + offsets`` in modality m, valid where the mask is set."""

    base: tl.tensor
    stride: tl.tensor
    offsets: tl.tensor  # [BLOCK_C, BLOCK_L * BLOCK_P]
    mask: tl.tensor


@triton.jit
def program_coords(pid, sizes, chunks, BLOCK_C: tl.constexpr, GROUP: tl.constexpr = 1):
    """Unit, chunk and channels ``[BLOCK_C]`` of a program.

    Each GROUP of channels has a power of two of places, so that a program has whole groups. Channel C, which
    there is not, fills them up.
    """
    _, C, _, _ = sizes
    PLACES: tl.constexpr = triton.next_power_of_2(GROUP)
    blocks = tl.cdiv(C // GROUP * PLACES, BLOCK_C)
    channels = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    if PLACES != GROUP:
        place = channels % PLACES
        channels = tl.where(place < GROUP, channels // PLACES * GROUP + place, C)
    return (pid // (blocks * chunks)).to(tl.int64), pid // blocks % chunks, channels


@triton.jit
def locate_values(index, sizes, BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, INT64: tl.constexpr):
    """Line and position of the values of tile number ``index``, and whether there are any."""
    _, _, L, P = sizes
    integer: tl.constexpr = tl.int64 if INT64 else tl.int32
    pieces = tl.cdiv(P, BLOCK_P)
    value = tl.arange(0, BLOCK_L * BLOCK_P)
    line = (index // pieces * BLOCK_L).to(integer) + value // BLOCK_P
    position = (index % pieces * BLOCK_P).to(integer) + value % BLOCK_P
    return line, position, (line < L) & (position < P)


@triton.jit
def locate_tile(
    index,
    unit,
    channels,
    sizes,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
):
    """Locate tile number ``index`` of a unit; offsets have 64 bits if INT64."""
    units, C, L, P = sizes
    integer: tl.constexpr = tl.int64 if INT64 else tl.int32
    line, position, inside = locate_values(index, sizes, BLOCK_L, BLOCK_P, INT64)
    mask = (channels < C)[:, None] & inside[None, :]
    if CHANNELS_LAST:
        offsets = ((line * STEP * P + position) * C)[None, :] + channels.to(integer)[:, None]
    else:
        offsets = (line * STEP * P * C + position)[None, :] + (channels.to(integer) * P)[:, None]
    unit_size = tl.full((), 1, tl.int64) * C * L * P
    stride = units * unit_size if STEP == 1 else tl.full((), 1, tl.int64) * C * P
    return Tile(unit * STEP * unit_size, stride, offsets, mask)


@triton.jit
def load_tile(tensor, m, tile, dtype: tl.constexpr):
    """Load the values of modality m as ``dtype``, with 0 where the mask is not set."""
    pointers = tensor + (tile.base + m * tile.stride) + tile.offsets
    return tl.load(pointers, mask=tile.mask, other=0.0).to(dtype)


@triton.jit
def store_tile(tensor, m, tile, values):
    """Store the values of modality m."""
    pointers = tensor + (tile.base + m * tile.stride) + tile.offsets
    tl.store(pointers, values.to(tensor.dtype.element_ty), mask=tile.mask)


@triton.jit
def load_rows(table, unit, units, channels, C, M: tl.constexpr):
    """Load the channels of a unit from a table ``[M * units, C]``, for every modality."""
    rows = ()
    for m in tl.static_range(M):
        at = (m * units + unit) * C + channels
        rows = rows + (tl.load(table + at, mask=channels < C, other=0.0),)
    return rows


@triton.jit
def load_routes(
    weights,
    route,  # [M, C], or None
    channels,
    C,
    M: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    OWN_REGION: tl.constexpr,
    SIGNED: tl.constexpr,
    SHARED: tl.constexpr,  # whether statistics are of several channels
):
    """What each channel becomes, as in a route; masks of those that no result depends on, and of those that
    y depends on by shared statistics alone or not at all."""
    if RULE == "route":
        routes = load_rows(route, 0, 1, channels, C, M)
    else:
        routes = ()
        for m in tl.static_range(M):
            threshold = tl.full((), THRESHOLD, weights[m].dtype)
            below = (weights[m] <= threshold) if SIGNED else (tl.abs(weights[m]) < threshold)
            below = below & (RULE == "threshold")
            if OWN_REGION:
                below = below & (channels >= m * C // M) & (channels < (m + 1) * C // M)
            routes = routes + (tl.where(below, MEAN, OWN),)
    unread, unlent = (), ()
    for m in tl.static_range(M):
        lent = tl.zeros_like(channels) > 0
        for k in tl.static_range(M):
            if k != m:
                lent = lent | lends(routes[k], k, m, M, RULE)
        unlent = unlent + (is_replaced(routes[m]) & (lent == 0),)
        unread = unread + (unlent[m] & (SHARED == 0),)
    return routes, unread, unlent


@triton.jit
def is_replaced(route):
    return route > OWN


@triton.jit
def is_mean(route, m, M: tl.constexpr, RULE: tl.constexpr):
    """Whether the mean of the others replaces channels of modality m, which are replaced.

    A route that names no other modality counts as the mean; of two modalities the other is the mean.
    """
    if RULE == "route" and M > 2:
        return (route == MEAN) | (route == m) | (route >= M)
    return is_replaced(route)


@triton.jit
def lends(route, m, other, M: tl.constexpr, RULE: tl.constexpr):
    """Whether modality ``other`` is among those that replace channels of modality m."""
    return is_mean(route, m, M, RULE) | (route == other)


@triton.jit
def zero_where(unread, tables, M: tl.constexpr):
    """Zero the unread channels, whose results must be finite for any x and statistics."""
    kept = ()
    for m in tl.static_range(M):
        kept = kept + (tl.where(unread[m], 0.0, tables[m]),)
    return kept


@triton.jit
def inverse_std(var, EPS: tl.constexpr):
    shifted = var + tl.full((), EPS, var.dtype)
    if var.dtype == tl.float64:
        inverse = 1.0 / tl.sqrt(shifted)
    else:
        inverse = tl.div_rn(tl.full(shifted.shape, 1.0, tl.float32), tl.sqrt_rn(shifted))
    return inverse


@triton.jit
def load_centered(x, m, tile, mean, unread, CHANNELS_LAST: tl.constexpr, AXIS: tl.constexpr):
    """Load x - mean of modality m, with 0 in unread channels; the mean is over AXIS of a tile."""
    means = tl.expand_dims(mean, AXIS)
    if CHANNELS_LAST:  # Masking single channels would save no memory traffic and split vector loads.
        return tl.where(unread[:, None], 0.0, load_tile(x, m, tile, mean.dtype) - means)
    read = Tile(tile.base, tile.stride, tile.offsets, tile.mask & (unread == 0)[:, None])
    return load_tile(x, m, read, mean.dtype) - means


@triton.jit
def join_groups(sums, GROUP: tl.constexpr):
    """Sums over the channels of each group, in all places of ``program_coords``."""
    if GROUP == 1:
        return sums
    PLACES: tl.constexpr = triton.next_power_of_2(GROUP)
    grouped = tl.reshape(sums, (sums.shape[0] // PLACES, PLACES))
    joint = tl.expand_dims(tl.sum(grouped, axis=1), 1)
    return tl.reshape(tl.broadcast_to(joint, grouped.shape), sums.shape)


@triton.jit
def exchange(zs, routes, M: tl.constexpr, RULE: tl.constexpr):
    """Replace z in replaced channels: by the mean of the other modalities' z, or by one of them."""
    if RULE == "none":
        return zs
    us = ()
    for m in tl.static_range(M):
        others = tl.zeros_like(zs[m])
        for k in tl.static_range(M):
            if k != m:
                others += zs[k]
        if M > 2:
            others = others / (M - 1)
            if RULE == "route":
                mean = is_mean(routes[m], m, M, RULE)
                for k in tl.static_range(M):
                    if k != m:
                        others = tl.where(((routes[m] == k) & (mean == 0))[:, None], zs[k], others)
        us = us + (tl.where(is_replaced(routes[m])[:, None], others, zs[m]),)
    return us


@triton.jit
def exchange_back(gs, routes, M: tl.constexpr, RULE: tl.constexpr):
    """Gradients of z from those of u: its own unless replaced, plus its share of its borrowers'."""
    if RULE == "none":
        return gs
    dzs = ()
    for m in tl.static_range(M):
        borrowed = tl.zeros_like(gs[m])
        for k in tl.static_range(M):
            if k != m:
                borrowed += tl.where(is_mean(routes[k], k, M, RULE)[:, None], gs[k], 0.0)
        if M > 2:
            borrowed = borrowed / (M - 1)
            if RULE == "route":
                for k in tl.static_range(M):
                    if k != m:
                        alone = (routes[k] == m) & (is_mean(routes[k], k, M, RULE) == 0)
                        borrowed += tl.where(alone[:, None], gs[k], 0.0)
        dzs = dzs + (tl.where(is_replaced(routes[m])[:, None], 0.0, gs[m]) + borrowed,)
    return dzs
