"""Thresholds that are factors of medians, from a training's start into its files and back.

``thresholds`` in a file is ``{"rule": "0.05*median", "layers": {name: float}}``; there is none where the
fusion's threshold is a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from cen_ext.modules.thresholds import parse_median
from models.networks.fusion.thresholds import (
    relative_threshold,
    resolve_thresholds,
    ruled_layers,
    set_thresholds,
)
from models.training.errors import UsageError

RECORD = "thresholds"


def resolve(net: nn.Module, *averages: nn.Module) -> None:
    """Resolve the thresholds of a network that has the weights to start from, and set its average's.

    Raises:
        UsageError: a layer whose median is 0.
    """
    try:
        values = resolve_thresholds(net)
    except ValueError as error:
        raise UsageError(f"fusion.{error}, or start from other scales") from None
    for average in averages:
        set_thresholds(average, values)


def record(net: nn.Module) -> dict[str, Any]:
    """The entry of a file beside the settings, or none."""
    rule = relative_threshold(net)
    if rule is None:
        return {}
    layers = {name: float(holder.threshold) for name, (_, holder) in ruled_layers(net).items()}
    return {RECORD: {"rule": rule, "layers": layers}}


def restore(net: nn.Module, where: str, contents: Mapping[str, Any]) -> None:
    """Set a network's thresholds to those that a file has recorded.

    Args:
        net: of the settings at hand; nothing is done where its threshold is a number.
        where: what errors name the file with.
        contents: of the file.

    Raises:
        UsageError: it holds none, or those of another factor or of other layers.
    """
    rule = relative_threshold(net)
    if rule is None:
        return
    remedy = "set fusion.threshold to a number"
    found = contents.get(RECORD)
    if found is None:
        raise UsageError(
            f"{where} holds no thresholds for fusion.threshold={rule}, whose medians are those of the "
            f"weights that its training began with: {remedy}"
        )
    if parse_median(found["rule"]) != parse_median(rule):
        raise UsageError(
            f"{where} holds the thresholds of fusion.threshold={found['rule']}, got {rule}: leave it as it "
            f"was, or {remedy}"
        )
    layers = ruled_layers(net)
    if missing := [name for name in layers if name not in found["layers"]]:
        raise UsageError(
            f"{where} holds no threshold for {len(missing)} of the layers that exchange here, the first "
            f"{missing[0]}: leave the settings of fusion as they were, or {remedy}"
        )
    set_thresholds(net, {name: found["layers"][name] for name in layers})


def refuse_relative(fusion: object, what: str) -> None:
    """Refuse a factor of the median where nothing tells which weights the training began with.

    Raises:
        UsageError: it is one.
    """
    rule = relative_threshold(fusion)
    if rule is not None:
        raise UsageError(
            f"fusion.threshold must be a number, got {rule}: {what} does not hold the scales that its "
            "training began with"
        )
