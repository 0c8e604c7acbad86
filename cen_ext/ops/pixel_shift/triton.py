"""The pixel shift in Triton: the op ``triton_pixel_shift``. A program adds VALUES values of one image."""

# The language is Triton, not Python.
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cen_ext.ops import flops
from cen_ext.ops.norm_exchange.reference import memory_format
from cen_ext.ops.pixel_shift.autograd import gradient, setup_context
from cen_ext.ops.triton import define_op, device_of, wrap_kernel

VALUES = 1024  # not yet measured on a GPU: eight values per thread
WARPS = 4


@triton.jit
def pixel_shift_kernel(
    x,
    base,  # as x, or None
    y,
    images,
    ahead,  # images from one to that whose channels are added to it
    C,
    H,
    W,
    group,
    ADJOINT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VALUES: tl.constexpr,
):
    blocks = tl.cdiv(C * H * W, VALUES)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * VALUES + tl.arange(0, VALUES)
    mask = at < C * H * W
    if CHANNELS_LAST:
        channel, pixel, step = at % C, at // C, C
    else:
        channel, pixel, step = at // (H * W), at % (H * W), 1
    row, column = pixel // W, pixel % W
    down, right = channel < group, (channel >= group) & (channel < 2 * group)
    left, up = (channel >= 2 * group) & (channel < 3 * group), (channel >= 3 * group) & (channel < 4 * group)
    rows = up.to(tl.int32) - down.to(tl.int32)
    columns = left.to(tl.int32) - right.to(tl.int32)
    if ADJOINT:
        rows, columns = -rows, -columns
    inside = (row + rows >= 0) & (row + rows < H) & (column + columns >= 0) & (column + columns < W)
    real: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    source = (image + ahead) % images * C * H * W
    read = mask & inside & (channel < 4 * group)
    total = tl.load(x + source + at + (rows * W + columns) * step, mask=read, other=0.0).to(real)
    if base is not None:
        total += tl.load(base + image * C * H * W + at, mask=mask, other=0.0).to(real)
    tl.store(y + image * C * H * W + at, total.to(y.dtype.element_ty), mask=mask)


def _pixel_shift(x: Tensor, base: Tensor | None, num_modalities: int, group: int, adjoint: bool) -> Tensor:
    layout = memory_format(x)
    y = torch.empty_like(x, memory_format=layout)
    if x.numel() == 0:
        return y
    x = x.contiguous(memory_format=layout)
    base = None if base is None else base.contiguous(memory_format=layout)
    images, channels, height, width = x.shape
    samples = images // num_modalities
    size = channels * height * width
    if size >= 2**31:
        raise ValueError(f"an image must have fewer than 2^31 values, got {size}")
    with device_of(x):
        wrap_kernel(pixel_shift_kernel)[(images * -(-size // VALUES),)](
            x, base, y, images, images - samples if adjoint else samples, channels, height, width, group,
            ADJOINT=adjoint, CHANNELS_LAST=layout != torch.contiguous_format, VALUES=VALUES, num_warps=WARPS,
        )  # fmt: skip
    return y


def _fake(x: Tensor, base: Tensor | None, num_modalities: int, group: int, adjoint: bool) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


pixel_shift: Any = define_op("cen_ext::triton_pixel_shift", _pixel_shift, mutates_args=())
pixel_shift.register_fake(_fake)
pixel_shift.register_autograd(gradient(pixel_shift), setup_context=setup_context)
flops.register("triton_pixel_shift")
