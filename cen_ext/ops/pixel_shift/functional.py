"""The pixel shift of AsymFusion: definition, dispatch, registration.

The compiled kernels (``csrc/cpu/pixel_shift.h``, ``csrc/cuda/pixel_shift.cuh``) and the Triton kernel
(``triton.py``) are ops

    pixel_shift(x, base?, num_modalities, group, adjoint) -> y

group: channels per direction. The op is linear; its adjoint, ``adjoint=True``, shifts back and from the other
side, and is the gradient of x. The gradient of base is that of y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F

from cen_ext.ops import dispatch, flops, fx
from cen_ext.ops.dispatch import Backend, why_not_cpu, why_not_cuda, why_not_reference, why_not_triton
from cen_ext.ops.norm_exchange.reference import DTYPES, memory_format, split_rows
from cen_ext.ops.pixel_shift.autograd import gradient, setup_context
from cen_ext.ops.streams import joined

DIRECTIONS = ((-1, 0), (0, -1), (0, 1), (1, 0))  # rows and columns from a result to the pixel that it gets


def pixel_shift(
    x: Tensor,
    num_modalities: int,
    *,
    base: Tensor | None = None,
    groups: int = 5,
    backend: str | None = None,
) -> Tensor:
    """Add to each modality the channels of the next one, in groups moved by a pixel.

    With g = C // groups, channels [0, g) move down, [g, 2g) right, [2g, 3g) left and [3g, 4g) up; zeros enter
    at the edge, and channels from 4g on give zero. The next modality of m is (m + 1) mod M: for M = 2 the
    other one, as in AsymFusion (Wang et al., "Learning Deep Multimodal Feature Representation with Asymmetric
    Multi-layer Fusion", ACM MM 2020), whose released code has M = 2 alone; the cycle for M > 2 is ours. A
    single modality shifts its own.

    Args:
        x: ``[M*N, C, H, W]``, stacked modality-major; float16, bfloat16, float32 or float64.
        num_modalities: M >= 1.
        base: as x, what the shifted channels are added to; None for zeros.
        groups: into how many the channels are divided, at least 4; 5 in AsymFusion.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; None for that of ``use_backend``, or
            else the best that can run.

    Returns:
        A tensor of x's shape, dtype and memory format.

    Raises:
        TypeError: x or base is not a tensor or of a wrong dtype; num_modalities or groups is not an integer.
        ValueError: wrong shape or device; num_modalities below 1, or the rows of x do not divide by it;
            groups below 4; no backend has that name.
        RuntimeError: the requested backend cannot run this call.
    """
    if isinstance(x, Proxy):
        return fx.call_function(pixel_shift, x, locals())
    x, base = joined(x), joined(base)
    _check(x, num_modalities, base, groups)
    run: Any = dispatch.choose("pixel_shift", backend, x).run
    y: Tensor = run(x, base, num_modalities, x.shape[1] // groups, False)
    return y


def _check(x: Tensor, num_modalities: int, base: Tensor | None, groups: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"x must be [M*N, C, H, W], got shape {tuple(x.shape)}")
    for name, value, least in (("num_modalities", num_modalities, 1), ("groups", groups, len(DIRECTIONS))):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if x.shape[0] % num_modalities != 0:
        raise ValueError(
            f"the batch axis of x has {x.shape[0]} rows, not divisible by {num_modalities} modalities"
        )
    if base is None:
        return
    if not isinstance(base, Tensor):
        raise TypeError(f"base must be a tensor, got {type(base).__name__}")
    if base.dtype != x.dtype:
        raise TypeError(f"base must be {x.dtype} as x is, got {base.dtype}")
    if base.shape != x.shape:
        raise ValueError(f"base must have shape {tuple(x.shape)}, got {tuple(base.shape)}")
    if base.device != x.device:
        raise ValueError(f"base must be on {x.device} as x is, got {base.device}")


def run_reference(x: Tensor, base: Tensor | None, num_modalities: int, group: int, adjoint: bool) -> Tensor:
    """Run the definition in plain PyTorch."""
    source = split_rows(x, num_modalities).roll(1 if adjoint else -1, 0).flatten(0, 1)
    moved, rest = F.pad(source[:, : 4 * group], (1, 1, 1, 1)), source[:, 4 * group :]
    height, width = x.shape[2:]
    sign = -1 if adjoint else 1
    shifted = [
        part[:, :, 1 + sign * rows :, 1 + sign * columns :][:, :, :height, :width]
        for part, (rows, columns) in zip(moved.tensor_split(4, 1), DIRECTIONS, strict=True)
    ]
    # Not added in place, which vmap refuses where it maps x alone.
    y = torch.cat([*shifted, torch.zeros_like(rest)], 1)
    y = y if base is None else base + y
    return y.contiguous(memory_format=memory_format(x))


def _run_native(x: Tensor, base: Tensor | None, num_modalities: int, group: int, adjoint: bool) -> Tensor:
    return _apply(torch.ops.cen_ext.pixel_shift, x, base, num_modalities, group, adjoint)


def _run_triton(x: Tensor, base: Tensor | None, num_modalities: int, group: int, adjoint: bool) -> Tensor:
    from cen_ext.ops.pixel_shift import triton as kernels

    return _apply(kernels.pixel_shift, x, base, num_modalities, group, adjoint)


def _apply(op: Any, x: Tensor, base: Tensor | None, *rest: Any) -> Tensor:
    """Run an op; eager calls bypass its registered autograd formula, which is slower."""
    if torch.compiler.is_compiling():
        y: Tensor = op(x, base, *rest)
    else:
        y = _PixelShift.apply(op, x, base, *rest)  # type: ignore[no-untyped-call]
    return y


class _PixelShift(torch.autograd.Function):
    """Autograd function of an op, for eager calls."""

    @staticmethod
    def forward(ctx: Any, op: Any, x: Tensor, base: Tensor | None, *rest: Any) -> Tensor:
        ctx.op, ctx.rest = op, rest
        y: Tensor = op(x, base, *rest)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        num_modalities, group, adjoint = ctx.rest
        dx = None
        if ctx.needs_input_grad[1]:
            dx = _apply(ctx.op, dy, None, num_modalities, group, not adjoint)
        return None, dx, dy if ctx.needs_input_grad[2] else None, None, None, None


def fake_pixel_shift(
    x: Tensor, base: Tensor | None, num_modalities: int, group: int, adjoint: bool
) -> Tensor:
    """Empty result of an op."""
    return torch.empty_like(x)


dispatch.register(
    "pixel_shift",
    cuda=Backend(why_not_cuda, _run_native),
    triton=Backend(why_not_triton, _run_triton),
    cpu=Backend(why_not_cpu, _run_native),
    reference=Backend(why_not_reference, run_reference),
)

if dispatch.IS_COMPILED:
    torch.library.register_fake("cen_ext::pixel_shift", fake_pixel_shift)
    torch.library.register_autograd(
        "cen_ext::pixel_shift", gradient(torch.ops.cen_ext.pixel_shift), setup_context=setup_context
    )
    flops.register("pixel_shift")
