"""3x3 convolutions with 2.25 times fewer multiplications on CPUs: definition, dispatch, registration.

The compiled CPU kernels (``csrc/cpu/conv3x3``: Winograd's minimal filtering F(2x2, 3x3), in float32 and
channels last) are three ops. Each is linear in both tensors, so the gradients of each are calls of the other
two:

    conv3x3(x, weight, bias?, dilation) -> y
    conv3x3_backward(dy, weight, dilation) -> dx
    conv3x3_weight_gradient(dy, x, dilation) -> dweight
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from cen_ext.ops import dispatch, flops, fx
from cen_ext.ops.dispatch import Backend
from cen_ext.ops.streams import Streams

_MULTIPLE = 32  # the kernels need multiples of this many channels
_FEWEST_TILES = 64  # with fewer, transforming the weights costs more than the products save
_MOST_WASTE = 1.5  # largest ratio of pixels covered by tiles to pixels of the image


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, *, backend: str | None = None
) -> Tensor:
    """3x3 convolution that preserves the image size: ``F.conv2d(x, weight, bias, 1, dilation, dilation)``.

    Rounding errors of the compiled kernels are those of float32 sums: for y and the gradient of x mostly
    smaller than PyTorch's, for that of weight up to seven times as large (for all three, at most 4e-6 of the
    largest value). Where PyTorch returns an infinity, the kernels may return NaN. Scratch memory is at most
    16 MiB, or 8 KiB per channel above 2048 channels, plus a few MiB per thread. Gradients can be
    differentiated again in reverse mode. The algorithm is that of Lavin and Gray, "Fast Algorithms for
    Convolutional Neural Networks", CVPR 2016.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[K, C, 3, 3]``.
        bias: ``[K]`` or None.
        dilation: the distance between taps, in pixels.
        backend: ``"cpu"``, for float32 in channels_last with C and K multiples of 32, without autocast, on
            processors with AVX2; ``"reference"``, PyTorch's own, for any call; None for the faster one, or
            PyTorch's within ``use_backend("reference")``.

    Returns:
        ``[N, K, H, W]``.

    Raises:
        TypeError: x, weight or bias is not a tensor, or dilation not an integer.
        ValueError: weight or bias is of another shape, or dilation not positive; no backend has that name.
        RuntimeError: the requested backend cannot run this call.
    """
    if isinstance(x, Proxy):
        return fx.call_function(conv3x3, x, locals())
    if isinstance(x, Streams):
        return x.each(conv3x3, weight, bias, dilation, backend=backend)  # type: ignore[return-value]  # as annotated in Streams
    _check(x, weight, bias, dilation)
    if backend is None and (dispatch.named_backend() == "reference" or not _pays(x, dilation)):
        backend = "reference"
    if backend is None:
        run: Any = dispatch.best("conv3x3", x, weight, bias).run
    else:
        run = dispatch.choose("conv3x3", backend, x, weight, bias).run
    y: Tensor = run(x, weight, bias, dilation)
    return y


class Conv3x3(nn.Conv2d):
    """Module for ``conv3x3``, ``[N, C, H, W]`` to ``[N, K, H, W]``, with the same errors.

    Parameters and their initialization are those of ``nn.Conv2d``.

    Args:
        in_channels: C.
        out_channels: K.
        dilation: the distance between taps, in pixels.
        bias: whether to add a bias.
        backend: as for ``conv3x3``.
    """

    backend: str | None = None  # of layers that were pickled before they had one

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dilation: int = 1,
        bias: bool = True,
        *,
        backend: str | None = None,
    ) -> None:
        dispatch.check_name(backend, dispatch.BACKENDS["conv3x3"])
        super().__init__(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=bias)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return conv3x3(x, self.weight, self.bias, self.dilation[0], backend=self.backend)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> None:
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not isinstance(bias, Tensor | None):
        raise TypeError(f"bias must be a tensor or None, got {type(bias).__name__}")
    if not isinstance(dilation, int):
        raise TypeError(f"dilation must be an integer, got {type(dilation).__name__}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got shape {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"weight must be [K, C, 3, 3] with x's C={x.shape[1]}, got shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [K] with weight's K={weight.shape[0]}, got {tuple(bias.shape)}")


def _pays(x: Tensor, dilation: int) -> bool:
    """Whether the kernels are faster than PyTorch's.

    They divide each of the dilation^2 grids of pixels of x into tiles of 2x2 pixels.
    """
    down, across = (-(-length // (2 * dilation)) for length in x.shape[-2:])
    tiles = x.shape[0] * dilation**2 * down * across
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return tiles >= _FEWEST_TILES and 4 * tiles <= _MOST_WASTE * pixels


def faster(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> str:
    """The backend that ``conv3x3`` chooses for a call outside of compilers and contexts."""
    return "cpu" if _pays(x, dilation) and _why_not_cpu(x, weight, bias) is None else "reference"


def _why_not_cpu(
    x: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
) -> str | None:
    """Reason why the compiled kernels cannot run this call (or any call, without arguments)."""
    reason = dispatch.why_not_cpu(x)
    if reason is not None or x is None or weight is None:
        return reason
    if _INSTRUCTION_SET == "default":
        return "it has not been tuned for this processor's vectors"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, needed is float32"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not channels_last"
    if any(channels == 0 or channels % _MULTIPLE for channels in weight.shape[:2]):
        return f"channels must be multiples of {_MULTIPLE}, got {weight.shape[1]} and {weight.shape[0]}"
    return None


def _run_native(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    y: Tensor = torch.ops.cen_ext.conv3x3(x, weight, bias, dilation)
    return y


def _run_reference(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    return F.conv2d(x, weight, bias, 1, dilation, dilation)


dispatch.register(
    "conv3x3",
    cpu=Backend(_why_not_cpu, _run_native),
    reference=Backend(dispatch.why_not_reference, _run_reference),
)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    return _empty(x, x.shape[0], weight.shape[0], *x.shape[2:])


def _fake_backward(dy: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return _empty(dy, dy.shape[0], weight.shape[1], *dy.shape[2:])


def _fake_weight_gradient(dy: Tensor, x: Tensor, dilation: int) -> Tensor:
    return _empty(x, dy.shape[1], x.shape[1], 3, 3)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.dilation = inputs[-1]


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    ops = torch.ops.cen_ext
    return (
        ops.conv3x3_backward(dy, weight, ctx.dilation) if needs_x else None,
        ops.conv3x3_weight_gradient(dy, x, ctx.dilation) if needs_weight else None,
        dy.sum((0, 2, 3)) if needs_bias else None,
        None,
    )


def _gradients_of_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight = ctx.saved_tensors
    needs_dy, needs_weight, _ = ctx.needs_input_grad
    ops = torch.ops.cen_ext
    return (
        ops.conv3x3(ddx, weight, None, ctx.dilation) if needs_dy else None,
        ops.conv3x3_weight_gradient(dy, ddx, ctx.dilation) if needs_weight else None,
        None,
    )


def _gradients_of_weight_gradient(ctx: Any, ddweight: Tensor) -> tuple[Tensor | None, ...]:
    dy, x = ctx.saved_tensors
    needs_dy, needs_x, _ = ctx.needs_input_grad
    ops = torch.ops.cen_ext
    return (
        ops.conv3x3(x, ddweight, None, ctx.dilation) if needs_dy else None,
        ops.conv3x3_backward(dy, ddweight, ctx.dilation) if needs_x else None,
        None,
    )


def _flops(first: Sequence[int], *_: Any, out_shape: Sequence[int]) -> int:
    """Of each op, whose first tensor's values meet nine taps of every channel of the result."""
    return 2 * 9 * prod(first) * out_shape[1]


_INSTRUCTION_SET = ""
if dispatch.IS_COMPILED:
    _INSTRUCTION_SET = importlib.import_module("cen_ext._C").build_info()["instruction_set"]
    for _name, _fake_kernel, _gradient in (
        ("conv3x3", _fake, _gradients),
        ("conv3x3_backward", _fake_backward, _gradients_of_backward),
        ("conv3x3_weight_gradient", _fake_weight_gradient, _gradients_of_weight_gradient),
    ):
        torch.library.register_fake(f"cen_ext::{_name}", _fake_kernel)
        torch.library.register_autograd(f"cen_ext::{_name}", _gradient, setup_context=_keep)
        flops.register(_name, formula=_flops)
