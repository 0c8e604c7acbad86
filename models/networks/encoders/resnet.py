"""ResNet encoders for M modalities that share every convolution and exchange channels.

Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020, section 3.3 and 3.4: convolutions
shared, norms private, an exchange after the norm of every 3x3 convolution. All modalities run stacked on the
batch axis, so that each convolution is one call and each norm, exchange, residual and relu is one more.
Modules and parameters carry torchvision's names; the stride sits in the 3x3 convolution, as there. In the
encoders ``resnet50_v1`` to ``resnet152_v1`` it sits in the 1x1 convolution before it, as in He et al., "Deep
Residual Learning for Image Recognition", CVPR 2016, and in Caffe: weights fit the form they were trained in.

A dilated network (Yu et al., "Dilated Residual Networks", CVPR 2017) keeps the grid of stage 2 to the end: at
every second (stage 3) or fourth (stage 4) position it computes exactly what the strided one computes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol

from torch import Tensor, nn

from cen_ext import Conv3x3
from models.networks.encoders.base import ENCODERS, STRIDES, Encoder, NormLayer, feature_strides
from models.networks.fusion.base import Fusion, Lateral, resolve
from models.networks.fusion.exchange import Exchange
from models.networks.messages import suggest

Strided = Literal["1x1", "3x3"]
Dilations = tuple[int, int]  # for the grid on which a block starts, and the one on which it ends


class Block(Protocol):
    """A class of blocks: what makes one, and by how many times its width its output has more channels."""

    expansion: int

    def __call__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        dilations: Dilations,
        norm_layer: NormLayer,
        lateral: Lateral | None = None,
        strided: Strided = "3x3",
    ) -> nn.Module: ...


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; both norms exchange, the second before the skip is added."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        dilations: Dilations,
        norm_layer: NormLayer,
        lateral: Lateral | None = None,
        strided: Strided = "3x3",
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width, stride, dilations[0])
        self.bn1 = norm_layer(width, exchange_point=True)
        self.conv2: nn.Module = _conv3x3(width, width, 1, dilations[1])  # transposed in ACNet's decoder
        self.bn2 = norm_layer(width, exchange_point=True)
        self.downsample = downsample(in_channels, width, stride, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        y: Tensor = self.bn2(self.conv2(x), skip)
        return y


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the norm of the 3x3 exchanges.

    Args:
        lateral: what the fusion does around the 3x3 convolution, in a block of stride 1.
        strided: the convolution that has the block's stride.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        dilations: Dilations,
        norm_layer: NormLayer,
        lateral: Lateral | None = None,
        strided: Strided = "3x3",
    ) -> None:
        super().__init__()
        lateral = lateral or Lateral()
        out_channels = self.expansion * width
        first, second = (stride, 1) if strided == "1x1" else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = norm_layer(width, **lateral.before)
        self.conv2 = _conv3x3(width, width, second, dilations[0])
        self.bn2 = norm_layer(width, exchange_point=True, **lateral.after)
        self.join = lateral.join
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm_layer(out_channels)
        self.downsample = downsample(in_channels, out_channels, stride, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        inner = self.bn2(self.conv2(x))
        x = inner if self.join is None else self.join(x, inner)
        y: Tensor = self.bn3(self.conv3(x), skip)
        return y


def _conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int) -> nn.Conv2d:
    if stride == 1:
        return Conv3x3(in_channels, out_channels, dilation, bias=False)
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


def downsample(
    in_channels: int, out_channels: int, stride: int, norm_layer: NormLayer
) -> nn.Sequential | None:
    """The skip's projection, where shapes differ."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        norm_layer(out_channels, activation="identity"),
    )


STEM_WIDTH = 64
WIDTHS = (64, 128, 256, 512)  # inner ones, of the four stages

