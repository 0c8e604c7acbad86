"""A system of one's own: a whole network that joins its modalities in its own way, with a side output.

cen train examples.own_system:recipe data.root=ROOT
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from models.networks.fusion import NoFusion
from models.networks.systems import Logits, System
from models.segmentation.recipes import synthetic_demo
from models.segmentation.settings import SegmentationRecipe


@models.register_system
class OwnSystem(System):
    """Adds the modalities at 1/4; classifies there and, in training, at 1/8; ``model.network=own_system``."""

    encoders = ("convs",)
    options = ("dropout", "width")
    sides = 1

    def __init__(self, num_classes: int, channels: Sequence[int], *, dropout: float, width: int) -> None:
        super().__init__(num_classes, channels)
        self.encoder = nn.ModuleList(nn.Conv2d(count, width, 5, 4, padding=2) for count in channels)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(width, width, 3, 2, padding=1)
        self.side = nn.Conv2d(width, num_classes, 1)
        self.classifier = nn.Conv2d(2 * width, num_classes, 1)

    def logits(self, images: Sequence[Tensor]) -> Logits:
        fine = sum(conv(image) for conv, image in zip(self.encoder, images, strict=True)).relu()
        coarse = self.conv(fine).relu()
        enlarged = F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
        output = self.classifier(self.dropout(torch.cat([fine, enlarged], 1)))
        return Logits(output, (self.side(coarse),) if self.training else ())


def recipe() -> SegmentationRecipe:
    """Trains the demo with this system."""
    demo = synthetic_demo()
    return replace(
        demo,
        model=replace(demo.model, network="own_system", encoder="convs", initial_scale=None),
        fusion=NoFusion(),
    )
