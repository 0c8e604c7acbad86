"""One optimizer and all that stands between a loss and the weights: scaling, clipping, schedule, average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from models.training import distributed
from models.training.ema import Ema
from models.training.errors import UsageError
from models.training.schedules import rate_factor
from models.training.settings import RunSettings, UpdateSettings


def fused(net: nn.Module, precision: str) -> bool:
    """Whether a network's optimizer should be one of torch's fused ones.

    They alone leave out fp16's overflowing steps without asking the device. On a CPU they copy channels_last
    weights, gradients and state back and forth, three quarters of what they take (RefineNet-50, SGD).
    """
    weights = list(net.parameters())
    copied = any(weight.device.type == "cpu" and not weight.is_contiguous() for weight in weights)
    return precision == "fp16" or not copied


def steps_in_backward(settings: UpdateSettings, run: RunSettings, device: torch.device) -> bool:
    """Whether an ``Optimization`` is to update each weight during the backward pass.

    Raises:
        UsageError: it is asked for, where all gradients are needed at once.
    """
    obstacles = {
        "optim.clip, a norm of all gradients": settings.clip is not None,
        "run.precision=fp16, which leaves out a step if any gradient overflows": run.precision == "fp16",
        "run.cuda_graphs=true, which updates outside of the graph": run.cuda_graphs,
        f"{distributed.world_size()} processes, whose gradients meet first": distributed.world_size() > 1,
    }
    found = [obstacle for obstacle, there in obstacles.items() if there]
    if settings.step_in_backward is None:
        return device.type == "cpu" and not found
    if settings.step_in_backward and found:
        raise UsageError(f"optim.step_in_backward=true does not go with {found[0]}; leave one of them out")
    return settings.step_in_backward


class Optimization:
    """Turns losses into updates: ``start`` a step, ``gradients`` of a batch, then ``step``.

    Nothing in it waits for the device, if the optimizer is a fused one, or on a CPU.

    Args:
        optimizer: fresh; its groups' learning rates are the stage's.
        settings: clipping and schedule.
        begin, steps: the stage's first step, and how many it has.
        scaler: ``models.training.precision.loss_scaler``'s.
        average: what follows, and the network that it follows.
        in_backward: update each weight as soon as its gradient is complete, and free that (as
            ``steps_in_backward`` tells): gradients of all weights are never there together.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        settings: UpdateSettings,
        begin: int,
        steps: int,
        scaler: torch.amp.GradScaler,
        average: tuple[Ema[Any], nn.Module] | None = None,
        in_backward: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.settings = settings
        self.begin, self.steps = begin, steps
        self.scaler = scaler
        self.average = average
        self.in_backward = in_backward
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.now = begin

    def start(self, step: int) -> None:
        """Set the learning rates of a step, counted from the run's first, before its gradients."""
        self.now = step
        factor = rate_factor(self.settings, step - self.begin, self.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def gradients(
        self,
        objective: nn.Module,
        parts: Sequence[tuple[Tensor, ...]],
        contexts: Sequence[AbstractContextManager[None]] = (),
    ) -> tuple[Tensor, ...]:
        """Set the gradients of the mean of the parts' losses, or update the weights by them ``in_backward``.

        Args:
            objective: called with each part, returns a loss, 0-d, and other tensors; a ``parallel`` one for
                the mean of all processes' parts.
            parts: of the batch, of which one after the other is in memory.
            contexts: for each part what its loss and gradients are computed in; none: nothing.

        Returns:
            The mean over the parts, detached, of all that the objective returned.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums: tuple[Tensor, ...] = ()
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            within = contexts[i] if contexts else nullcontext()
            with within, nullcontext() if last else distributed.gradients_stay(objective):
                values = objective(*part)
                with self._updates_in_backward() if last and self.in_backward else nullcontext():
                    self.scaler.scale(values[0] / len(parts)).backward()
            values = tuple(value.detach() for value in values)
            sums = tuple(a + b for a, b in zip(sums, values, strict=True)) if sums else values
        return tuple(value / len(parts) for value in sums)

    @contextmanager
    def _updates_in_backward(self) -> Iterator[None]:
        """In this context a backward pass uses up the gradients that it completes."""
        groups = {weight: group for group in self.optimizer.param_groups for weight in group["params"]}

        def update(weight: Tensor) -> None:
            # An optimizer updates what its groups hold: here this weight alone.
            everything = self.optimizer.param_groups
            self.optimizer.param_groups = [{**groups[weight], "params": [weight]}]
            try:
                self.optimizer.step()
            finally:
                self.optimizer.param_groups = everything
            weight.grad = None

        hooks = [
            weight.register_post_accumulate_grad_hook(update) for weight in groups if weight.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def step(self) -> None:
        """Update the weights by the gradients that are there: ``in_backward``, of earlier parts alone."""
        if self.settings.clip is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            ema, net = self.average
            ema.update(net, self.now)

    def learning_rates(self) -> dict[str, float]:
        """The rates of the step that was started last, by the groups' ``name``."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(_flattened(state["optimizer"], self.optimizer))
        self.scaler.load_state_dict(state["scaler"])


def _flattened(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with moments ``[M*C]``, as the scales now are, where old files have ``[M, C]``."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = dict(saved["state"])
    for number, parameter in zip(numbers, parameters, strict=False):  # the optimizer checks the numbers
        state[number] = {
            name: value.reshape(-1)
            if isinstance(value, Tensor) and value.dim() == 2 and parameter.dim() == 1
            else value
            for name, value in state.get(number, {}).items()
        }
    return {**saved, "state": {number: moments for number, moments in state.items() if moments}}
