"""Max pooling in Triton: the ops ``triton_max_pool_same`` and ``triton_max_pool_same_backward``.

Both memory layouts are one case, as in ``csrc/cpu/max_pool_same.h``: ``images`` images of H rows of L values,
in which neighboring pixels are ``step`` values apart. A program computes ROWS rows of VALUES values each,
which may belong to several small images. The forward pass keeps the horizontal maxima of the last SIZE rows
in registers. The backward pass loads each gradient once per column of a window and adds it to the row of the
maximum. Sums are in float32 or float64 and in a fixed order, so results are bitwise reproducible.
"""

# The language is Triton, not Python.
# mypy: ignore-errors
# ruff: noqa: RUF005

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cen_ext.ops import flops
from cen_ext.ops.max_pool_same.autograd import gradient, refuse_second_gradient, setup_context
from cen_ext.ops.norm_exchange.reference import memory_format
from cen_ext.ops.triton import define_op, device_of, wrap_kernel

# Not yet measured on a GPU: four values per thread, and a third of the rows are loaded twice.
ROWS = 8
VALUES = 512
WARPS = 4


@triton.jit
def program_coords(program, images, L, VALUES: tl.constexpr):
    """Image, offset within a row and in-bounds mask of a program's values, ``[VALUES]`` each."""
    index = program.to(tl.int64) * VALUES + tl.arange(0, VALUES)
    return index // L, (index % L).to(tl.int32), index < images * L


@triton.jit
def is_better(value, best):
    return (value > best) | (value != value)


