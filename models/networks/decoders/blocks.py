"""Layers that several decoders are built of."""

from __future__ import annotations

from torch import Tensor, nn

from models.networks.encoders.base import NormLayer


class ConvNorm(nn.Module):
    """Convolution, norm, relu."""

    def __init__(self, conv: nn.Conv2d, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm_layer(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y
