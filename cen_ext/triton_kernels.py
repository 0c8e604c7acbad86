"""The operator's Triton kernels: ``cen_ext/reference.py``, a tile of all modalities at a time.

x is cut into units, ``M * units`` of them, each with statistics of its own: one a modality with batch norm
(or given statistics), one a row with instance norm. A unit's channel is ``L`` lines of ``P`` positions:
N lines of the spatial size where x is contiguous, one line of all rows where it is channels_last. A tile is
``CHANNELS`` channels by ``LINES * POSITIONS`` values, at the same place in every modality, so that partners
are at hand; sums run along its second axis. Tables (weight, statistics, sums) are ``[M, C]`` or
``[M * units, C]`` and are computed with in their own type, float32 or float64.

``SLOPE`` is the activation: 1 is the identity, 0 relu, else leaky_relu's slope. A ``THRESHOLD`` of 0 leaves
the exchange out. Numbers such as these are compile-time constants because arguments are float32 at best.
"""

# Triton knows tuples' sum, not their unpacking.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

# Squares of numbers times this neither overflow nor vanish, where the sum of those without it did.
_SHRINK = tl.constexpr(2.0**-80)
_UNSHRINK = tl.constexpr(2.0**160)
_INFINITY = tl.constexpr(float("inf"))


# --- where a program and a tile lie ---


