"""Execution of a call on its backend, with given statistics or with those of x."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cen_ext import recompute
from cen_ext.ops.dispatch import Backend
from cen_ext.ops.norm_exchange.options import Options

Running = tuple[Tensor, Tensor]  # running mean and variance [M, C], updated in place


class Call(NamedTuple):
    """The backend and the arguments of one call, except the statistics."""

    backend: Backend
    x: Tensor  # [M*N, C, *spatial]
    weight: Tensor  # [M, C]
    bias: Tensor  # [M, C]
    residual: Tensor | None  # as x
    options: Options
    route: Tensor | None = None  # [M, C] int32, in place of threshold, region and criterion

    def run(self, mean: Tensor | None = None, var: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Run with the given statistics or, if None, those of x; return y and the statistics of x."""
        y: Tensor
        y, mean, var = self.backend.run(
            self.x, self.weight, self.bias, mean, var, self.residual, self.options, self.route
        )
        return y, mean, var


def without_norm(call: Call) -> Call:
    """The call of norm ``"none"`` as one of given statistics, which must be zeros and ones."""
    return call._replace(options=call.options._replace(norm="batch", eps=0.0))


def evaluate(call: Call, mean: Tensor, var: Tensor) -> Tensor:
    """Run with given statistics."""
    y = call.run(mean, var)[0]
    offer_recomputation(call, y, mean, var)
    return y


def train(call: Call, running: Running | None, momentum: float | Tensor) -> Tensor:
    """Run with the statistics of x, and update the running statistics, if any, with them."""
    if running is not None and _updates_in_backend(call, running, momentum):
        assert call.backend.update is not None
        y, mean, var = call.backend.update(
            call.x, call.weight, call.bias, *running, call.residual, float(momentum), call.options, call.route
        )
    else:
        y, mean, var = call.run()
        values = call.x.numel() // max(mean.numel(), 1)
        if running is not None and values > 0:
            update_running(running, mean, var, values, momentum)
    offer_recomputation(call, y, mean, var)
    return y  # type: ignore[no-any-return]


def _updates_in_backend(call: Call, running: Running, momentum: float | Tensor) -> bool:
    """Whether the backend updates the running statistics itself; under compilers it must not."""
    return (
        call.backend.update is not None
        and not isinstance(momentum, Tensor)
        and all(table.is_contiguous() for table in running)
        and not torch.compiler.is_compiling()
    )


def update_running(
    running: Running,
    mean: Tensor,  # [M, C], or [M*N, C] for instance norm
    var: Tensor,
    values: int | Tensor,  # number of values that each mean and var was computed from
    momentum: float | Tensor,
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance."""
    # Detached rather than under no_grad, of which torch.export.save cannot save the in-place updates.
    mean, var = mean.detach(), var.detach()
    running_mean, running_var = running
    num_modalities, channels = running_mean.shape
    weight = momentum.detach().to(var) if isinstance(momentum, Tensor) else float(momentum)
    if isinstance(values, Tensor):  # the total of a process group, on the device: it may be 0 or 1
        unbiased = (var * (values / (values - 1).clamp(min=1))).to(var.dtype)
        weight = (values > 0).to(var.dtype) * weight
    else:
        unbiased = var * (values / (values - 1))
    if mean.shape != running_mean.shape:
        samples = mean.shape[0] // num_modalities
        mean, unbiased = (t.view(num_modalities, samples, channels).mean(1) for t in (mean, unbiased))
    running_mean.lerp_(mean, weight)
    running_var.lerp_(unbiased, weight)


def offer_recomputation(call: Call, y: Tensor, mean: Tensor, var: Tensor) -> None:
    """Register with a surrounding ``recompute_outputs`` how to recompute y."""
    if not recompute.active() or call.residual is not None or call.options.norm != "batch":
        return

    def compute() -> Tensor:
        with torch.no_grad():
            return call.run(mean, var)[0]

    recompute.note(y, compute)
