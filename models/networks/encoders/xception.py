"""Aligned Xception encoders for M modalities that share every convolution.

Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018,
modify Chollet's Xception (CVPR 2017): more middle blocks, strided separable convolutions in the place of
pooling, and a norm after every depthwise convolution. Modules and parameters carry timm's names, but for the
stem, whose name is taken.

Features leave where the resolution is about to be halved, between the second and the third separable
convolution of a block, before the relu: that of 256 channels at 1/4 is the low-level feature of DeepLabv3+.
The stages end there, so that a fusion after a stage acts within a block. The block's skip, which goes around
it, stays as it was; where the fusion leaves fewer streams, it is averaged over those that came in.
"""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext import Conv3x3
from models.networks.branches import stacked_input
from models.networks.encoders.base import (
    STRIDES,
    Encoder,
    Normalization,
    NormLayer,
    feature_strides,
    register_encoder,
)
from models.networks.fusion.base import Fusion, Lateral

EPS = 1e-3  # of the norms, in Chen et al.'s weights and timm's

Widths = tuple[int, int, int]  # channels after each of a block's separable convolutions


class SeparableConv(nn.Module):
    """Depthwise 3x3 and pointwise 1x1 convolution without biases, each followed by a norm.

    Args:
        in_channels, out_channels: of the pointwise convolution.
        norm_layer: makes the norms.
        stride, dilation: of the depthwise convolution.
        activations: after the depthwise and after the pointwise convolution's norm.
        lateral: further options of the latter.
        exchange_point: whether the fusion may exchange after the depthwise convolution, a spatial one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_layer: NormLayer,
        *,
        stride: int = 1,
        dilation: int = 1,
        activations: tuple[str, str] = ("relu", "relu"),
        lateral: Mapping[str, Any] = MappingProxyType({}),
        exchange_point: bool = False,
    ) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(
            in_channels,
            in_channels,
            3,
            stride,
            padding=dilation,
            dilation=dilation,
            groups=in_channels,
            bias=False,
        )
        self.bn_dw = norm_layer(in_channels, exchange_point=exchange_point, activation=activations[0])
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn_pw = norm_layer(out_channels, activation=activations[1], **lateral)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, h, w]``; the residual comes before the relu."""
        x = self.bn_dw(self.conv_dw(x))
        y: Tensor = self.bn_pw(self.conv_pw(x), residual)
        return y


class SeparableStack(nn.Sequential):
    """A block's three separable convolutions, the third with the stride.

    Args:
        in_channels: of the input.
        widths: channels after each separable convolution.
        stride, dilation: of the third one, and of all three.
        norm_layers, activations: of each.
        lateral: what the fusion does around the second one.
    """

    conv1: SeparableConv
    conv2: SeparableConv
    conv3: SeparableConv

    def __init__(
        self,
        in_channels: int,
        widths: Widths,
        stride: int,
        dilation: int,
        norm_layers: Sequence[NormLayer],
        activations: Sequence[tuple[str, str]],
        lateral: Lateral,
    ) -> None:
        super().__init__()
        around: tuple[Mapping[str, Any], ...] = (lateral.before, lateral.after, {})
        parts = zip((in_channels, *widths), widths, norm_layers, activations, around, strict=False)
        for number, (before, width, norm_layer, each, options) in enumerate(parts, 1):
            conv = SeparableConv(
                before,
                width,
                norm_layer,
                stride=stride if number == 3 else 1,
                dilation=dilation,
                activations=each,
                lateral=options,
                exchange_point=True,
            )
            self.add_module(f"conv{number}", conv)


