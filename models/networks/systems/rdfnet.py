"""RDFNet: a ResNet for each of RGB and HHA, whose features a block joins at every level, and a RefineNet.

Park, Hong and Lee, "RDFNet: RGB-D Multi-Level Residual Feature Fusion for Indoor Semantic Segmentation", ICCV
2017, in the layout of the test networks that its authors published for Caffe. On ResNet-50, 101 and 152 with
40 classes it has 149,143,080, 187,127,208 and 218,414,504 parameters.

AsymFusion's table counts another one, of 366,714,792 and 398,002,088 parameters: the fusion block at the full
width of the features, before CEN's decoder. That is ``refinenet(..., fusion="mmf")``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.networks.decoders.refinenet import RefineNetBlock, RefineNetDecoder
from models.networks.encoders.resnet import ExchangeResNet
from models.networks.encoders.streams import ResNetStreams
from models.networks.fusion.exchange import NoFusion
from models.networks.fusion.stages import MMFJoin, ResidualUnit
from models.networks.systems.base import Logits, System, register_system

WIDTH = 256  # of the three finer levels; the coarsest has twice as many channels
DEVIATION = 0.01  # of the initial weights


class RDFNetBlock(RefineNetBlock):
    """One level: join the two streams' features, adapt, join the coarser level, pool, refine.

    Beside CEN's RefineNet the skips of residual units carry x as it is, the chained pooling is half as long,
    and the coarser level is resized by bicubic interpolation. Ours: its corners are aligned, as there.
    """

    unit = ResidualUnit
    links = 2
    resizing = "bicubic"

    def reduction(self, in_channels: int, channels: int) -> nn.Module:
        return MMFJoin(in_channels, 2, channels)


class RDFNetDecoder(RefineNetDecoder):
    """Four cascades of ``RDFNetBlock`` and a 1x1 classifier; its features are pairs.

    Args:
        in_channels: channels of the four features, finest first, the same in both streams.
        num_classes: K.
        width: as ``WIDTH``.
        dropout: probability, on all features and before the classifier.
    """

    block = RDFNetBlock

    def __init__(self, in_channels: Sequence[int], num_classes: int, width: int, dropout: float) -> None:
        super().__init__(in_channels, num_classes, width, dropout, init="torch")
        self.classifier = nn.Conv2d(width, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=DEVIATION)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def levels(self, features: Sequence[Any]) -> Sequence[Any]:
        return [[self.dropout(stream) for stream in streams] for streams in reversed(features)]


@register_system
class RDFNet(System):
    """RDFNet for RGB and HHA, or another second modality; logits at 1/4.

    Its encoders are Caffe's ResNets: stride in the first convolution of a bottleneck, and max pooling without
    padding, whose last windows may reach over the edge. Pretrained weights go into both. For those that were
    trained with padding, such as torchvision's, the pooled grid is moved by half a pixel of it.

    ``from_released`` refuses: of the published Caffe models the names within a level are not known.

    Args:
        num_classes: K.
        channels: of the two modalities' images: 1 or 3 each.
        encoder: one of ``encoders``.
        dropout: probability, on all features and before the classifier.
        frozen_statistics: the encoders' norms use their running statistics in training too.

    Raises:
        ValueError: as ``System``.
    """

    name: ClassVar[str] = "rdfnet"
    encoders: ClassVar[tuple[str, ...]] = ("resnet50_v1", "resnet101_v1", "resnet152_v1")
    options: ClassVar[tuple[str, ...]] = ("dropout", "frozen_statistics")
    least: ClassVar[int] = 35
    takes: ClassVar[tuple[int, ...]] = (2,)

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[int],
        encoder: str = encoders[0],
        dropout: float = 0.5,
        frozen_statistics: bool = True,
    ) -> None:
        super().__init__(num_classes, channels)
        rgb, depth = (_caffe_resnet(encoder, count, frozen_statistics) for count in channels)
        self.encoder = ResNetStreams(rgb=rgb, depth=depth)
        self.decoder = RDFNetDecoder(rgb.channels, num_classes, WIDTH, dropout)

    def logits(self, images: Sequence[Tensor]) -> Logits:
        return Logits(self.decoder(self.encoder(images)))


def _caffe_resnet(name: str, in_channels: int, frozen_statistics: bool) -> ExchangeResNet:
    """One of ``RDFNet.encoders``."""
    resnet = ExchangeResNet(
        name.removesuffix("_v1"),
        1,
        NoFusion(),
        in_channels=in_channels,
        frozen_statistics=frozen_statistics,
        strided="1x1",
    )
    # Zeros do not win over what relu leaves. With ceil_mode instead, exported programs would have one size.
    resnet.maxpool = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, stride=2))
    if name == "resnet50_v1":  # alone among Caffe's, its first convolution has a bias before the norm
        resnet.conv1.bias = nn.Parameter(torch.zeros(resnet.conv1.out_channels))
    return resnet
