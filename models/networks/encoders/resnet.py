"""ResNet encoders for M modalities that share every convolution and exchange channels.

Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020, section 3.3 and 3.4: convolutions
shared, norms private, an exchange after the norm of every 3x3 convolution. All modalities run stacked on the
batch axis, so that each convolution is one call and each norm, exchange, residual and relu is one more.
Modules and parameters carry torchvision's names; the stride sits in the 3x3 convolution, as there.

A dilated network (Yu et al., "Dilated Residual Networks", CVPR 2017) keeps the grid of stage 2 to the end: at
every second (stage 3) or fourth (stage 4) position it computes exactly what the strided one computes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cen_ext import Conv3x3, ExchangeBatchNorm2d
from models.networks.branches import stacked_input
from models.networks.encoders.norms import Norms
from models.networks.encoders.variants import Variant
from models.networks.messages import suggest

Dilations = tuple[int, int]  # that fit the grid on which a block starts, and the one on which it ends


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; both norms exchange, the second before the skip is added."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, dilations: Dilations, norms: Norms) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width, stride, dilations[0])
        self.bn1 = norms(width, exchange=True)
        self.conv2 = _conv3x3(width, width, 1, dilations[1])
        self.bn2 = norms(width, exchange=True)
        self.downsample = _downsample(in_channels, width, stride, norms)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(x), skip)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the norm of the 3x3 exchanges."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, dilations: Dilations, norms: Norms) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norms(width)
        self.conv2 = _conv3x3(width, width, stride, dilations[0])
        self.bn2 = norms(width, exchange=True)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norms(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride, norms)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x))
        return self.bn3(self.conv3(x), skip)


def _conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int) -> nn.Conv2d:
    if stride == 1:
        return Conv3x3(in_channels, out_channels, dilation, bias=False)
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


def _downsample(in_channels: int, out_channels: int, stride: int, norms: Norms) -> nn.Sequential | None:
    """The skip's projection, where shapes differ."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        norms(out_channels, activation="identity"),
    )


# name -> (block, blocks of the four stages)
RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class ExchangeResNet(nn.Module):
    """A ResNet whose M modalities share convolutions and exchange channels; returns four stages' features.

    Args:
        name: ``"resnet18"``, ``"resnet34"``, ``"resnet50"``, ``"resnet101"`` or ``"resnet152"``.
        num_modalities: M >= 1; 1 is a plain ResNet.
        threshold, region, criterion: of the exchange, as ``cen_ext.norm_exchange`` describes them.
        in_channels: channels of every modality's input.
        frozen_statistics: ``train()`` leaves the norms in eval mode: running statistics are used and not
            updated, while weight and bias train. The paper's recipe for segmentation from ImageNet weights.
        dilated: stages 3 and 4 keep the grid of stage 2, with dilation instead of strides.
        variant: whether norms are private, where and what is exchanged. Its convolutions, penalty and fusion
            are the whole network's and do nothing here.

    Attributes:
        channels: widths of the four stages' features.
        norms: makes norms of the same kind, for what follows the encoder.

    Raises:
        ValueError: unknown name, region or criterion; negative threshold; num_modalities or in_channels
            below 1; a variant that contradicts itself.
    """

    def __init__(
        self,
        name: str = "resnet101",
        num_modalities: int = 2,
        *,
        threshold: float = 0.02,
        region: str = "own",
        criterion: str = "abs",
        in_channels: int = 3,
        frozen_statistics: bool = True,
        dilated: bool = False,
        variant: Variant | None = None,
    ) -> None:
        super().__init__()
        if name not in RESNETS:
            hint = suggest(str(name), RESNETS)
            raise ValueError(f"encoder must be one of {', '.join(RESNETS)}, got {name!r}{hint}")
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        variant = variant or Variant()
        norms = Norms(num_modalities, threshold, region, criterion, variant)
        norms.check()
        block, depths = RESNETS[name]
        self.num_modalities = num_modalities
        self.in_channels = in_channels
        self.frozen_statistics = frozen_statistics
        self.channels = tuple(block.expansion * width for width in (64, 128, 256, 512))
        self.norms = norms

        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = norms(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, dilation = 64, 1
        for stage, depth in enumerate(depths):
            width = 64 << stage
            blocks = []
            for i in range(depth):
                halves = stage > 0 and i == 0  # the resolution, or by dilation that of the strided network
                dilates = halves and dilated and stage >= 2
                before, dilation = dilation, 2 * dilation if dilates else dilation
                stride = 2 if halves and not dilates else 1
                here = norms._replace(points=halves or variant.exchange_at == "every")
                blocks.append(block(channels, width, stride, (before, dilation), here))
                channels = block.expansion * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def train(self, mode: bool = True) -> ExchangeResNet:
        """As ``nn.Module.train``, but with ``frozen_statistics`` the norms stay in eval mode."""
        super().train(mode)
        if self.frozen_statistics:
            for module in self.modules():
                if isinstance(module, ExchangeBatchNorm2d):
                    module.eval()
        return self

    def forward(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Features at 1/4, 1/8, 1/16 and 1/32 of the input's size; at 1/4, 1/8, 1/8 and 1/8 if dilated.

        Args:
            x: ``[M*N, in_channels, H, W]`` stacked modality-major, or a sequence of M tensors
                ``[N, in_channels, H, W]``.

        Returns:
            Four ``[M*N, channels[i], h, w]``.

        Raises:
            ValueError: another number of modalities or channels, or modalities of different shapes.
        """
        x = stacked_input(x, self.num_modalities, self.in_channels)
        x = self.bn1(self.conv1(x))
        x = self.maxpool(x)
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features
