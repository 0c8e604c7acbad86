"""What Theorem 1 speaks of, seen in a network: x̂ and ∂L/∂x' of channels whose scale is 0.

The norms of a network are one fused call each, which shows neither. An ``ObservedNorm`` computes the same in
plain steps: the fused call gives x̂, PyTorch the scale, shift, residual and activation.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cen_ext.modules import ExchangeNorm
from cen_ext.ops.activation import ACTIVATIONS
from models.analysis import theorem
from models.networks.fusion import named_exchange_points
from models.training.errors import UsageError


class Seen(NamedTuple):
    """A channel in one batch, in 0-d tensors: its task gradient ``d = ∂L/∂γ``, and what it is compared with.

    Attributes:
        gradient: d.
        norm, centered: ``gradient_norm`` and ``centered_norm``, a deviation of d each.
        shuffled: d of the same gradient and a permuted x̂.
        mean, deviation: ``shuffled_moments``, of such a d.
    """

    gradient: Tensor
    norm: Tensor
    centered: Tensor
    shuffled: Tensor
    mean: Tensor
    deviation: Tensor


class ObservedNorm:
    """An exchange point that exchanges nothing, with some of its scales set to 0.

    Takes the place of the layer's ``forward``, for good; a backward pass of the loss fills ``seen``.

    Args:
        layer: the norm.

    Attributes:
        zeroed: by modality, the channel whose scale is 0 in the next forward pass.
        seen: by modality, what the last backward pass showed of that channel.
    """

    def __init__(self, layer: ExchangeNorm) -> None:
        self.layer = layer
        self.activation, layer.activation = layer.activation, "identity"
        layer.threshold = 0.0
        self.channel_dim: int = getattr(layer, "channel_dim", 1)
        self.zeroed: dict[int, int] = {}
        self.seen: dict[int, Seen] = {}
        layer.forward = self.forward  # type: ignore[method-assign]

    @property
    def normalizes_itself(self) -> bool:
        """Whether each channel's x̂ has mean 0 and variance 1 in every batch (instance norm: every sample)."""
        layer = self.layer
        if layer.norm not in ("batch", "instance"):
            return False  # statistics over several channels
        running = layer.running_mean is not None and (layer.norm == "batch" or layer.track_running_stats)
        return layer.training or not running

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Do as the layer would without exchange."""
        weight, bias = self.layer.table("weight"), self.layer.table("bias")
        assert weight is not None  # ``observe`` has checked
        bias = torch.zeros_like(weight) if bias is None else bias
        xhat = self.layer.normalize(x, torch.ones_like(weight), torch.zeros_like(weight))
        scales = weight.detach().clone()
        for m, channel in self.zeroed.items():
            scales[m, channel] = 0
        scales.requires_grad_()  # the parameters need not
        z = self._spread(scales, xhat) * xhat + self._spread(bias, xhat)
        z.register_hook(partial(self._look, xhat.detach()))
        u = z if residual is None else z + residual
        return ACTIVATIONS[self.activation].value(u, self.layer.negative_slope)

    def _spread(self, table: Tensor, x: Tensor) -> Tensor:
        """``[M, C]`` to what is multiplied with the stacked x."""
        ones = (1,) * (x.dim() - 2)
        shape = (*ones, -1) if self.channel_dim == -1 else (-1, *ones)
        return table.repeat_interleave(len(x) // len(table), 0).view(len(x), *shape)

    def _look(self, xhat: Tensor, gradient: Tensor) -> None:
        """Compute ``seen`` in a backward pass, when the gradient by x' is there."""
        for m, channel in self.zeroed.items():
            self.seen[m] = _seen(self._channel(gradient, m, channel), self._channel(xhat, m, channel))

    def _channel(self, x: Tensor, m: int, channel: int) -> Tensor:
        """A channel of a modality as ``theorem`` takes it, ``[groups, K]``."""
        samples = len(x) // self.layer.num_modalities
        elements = x[m * samples : (m + 1) * samples].select(self.channel_dim, channel)
        groups = samples if self.layer.norm == "instance" else 1
        return elements.reshape(groups, -1).double()


def _seen(gradient: Tensor, xhat: Tensor) -> Seen:
    return Seen(
        (gradient * xhat).sum(),
        theorem.gradient_norm(gradient),
        theorem.centered_norm(gradient),
        (gradient * theorem.shuffled(xhat)).sum(),
        *theorem.shuffled_moments(gradient, xhat),
    )


def observe(net: nn.Module) -> dict[str, ObservedNorm]:
    """Put an ``ObservedNorm`` in the place of every exchange point, by the points' names.

    The network is changed for good: it exchanges nothing, and its parameters need no gradients.

    Raises:
        UsageError: it has no exchange points, or some that do more than to exchange by a threshold.
    """
    points = named_exchange_points(net)
    if not points:
        raise UsageError("--theorem: the network has no norms at which the paper's exchanges: no scales γ")
    for name, point in points.items():
        plain = type(point).forward is ExchangeNorm.forward
        if not plain or point.mask is not None or point.replaced_mask is not None or point.weight is None:
            raise UsageError(
                f"--theorem: {name} does more than to exchange channels by a threshold; runs with "
                "fusion=exchange or fusion=none can be analyzed"
            )
    net.requires_grad_(False)
    return {name: ObservedNorm(point) for name, point in points.items()}
