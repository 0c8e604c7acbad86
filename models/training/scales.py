"""The scales γ that a training begins with, and whether its penalty can bring them below the threshold.

A threshold that none of the scales comes below makes a training without exchange, which its losses do not
show. So it is said at the start: where the scales lie, and how far the penalty alone moves one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cen_ext import replaced_channels
from cen_ext.modules import ExchangeNorm
from models.data.survey import Overview
from models.networks.fusion.thresholds import Ruled, relative_threshold, ruled_layers
from models.training.schedules import rate_factor
from models.training.settings import UpdateSettings

PERCENTILES = (1, 10, 50, 90)
Numbers = NDArray[np.float64]


def travel_by_stage(
    settings: UpdateSettings, lengths: Sequence[int], steps: int, momentum: float | None
) -> list[float]:
    """The way that a constant gradient moves a scale in each stage of a training, for a learning rate of 1.

    SGD with momentum m, whose optimizer is fresh in each stage, moves it by ``lr_t g (1 - m^t) / (1 - m)`` in
    the stage's step t = 1, 2, ...: over many steps ``g / (1 - m) * sum of lr_t``. Adam moves it by ``lr_t``,
    whatever g is.

    Args:
        settings: the schedule of the rates.
        lengths: of the stages, in steps.
        steps: after which the training stops.
        momentum: of SGD, for g = 1; None for Adam.
    """
    ways = []
    for length in lengths:
        done = min(length, steps)
        velocity, way = 0.0, 0.0
        for step in range(done):
            velocity = 1.0 if momentum is None else momentum * velocity + 1.0
            way += rate_factor(settings, step, length) * velocity
        steps -= done
        ways.append(way)
    return ways


@dataclass(frozen=True)
class Penalty:
    """What moves scales towards 0 by itself.

    Attributes:
        strength: λ, times how often a step's loss has the penalty.
        momentum: of SGD; None for Adam.
        travel: of an encoder's scale and of any other one, over the whole training, as ``travel_by_stage``
            has it but for the stages' learning rates.
        steps: of the training.
    """

    strength: float
    momentum: float | None
    travel: tuple[float, float]
    steps: int

    def travel_of(self, name: str, slopes: Tensor) -> Tensor:
        """How far the scales of a layer come, by the penalty's derivatives without λ."""
        travel = self.travel[0 if name.startswith("encoder.") else 1]
        gradients = self.strength * slopes.double()
        return travel * (gradients if self.momentum is not None else (gradients > 0).double())

    def line(self, travel: float) -> str:
        """What it does in words, of which ``travel`` is the most."""
        if travel == 0:
            return "no penalty moves these scales"
        if self.momentum is None:
            how = "a learning rate per step, whatever λ"
        else:
            how = f"λ {self.strength:.3g}, momentum {self.momentum:g}"
        return f"the penalty alone moves a scale by up to {travel:.3g} in {self.steps} steps: {how}"

    def remedy(self, times: float) -> str:
        """The settings that let scales come so many times as far."""
        if not math.isfinite(times):
            return "a penalty that moves these scales: loss.sparsity, fusion.penalty, learning rates"
        which = "steps" if self.momentum is None else "loss.sparsity or steps"
        return f"{_rounded_up(times)} times the {which}"


class _Scales(NamedTuple):
    """Of some layers, all ``[scales]``."""

    sizes: Numbers  # |γ|
    medians: Numbers  # of the layer
    thresholds: Numbers
    below: NDArray[np.bool_]
    exchangeable: NDArray[np.bool_]  # in a modality's share
    travels: Numbers

    @property
    def out_of_reach(self) -> bool:
        """Whether the penalty alone brings none of these below that may be exchanged."""
        reached = self.below | (self.sizes - self.travels < self.thresholds)
        return not (reached & self.exchangeable).any()

    @property
    def smallest(self) -> float:
        return float(self.sizes[self.exchangeable].min())

    def needed(self) -> tuple[float, float, float]:
        """What is just not enough: a threshold, as a number and as a factor of the median, or a travel, as a
        factor of what it is."""
        left = self.sizes - self.travels
        with np.errstate(divide="ignore", invalid="ignore"):  # by a median or a travel of 0
            ways = (left, left / self.medians, (self.sizes - self.thresholds) / self.travels)
        number, factor, times = (float(way[self.exchangeable].min()) for way in ways)
        return number, factor, times


def scales_at_start(net: nn.Module, penalty: Penalty, word: str = "stage") -> Overview:
    """Describe the scales of the layers that exchange by a threshold, and warn where that is out of reach.

    Args:
        net: with ``fusion``, and an ``encoder`` that has ``stages()``.
        penalty: how far it moves them.
        word: for a part of the encoder.

    Returns:
        No lines for a network that has no such layer.
    """
    layers = ruled_layers(net)
    if not layers:
        return Overview([], [])
    slopes = penalty_slopes(net, {name: layer for name, (layer, _) in layers.items()})
    groups: dict[str, list[_Scales]] = {}
    for name, group in _groups(net, layers, word).items():
        groups.setdefault(group, []).append(_scales_of(name, layers[name], slopes[name], penalty))
    parts = {group: _joined(each) for group, each in groups.items()}
    whole = _joined(parts.values())
    lines = [_line(group, scales) for group, scales in parts.items()]
    lines.append(penalty.line(float(whole.travels.max())))
    return Overview(lines, _warnings(parts, whole, penalty, relative_threshold(net)))


