"""The compiled operator's registration: fake kernels and autograd for ``torch.ops.cen_ext.*``.

``cen_ext._C`` defines the ops and their kernels through LibTorch's stable ABI
(``csrc/ops/norm_exchange.cpp``):

    norm_exchange(x, weight, bias, mean?, var?, residual?, *options, route?, plan) -> (y, mean, var)
    norm_exchange_updating(
        x, weight, bias, running_mean, running_var, residual?, momentum, *options, route?, plan
    ) -> (y, mean, var)
    norm_exchange_backward(
        dy, x, weight, bias, mean, var, residual?, batch_statistics, *options, route?, plan
    ) -> (dx, dweight, dbias, dresidual)

The second also updates the running statistics, which saves three launches on a GPU. Autograd formulas can be
registered only for ops without side effects, so compilers use the first. plan selects the CUDA kernels:
``"auto"`` (the default), ``"two_pass"``, ``"cluster"`` or ``"grid"`` (``csrc/cuda/kernels.h``).

``cen_ext/ops/norm_exchange/autograd.py`` describes the results and what is saved for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cen_ext.ops import flops
from cen_ext.ops.norm_exchange import autograd
from cen_ext.ops.norm_exchange.reference import statistics_dtype, statistics_shape

norm_exchange_op = torch.ops.cen_ext.norm_exchange.default
norm_exchange_updating_op = torch.ops.cen_ext.norm_exchange_updating.default
norm_exchange_backward_op = torch.ops.cen_ext.norm_exchange_backward.default


def _norm_exchange_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    shape: tuple[int, ...] = (0,)
    if mean is None:
        shape = statistics_shape(x, weight.shape[0], autograd.split(rest)[0])
    dtype = statistics_dtype(x.dtype)
    return torch.empty_like(x), x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _norm_exchange_updating_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    momentum: float,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_exchange_fake(x, weight, bias, None, None, residual, *rest)


def _norm_exchange_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    batch_statistics: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = x.new_empty((0,)) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape), dresidual


def run_kernels(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Call ``norm_exchange`` past its registered autograd formula, for eager calls without gradients."""
    with torch._C._AutoDispatchBelowAutograd():
        output: tuple[Tensor, Tensor, Tensor] = norm_exchange_op(*inputs)
    return output


def _gradients_once(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the backward op likewise, but under grad mode as it is, so that double backward raises."""
    gradients: tuple[Tensor, Tensor, Tensor, Tensor]
    if torch.is_grad_enabled():
        gradients = norm_exchange_backward_op(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            gradients = norm_exchange_backward_op(*arguments)
    return gradients


_backward = autograd.gradient(_gradients_once)


class NativeNormExchange(torch.autograd.Function):
    """Autograd function of ``norm_exchange``, for eager calls.

    The registered autograd formulas, which compilers need, cost about 30 µs more per call, three times the op
    itself on a small layer.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = run_kernels(*inputs)
        autograd.setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


class NativeNormExchangeUpdating(torch.autograd.Function):
    """Autograd function of ``norm_exchange_updating``, for eager calls."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        residual: Tensor | None,
        momentum: float,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        output: tuple[Tensor, Tensor, Tensor] = norm_exchange_updating_op(
            x, weight, bias, running_mean, running_var, residual, momentum, *rest
        )
        torch.autograd.graph.increment_version((running_mean, running_var))
        autograd.setup_context(ctx, (x, weight, bias, None, None, residual, *rest), output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, *gradients), None  # momentum has no gradient


torch.library.register_fake("cen_ext::norm_exchange", _norm_exchange_fake)
torch.library.register_fake("cen_ext::norm_exchange_updating", _norm_exchange_updating_fake)
torch.library.register_fake("cen_ext::norm_exchange_backward", _norm_exchange_backward_fake)
torch.library.register_autograd(
    "cen_ext::norm_exchange",
    autograd.gradient(norm_exchange_backward_op),
    setup_context=autograd.setup_context,
)
torch.library.register_autograd("cen_ext::norm_exchange_backward", autograd.refuse_second_gradient)
flops.register("norm_exchange", "norm_exchange_updating", "norm_exchange_backward")
