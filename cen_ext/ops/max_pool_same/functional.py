"""Max pooling that keeps one byte per element for the backward pass: definition, dispatch, registration.

PyTorch keeps x and an int64 index per element, in float32 three times the size of x; here it is a quarter.
The compiled CPU kernels (``csrc/cpu/max_pool_same.h``) and the Triton kernels (``triton.py``) are ops

    max_pool_same(x, size) -> (y, winners)
    max_pool_same_backward(dy, winners, size) -> dx

winners: uint8 in the layout of x, the argmax within each window: its column in the low and its row in the
high four bits, relative to the window's top left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F

from cen_ext.ops import dispatch, flops, fx
from cen_ext.ops.dispatch import Backend, why_not_cpu, why_not_reference, why_not_triton
from cen_ext.ops.max_pool_same.autograd import gradient, refuse_second_gradient, setup_context
from cen_ext.ops.norm_exchange.reference import DTYPES, memory_format
from cen_ext.ops.streams import Streams

LARGEST_SIZE = 15  # four bits hold a row or a column


def max_pool_same(x: Tensor, size: int, *, backend: str | None = None) -> Tensor:
    """Max pooling of stride 1 in a square window around each pixel that preserves the image size.

    Equals ``F.max_pool2d(x, size, stride=1, padding=size // 2)``: padding never wins, and NaN exceeds all
    numbers. Windows are reduced by rows, then by columns; the gradient goes to the first maximum in that
    order.

    Args:
        x: ``[N, C, H, W]``, float16, bfloat16, float32 or float64.
        size: the window size in pixels: odd, from 1 to 15.
        backend: ``"triton"``, ``"cpu"`` or ``"reference"``; None for that of ``use_backend``, or else the
            best that can run.

    Returns:
        A tensor of x's shape, dtype and memory format. Only the reference can be differentiated twice.

    Raises:
        TypeError: x is not a tensor or of another dtype; size is not an integer.
        ValueError: x has another number of axes or no channel or pixel; size is even or out of range; no
            backend has that name.
        RuntimeError: the requested backend cannot run this call.
    """
    if isinstance(x, Proxy):
        return fx.call_function(max_pool_same, x, locals())
    if isinstance(x, Streams):
        return x.each(max_pool_same, size, backend=backend)  # type: ignore[return-value]  # as annotated in Streams
    _check(x, size)
    run: Any = dispatch.choose("max_pool_same", backend, x).run
    y: Tensor = run(x, size)
    return y


def _check(x: Tensor, size: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be [N, C, H, W] with C, H and W at least 1, got shape {tuple(x.shape)}")
    if not isinstance(size, int):
        raise TypeError(f"size must be an integer, got {type(size).__name__}")
    if size % 2 == 0 or not 1 <= size <= LARGEST_SIZE:
        raise ValueError(f"size must be odd and from 1 to {LARGEST_SIZE}, got {size}")


def _run_reference(x: Tensor, size: int) -> Tensor:
    """Run the definition in plain PyTorch."""
    rows = F.max_pool2d(x, (1, size), stride=1, padding=(0, size // 2))
    y = F.max_pool2d(rows, (size, 1), stride=1, padding=(size // 2, 0))
    return y.contiguous(memory_format=memory_format(x))


def _run_native(x: Tensor, size: int) -> Tensor:
    return _apply(torch.ops.cen_ext.max_pool_same, torch.ops.cen_ext.max_pool_same_backward, x, size)


def _run_triton(x: Tensor, size: int) -> Tensor:
    from cen_ext.ops.max_pool_same import triton as pooling_kernels

    return _apply(pooling_kernels.max_pool_same, pooling_kernels.max_pool_same_backward, x, size)


def _apply(forward: Any, backward: Any, x: Tensor, size: int) -> Tensor:
    """Run an op; eager calls bypass its registered autograd formula, which is slower."""
    if torch.compiler.is_compiling():
        y: Tensor = forward(x, size)[0]
    else:
        y = _MaxPoolSame.apply(x, size, forward, backward)  # type: ignore[no-untyped-call]
    return y


class _MaxPoolSame(torch.autograd.Function):
    """Autograd function of an op, for eager calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, forward: Any, backward: Any) -> Tensor:
        y, winners = forward(x, size)
        ctx.save_for_backward(winners)
        ctx.size, ctx.run_backward = size, backward
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.run_backward(dy, *ctx.saved_tensors, ctx.size), None, None, None


def fake_forward(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Empty results of an op ``max_pool_same``."""
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)


def fake_backward(dy: Tensor, winners: Tensor, size: int) -> Tensor:
    """Empty result of an op ``max_pool_same_backward``."""
    return torch.empty_like(winners, dtype=dy.dtype)


dispatch.register(
    "max_pool_same",
    triton=Backend(why_not_triton, _run_triton),
    cpu=Backend(why_not_cpu, _run_native),
    reference=Backend(why_not_reference, _run_reference),
)

if dispatch.IS_COMPILED:
    torch.library.register_fake("cen_ext::max_pool_same", fake_forward)
    torch.library.register_fake("cen_ext::max_pool_same_backward", fake_backward)
    torch.library.register_autograd(
        "cen_ext::max_pool_same",
        gradient(torch.ops.cen_ext.max_pool_same_backward),
        setup_context=setup_context,
    )
    torch.library.register_autograd("cen_ext::max_pool_same_backward", refuse_second_gradient)
    flops.register("max_pool_same", "max_pool_same_backward")
