"""Thresholds on the scales of the layers that exchange: a number, or a factor of each layer's median.

Kernels take a threshold as a Python float, so that nothing waits for the device. ``"0.05*median"`` is
therefore resolved once, to a float for each layer, when the weights to start from are there, and stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from cen_ext import exchanging_layers
from cen_ext.modules import ExchangeNorm
from cen_ext.modules.thresholds import median_threshold, parse_median

Threshold = float | str
THRESHOLD_HELP = ", or 0.05*median: that factor of the median of each layer's |scales| at the start"


class Ruled(NamedTuple):
    """A layer whose channels are replaced where a threshold says so.

    Attributes:
        layer: it.
        holder: what has ``threshold``, ``region`` and ``criterion``: the layer itself, or its mix.
    """

    layer: ExchangeNorm
    holder: Any


def threshold_at_ones(threshold: Threshold) -> float:
    """The threshold of a layer whose scales are ones, as layers are made.

    Raises:
        ValueError: a text that is no factor of the median.
    """
    return parse_median(threshold) if isinstance(threshold, str) else threshold


def relative_threshold(of: object) -> str | None:
    """The threshold of a fusion, or a network's, if it is a factor of the median; None for all else."""
    threshold = getattr(getattr(of, "fusion", of), "threshold", None)
    return threshold if isinstance(threshold, str) else None


def ruled_layers(net: nn.Module) -> dict[str, Ruled]:
    """The layers of a network that exchange, or discard, by a threshold, by their names."""
    found = {}
    for name, layer in exchanging_layers(net).items():
        mix = getattr(layer, "mix", None)
        holder = layer if mix is None else mix
        masked = layer.mask is not None or layer.replaced_mask is not None
        if getattr(holder, "threshold", 0) > 0 and not masked:
            found[name] = Ruled(layer, holder)
    return found


def resolve_thresholds(net: nn.Module) -> dict[str, float]:
    """Set every layer's threshold to its factor of the median of the layer's scales as they are now.

    To be called once, after the weights that training starts from are loaded, and not after training, which
    moves the median. Until then the thresholds are those of scales of 1. ``models``'s trainings do so; a
    network whose fusion has a number for a threshold is left as it is.

    Args:
        net: with ``fusion``, as the builders of ``models`` make it.

    Returns:
        What was set, by the layers' names.

    Raises:
        ValueError: a layer whose median is 0; the message names it.
    """
    rule = relative_threshold(net)
    if rule is None:
        return {}
    factor, values = parse_median(rule), {}
    for name, (layer, _) in ruled_layers(net).items():
        try:
            values[name] = median_threshold(factor, layer.weight)
        except ValueError as error:
            raise ValueError(f"threshold={rule}: {name} {error}: give a number") from None
    set_thresholds(net, values)
    return values


def set_thresholds(net: nn.Module, values: Mapping[str, float]) -> None:
    """Set the thresholds of layers by their names, of which ``ruled_layers`` must have each."""
    layers = ruled_layers(net)
    for name, value in values.items():
        layers[name].holder.threshold = value