# name -> (block, blocks of the four stages)
RESNETS: dict[str, tuple[Block, tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class ExchangeResNet(Encoder):
    """A ResNet whose M modalities share convolutions and exchange channels.

    A fusion may act after its stem, before the pooling, at half of the resolution.

    Args:
        name: ``"resnet18"``, ``"resnet34"``, ``"resnet50"``, ``"resnet101"`` or ``"resnet152"``.
        num_modalities: M >= 1; 1 is a plain ResNet.
        fusion: a ``Fusion`` or a registered name; None for ``Exchange(threshold, region, criterion)``.
        threshold, region, criterion: of the exchange, as ``cen_ext.norm_exchange`` describes them, or as
            ``Exchange`` a threshold ``"0.05*median"``.
        in_channels: channels of every modality's input.
        frozen_statistics: ``train()`` leaves the norms in eval mode: running statistics are used and not
            updated, while weight and bias train. The paper's recipe for segmentation from ImageNet weights.
        output_stride: of stage 4: 32; or 16 or 8, where stage 4 or stages 3 and 4 keep the grid of the stage
            before, with dilation instead of strides.
        dilated: the older spelling of ``output_stride=8``.
        strided: the convolution of a bottleneck that halves the resolution: ``"3x3"`` as in torchvision's
            networks, or ``"1x1"`` as in the first ones. Basic blocks have it in the first convolution.

    Attributes:
        variants: what the names stand for.

    Raises:
        ValueError: unknown name, region, criterion or output stride; negative threshold; num_modalities or
            in_channels below 1; a fusion that contradicts itself, or beside threshold, region or criterion.
    """

    weights_kind = "a torchvision ResNet"
    variants: ClassVar[Mapping[str, tuple[Block, tuple[int, int, int, int]]]] = RESNETS

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        name: str = "resnet101",
        num_modalities: int = 2,
        fusion: Fusion | str | None = None,
        *,
        threshold: float | str | None = None,
        region: str | None = None,
        criterion: str | None = None,
        in_channels: int = 3,
        frozen_statistics: bool = True,
        output_stride: int = STRIDES[-1],
        dilated: bool = False,
        strided: Strided = "3x3",
    ) -> None:
        if name not in self.variants:
            hint = suggest(str(name), self.variants)
            raise ValueError(f"encoder must be one of {', '.join(self.variants)}, got {name!r}{hint}")
        block, depths = self.variants[name]
        super().__init__(
            num_modalities,
            resolve(
                fusion, Exchange(), num_modalities, threshold=threshold, region=region, criterion=criterion
            ),
            channels=[block.expansion * width for width in WIDTHS],
            strides=feature_strides(output_stride, dilated),
            in_channels=in_channels,
            frozen_statistics=frozen_statistics,
            asks_for_lateral=block is Bottleneck,
            stem_channels=STEM_WIDTH,
        )
        self.conv1 = nn.Conv2d(in_channels, STEM_WIDTH, 7, stride=2, padding=3, bias=False)
        self.bn1 = self.norm_layer(0)(STEM_WIDTH)
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        channels, dilation = STEM_WIDTH, 1
        for stage, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True), 1):
            blocks = []
            for i in range(depth):
                # The block halves the resolution, or in a dilated network doubles the dilation instead.
                downsampling = stage > 1 and i == 0
                widens = downsampling and self.strides[stage - 1] == self.strides[stage - 2]
                before, dilation = dilation, 2 * dilation if widens else dilation
                stride = 2 if downsampling and not widens else 1
                norm_layer = self.norm_layer(stage, downsampling=downsampling)
                lateral = self.fusion.lateral(width, num_modalities) if i == depth - 1 else None
                blocks.append(
                    block(channels, width, stride, (before, dilation), norm_layer, lateral, strided)
                )
                channels = block.expansion * width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.finish()

    def stem(self, x: Tensor) -> Tensor:
        x, _ = self.fuse(0, self.bn1(self.conv1(x)))
        y: Tensor = self.maxpool(x)
        return y

    def stages(self) -> Sequence[nn.Module]:
        return (self.layer1, self.layer2, self.layer3, self.layer4)


for _name, (_block, _) in RESNETS.items():
    ENCODERS.members[_name] = functools.partial(ExchangeResNet, _name)
    if _block is Bottleneck:
        ENCODERS.members[f"{_name}_v1"] = functools.partial(ExchangeResNet, _name, strided="1x1")
