"""Conditional batch norm: the first modality modulates the norms of the others.

De Vries et al., "Modulating early visual processing by language", NeurIPS 2017, as Wang et al., NeurIPS 2020,
section 4.1, compare with it: depth modulated by RGB. Where and of what is not described; here it is done at
the norms where the paper exchanges, from the mean over the image of what the first modality's norm returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cen_ext import ExchangeBatchNorm2d
from cen_ext.modules import ExchangeNorm
from cen_ext.ops.activation import ACTIVATIONS
from models.networks.fusion.base import Fusion, MakeLayer, check_several, mark, option, register_fusion
from models.networks.fusion.exchange import CONVOLUTIONS_HELP, Convolutions


class Modulation(nn.Module):
    """``1.5 C² + 2.5 C`` parameters: what one modality's summary adds to another's scale and shift.

    ``h = relu(W1 e + b1); Δγ = W2 h + b2; Δβ = W3 h + b3`` with C/2 hidden units. W2, b2, W3 and b3 are 0 at
    first, so that training starts from the unconditional norm.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.hidden = nn.Linear(channels, hidden)
        self.scale = nn.Linear(hidden, channels)
        self.shift = nn.Linear(hidden, channels)
        for last in (self.scale, self.shift):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, summary: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, C]`` to Δγ and Δβ, ``[N, C]`` each."""
        h = self.hidden(summary).relu()
        return self.scale(h), self.shift(h)


class ConditionalBatchNorm2d(ExchangeBatchNorm2d):
    """Batch norms of M modalities, all but the first with scales and shifts that the first one adds to.

    ``y_m = (γ_m + Δγ_m) x̂_m + (β_m + Δβ_m)`` for every image, where both additions are made from the mean
    over the image of the first modality's output.

    Args:
        detach: no gradient flows from the others into the first modality through the modulation.
        activation, negative_slope: after the residual, as in ``cen_ext.norm_exchange``.
        options: as in ``cen_ext.ExchangeBatchNorm2d``.
    """

    def __init__(
        self,
        num_features: int,
        num_modalities: int,
        *,
        detach: bool = False,
        activation: str = "identity",
        negative_slope: float = 0.01,
        **options: Any,
    ) -> None:
        # The private norms, no more; the slope waits for the activation after the modulation.
        super().__init__(num_features, num_modalities, negative_slope=negative_slope, **options)
        self.detach = detach
        self.modulated_activation = activation
        self.modulations = nn.ModuleList(Modulation(num_features) for _ in range(num_modalities - 1))

    def check_subset(self) -> None:
        raise ValueError(f"{type(self).__name__} modulates by the first modality and cannot do without one")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        ones, zeros = torch.ones_like(self.weight), torch.zeros_like(self.bias)
        first, *others = self.normalize(x, ones, zeros).chunk(self.num_modalities)
        residuals = [None] * self.num_modalities if residual is None else residual.chunk(self.num_modalities)
        y = [self._finish(first, self.weight[0], self.bias[0], residuals[0])]
        summary = y[0].mean((2, 3))
        summary = summary.detach() if self.detach else summary
        for m, (xhat, modulation) in enumerate(zip(others, self.modulations, strict=True), 1):
            scale, shift = modulation(summary)
            y.append(self._finish(xhat, self.weight[m] + scale, self.bias[m] + shift, residuals[m]))
        return torch.cat(y)

    def _finish(self, xhat: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
        """Scale and shift by ``[C]`` or ``[N, C]``, add the residual, activate."""
        u = xhat * scale[..., None, None].to(xhat.dtype) + shift[..., None, None].to(xhat.dtype)
        u = u if residual is None else u + residual.to(u.dtype)
        return ACTIVATIONS[self.modulated_activation].value(u, self.negative_slope)


@register_fusion
@dataclass(frozen=True)
class ConditionalNorm(Fusion):
    """Modulates the norms of all modalities but the first by the first (section 4.1, "CBN")."""

    modulated: Literal["exchange_points", "every"] = option(
        "exchange_points", "norms: those after the encoder's spatial convolutions, or every one"
    )
    detach: bool = option(False, "let no gradient flow into the first modality through the modulation")
    convolutions: Convolutions = option("shared", CONVOLUTIONS_HELP)

    name: ClassVar[str] = "conditional_norm"

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
        if self.modulated == "exchange_points" and not exchange_point:
            return layer(channels, streams, **options)
        if layer is not ExchangeBatchNorm2d:
            raise ValueError("fusion=conditional_norm needs a network of batch norms")
        norm = ConditionalBatchNorm2d(channels, streams, detach=self.detach, **options)
        return mark(norm) if exchange_point else norm

    def private_convolutions(self, stage: int) -> bool:
        return self.convolutions == "private"
