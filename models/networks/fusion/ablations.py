"""The paper's ablations: other ways to mix the modalities' channels after a norm.

Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020, section 4.1, "Additional ablation
studies". Exchanges of other channels than Eq. 6's are the operator's, with a mask. All else is a mix: it
takes ``z [M, N, C, H, W]``, the normalized activations of Eq. 5, and the scales ``weight [M, C]``, and
returns what goes on to residual and activation, in plain PyTorch with its autograd. Each fusion here puts
one or the other at the norms at which the paper exchanges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cen_ext import ExchangeBatchNorm2d, ExchangeInstanceNorm2d, masks, replaced_channels
from cen_ext.modules import ExchangeNorm
from cen_ext.ops.activation import ACTIVATIONS
from models.networks.fusion.base import (
    Fusion,
    MakeLayer,
    check_rule,
    check_several,
    mark,
    option,
    register_fusion,
    scale_penalty,
)
from models.networks.fusion.exchange import (
    AT_HELP,
    CONVOLUTIONS_HELP,
    CRITERION_HELP,
    PENALTY_HELP,
    REGION_HELP,
    At,
    Convolutions,
    Penalty,
)
from models.networks.fusion.thresholds import THRESHOLD_HELP, Threshold, threshold_at_ones


class Mix(nn.Module):
    """Base: ``z [M, N, C, H, W]`` and ``weight [M, C]`` to the like of z."""

    replaces = False  # whether ``replaced`` can be true

    def replaced(self, weight: Tensor) -> Tensor:
        """``[M, C]`` bool: the channels that go on without their own activations."""
        return torch.zeros_like(weight, dtype=torch.bool)

    def forward(self, z: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError


class FixedPortionMask(nn.Module):
    """Ablation 1 and 5: a fixed share of the channels is replaced by the others' mean, Eq. 6's second case.

    "Naively exchanging channels with a fixed portion (without using l1 and threshold)": the paper exchanges
    30 % and does not say which. ``"first"``: the first of the region; ``"smallest"``: those of the region's
    smallest |γ|, chosen anew at every step; ``"random"``: drawn once, when the network is made, and kept
    ("exchange channels randomly like ShuffleNet", whose pattern is fixed as well).

    Args:
        choice: ``"first"``, ``"smallest"`` or ``"random"``.
        num_modalities, channels: M and C.
        portion: each modality replaces ``round(portion * C)`` channels.
        region: ``"own"``, from its own share of the channels, or ``"all"``.
    """

    scores: Tensor | None

    def __init__(self, choice: str, num_modalities: int, channels: int, portion: float, region: str) -> None:
        super().__init__()
        self.count = round(portion * channels)
        self.region = region
        if choice == "random":
            self.register_buffer("scores", torch.rand(num_modalities, channels))
        elif choice == "first":
            places = torch.arange(channels, dtype=torch.float32).expand(num_modalities, -1)
            self.register_buffer("scores", places.clone(), persistent=False)
        else:
            self.scores = None

    def forward(self, weight: Tensor) -> Tensor:
        """Scales ``[M, C]`` to the channels that are replaced, bool ``[M, C]``."""
        return masks.smallest(weight if self.scores is None else self.scores, self.count, self.region)


class DiscardMix(Mix):
    """Ablation 5: "directly discard unimportant channels without channel exchanging".

    Channels that Eq. 6 would replace are zero. Arguments as in ``cen_ext.norm_exchange``.
    """

    def __init__(self, threshold: float, region: str, criterion: str) -> None:
        super().__init__()
        self.threshold = threshold
        self.region = region
        self.criterion = criterion
        self.replaces = threshold > 0

    def replaced(self, weight: Tensor) -> Tensor:
        return replaced_channels(weight, self.threshold, self.region, self.criterion)

    def forward(self, z: Tensor, weight: Tensor) -> Tensor:
        return z.masked_fill(_spread(self.replaced(weight)), 0)


class SumMix(Mix):
    """Ablation 3: "directly summing activations (discarding the 1st term in Equation 6)".

    No channel goes on as it is: every modality gets the sum of all modalities' activations, in every channel.
    """

    def forward(self, z: Tensor, weight: Tensor) -> Tensor:
        return z.sum(0, keepdim=True).expand_as(z)


class GatedSumMix(Mix):
    """Ablation 3, "summing with a learnt soft gate": ``sum over m of sigmoid(gate[m, c]) * z[m, c]``.

    The paper does not describe the gate. This one is the smallest there is: a number per channel and
    modality, 0 at first, so that two modalities begin as their mean.
    """

    def __init__(self, num_modalities: int, channels: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(num_modalities, channels))

    def forward(self, z: Tensor, weight: Tensor) -> Tensor:
        return (_spread(self.gate.sigmoid()).to(z.dtype) * z).sum(0, keepdim=True).expand_as(z)


class MixedNorm(ExchangeNorm):
    """Mixin: an exchange point that mixes otherwise than by Eq. 6: norm, mix, residual, activation.

    Args:
        mix: makes of the normalized activations what goes on.
        activation, negative_slope: after the residual, as in ``cen_ext.norm_exchange``.
        options: as in ``cen_ext.ExchangeBatchNorm2d``.
    """

    def __init__(
        self,
        num_features: int,
        num_modalities: int,
        *,
        mix: Mix,
        activation: str = "identity",
        negative_slope: float = 0.01,
        **options: Any,
    ) -> None:
        # The private norms, no more; the slope waits for the activation after the mix.
        super().__init__(num_features, num_modalities, negative_slope=negative_slope, **options)
        self.mix = mix
        self.mixed_activation = activation

    @property
    def exchanges(self) -> bool:
        """Whether this layer replaces channels, be it by zeros."""
        return self.mix.replaces

    def replaced(self) -> Tensor:
        return self.mix.replaced(self.weight)

    def check_subset(self) -> None:
        raise ValueError(f"{type(self).__name__} mixes all modalities and cannot do without one")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = super().forward(x).unflatten(0, (self.num_modalities, -1))
        u = self.mix(z, self.weight).flatten(0, 1)
        if residual is not None:
            u = u + residual.to(u.dtype)
        return ACTIVATIONS[self.mixed_activation].value(u, self.negative_slope)


class MixedBatchNorm2d(MixedNorm, ExchangeBatchNorm2d):
    """Batch norm with a mix, a ``MixedNorm``."""


class MixedInstanceNorm2d(MixedNorm, ExchangeInstanceNorm2d):
    """Instance norm with a mix, a ``MixedNorm``."""


_MIXED: dict[MakeLayer, type[MixedNorm]] = {
    ExchangeBatchNorm2d: MixedBatchNorm2d,
    ExchangeInstanceNorm2d: MixedInstanceNorm2d,
}


@dataclass(frozen=True)
class _Ablation(Fusion):
    """Base: the exchange points of some blocks mix otherwise."""

    penalty: Penalty = option("none", PENALTY_HELP)
    at: At = option("every", AT_HELP, carried=True)
    convolutions: Convolutions = option("shared", CONVOLUTIONS_HELP)

    def point(self, channels: int, streams: int, layer: MakeLayer, options: dict[str, Any]) -> ExchangeNorm:
        """Make one exchange point, of the layer's kind and with its options."""
        raise NotImplementedError

    def check(self, num_modalities: int) -> None:
        check_several(self, num_modalities)

    def norm(
        self,
        channels: int,
        streams: int,
        *,
        exchange_point: bool = False,
        downsampling: bool = False,
        layer: MakeLayer = ExchangeBatchNorm2d,
        **options: Any,
    ) -> ExchangeNorm:
        if not exchange_point or (self.at == "downsampling" and not downsampling):
            return layer(channels, streams, **options)
        return mark(self.point(channels, streams, layer, options))

    def private_convolutions(self, stage: int) -> bool:
        return self.convolutions == "private"

    def penalty_on_scales(self, net: nn.Module) -> Tensor:
        return scale_penalty(net, self.penalty)