class XceptionBlock(nn.Module):
    """Three separable convolutions, each of a rectified input, and a skip: ``x + f(x)``.

    The relu before the second and the third is fused into the norm before it.

    Args:
        in_channels: of the input.
        widths: channels after each separable convolution.
        stride: of the third one, and of the skip.
        dilation: of all three.
        norm_layers: make the norms of the first two, and those of the third and of the skip.
        tapped: a feature leaves after the second one, and so before the relu.
        lateral: what the fusion does around the second one.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Widths,
        stride: int,
        dilation: int,
        norm_layers: tuple[NormLayer, NormLayer],
        *,
        tapped: bool = False,
        lateral: Lateral | None = None,
    ) -> None:
        super().__init__()
        first, last = norm_layers
        self.tapped = tapped
        self.shortcut = None
        if stride != 1 or widths[2] != in_channels:
            conv = nn.Conv2d(in_channels, widths[2], 1, stride, bias=False)
            self.shortcut = _conv_norm(conv, last(widths[2], activation="identity"))
        inner = "identity" if tapped else "relu"
        activations = (("identity", "relu"), ("identity", inner), ("identity", "identity"))
        lateral = lateral or Lateral()
        norms = (first, first, last)
        self.stack = SeparableStack(in_channels, widths, stride, dilation, norms, activations, lateral)
        self.join = lateral.join

    def begin(self, x: Tensor) -> Tensor:
        """The first two separable convolutions: what the third takes, not rectified in a tapped block."""
        entering = self.stack.conv1(F.relu(x))
        y: Tensor = self.stack.conv2(entering)
        return y if self.join is None else self.join(entering, y)

    def end(self, inner: Tensor, x: Tensor) -> Tensor:
        """The third one of ``begin``'s output, and the skip of the block's input."""
        inner = F.relu(inner) if self.tapped else inner
        y: Tensor = self.stack.conv3(inner, x if self.shortcut is None else self.shortcut(x))
        return y


class FinalBlock(nn.Module):
    """Three separable convolutions, rectified after each norm instead of before, without a skip."""

    def __init__(self, in_channels: int, widths: Widths, dilation: int, norm_layer: NormLayer) -> None:
        super().__init__()
        activations = (("relu", "relu"),) * 3
        norms = (norm_layer,) * 3
        self.stack = SeparableStack(in_channels, widths, 1, dilation, norms, activations, Lateral())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stack(x)
        return y


class AlignedXception(Encoder):
    """An aligned Xception whose M modalities share convolutions; the subclasses are registered.

    Args:
        num_modalities: M >= 1; 1 is a plain Xception.
        fusion: how the modalities meet; it may exchange after every depthwise convolution and after the
            stem's second one, and act around the second separable convolution of each block before one that
            halves the resolution (``Fusion.lateral``; where AsymFusion does so is not public).
        in_channels: channels of every modality's input.
        frozen_statistics: as ``Encoder``.
        output_stride: of the last feature: 32 as for ImageNet, 16 as in DeepLabv3+, or 8.

    Attributes:
        entry: width and stride of the entry flow's blocks.
        middle_blocks: how many blocks the middle flow has.
        exit: widths in the exit flow's two blocks.

    Raises:
        ValueError: as ``Encoder``; another output stride.
    """

    name: ClassVar[str]
    entry: ClassVar[tuple[tuple[int, int], ...]]
    middle_blocks: ClassVar[int] = 16
    exit: ClassVar[tuple[Widths, Widths]] = ((728, 1024, 1024), (1536, 1536, 2048))
    stem_weight = "stem_convs.0.conv.weight"
    normalization = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def __init__(
        self,
        num_modalities: int,
        fusion: Fusion,
        *,
        in_channels: int = 3,
        frozen_statistics: bool = True,
        output_stride: int = STRIDES[-1],
    ) -> None:
        fine, coarse = [width for width, stride in self.entry[1:] if stride > 1]
        super().__init__(
            num_modalities,
            fusion,
            channels=(fine, coarse, self.exit[0][1], self.exit[1][2]),
            strides=feature_strides(output_stride),
            in_channels=in_channels,
            frozen_statistics=frozen_statistics,
            asks_for_lateral=True,
        )
        self.weights_kind = f"timm's {self.name}"
        norm_layer = self._norm_layer(0)
        self.stem_convs = nn.Sequential(
            _conv_norm(nn.Conv2d(in_channels, 32, 3, 2, padding=1, bias=False), norm_layer(32)),
            _conv_norm(Conv3x3(32, 64, bias=False), norm_layer(64, exchange_point=True)),
        )
        self._make_blocks(64)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self.finish()

    def _make_blocks(self, channels: int) -> None:
        """Make all blocks, and remember which of their parts belong to which stage."""
        middle = self.entry[-1][0]
        layout = [((width,) * 3, stride) for width, stride in self.entry]
        layout += [((middle,) * 3, 1)] * self.middle_blocks + [(self.exit[0], 2)]
        blocks: list[nn.Module] = []
        stages: list[list[nn.Module]] = [[] for _ in STRIDES]
        stage, dilation = 1, 1
        for index, (widths, stride) in enumerate(layout):
            halves = stride > 1
            tapped = halves and index > 0
            # Of a tapped block, what comes after the feature belongs to the next stage.
            after = stage + tapped
            widens = tapped and self.strides[after - 1] == self.strides[stage - 1]
            norm_layers = (self._norm_layer(stage, halves), self._norm_layer(after, halves))
            stride = 1 if widens else stride
            ends = index + 1 < len(layout) and layout[index + 1][1] > 1
            lateral = self.fusion.lateral(widths[0], self.num_modalities) if ends else None
            block = XceptionBlock(
                channels, widths, stride, dilation, norm_layers, tapped=tapped, lateral=lateral
            )
            blocks.append(block)
            stages[stage - 1] += [block.stack.conv1, block.stack.conv2]
            stages[after - 1] += [block.stack.conv3, *([] if block.shortcut is None else [block.shortcut])]
            channels, stage, dilation = widths[2], after, 2 * dilation if widens else dilation
        blocks.append(FinalBlock(channels, self.exit[1], dilation, self._norm_layer(stage)))
        stages[stage - 1].append(blocks[-1])
        self.blocks = nn.ModuleList(blocks)
        # As a tuple, they are not registered again.
        self._stages = tuple(nn.ModuleList(parts) for parts in stages)

    def _norm_layer(self, stage: int, downsampling: bool = False) -> NormLayer:
        return functools.partial(self.norm_layer(stage, downsampling=downsampling), eps=EPS)

    def stem(self, x: Tensor) -> Tensor:
        y: Tensor = self.stem_convs(x)
        return y

    def stages(self) -> Sequence[nn.Module]:
        """The parts of each stage, which ``forward`` runs."""
        return self._stages

    def forward(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        y = self.stem(stacked_input(x, self.num_present, self.in_channels))
        features: list[Tensor] = []
        *blocks, last = self.blocks
        for block in cast("list[XceptionBlock]", blocks):
            inner = block.begin(y)
            if block.tapped:
                stage = len(features) + 1
                inner, feature = self.fuse(stage, inner)
                features.append(feature)
                before, after = self._entering(stage), self._entering(stage + 1)
                if after != before:
                    y = y.unflatten(0, (before, -1)).mean(0).repeat(after, 1, 1, 1)
            y = block.end(inner, y)
        _, feature = self.fuse(len(STRIDES), last(y))
        return [*features, feature]

    def from_pretrained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate timm's state dict to this encoder's names, without its classifier."""
        return {
            re.sub(r"^stem\.", "stem_convs.", key): value
            for key, value in state.items()
            if not key.startswith("head.")
        }


@register_encoder
class Xception65(AlignedXception):
    """The aligned Xception of 65 layers: 37,867,312 parameters, of which 185,200 are the norms'."""

    name: ClassVar[str] = "xception65"
    entry = ((128, 2), (256, 2), (728, 2))


@register_encoder
class Xception71(AlignedXception):
    """The aligned Xception of 71 layers: 40,289,736 parameters, of which 198,976 are the norms'."""

    name: ClassVar[str] = "xception71"
    entry = ((128, 2), (256, 1), (256, 2), (728, 1), (728, 2))


def _conv_norm(conv: nn.Conv2d, norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=conv, bn=norm))