def penalty_slopes(net: nn.Module, layers: Mapping[str, ExchangeNorm]) -> dict[str, Tensor]:
    """By layer ``[M, C]``: the size of the derivative of the fusion's penalty, without λ, by each scale.

    Args:
        net: with ``fusion``.
        layers: of it, by their names.
    """
    fusion: Any = net.fusion
    penalty = fusion.penalty_on_scales(net)
    slopes = {name: torch.zeros(layer.table_shape()) for name, layer in layers.items()}
    weights = {name: layer.weight.parameter for name, layer in layers.items() if layer.weight.requires_grad}
    if penalty.requires_grad and weights:
        gradients = torch.autograd.grad(penalty, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                slopes[name] = gradient.abs().view_as(slopes[name])
    return slopes


def stage_numbers(net: nn.Module) -> dict[nn.Module, int]:
    """The modules of an encoder's stages, each with its stage's number, from 1 on.

    Args:
        net: whose ``encoder`` may have ``stages()``; a system's need not.
    """
    stages: Any = getattr(net.encoder, "stages", tuple)
    if isinstance(stages, nn.Module):  # a part of that name
        return {}
    return {module: number for number, stage in enumerate(stages(), 1) for module in stage.modules()}


def _groups(net: nn.Module, layers: Mapping[str, Ruled], word: str) -> dict[str, str]:
    """Which part of the network each layer is of, in words and in the network's order."""
    stages = stage_numbers(net)
    outside = "the stem" if stages else "the encoder"

    def group(name: str, layer: nn.Module) -> str:
        if layer in stages:
            return f"{word} {stages[layer]}"
        return outside if name.startswith("encoder.") else "the decoder"

    return {name: group(name, layer) for name, (layer, _) in layers.items()}


def _scales_of(name: str, ruled: Ruled, slopes: Tensor, penalty: Penalty) -> _Scales:
    weight, holder = ruled.layer.weight.detach(), ruled.holder
    sizes = _flat(weight.abs())
    return _Scales(
        sizes,
        np.full_like(sizes, np.median(sizes)),
        np.full_like(sizes, holder.threshold),
        # The operator says what is below, and what it would replace if all were.
        _flat(replaced_channels(weight, holder.threshold, "all", holder.criterion)) > 0,
        _flat(replaced_channels(torch.zeros_like(weight), 1.0, holder.region)) > 0,
        _flat(penalty.travel_of(name, slopes)),
    )


def _flat(table: Tensor) -> Numbers:
    found: Numbers = table.double().cpu().flatten().numpy()
    return found


def _joined(parts: Iterable[_Scales]) -> _Scales:
    return _Scales(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _line(group: str, scales: _Scales) -> str:
    values = np.percentile(scales.sizes, PERCENTILES)
    shown = ", ".join(f"{percent} % {value:.3g}" for percent, value in zip(PERCENTILES, values, strict=True))
    low, high = scales.thresholds.min(), scales.thresholds.max()
    threshold = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    count = f"{scales.below.sum()} of {len(scales.below)}"
    return f"|γ| of {group}: {shown}; threshold {threshold}, {count} below"


def _warnings(
    parts: Mapping[str, _Scales], whole: _Scales, penalty: Penalty, relative: str | None
) -> list[str]:
    found = []
    far = {group: scales for group, scales in parts.items() if scales.out_of_reach}
    if far:
        where = "everywhere" if len(far) == len(parts) else f"in {', '.join(far)}"
        scales = _joined(far.values())
        travel = float(scales.travels[scales.exchangeable].max())
        needs = zip(*(each.needed() for each in far.values()), strict=True)
        number, factor, times = (max(each) for each in needs)
        sizes = ", ".join(f"{each.smallest:.3g} in {group}" for group, each in far.items())
        texts = [] if relative else [f"above {_rounded_up(number)}"]
        texts += [f"above {_rounded_up(factor)}*median"] if math.isfinite(factor) else []
        found.append(
            f"the threshold is out of reach {where}: the penalty alone takes at most {travel:.3g} off a "
            f"scale, and the smallest |γ| is {sizes}. For channels to be exchanged there, give "
            f"fusion.threshold {', or '.join(texts)}, or {penalty.remedy(times)}"
        )
    share = whole.below.mean()
    if share > 0.5:
        found.append(
            f"{share:.0%} of the scales are below the threshold before training, so that most channels that "
            "may be exchanged are from the first step on: give a smaller fusion.threshold"
        )
    return found


def _rounded_up(value: float) -> str:
    """A positive number with two digits, not less than it is, float32's rounding aside."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit - 1e-5) * unit:g}"
