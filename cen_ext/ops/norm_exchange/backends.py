"""The backends of ``norm_exchange``, registered when ``cen_ext`` is imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cen_ext.ops import dispatch
from cen_ext.ops.dispatch import Backend, why_not_cpu, why_not_cuda, why_not_reference, why_not_triton
from cen_ext.ops.norm_exchange.options import Options
from cen_ext.ops.norm_exchange.reference import norm_exchange_reference

if dispatch.IS_COMPILED:
    from cen_ext.ops.norm_exchange import native


def _run_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    options: Options,
    route: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # Compilers trace the op; eager calls bypass its registered autograd formula, which is slower.
    run: Any
    if torch.compiler.is_compiling():
        run = native.norm_exchange_op
    else:
        run = native.NativeNormExchange.apply if torch.is_grad_enabled() else native.run_kernels
    outputs: tuple[Tensor, Tensor, Tensor] = run(x, weight, bias, mean, var, residual, *options, route)
    return outputs


def _update_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    momentum: float,
    options: Options,
    route: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    run: Any = native.NativeNormExchangeUpdating.apply
    outputs: tuple[Tensor, Tensor, Tensor] = run(
        x, weight, bias, running_mean, running_var, residual, momentum, *options, route
    )
    return outputs


def _run_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    options: Options,
    route: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from cen_ext.ops.norm_exchange.triton import launch

    # Compilers trace the op, and tensor subclasses such as fake tensors need its dispatch.
    eager = type(x) is Tensor and not torch.compiler.is_compiling()
    run: Any = launch.TritonNormExchange.apply if eager else launch.triton_norm_exchange
    outputs: tuple[Tensor, Tensor, Tensor] = run(x, weight, bias, mean, var, residual, *options, route)
    return outputs


dispatch.register(
    "norm_exchange",
    cuda=Backend(why_not_cuda, _run_native, _update_native),
    triton=Backend(why_not_triton, _run_triton),
    cpu=Backend(why_not_cpu, _run_native, _update_native),
    reference=Backend(why_not_reference, norm_exchange_reference),
)
