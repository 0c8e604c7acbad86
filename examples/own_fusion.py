"""A fusion of one's own: concatenation and a 1x1 convolution after stage 3, one stream from there.

cen train examples.own_fusion:recipe data.root=ROOT fusion.stage=2
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

import models
from models.fusion import Fusion, FusionStage, option
from models.segmentation.recipes import synthetic_demo
from models.segmentation.settings import SegmentationRecipe


class FirstToDecoder(FusionStage):
    """Passes all streams on, and the first modality's feature to the decoder."""

    def __init__(self, num_modalities: int) -> None:
        super().__init__()
        self.num_modalities = num_modalities

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.chunk(self.num_modalities)[0]


class Concat(FusionStage):
    """Joins M streams ``[M*N, C, h, w]`` to one, ``[N, C, h, w]``."""

    def __init__(self, channels: int, num_modalities: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(num_modalities * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        modalities = self.reduce.in_channels // self.reduce.out_channels
        fused = self.reduce(x.unflatten(0, (modalities, -1)).transpose(0, 1).flatten(1, 2))
        return fused, fused


@models.register_fusion
@dataclass(frozen=True)
class ConcatOnce(Fusion):
    """Concatenation after one stage; ``fusion=concat_once`` on the command line."""

    stage: int = option(3, "stage, 1 to 4, after which the modalities are concatenated")

    def streams(self, stage: int, num_modalities: int) -> int:
        return 1 if stage >= self.stage else num_modalities

    def after_stage(self, stage: int, channels: int, num_modalities: int) -> FusionStage | None:
        if stage < self.stage:
            return FirstToDecoder(num_modalities)
        return Concat(channels, num_modalities) if stage == self.stage else None


def recipe() -> SegmentationRecipe:
    """Trains the demo with one concatenation instead of the exchange."""
    return replace(synthetic_demo(), fusion=ConcatOnce())