@triton.jit
def _share(program, C, chunks, CHANNELS: tl.constexpr):
    """The unit, the chunk of its tiles and the channels ``[CHANNELS]`` that are this program's."""
    blocks = tl.cdiv(C, CHANNELS)
    unit = (program // (blocks * chunks)).to(tl.int64)
    channels = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return unit, program // blocks % chunks, channels


@triton.jit
def _place(
    tile,
    channels,
    C,
    L,
    P,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Offsets of a tile's values in its unit ``[CHANNELS, LINES * POSITIONS]``, and which of them exist."""
    pieces = tl.cdiv(P, POSITIONS)
    place = tl.arange(0, LINES * POSITIONS)
    line = (tile // pieces * LINES).to(INDEX) + place // POSITIONS
    position = (tile % pieces * POSITIONS).to(INDEX) + place % POSITIONS
    exists = (channels < C)[:, None] & ((line < L) & (position < P))[None, :]
    along, across = line * P * C, channels.to(INDEX)
    if CHANNELS_LAST:
        return (along + position * C)[None, :] + across[:, None], exists
    return (along + position)[None, :] + (across * P)[:, None], exists


@triton.jit
def _count(tile, L, P, LINES: tl.constexpr, POSITIONS: tl.constexpr):
    """How many values of a channel a tile holds."""
    pieces = tl.cdiv(P, POSITIONS)
    lines = tl.minimum(LINES, L - tile // pieces * LINES)
    return tl.maximum(lines, 0) * tl.minimum(POSITIONS, P - tile % pieces * POSITIONS)


@triton.jit
def _load(tensor, offsets, exists, type: tl.constexpr):
    return tl.load(tensor + offsets, mask=exists, other=0.0).to(type)


# --- the definition ---


@triton.jit
def _replaced(
    weight,
    channels,
    C,
    M: tl.constexpr,
    THRESHOLD: tl.constexpr,
    OWN: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Which channels are replaced (Eq. 6), and which of these nobody borrows: a mask a modality."""
    replaced = ()
    borrowers = tl.zeros_like(channels)
    for m in tl.static_range(M):
        scale = tl.load(weight + m * C + channels, mask=channels < C, other=0.0)
        threshold = tl.full((), THRESHOLD, scale.dtype)
        below = (scale <= threshold) if SIGNED else (tl.abs(scale) < threshold)
        if OWN:
            below = below & (channels >= m * C // M) & (channels < (m + 1) * C // M)
        below = below & (THRESHOLD > 0.0)
        borrowers += below.to(tl.int32)
        replaced = replaced + (below,)
    unread = ()
    for m in tl.static_range(M):
        unread = unread + (replaced[m] & (borrowers == 1),)
    return replaced, unread


@triton.jit
def _normalisation(
    weight, bias, mean, var, unread, unit, units, channels, C, M: tl.constexpr, EPS: tl.constexpr
):
    """Mean, 1 / standard deviation, weight and bias, ``[CHANNELS]`` a modality; 0 where x is not read."""
    means, invstds, weights, biases = (), (), (), ()
    for m in tl.static_range(M):
        read = (channels < C) & (unread[m] == 0)
        row = (m * units + unit) * C + channels
        means = means + (tl.load(mean + row, mask=read, other=0.0),)
        invstd = _invstd(tl.load(var + row, mask=read, other=0.0), EPS)
        invstds = invstds + (tl.where(read, invstd, 0.0),)
        weights = weights + (tl.load(weight + m * C + channels, mask=read, other=0.0),)
        biases = biases + (tl.load(bias + m * C + channels, mask=read, other=0.0),)
    return means, invstds, weights, biases


@triton.jit
def _invstd(var, EPS: tl.constexpr):
    shifted = var + tl.full((), EPS, var.dtype)
    if var.dtype == tl.float64:
        return 1.0 / tl.sqrt(shifted)
    return tl.div_rn(tl.full(shifted.shape, 1.0, tl.float32), tl.sqrt_rn(shifted))


@triton.jit
def _exchange(zs, replaced, M: tl.constexpr, THRESHOLD: tl.constexpr):
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
def _finish(
    zs,
    replaced,
    residual,
    y,
    unit,
    units,
    unit_size,
    offsets,
    exists,
    M: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Exchanges, adds the residual, activates and stores a tile of all modalities."""
    us = _exchange(zs, replaced, M, THRESHOLD)
    for m in tl.static_range(M):
        u = us[m]
        at = (m * units + unit) * unit_size
        if residual is not None:
            u += _load(residual + at, offsets, exists, u.dtype)
        if SLOPE == 0.0:  # not a product, which would make NaN of -inf
            u = tl.where(u < 0.0, 0.0, u)
        elif SLOPE != 1.0:
            u = tl.where(u < 0.0, u * tl.full((), SLOPE, u.dtype), u)
        tl.store(y + at + offsets, u.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _gradients(
    dy,
    xhats,
    weights,
    biases,
    replaced,
    residual,
    dresidual,
    unit,
    units,
    unit_size,
    offsets,
    exists,
    M: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """dz of all modalities in a tile; stores the gradient of the residual where that is wanted."""
    gs = ()
    if SLOPE != 1.0:
        zs = ()
        for m in tl.static_range(M):
            zs = zs + (xhats[m] * weights[m][:, None] + biases[m][:, None],)
        us = _exchange(zs, replaced, M, THRESHOLD)
    for m in tl.static_range(M):
        at = (m * units + unit) * unit_size
        g = _load(dy + at, offsets, exists, weights[m].dtype)
        if SLOPE != 1.0:
            u = us[m]
            if residual is not None:
                u += _load(residual + at, offsets, exists, u.dtype)
            if SLOPE == 0.0:
                g = tl.where(u > 0.0, g, 0.0)
            else:
                g = tl.where(u > 0.0, g, g * tl.full((), SLOPE, g.dtype))
        if dresidual is not None:
            tl.store(dresidual + at + offsets, g.to(dresidual.dtype.element_ty), mask=exists)
        gs = gs + (g,)
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


@triton.jit
def _xhats(x, means, invstds, unread, unit, units, unit_size, offsets, exists, M: tl.constexpr):
    """xhat of all modalities in a tile, 0 where x is not read."""
    xhats = ()
    for m in tl.static_range(M):
        read = exists & (unread[m] == 0)[:, None]
        d = _load(x + (m * units + unit) * unit_size, offsets, read, means[m].dtype) - means[m][:, None]
        xhats = xhats + (tl.where(exists, d * invstds[m][:, None], 0.0),)
    return xhats


@triton.jit
def _store_dx(dx, dz, xhat, scale, dweight, dbias, L, P, exists):
    """dx with the statistics of x: what flows through them is taken out. scale is weight * invstd."""
    count = tl.full((), 1.0, scale.dtype) * L * P
    inner = dz - (dbias / count)[:, None] - xhat * (dweight / count)[:, None]
    tl.store(dx, (scale[:, None] * inner).to(dx.dtype.element_ty), mask=exists)


# --- statistics ---


@triton.jit
def _shifted_sums(
    x,
    shift,
    first,
    channels,
    C,
    L,
    P,
    SCALE: tl.constexpr,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Sums of ``d = (x - shift) * SCALE`` and of its squares over a chunk of tiles, ``[CHANNELS]`` each."""
    total = tl.zeros([channels.shape[0], LINES * POSITIONS], shift.dtype)
    squares = tl.zeros([channels.shape[0], LINES * POSITIONS], shift.dtype)
    for i in range(TILES):
        offsets, exists = _place(first + i, channels, C, L, P, LINES, POSITIONS, CHANNELS_LAST, INDEX)
        d = tl.where(exists, _load(x, offsets, exists, shift.dtype) - shift[:, None], 0.0) * SCALE
        total += d
        squares += d * d
    return tl.sum(total, axis=1), tl.sum(squares, axis=1)


@triton.jit
def statistics_kernel(
    x,
    partials,  # [3, chunks, M * units, C] float64: mean, centred sum of squares, count
    C,
    L,
    P,
    chunks,
    rows,  # M * units
    CHANNELS: tl.constexpr,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Moments of every chunk of tiles, summed about the mean of its first tile as shift.

    By Cauchy-Schwarz ``n (shift - mean)^2 <= TILES sum (x - mean)^2``, whatever the values: no more than
    log2(TILES) bits are lost when the shift is taken out.
    """
    row, chunk, channels = _share(tl.program_id(0), C, chunks, CHANNELS)
    real: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    x += row * L * P * C
    first = chunk * TILES
    offsets, exists = _place(first, channels, C, L, P, LINES, POSITIONS, CHANNELS_LAST, INDEX)
    sample = (1.0 / _count(first, L, P, LINES, POSITIONS)).to(real)
    shift = tl.sum(_load(x, offsets, exists, real) * sample, axis=1)

    total, squares = _shifted_sums(
        x, shift, first, channels, C, L, P, 1.0, LINES, POSITIONS, TILES, CHANNELS_LAST, INDEX
    )
    total, wide = total.to(tl.float64), squares.to(tl.float64)
    overflow = squares == _INFINITY
    if tl.max(overflow.to(tl.int32), axis=0) > 0:
        _, small = _shifted_sums(
            x, shift, first, channels, C, L, P, _SHRINK, LINES, POSITIONS, TILES, CHANNELS_LAST, INDEX
        )
        wide = tl.where(overflow, small.to(tl.float64) * tl.full((), _UNSHRINK, tl.float64), wide)

    count = tl.zeros([CHANNELS], tl.float64)
    for i in range(TILES):
        count += _count(first + i, L, P, LINES, POSITIONS)
    centred = wide - total * total / count
    at = partials + (chunk * rows + row) * C + channels
    plane = (chunks * rows).to(tl.int64) * C
    tl.store(at, shift.to(tl.float64) + total / count, mask=channels < C)
    tl.store(at + plane, tl.where(centred < 0.0, 0.0, centred), mask=channels < C)
    tl.store(at + 2 * plane, count, mask=channels < C)


@triton.jit
def join_kernel(
    partials,  # as statistics_kernel leaves them
    mean,  # [M * units, C]
    var,
    C,
    chunks,
    rows,
    CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Mean and biased variance from the moments of the chunks (Chan, Golub and LeVeque 1983)."""
    row, _, channels = _share(tl.program_id(0), C, 1, CHANNELS)
    chunk = tl.arange(0, CHUNKS)
    exists = (channels < C)[:, None] & (chunk < chunks)[None, :]
    at = partials + (chunk * rows + row)[None, :] * C + channels[:, None]
    plane = (chunks * rows).to(tl.int64) * C
    means = tl.load(at, mask=exists, other=0.0)
    squares = tl.load(at + plane, mask=exists, other=0.0)
    counts = tl.load(at + 2 * plane, mask=exists, other=0.0)

    count = tl.sum(counts, axis=1)
    origin = tl.sum(tl.where(chunk[None, :] == 0, means, 0.0), axis=1)
    joint = origin + tl.sum(counts * (means - origin[:, None]), axis=1) / count
    apart = means - joint[:, None]
    centred = tl.sum(squares + counts * apart * apart, axis=1)
    at_row = row * C + channels
    tl.store(mean + at_row, joint.to(mean.dtype.element_ty), mask=channels < C)
    tl.store(var + at_row, (centred / count).to(var.dtype.element_ty), mask=channels < C)


@triton.jit
def _centre(x, exists, count):
    """Mean ``[CHANNELS]``, biased variance and ``x - mean`` of whole channels.

    The mean is found in two steps: the second finds what rounding cost the first. Of equal values it is
    just that value.
    """
    rough = tl.sum(x * (1.0 / count).to(x.dtype), axis=1)
    rest = tl.sum(tl.where(exists, x - rough[:, None], 0.0), axis=1)
    mean = (rough.to(tl.float64) + rest.to(tl.float64) / count).to(x.dtype)
    d = tl.where(exists, x - mean[:, None], 0.0)

    squares = tl.sum(d * d, axis=1)
    wide = squares.to(tl.float64)
    overflow = squares == _INFINITY
    if tl.max(overflow.to(tl.int32), axis=0) > 0:
        small = d * _SHRINK
        unshrunk = tl.sum(small * small, axis=1).to(tl.float64) * tl.full((), _UNSHRINK, tl.float64)
        wide = tl.where(overflow, unshrunk, wide)
    return mean, (wide / count).to(x.dtype), d


# --- forward ---


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    mean,  # [M * units, C], given or those of x
    var,
    residual,  # None, or as x
    y,
    C,
    L,
    P,
    units,
    chunks,
    M: tl.constexpr,
    THRESHOLD: tl.constexpr,
    OWN: tl.constexpr,
    SIGNED: tl.constexpr,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
):
    """y from the statistics."""
    # Last programs first: what the statistics' pass read last is still in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    unit, chunk, channels = _share(program, C, chunks, CHANNELS)
    replaced, unread = _replaced(weight, channels, C, M, THRESHOLD, OWN, SIGNED)
    means, invstds, weights, biases = _normalisation(
        weight, bias, mean, var, unread, unit, units, channels, C, M, EPS
    )
    unit_size = tl.full((), 1, tl.int64) * L * P * C
    for i in range(TILES):
        offsets, exists = _place(chunk * TILES + i, channels, C, L, P, LINES, POSITIONS, CHANNELS_LAST, INDEX)
        zs = ()
        for m in tl.static_range(M):
            read = exists & (unread[m] == 0)[:, None]
            d = _load(x + (m * units + unit) * unit_size, offsets, read, means[m].dtype) - means[m][:, None]
            zs = zs + (d * (invstds[m] * weights[m])[:, None] + biases[m][:, None],)
        _finish(zs, replaced, residual, y, unit, units, unit_size, offsets, exists, M, THRESHOLD, SLOPE)


@triton.jit
def forward_whole_kernel(
    x,
    weight,
    bias,
    residual,
    y,
    mean,  # [M * units, C], results
    var,
    C,
    L,
    P,
    units,
    M: tl.constexpr,
    THRESHOLD: tl.constexpr,
    OWN: tl.constexpr,
    SIGNED: tl.constexpr,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Statistics and y where a tile holds whole channels: x is read once."""
    unit, _, channels = _share(tl.program_id(0), C, 1, CHANNELS)
    replaced, _ = _replaced(weight, channels, C, M, THRESHOLD, OWN, SIGNED)
    unit_size = tl.full((), 1, tl.int64) * L * P * C
    offsets, exists = _place(0, channels, C, L, P, LINES, POSITIONS, CHANNELS_LAST, INDEX)
    zs = ()
    for m in tl.static_range(M):
        row = m * units + unit
        average, variance, d = _centre(
            _load(x + row * unit_size, offsets, exists, weight.dtype.element_ty), exists, L * P
        )
        tl.store(mean + row * C + channels, average, mask=channels < C)
        tl.store(var + row * C + channels, variance, mask=channels < C)
        at = m * C + channels
        scale = _invstd(variance, EPS) * tl.load(weight + at, mask=channels < C, other=0.0)
        zs = zs + (d * scale[:, None] + tl.load(bias + at, mask=channels < C, other=0.0)[:, None],)
    _finish(zs, replaced, residual, y, unit, units, unit_size, offsets, exists, M, THRESHOLD, SLOPE)


# --- backward ---


@triton.jit
def backward_sums_kernel(
    dy,
    x,
    weight,
    bias,
    mean,
    var,
    residual,  # None, or as x
    dx,  # None, or as x: with given statistics it needs no sums
    dweights,  # [chunks, M * units, C]
    dbiases,
    dresidual,  # None, or as x
    C,
    L,
    P,
    units,
    chunks,
    M: tl.constexpr,
    THRESHOLD: tl.constexpr,
    OWN: tl.constexpr,
    SIGNED: tl.constexpr,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The sums of dz * xhat and of dz over every chunk of tiles, the residual's gradient, perhaps dx."""
    unit, chunk, channels = _share(tl.program_id(0), C, chunks, CHANNELS)
    replaced, unread = _replaced(weight, channels, C, M, THRESHOLD, OWN, SIGNED)
    means, invstds, weights, biases = _normalisation(
        weight, bias, mean, var, unread, unit, units, channels, C, M, EPS
    )
    unit_size = tl.full((), 1, tl.int64) * L * P * C
    dweight, dbias = (), ()
    for m in tl.static_range(M):
        dweight = dweight + (tl.zeros([CHANNELS, LINES * POSITIONS], means[m].dtype),)
        dbias = dbias + (tl.zeros([CHANNELS, LINES * POSITIONS], means[m].dtype),)
    for i in range(TILES):
        offsets, exists = _place(chunk * TILES + i, channels, C, L, P, LINES, POSITIONS, CHANNELS_LAST, INDEX)
        xhats = _xhats(x, means, invstds, unread, unit, units, unit_size, offsets, exists, M)
        dzs = _gradients(
            dy,
            xhats,
            weights,
            biases,
            replaced,
            residual,
            dresidual,
            unit,
            units,
            unit_size,
            offsets,
            exists,
            M,
            THRESHOLD,
            SLOPE,
        )
        new_dweight, new_dbias = (), ()
        for m in tl.static_range(M):
            new_dweight = new_dweight + (dweight[m] + dzs[m] * xhats[m],)
            new_dbias = new_dbias + (dbias[m] + dzs[m],)
            if dx is not None:
                scale = weights[m] * invstds[m]
                at = dx + (m * units + unit) * unit_size + offsets
                tl.store(at, (scale[:, None] * dzs[m]).to(dx.dtype.element_ty), mask=exists)
        dweight, dbias = new_dweight, new_dbias
    for m in tl.static_range(M):
        at = (chunk.to(tl.int64) * M * units + m * units + unit) * C + channels
        tl.store(dweights + at, tl.sum(dweight[m], axis=1), mask=channels < C)
        tl.store(dbiases + at, tl.sum(dbias[m], axis=1), mask=channels < C)


@triton.jit
def backward_kernel(
    dy,
    x,
    weight,
    bias,
    mean,
    var,
    residual,
    dweights,  # [M * units, C], the sums
    dbiases,
    dx,
    C,
    L,
    P,
    units,
    chunks,
    M: tl.constexpr,
    THRESHOLD: tl.constexpr,
    OWN: tl.constexpr,
    SIGNED: tl.constexpr,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
):
    """dx through the statistics of x, from the sums."""
    # Last programs first: what the sums' pass read last is still in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    unit, chunk, channels = _share(program, C, chunks, CHANNELS)
    replaced, unread = _replaced(weight, channels, C, M, THRESHOLD, OWN, SIGNED)
    means, invstds, weights, biases = _normalisation(
        weight, bias, mean, var, unread, unit, units, channels, C, M, EPS
    )
    unit_size = tl.full((), 1, tl.int64) * L * P * C
    dweight, dbias = (), ()
    for m in tl.static_range(M):
        row = (m * units + unit) * C + channels
        dweight = dweight + (tl.load(dweights + row, mask=channels < C, other=0.0),)
        dbias = dbias + (tl.load(dbiases + row, mask=channels < C, other=0.0),)
    for i in range(TILES):
        offsets, exists = _place(chunk * TILES + i, channels, C, L, P, LINES, POSITIONS, CHANNELS_LAST, INDEX)
        xhats = _xhats(x, means, invstds, unread, unit, units, unit_size, offsets, exists, M)
        dzs = _gradients(
            dy,
            xhats,
            weights,
            biases,
            replaced,
            residual,
            None,
            unit,
            units,
            unit_size,
            offsets,
            exists,
            M,
            THRESHOLD,
            SLOPE,
        )
        for m in tl.static_range(M):
            at = dx + (m * units + unit) * unit_size + offsets
            _store_dx(at, dzs[m], xhats[m], weights[m] * invstds[m], dweight[m], dbias[m], L, P, exists)


@triton.jit
def backward_whole_kernel(
    dy,
    x,
    weight,
    bias,
    mean,
    var,
    residual,
    dx,
    dweights,  # [M * units, C]
    dbiases,
    dresidual,
    C,
    L,
    P,
    units,
    M: tl.constexpr,
    THRESHOLD: tl.constexpr,
    OWN: tl.constexpr,
    SIGNED: tl.constexpr,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
):
    """All gradients where a tile holds whole channels: x and dy are read once."""
    unit, _, channels = _share(tl.program_id(0), C, 1, CHANNELS)
    replaced, unread = _replaced(weight, channels, C, M, THRESHOLD, OWN, SIGNED)
    means, invstds, weights, biases = _normalisation(
        weight, bias, mean, var, unread, unit, units, channels, C, M, EPS
    )
    unit_size = tl.full((), 1, tl.int64) * L * P * C
    offsets, exists = _place(0, channels, C, L, P, LINES, POSITIONS, CHANNELS_LAST, INDEX)
    xhats = _xhats(x, means, invstds, unread, unit, units, unit_size, offsets, exists, M)
    dzs = _gradients(
        dy,
        xhats,
        weights,
        biases,
        replaced,
        residual,
        dresidual,
        unit,
        units,
        unit_size,
        offsets,
        exists,
        M,
        THRESHOLD,
        SLOPE,
    )
    for m in tl.static_range(M):
        dweight, dbias = tl.sum(dzs[m] * xhats[m], axis=1), tl.sum(dzs[m], axis=1)
        row = (m * units + unit) * C + channels
        tl.store(dweights + row, dweight, mask=channels < C)
        tl.store(dbiases + row, dbias, mask=channels < C)
        at = dx + (m * units + unit) * unit_size + offsets
        _store_dx(at, dzs[m], xhats[m], weights[m] * invstds[m], dweight, dbias, L, P, exists)
