"""The norms of a multimodal network: private ones, and those after which channels are exchanged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cen_ext import ExchangeBatchNorm2d, replaced_channels
from models.networks.encoders.ablations import Discard, FixedPortion, GatedSum, Mix, Sum
from models.networks.encoders.variants import MIXES, Variant


class ExchangePoint(ExchangeBatchNorm2d):
    """The norm of a 3x3 convolution of the encoder: where the paper exchanges channels and penalises scales.

    A type of its own, so that those norms are known in a network that does neither.
    """


class MixingPoint(ExchangePoint):
    """An exchange point that mixes otherwise than by Eq. 6: norm, ``mix``, residual, activation.

    Args:
        num_features, num_modalities: C and M.
        mix: what to do with the normalised activations.
        activation: ``"identity"`` or ``"relu"``, after the residual.
    """

    def __init__(self, num_features: int, num_modalities: int, mix: Mix, activation: str) -> None:
        super().__init__(num_features, num_modalities)  # private norms, no more
        self.mix = mix
        self.rectifies = activation == "relu"

    @property
    def exchanges(self) -> bool:
        """Whether this layer replaces channels, be it by zeros."""
        return isinstance(self.mix, FixedPortion) or (
            isinstance(self.mix, Discard) and self.mix.threshold > 0
        )

    def replaced(self) -> Tensor:
        return self.mix.replaced(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = super().forward(x).unflatten(0, (self.num_modalities, -1))
        u = self.mix(z, self.weight).flatten(0, 1)
        if residual is not None:
            u = u + residual
        return F.relu(u) if self.rectifies else u


class Norms(NamedTuple):
    """Makes the norms of one network, which differ only in channels, exchange and activation.

    Attributes:
        num_modalities: M.
        threshold, region, criterion: of the exchange, as ``cen_ext.norm_exchange`` describes them.
        variant: whether norms are private, and what happens at exchange points.
        points: whether ``exchange=True`` is heeded.
    """

    num_modalities: int
    threshold: float
    region: str
    criterion: str
    variant: Variant
    points: bool = True

    def check(self) -> None:
        """Refuse what the norms would refuse at the first batch only.

        Raises:
            ValueError: a negative threshold, an unknown region or criterion; the variant contradicts itself.
        """
        replaced_channels(torch.ones(1, 1), self.threshold, self.region, self.criterion)
        self.variant.check(self.num_modalities, self.region)

    def __call__(
        self, channels: int, *, exchange: bool = False, activation: str = "relu"
    ) -> ExchangeBatchNorm2d:
        # A norm that all modalities share is a single modality's, whose batch is the whole stack.
        num_modalities = 1 if self.variant.norms == "shared" else self.num_modalities
        if not (exchange and self.points):
            return ExchangeBatchNorm2d(channels, num_modalities, activation=activation)
        if self.variant.exchange in MIXES:
            return MixingPoint(channels, num_modalities, self._mix(channels), activation)
        return ExchangePoint(
            channels,
            num_modalities,
            threshold=self.threshold if self.variant.exchange == "threshold" else 0.0,
            region=self.region,
            criterion=self.criterion,
            activation=activation,
        )

    def _mix(self, channels: int) -> Mix:
        kind = self.variant.exchange
        if kind == "discard":
            return Discard(self.threshold, self.region, self.criterion)
        if kind == "sum":
            return Sum()
        if kind == "gated_sum":
            return GatedSum(self.num_modalities, channels)
        return FixedPortion(kind, self.num_modalities, channels, self.variant.portion, self.region)
