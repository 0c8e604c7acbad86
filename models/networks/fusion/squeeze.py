"""ESANet's fusion: modalities reweighted channel by channel and added, after the stem and after each stage.

Seichter et al., "Efficient RGB-D Semantic Segmentation for Indoor Scene Analysis", ICRA 2021: each of two
encoders' features goes through a squeeze-and-excitation block of its own (Hu et al., "Squeeze-and-Excitation
Networks", CVPR 2018) and their sum goes on in the encoder of colors, that of depth going on as it was. They
fuse at five resolutions, the finest being the stem's, half of the image's, before the pooling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.networks.fusion.base import option, register_fusion
from models.networks.fusion.stages import SETTING_HELP, Join, JoiningFusion, Setting

REDUCTION = 16  # channels for each channel of the bottleneck, as in Hu et al.


class SqueezeExcitation(nn.Module):
    """``x * sigmoid(W2 relu(W1 mean(x) + b1) + b2)``, the mean over the image; C/16 hidden channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // REDUCTION, 1)
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` to the like of it."""
        mean = x.mean((2, 3), keepdim=True)
        y: Tensor = x * self.excite(F.relu(self.squeeze(mean))).sigmoid()
        return y


class SEAddJoin(Join):
    """The sum of the streams, each reweighted by a squeeze-and-excitation block of its own.

    ``M (C²/8 + C/16 + C)`` parameters.
    """

    def __init__(self, channels: int, num_modalities: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(SqueezeExcitation(channels) for _ in range(num_modalities))

    def forward(self, streams: Tensor) -> Tensor:
        parts = [gate(stream) for gate, stream in zip(self.gates, streams, strict=True)]
        return torch.stack(parts).sum(0)


@register_fusion
@dataclass(frozen=True)
class SEAdd(JoiningFusion):
    """Adds the modalities' features, reweighted by squeeze-and-excitation blocks (ESANet).

    By default as there: separate encoders, whose features join after the stem and after each stage, the sum
    going on in the first one and to the decoder. Encoders without a place after their stem take
    ``stages=(1, 2, 3, 4)``.
    """

    stages: tuple[int, ...] = option(
        (0, 1, 2, 3, 4), "encoder stages after which the modalities meet, 0 for the stem; levels of a U-Net"
    )
    setting: Setting = option("separate", SETTING_HELP, carried=True)

    name: ClassVar[str] = "se_add"
    first_stage: ClassVar[int] = 0

    @property
    def after_stem(self) -> bool:
        return 0 in self.stages

    def join(self, channels: int, num_modalities: int) -> Join:
        return SEAddJoin(channels, num_modalities)