@triton.jit
def max_pool_kernel(
    x,
    y,
    winners,
    images,
    H,
    L,
    step,
    blocks,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    RADIUS: tl.constexpr = SIZE // 2
    real: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    image, offset, mask = program_coords(tl.program_id(0) % blocks, images, L, VALUES)
    # A vector, because Triton's interpreter cannot broadcast conditions.
    first_row = tl.program_id(0) // blocks * ROWS + tl.zeros([VALUES], tl.int32)
    base = image * H * L + offset
    first_column = tl.maximum(RADIUS - offset // step, 0)
    maxima, columns = (), ()
    for i in tl.static_range(ROWS + 2 * RADIUS):
        row = first_row + i - RADIUS
        best = tl.full([VALUES], float("-inf"), real)
        column = first_column
        for k in tl.static_range(SIZE):
            at = offset + (k - RADIUS) * step
            read = mask & (at >= 0) & (at < L) & (row >= 0) & (row < H)
            value = tl.load(
                x + base + row.to(tl.int64) * L + (k - RADIUS) * step, mask=read, other=float("-inf")
            )
            value = value.to(real)
            better = is_better(value, best)
            best = tl.where(better, value, best)
            column = tl.where(better, k, column)
        maxima, columns = maxima + (best,), columns + (column,)
        if i >= 2 * RADIUS:
            row = row - RADIUS  # the row whose window is complete
            best = maxima[i - 2 * RADIUS]
            winner = columns[i - 2 * RADIUS]
            for k in tl.static_range(1, SIZE):
                # In a window of -inf alone the first pixel inside the image wins, not the padding.
                better = is_better(maxima[i - 2 * RADIUS + k], best) | (k == RADIUS - row)
                best = tl.where(better, maxima[i - 2 * RADIUS + k], best)
                winner = tl.where(better, columns[i - 2 * RADIUS + k] + 16 * k, winner)
            to = base + row.to(tl.int64) * L
            tl.store(y + to, best.to(y.dtype.element_ty), mask=mask & (row < H))
            tl.store(winners + to, winner.to(tl.uint8), mask=mask & (row < H))


@triton.jit
def max_pool_backward_kernel(
    dy,
    winners,
    dx,
    images,
    H,
    L,
    step,
    blocks,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    RADIUS: tl.constexpr = SIZE // 2
    real: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    image, offset, mask = program_coords(tl.program_id(0) % blocks, images, L, VALUES)
    # A vector, because Triton's interpreter cannot broadcast conditions.
    first_row = tl.program_id(0) // blocks * ROWS + tl.zeros([VALUES], tl.int32)
    base = image * H * L + offset
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([VALUES], real),)
    for i in tl.static_range(ROWS + 2 * RADIUS):
        row = first_row + i - RADIUS
        for k in tl.static_range(SIZE):
            # This pixel is column k of the windows centered RADIUS - k pixels further on.
            at = offset + (RADIUS - k) * step
            read = mask & (at >= 0) & (at < L) & (row >= 0) & (row < H)
            of = base + row.to(tl.int64) * L + (RADIUS - k) * step
            winner = tl.load(winners + of, mask=read, other=255).to(tl.int32)
            won = (winner & 15) == k
            gradient = tl.load(dy + of, mask=read & won, other=0.0).to(real)
            added = ()
            for j in tl.static_range(ROWS):
                # Row j of the program is row j - i + 2 * RADIUS of that window.
                if (j - i + 2 * RADIUS >= 0) and (j - i + 2 * RADIUS < SIZE):
                    mine = (winner >> 4) == j - i + 2 * RADIUS
                    added = added + (sums[j] + tl.where(mine, gradient, 0.0),)
                else:
                    added = added + (sums[j],)
            sums = added
    for j in tl.static_range(ROWS):
        to = base + (first_row + j).to(tl.int64) * L
        tl.store(dx + to, sums[j].to(dx.dtype.element_ty), mask=mask & (first_row + j < H))


@dataclass(frozen=True)
class Geometry:
    """Images, rows, row length and pixel stride of a tensor in memory, and the programs of a launch."""

    images: int
    rows: int
    length: int
    step: int

    @staticmethod
    def of(x: Tensor) -> Geometry:
        samples, channels, height, width = x.shape
        if memory_format(x) != torch.contiguous_format:
            return Geometry(samples, height, width * channels, channels)
        return Geometry(samples * channels, height, width, 1)

    @property
    def blocks(self) -> int:
        return -(-self.images * self.length // VALUES)

    @property
    def programs(self) -> int:
        return self.blocks * -(-self.rows // ROWS)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """``images, H, L, step, blocks``, the kernels' arguments."""
        return self.images, self.rows, self.length, self.step, self.blocks


def _constants(size: int) -> dict[str, int]:
    return dict(SIZE=size, ROWS=ROWS, VALUES=VALUES, num_warps=WARPS)


def _forward(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    y, winners = _fake_forward(x, size)
    if x.numel() > 0:
        x = x.contiguous(memory_format=memory_format(x))
        g = Geometry.of(x)
        with device_of(x):
            wrap_kernel(max_pool_kernel)[(g.programs,)](x, y, winners, *g.sizes, **_constants(size))
    return y, winners


def _backward(dy: Tensor, winners: Tensor, size: int) -> Tensor:
    layout = memory_format(winners)
    dx = _fake_backward(dy, winners, size)
    if dy.numel() > 0:
        dy, winners = dy.contiguous(memory_format=layout), winners.contiguous(memory_format=layout)
        g = Geometry.of(winners)
        with device_of(dy):
            wrap_kernel(max_pool_backward_kernel)[(g.programs,)](
                dy, winners, dx, *g.sizes, **_constants(size)
            )
    return dx


def _fake_forward(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    layout = memory_format(x)
    return torch.empty_like(x, memory_format=layout), torch.empty_like(
        x, memory_format=layout, dtype=torch.uint8
    )


def _fake_backward(dy: Tensor, winners: Tensor, size: int) -> Tensor:
    return torch.empty_like(winners, memory_format=memory_format(winners), dtype=dy.dtype)


max_pool_same: Any = define_op("cen_ext::triton_max_pool_same", _forward, mutates_args=())
max_pool_same_backward: Any = define_op("cen_ext::triton_max_pool_same_backward", _backward, mutates_args=())
max_pool_same.register_fake(_fake_forward)
max_pool_same.register_autograd(gradient(max_pool_same_backward), setup_context=setup_context)
max_pool_same_backward.register_fake(_fake_backward)
max_pool_same_backward.register_autograd(refuse_second_gradient)
flops.register("triton_max_pool_same", "triton_max_pool_same_backward")
