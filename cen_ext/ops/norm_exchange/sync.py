"""Synchronized batch norm: statistics over all processes of a group, for any backend.

A layer costs one collective forward (count, mean and variance of each process) and one backward (the sums of
the gradients of weight and bias). The backend runs with given statistics and so omits the gradient of x
through the statistics, which depends only on these sums (``_ThroughStatistics``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from cen_ext.ops.norm_exchange import reference
from cen_ext.ops.norm_exchange.options import Options
from cen_ext.ops.norm_exchange.paths import Call, Running, offer_recomputation, update_running


def check_process_group(process_group: object, norm: str) -> None:
    """Raise unless process_group is None or a process group, the latter with batch norm only."""
    if process_group is None:
        return
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this process belongs to, or None, "
            f"got {type(process_group).__name__}"
        )
    if norm != "batch":
        raise ValueError(f"process_group synchronizes batch norm, but norm is {norm!r}")


def default_group() -> dist.ProcessGroup | None:
    """Default process group, or None if torch.distributed is not initialized."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def train(
    call: Call, running: Running | None, momentum: float | Tensor, process_group: dist.ProcessGroup
) -> Tensor:
    """Run with the statistics of x over all processes, and update the running statistics, if any, with them.

    Every process of the group must call it, and run its backward pass, for the same layers in the same order.
    N may differ between processes and may be 0. The gradients of weight and bias are sums over this process,
    as usual under data parallelism.
    """
    order = call.options.order
    mean, var, values = joint_statistics(call.x, call.weight.shape[0], process_group, order)
    weight, bias = _ThroughStatistics.apply(  # type: ignore[no-untyped-call]
        call.x, call.weight, call.bias, mean, var, values, call.options.eps, process_group, order
    )
    y = call._replace(weight=weight, bias=bias).run(mean, var)[0]
    if running is not None:
        update_running(running, mean, var, values, momentum)
    offer_recomputation(call, y, mean, var)
    return y


@torch.no_grad()
def joint_statistics(
    x: Tensor, num_modalities: int, process_group: dist.ProcessGroup, order: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance ``[M, C]`` of x over all processes and values per channel, in one collective.

    The parts are combined as in Chan, Golub and LeVeque (1983): the variance is the mean of the parts'
    variances plus that of the squared deviations of their means from the joint mean.
    """
    mean, var = reference.statistics(reference.split_rows(x, num_modalities, order), Options())
    values = x.numel() // max(mean.numel(), 1)
    local = torch.cat([mean.new_full((1,), values), mean.flatten(), var.flatten()])
    parts = local.new_empty((process_group.size(), local.numel()))
    dist.all_gather(list(parts.unbind()), local, group=process_group)
    # In float64, because float32 would lose the differences between means far from zero.
    counts, means, variances = parts.double().split_with_sizes([1, mean.numel(), mean.numel()], 1)
    total = counts.sum()
    shares = counts / total.clamp(min=1)  # without any values the results are 0, as in reference.statistics
    joint_mean = (shares * means).sum(0)
    joint_var = (shares * (variances + (means - joint_mean).square())).sum(0)
    return joint_mean.view_as(mean).to(mean.dtype), joint_var.view_as(var).to(var.dtype), total


class _ThroughStatistics(torch.autograd.Function):
    """Identity on weight and bias whose backward adds the gradient of x through the joint statistics.

    With K values per channel in all processes, batch statistics subtract
    ``weight * invstd * (dbias + xhat * dweight) / K`` from the gradient with given statistics, where dweight
    and dbias are sums over all processes. Any backend's backward pass computes this process's part of these
    sums before this one runs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        values: Tensor,
        eps: float,
        process_group: dist.ProcessGroup,
        order: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, mean, var, values)
        ctx.eps = eps
        ctx.process_group = process_group
        ctx.order = order
        return weight.view_as(weight), bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweight: Tensor, dbias: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, dweight, dbias, None, None, None, None, None, None
        x, weight, mean, var, values = ctx.saved_tensors
        sums = torch.stack([dweight, dbias])
        dist.all_reduce(sums, group=ctx.process_group)
        invstd = torch.rsqrt(var + ctx.eps)
        scale = weight * invstd / values.clamp(min=1).to(weight.dtype)
        column = (weight.shape[0], 1, weight.shape[1], *(1,) * (x.dim() - 2))
        rows = reference.split_rows(x, weight.shape[0], ctx.order).to(weight.dtype)
        dx = (rows - mean.view(column)).mul_((scale * invstd * sums[0]).view(column))
        dx = dx.add_((scale * sums[1]).view(column)).neg_()
        dx = reference.join_rows(dx, ctx.order).to(x.dtype)
        return dx, dweight, dbias, None, None, None, None, None, None
