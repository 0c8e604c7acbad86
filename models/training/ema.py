"""An exponential moving average of a network's weights.

Not ``torch.optim.swa_utils.AveragedModel`` with ``get_ema_multi_avg_fn``, compared on 2026-11-29 with torch
2.13.0: it reads a counter on the host twice per update, which waits for the GPU in every step, averages
integer buffers (with a decay of 0.9, ``num_batches_tracked`` was 10 after 20 steps) and has no warm-up of the
decay. Its state dict, with ``n_averaged`` and the prefix ``module.``, is not that of earlier checkpoints.
"""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class Ema(Generic[Network]):
    """A copy of a network that follows it slowly: ``average += (1 - decay) * (weights - average)`` a step.

    Running statistics are averaged with the weights, counters are copied. The decay of step t is at most
    ``(1 + t) / (10 + t)``, so that the random weights at the start are soon forgotten.

    Args:
        net: the network.
        decay: weight of the past in a step, between 0 and 1.

    Attributes:
        net: the copy, in evaluation mode.
    """

    def __init__(self, net: Network, decay: float) -> None:
        self.decay = decay
        self.net: Network = copy.deepcopy(net).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Follow ``net`` after step ``step``, counted from 0; nothing waits for the device."""
        averages, values, counters = [], [], []
        for average, value in zip(_state(self.net), _state(net), strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                counters.append((average, value))
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in counters:
            average.copy_(value)

    def restart(self, net: nn.Module) -> None:
        """Begin at ``net`` as it is now."""
        self.net.load_state_dict(net.state_dict())


def _state(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]
