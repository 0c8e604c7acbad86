"""The channels of a layer by which modality uses them: the sets of CEN's Figure 3, and a layer that has them.

A modality uses a channel where its scale |γ| is not below the exchange's threshold θ. Of two modalities,
S10 are the channels that the first one alone uses, S01 those that the other one alone uses, S11 those that
both use and S00 those that neither does (Wang et al., "Deep Multimodal Fusion by Channel Exchanging",
NeurIPS 2020, Figure 3). With region ``own``, the first modality takes only those of S01 that lie in its share
from the other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cen_ext import ExchangeBatchNorm2d, replaced_channels
from models.networks.fusion.thresholds import ruled_layers
from models.networks.messages import suggest
from models.training.errors import UsageError
from models.training.scales import stage_numbers

SETS = ("S01", "S10", "S11", "S00")
# In which the paper exchanges what is still near the image; its figure does not say the layer.
_EARLY = (1, 2)
_PERCENTS = (1, 5, 10, 25, 50, 75)
_NAMED = 3  # thresholds


@dataclass(frozen=True)
class Layer:
    """A batch norm that exchanges by a threshold.

    Attributes:
        name: the norm's in the network.
        stage: of the encoder, from 1 on; None outside of its stages.
        norm: it.
        scales: γ ``[M, C]``, on the CPU.
        threshold, criterion: by which ``unused`` is decided; those of the norm but in ``at``.
    """

    name: str
    stage: int | None
    norm: ExchangeBatchNorm2d
    scales: Tensor
    threshold: float
    criterion: str

    @property
    def unused(self) -> Tensor:
        """Mask ``[M, C]`` of the scales below the threshold, in any region."""
        return replaced_channels(self.scales, self.threshold, "all", self.criterion)

    @property
    def others(self) -> range:
        """The modalities that make a pair with the first one."""
        return range(1, len(self.scales))

    def sets(self, other: int) -> dict[str, Tensor]:
        """Masks ``[C]`` of ``SETS``, of the first modality and another one."""
        first, second = ~self.unused[0], ~self.unused[other]
        return dict(
            zip(SETS, (~first & second, first & ~second, first & second, ~first & ~second), strict=True)
        )

    def sizes(self, other: int) -> dict[str, int]:
        """The sets' sizes."""
        return {name: int(mask.sum()) for name, mask in self.sets(other).items()}

    @property
    def drawn(self) -> list[tuple[int, str]]:
        """The K sets to draw: by the other modality of the pair and the set's name."""
        return [(other, name) for other in self.others for name in SETS[:3]]

    def means(self) -> Tensor:
        """Weights ``[K, C]`` float64 of the means over the sets to draw; NaN of empty sets."""
        masks = torch.stack([self.sets(other)[name] for other, name in self.drawn]).double()
        return masks / masks.sum(1, keepdim=True)

    @property
    def smallest(self) -> int:
        """The least size of S01 and S10, over all pairs."""
        return min(min(sizes["S01"], sizes["S10"]) for sizes in map(self.sizes, self.others))

    @property
    def has_common(self) -> bool:
        """Whether every pair has channels that both use, S11."""
        return all(self.sizes(other)["S11"] > 0 for other in self.others)

    def at(self, threshold: float) -> Layer:
        """The layer as it would be at another threshold."""
        return replace(self, threshold=threshold)


class Choice(NamedTuple):
    """A layer to draw, and what is to be said of it."""

    layer: Layer
    notes: list[str]


def find_layers(net: nn.Module) -> list[Layer]:
    """The batch norms of a network that exchange by a threshold on their scales and keep statistics.

    Args:
        net: with an ``encoder`` that has ``stages()``.
    """
    stages = stage_numbers(net)
    return [
        Layer(
            name,
            stages.get(norm),
            norm,
            norm.weight.detach().cpu(),
            float(norm.threshold),
            norm.criterion,
        )
        for name, (norm, holder) in ruled_layers(net).items()
        # A layer that hands the rule to a mix of its own (discarding) exchanges nothing.
        if holder is norm and isinstance(norm, ExchangeBatchNorm2d) and norm.running_mean is not None
    ]


def choose(layers: Sequence[Layer], name: str | None = None) -> Choice:
    """The layer with the largest sets of both S01 and S10: that of the greatest ``smallest``.

    Layers of stages 1 and 2 go before all others; of equal ones, the first.

    Args:
        layers: some.
        name: of the layer to take instead.

    Raises:
        UsageError: no layer has that name, or none has both sets; the message says which thresholds would do.
    """
    if name is not None:
        return _named(layers, name)
    layer = _best(layers)
    if layer.smallest == 0:
        neither = sum(each.sizes(other)["S00"] for each in layers for other in each.others)
        raise UsageError(
            "no layer has channels that one modality alone uses, for each of the two; those that neither "
            f"uses are {neither}: {_remedy(layers)}; or name a layer to draw all the same with --layer"
        )
    notes = []
    if layer.stage not in _EARLY:
        notes.append(f"no layer of stages 1 and 2 has both sets S01 and S10: {layer.name} is drawn")
    common = [each for each in layers if each.has_common and each.smallest > 0]
    if common and not layer.has_common:
        notes.append(
            f"{layer.name} has no channels of S11, and where all is exchanged, the modalities' maps become "
            f"alike; of the layers that have some, --layer {_best(common).name} has the largest sets"
        )
    return Choice(layer, notes)


def _named(layers: Sequence[Layer], name: str) -> Choice:
    names = [layer.name for layer in layers]
    if name not in names:
        raise UsageError(
            f"--layer: {name} is no layer that exchanges{suggest(name, names)}; there are {', '.join(names)}"
        )
    layer = layers[names.index(name)]
    if layer.smallest > 0:
        return Choice(layer, [])
    return Choice(layer, [f"{name} has no channels of S01 or of S10: {_remedy(layers)}"])


def _best(layers: Sequence[Layer]) -> Layer:
    early = [layer for layer in layers if layer.stage in _EARLY and layer.smallest > 0]
    return max(early or layers, key=lambda layer: layer.smallest)


def _remedy(layers: Sequence[Layer]) -> str:
    """Thresholds at which there are sets, in words."""
    sizes = torch.cat([layer.scales.abs().flatten() for layer in layers]).double()
    found: dict[float, str] = {}
    for percent in _PERCENTS:
        threshold = float(f"{torch.quantile(sizes, percent / 100).item():.3g}")
        best = _best([layer.at(threshold) for layer in layers])
        if best.smallest > 0 and threshold not in found:
            counts = best.sizes(best.others[0])
            found[threshold] = (
                f"fusion.threshold={threshold:g}, the {percent} % percentile of |γ| ({best.name}: S01 "
                f"{counts['S01']}, S10 {counts['S10']})"
            )
    if not found:
        return (
            f"no threshold would give them, as |γ| is from {sizes.min():.3g} to {sizes.max():.3g} in all "
            "modalities alike; train longer, or with a penalty that moves the scales"
        )
    return f"give {', or '.join(list(found.values())[:_NAMED])}"
