"""Layers that several decoders are built of."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from models.networks.encoders.base import NormLayer

INITS = ("torch", "kaiming")


class ConvNorm(nn.Module):
    """Convolution, norm, relu."""

    def __init__(self, conv: nn.Conv2d, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm_layer(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y


def initialize(init: str, convolutions: Iterable[nn.Conv2d | None]) -> None:
    """Start a decoder's convolutions as torch makes them, or so that they keep the scale of activations.

    Args:
        init: ``"torch"`` or ``"kaiming"``.
        convolutions: None among them counts for nothing.

    Raises:
        ValueError: another init.
    """
    if init not in INITS:
        raise ValueError(f"decoder_init must be 'torch' or 'kaiming', got {init!r}")
    for conv in convolutions:
        if conv is not None and init == "kaiming":
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
