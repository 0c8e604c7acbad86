"""What the Triton kernels share: where a tile lies, and ``reference.py`` on a tile of all modalities.

x is cut into ``M * units`` units, each with statistics of its own: one a modality with batch norm (or given
statistics), one a row with instance norm. A channel of a unit is ``L`` lines of ``P`` positions: where x is
contiguous the unit's rows, each with its spatial positions; where x is channels_last a single line of both.
A tile is ``CHANNELS`` channels by ``LINES * POSITIONS`` values, ``[CHANNELS, values]``, at the same place in
every modality, so that partners are at hand. Tables (parameters, statistics, sums) are ``[M, C]`` or
``[M * units, C]`` and all is computed in their type, float32 or float64. Tuples have an element a modality.

Numbers that define the operator are compile-time constants, since a float argument is a float32. THRESHOLD is
0 where nothing is exchanged. ``activation`` says what ACTIVATION and SLOPE are.
"""

# The language is Triton, not Python: what functions take has no type there, and tuples grow by sums alone.
# mypy: ignore-errors
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

# TRITON_INTERPRET was set when this was imported: kernels run on the CPU, for tests.
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def share_of(program, sizes, chunks, CHANNELS: tl.constexpr):
    """The unit, the chunk of its tiles and the channels ``[CHANNELS]`` of a program."""
    _, C, _, _ = sizes
    blocks = tl.cdiv(C, CHANNELS)
    channels = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return (program // (blocks * chunks)).to(tl.int64), program // blocks % chunks, channels


@triton.jit
def place_of(
    tile,
    unit,
    channels,
    sizes,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile's place: where its unit begins, how far apart modalities are, offsets in the unit, which exist.

    Offsets are 64 bits wide where a unit needs it; the rest always is.
    """
    units, C, L, P = sizes
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    pieces = tl.cdiv(P, POSITIONS)
    value = tl.arange(0, LINES * POSITIONS)
    line = (tile // pieces * LINES).to(index) + value // POSITIONS
    position = (tile % pieces * POSITIONS).to(index) + value % POSITIONS
    exists = (channels < C)[:, None] & ((line < L) & (position < P))[None, :]
    if CHANNELS_LAST:
        offsets = ((line * P + position) * C)[None, :] + channels.to(index)[:, None]
    else:
        offsets = (line * P * C + position)[None, :] + (channels.to(index) * P)[:, None]
    unit_size = tl.full((), 1, tl.int64) * C * L * P
    return unit * unit_size, units * unit_size, offsets, exists


@triton.jit
def load_tile(tensor, m, place, real: tl.constexpr):
    """The values of modality m, as type ``real``, and 0 outside."""
    first, stride, offsets, exists = place
    return tl.load(tensor + (first + m * stride) + offsets, mask=exists, other=0.0).to(real)


@triton.jit
def store_tile(tensor, m, place, values):
    first, stride, offsets, exists = place
    tl.store(tensor + (first + m * stride) + offsets, values.to(tensor.dtype.element_ty), mask=exists)


@triton.jit
def load_rows(table, unit, units, channels, C, M: tl.constexpr):
    """The channels of a unit's rows of a table ``[M * units, C]``."""
    rows = ()
    for m in tl.static_range(M):
        at = (m * units + unit) * C + channels
        rows = rows + (tl.load(table + at, mask=channels < C, other=0.0),)
    return rows


@triton.jit
def replaced_channels(
    weights, channels, C, M: tl.constexpr, THRESHOLD: tl.constexpr, OWN: tl.constexpr, SIGNED: tl.constexpr
):
    """Which channels are replaced (Eq. 6), and which of these nobody borrows: no part of y."""
    replaced = ()
    count = tl.zeros_like(channels)
    for m in tl.static_range(M):
        threshold = tl.full((), THRESHOLD, weights[m].dtype)
        below = (weights[m] <= threshold) if SIGNED else (tl.abs(weights[m]) < threshold)
        below = below & (THRESHOLD > 0.0)
        if OWN:
            below = below & (channels >= m * C // M) & (channels < (m + 1) * C // M)
        count += below.to(tl.int32)
        replaced = replaced + (below,)
    unread = ()
    for m in tl.static_range(M):
        unread = unread + (replaced[m] & (count == 1),)
    return replaced, unread


@triton.jit
def zero_where(unread, tables, M: tl.constexpr):
    """What is computed from an unread channel must stay finite, whatever its x and its statistics are."""
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
def centred(x, m, place, mean, unread, CHANNELS_LAST: tl.constexpr):
    """x - mean of modality m, 0 where it is unread."""
    if CHANNELS_LAST:  # Nothing is spared by not reading single channels, and vectors would fall apart.
        return tl.where(unread[:, None], 0.0, load_tile(x, m, place, mean.dtype) - mean[:, None])
    first, stride, offsets, exists = place
    read = exists & (unread == 0)[:, None]
    return load_tile(x, m, (first, stride, offsets, read), mean.dtype) - mean[:, None]


@triton.jit
def exchange(zs, replaced, M: tl.constexpr, THRESHOLD: tl.constexpr):
    """u: the mean of the other modalities' z where a channel is replaced, else its own."""
    if THRESHOLD == 0.0:
        return zs
    us = ()
    for m in tl.static_range(M):
        others = tl.zeros_like(zs[m])
        for k in tl.static_range(M):
            if k != m:
                others += zs[k]
        if M > 2:
            others = others / (M - 1)
        us = us + (tl.where(replaced[m][:, None], others, zs[m]),)
    return us


@triton.jit
def exchange_back(gs, replaced, M: tl.constexpr, THRESHOLD: tl.constexpr):
    """dz from the gradients of u: its own where not replaced, and its share of its borrowers'."""
    if THRESHOLD == 0.0:
        return gs
    dzs = ()
    for m in tl.static_range(M):
        borrowed = tl.zeros_like(gs[m])
        for k in tl.static_range(M):
            if k != m:
                borrowed += tl.where(replaced[k][:, None], gs[k], 0.0)
        if M > 2:
            borrowed = borrowed / (M - 1)
        dzs = dzs + (tl.where(replaced[m][:, None], 0.0, gs[m]) + borrowed,)
    return dzs