@dataclass(frozen=True)
class _Mixing(_Ablation):
    """Base: those whose exchange points are norms with a mix."""

    def mix(self, channels: int, num_modalities: int) -> Mix:
        """Make the mix of one exchange point."""
        raise NotImplementedError

    def point(self, channels: int, streams: int, layer: MakeLayer, options: dict[str, Any]) -> ExchangeNorm:
        if layer not in _MIXED:
            raise ValueError(f"fusion={self.name} needs a network of batch or instance norms")
        return _MIXED[layer](channels, streams, mix=self.mix(channels, streams), **options)


@register_fusion
@dataclass(frozen=True)
class FixedPortion(_Ablation):
    """Replaces a fixed share of the channels by the others' mean, whatever their scales (ablations 1 and 5).

    Raises:
        ValueError: a portion outside (0, 1]; one above 1/M with ``region="own"``; an unknown choice.
    """

    choice: Literal["first", "smallest", "random"] = option(
        "first", "first channels of the region, those of smallest scale, or random ones that are kept"
    )
    portion: float = option(0.3, "share of the channels that each modality replaces")
    region: Literal["own", "all"] = option("own", REGION_HELP, carried=True)

    name: ClassVar[str] = "fixed_portion"
    subsets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.portion <= 1:
            raise ValueError(f"portion must be above 0 and at most 1, got {self.portion}")

    def check(self, num_modalities: int) -> None:
        super().check(num_modalities)
        if self.region == "own" and self.portion * num_modalities > 1:
            raise ValueError(
                f"portion must be at most 1/{num_modalities} with {num_modalities} modalities and "
                f"region=own, got {self.portion}"
            )

    def point(self, channels: int, streams: int, layer: MakeLayer, options: dict[str, Any]) -> ExchangeNorm:
        mask = FixedPortionMask(self.choice, streams, channels, self.portion, self.region)
        return layer(channels, streams, mask=mask, **options)


