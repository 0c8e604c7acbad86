"""Which channels the norms of a network replace, and whose channels they take, for any scales γ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cen_ext import exchanging_layers
from cen_ext.modules import ExchangeNorm
from models.networks.fusion import named_exchange_points
from models.networks.fusion.thresholds import ruled_layers
from models.networks.systems import System


@dataclass(frozen=True)
class Layer:
    """A norm where a network exchanges, or might.

    Attributes:
        name: in the network.
        scales: ``[M, C]`` γ, on the CPU.
        threshold: θ; None where no threshold decides what is replaced.
        replaced: ``[M]`` shares of the channels that each modality gives up.
        lent: ``[M, M]`` by taker and lender, shares of the taker's channels; of zeros where channels that are
            given up are not another modality's afterwards.
    """

    name: str
    scales: Tensor
    threshold: float | None
    replaced: Tensor
    lent: Tensor


def layers_of(net: nn.Module, scales: Mapping[str, Tensor] | None = None) -> list[Layer]:
    """The norms where the network exchanges or might, in its order.

    Args:
        net: with its weights; left as it is.
        scales: γ to look at in the place of its own, by the norms' names; norms without any are left out.
    """
    if isinstance(net, System):  # its streams' norms are of one modality each
        return []
    exchanging = exchanging_layers(net)
    known = {**named_exchange_points(net), **exchanging}
    if scales is not None:
        known = {name: norm for name, norm in known.items() if name in scales}
    rules = ruled_layers(net)
    layers = []
    with torch.no_grad():
        for name, norm in known.items():
            own = norm.weight.clone()
            if scales is not None:
                norm.weight.copy_(scales[name])
            table = norm.weight.cpu().clone()
            replaced = norm.replaced().cpu() if name in exchanging else torch.zeros_like(table).bool()
            norm.weight.copy_(own)
            threshold = float(rules[name].holder.threshold) if name in rules else None
            layers.append(
                Layer(name, table, threshold, replaced.float().mean(1), _lent(norm, replaced.float()))
            )
    return layers


def _lent(norm: ExchangeNorm, replaced: Tensor) -> Tensor:
    """``[M, M]`` of ``[M, C]``; where a channel is the mean of all others, each lends an equal part."""
    count = len(replaced)
    shares = torch.zeros(count, count)
    if hasattr(norm, "mix"):  # discards, or mixes in another way
        return shares
    lender = torch.full(replaced.shape, -1) if norm.lender is None else norm.lender.cpu()
    for taker in range(count):
        for source in {*range(count)} - {taker}:
            everyone = (lender[taker] < 0).float() / (count - 1)
            part = torch.where(lender[taker] == source, 1.0, everyone)
            shares[taker, source] = (replaced[taker] * part).mean()
    return shares
