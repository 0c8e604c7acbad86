"""The feature maps of one exchanging batch norm, by the plain formulas: normalized, scaled, exchanged.

The norms are one fused call with the exchange, the residual and the activation, so that nothing in a network
holds what is drawn here. It is computed in float64 of what enters the norm.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from cen_ext import ExchangeBatchNorm2d, unstack_modalities


class FeatureMaps(NamedTuple):
    """What a norm makes of its input, all ``[M, N, C, h, w]`` float64.

    Attributes:
        normalized: x̂, by the running statistics.
        z: γ x̂ + β, before the exchange.
        exchanged: z, but where a channel is replaced, the mean of the other modalities' z (Eq. 6).
    """

    normalized: Tensor
    z: Tensor
    exchanged: Tensor

    @property
    def rectified(self) -> Tensor:
        """relu(z): of a norm without a residual, what its relu lets through."""
        return self.z.relu()

    @property
    def magnitude(self) -> Tensor:
        """|x̂|: how much a channel responds, of whichever sign, which a mean of x̂ over channels cancels."""
        return self.normalized.abs()

    def over(self, weights: Tensor) -> FeatureMaps:
        """Weighted sums over the channels, by weights ``[K, C]``: maps of K in place of C."""
        return FeatureMaps(*(torch.einsum("kc,mnchw->mnkhw", weights.to(each.device), each) for each in self))


class _Reached(Exception):
    """Ends a forward pass at a layer."""


def input_of(net: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """What a network passes to one of its layers; nothing from that layer on is computed.

    Args:
        net: in the mode that it is to run in.
        layer: a part of it.
        images: the network's input.

    Raises:
        ValueError: the network does without the layer.
    """

    def stop(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> NoReturn:
        raise _Reached(args[0] if args else named["x"])

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            net(images)
    except _Reached as reached:
        x: Tensor = reached.args[0]
        return x
    finally:
        handle.remove()
    raise ValueError("the network does not call the layer")


def feature_maps(norm: ExchangeBatchNorm2d, x: Tensor) -> FeatureMaps:
    """What a norm in evaluation mode makes of its input, in plain formulas.

    Args:
        norm: one with running statistics, which exchanges by its scales.
        x: ``[M*N, C, h, w]``.
    """
    assert norm.running_mean is not None  # as the caller has checked
    assert norm.running_var is not None
    rows = torch.stack(unstack_modalities(x.double(), norm.num_modalities, order=norm.order))

    def spread(table: Tensor) -> Tensor:  # [M, C] -> [M, 1, C, 1, 1]
        return table.detach()[:, None, :, None, None]

    mean, var = spread(norm.running_mean.double()), spread(norm.running_var.double())
    normalized = (rows - mean) / (var + norm.eps).sqrt()
    z = spread(norm.weight.double()) * normalized + spread(norm.bias.double())
    others = (z.sum(0) - z) / (norm.num_modalities - 1)
    return FeatureMaps(normalized, z, torch.where(spread(norm.replaced()), others, z))