@register_fusion
@dataclass(frozen=True)
class Discard(_Mixing):
    """Sets channels of small scale to zero instead of exchanging them (ablation 5).

    Raises:
        ValueError: a negative threshold, a text that is no factor of the median, an unknown choice.
    """

    threshold: Threshold = option(0.02, f"channels of a smaller scale are zero{THRESHOLD_HELP}", carried=True)
    region: Literal["own", "all"] = option("own", REGION_HELP, carried=True)
    criterion: Literal["abs", "signed"] = option("abs", CRITERION_HELP, carried=True)
    penalty: Penalty = option("own", PENALTY_HELP)

    name: ClassVar[str] = "discard"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule(self.threshold, self.region, self.criterion)

    def mix(self, channels: int, num_modalities: int) -> Mix:
        return DiscardMix(threshold_at_ones(self.threshold), self.region, self.criterion)

    def penalty_on_scales(self, net: nn.Module) -> Tensor:
        return scale_penalty(net, self.penalty if threshold_at_ones(self.threshold) > 0 else "none")


@register_fusion
@dataclass(frozen=True)
class Sum(_Mixing):
    """Sums the modalities' activations (ablation 3)."""

    name: ClassVar[str] = "sum"

    def mix(self, channels: int, num_modalities: int) -> Mix:
        return SumMix()


@register_fusion
@dataclass(frozen=True)
class GatedSum(_Mixing):
    """Sums the modalities' activations with a learned soft gate (ablation 3)."""

    name: ClassVar[str] = "gated_sum"

    def mix(self, channels: int, num_modalities: int) -> Mix:
        return GatedSumMix(num_modalities, channels)


def _spread(table: Tensor) -> Tensor:
    """``[M, C]`` to ``[M, 1, C, 1, 1]``."""
    return table[:, None, :, None, None]
