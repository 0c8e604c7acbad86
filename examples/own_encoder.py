"""An encoder of one's own: five plain 3x3 convolutions, each followed by the fusion's norm.

cen train examples.own_encoder:recipe data.root=ROOT fusion.threshold=0.05
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

import models
from models.networks.encoders import Encoder
from models.networks.fusion import Fusion
from models.segmentation.recipes import synthetic_demo
from models.segmentation.settings import SegmentationRecipe

WIDTHS = (16, 32, 48, 64)


class ConvNorm(nn.Module):
    """3x3 convolution of stride 2 and the norm after it, which may exchange."""

    def __init__(self, in_channels: int, norm: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, 2, padding=1, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@models.register_encoder
class PlainNet(Encoder):
    """A chain of convolutions; ``model.encoder=plain_net`` on the command line."""

    stem_weight = "first.conv.weight"

    def __init__(self, num_modalities: int, fusion: Fusion, **options: object) -> None:
        super().__init__(num_modalities, fusion, channels=WIDTHS, strides=(4, 8, 16, 32), **options)
        self.first = ConvNorm(self.in_channels, self.norm_layer(0)(16), 16)
        layers = []
        for stage, (before, width) in enumerate(zip((16, *WIDTHS), WIDTHS, strict=False), 1):
            norm = self.norm_layer(stage, downsampling=True)(width, exchange_point=True)
            layers.append(ConvNorm(before, norm, width))
        self.layers = nn.ModuleList(layers)
        self.finish()

    def stem(self, x: Tensor) -> Tensor:
        return self.first(x)

    def stages(self) -> Sequence[nn.Module]:
        return tuple(self.layers)


def recipe() -> SegmentationRecipe:
    """Trains the demo on this encoder."""
    demo = synthetic_demo()
    return replace(demo, model=replace(demo.model, encoder="plain_net"))
