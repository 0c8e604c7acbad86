"""AdapNet++: a pre-activation ResNet of multi-scale units, an efficient atrous pyramid, and a decoder.

Valada, Mohan and Burgard, "Self-Supervised Model Adaptation for Multimodal Semantic Segmentation", IJCV 2020.
It segments one modality; ``ssma`` joins two of them. Trainable parameters with 12 classes on ResNet-50, the
side heads aside: 30,145,366 (the paper: 30.20 million).

Published are the layers' channels, kernels, strides and dilations, and the weights of the side outputs in the
loss: 0.6 at 1/4 and 0.5 at 1/8. Two things follow from the count: there is a norm after the last unit, and
none in the first one, which follows the stem's; so it is in He et al., "Identity Mappings in Deep Residual
Networks", ECCV 2016. Ours:

- The stride of a block is in its first unit's 3x3 convolution, as in torchvision, whose weights it takes.
- A projecting shortcut reads what the unit's first convolution reads, as He et al. have it; that of the first
  unit of all is published: it reads the first convolution's normalized output.
- Multi-scale units of block 3 are its last four; the paper counts them on ResNet-50 alone, from the third on.
- Dropout acts on the last unit's residual, before the sum.
- Side outputs read what the decoder's transposed convolutions return, before a skip is put beside it.
- Padding is symmetric. A transposed convolution is cut to its partner's size, at bottom and right: to the
  skip's, and in the end to the image's.
- Convolutions start from He et al.'s normal weights, transposed ones as torch makes them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cen_ext import Conv3x3, ExchangeBatchNorm2d, conv3x3
from models.networks.decoders.blocks import ConvNorm, cropped
from models.networks.dropout import Dropout
from models.networks.encoders.base import Backbone
from models.networks.encoders.resnet import RESNETS, WIDTHS
from models.networks.fusion.stages import initialize_convolutions
from models.networks.messages import suggest
from models.networks.systems.base import Logits, System, register_system

EXPANSION = 4  # of a unit's last convolution
WIDTH = 256  # channels of pyramid and decoder
REDUCED = 64  # channels of the pyramid's dilated convolutions
SKIP = 24  # channels of a skip
RATES = (3, 6, 12)  # dilations of the pyramid

ENCODERS = {"adapnet_resnet50": "resnet50", "adapnet_resnet101": "resnet101"}

Dilations = Literal["paper", "released"]
Rates = tuple[int, ...]  # dilations of a 3x3 convolution's equal parts

# Of the last units of blocks 1 to 4.
DILATIONS: dict[str, tuple[tuple[Rates, ...], ...]] = {
    "paper": ((), ((1, 2),), ((1, 2), (1, 16), (1, 8), (1, 4)), ((2, 4), (2, 8), (2, 16))),
    "released": ((), ((1, 2),), ((1, 2),) * 4, ((2, 2),) * 3),
}

norm = functools.partial(ExchangeBatchNorm2d, num_modalities=1, activation="relu")
plain_norm = functools.partial(ExchangeBatchNorm2d, num_modalities=1)  # without relu


class MultiScaleConv(nn.Conv2d):
    """3x3 convolution without bias, ``[N, C, H, W]`` to the same, in parts of different dilation.

    Args:
        channels: C.
        rates: dilations of as many equal parts of the output channels.
    """

    def __init__(self, channels: int, rates: Rates) -> None:
        super().__init__(channels, channels, 3, padding=1, bias=False)
        self.rates = rates

    def forward(self, x: Tensor) -> Tensor:
        count = len(self.rates)
        # A deployed network has the norms behind as a bias.
        biases = [None] * count if self.bias is None else self.bias.chunk(count)
        parts = zip(self.weight.chunk(count), biases, self.rates, strict=True)
        return torch.cat([conv3x3(x, weight, bias, rate) for weight, bias, rate in parts], 1)


class Unit(nn.Module):
    """A bottleneck unit with norms before the convolutions: ``x + conv1x1(conv3x3(conv1x1(norm(x))))``.

    A norm and relu are before each of the convolutions; there is none after the sum.

    Args:
        in_channels: of x; the output has ``4 * width``.
        width: of the 3x3 convolution.
        stride: of the 3x3 convolution and the shortcut.
        rates: dilations, where it is a multi-scale unit; of stride 1 then.
        dropout: probability, on the residual.
        first: its input is normalized already.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        rates: Rates | None = None,
        *,
        dropout: float = 0.0,
        first: bool = False,
    ) -> None:
        super().__init__()
        out_channels = EXPANSION * width
        self.norm = None if first else norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        if rates is not None:
            self.conv2: nn.Conv2d = MultiScaleConv(width, rates)
        elif stride == 1:
            self.conv2 = Conv3x3(width, width, bias=False)
        else:
            self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.dropout = Dropout(dropout)
        projects = in_channels != out_channels
        shortcut = width if first else in_channels
        self.downsample = nn.Conv2d(shortcut, out_channels, 1, stride, bias=False) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        normalized = x if self.norm is None else self.norm(x)
        inner = self.bn1(self.conv1(normalized))
        residual: Tensor = self.dropout(self.conv3(self.bn2(self.conv2(inner))))
        if self.downsample is not None:
            x = self.downsample(inner if self.norm is None else normalized)
        return x + residual


class EfficientPyramid(nn.Module):
    """The eASPP: 1x1, dilated pairs of 3x3 through fewer channels, and the image's mean, merged by a 1x1.

    All norms but the last are rectified.

    Args:
        channels: of the input.
        rates: dilations, of each pair of 3x3 convolutions.
        width: channels of every part and of the output.
        reduced: channels of the 3x3 convolutions.
    """

    def __init__(
        self, channels: int, rates: Sequence[int], width: int = WIDTH, reduced: int = REDUCED
    ) -> None:
        super().__init__()
        self.point = _conv1x1(channels, width)
        self.atrous = nn.ModuleList(
            nn.Sequential(
                _conv1x1(channels, reduced),
                ConvNorm(Conv3x3(reduced, reduced, rate, bias=False), norm),
                ConvNorm(Conv3x3(reduced, reduced, rate, bias=False), norm),
                _conv1x1(reduced, width),
            )
            for rate in rates
        )
        self.pool = _conv1x1(channels, width)
        self.merge = _conv1x1((2 + len(rates)) * width, width, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, h, w]`` to ``[N, width, h, w]``."""
        mean = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        parts = [self.point(x), *(atrous(x) for atrous in self.atrous), mean]
        y: Tensor = self.merge(torch.cat(parts, 1))
        return y


class AdapNetEncoder(Backbone):
    """The pre-activation ResNet with multi-scale units, the pyramid, and the reduced skips.

    Args:
        name: ``"adapnet_resnet50"`` or ``"adapnet_resnet101"``.
        in_channels: of the image.
        dropout: probability in the last unit.
        ssma_dilations, aspp_rates: as in ``AdapNetPlusPlus``.

    Raises:
        ValueError: unknown dilations, rates below 1.
    """

    weights_kind = "a torchvision ResNet of bottleneck blocks"

    def __init__(
        self, name: str, in_channels: int, dropout: float, ssma_dilations: str, aspp_rates: Sequence[int]
    ) -> None:
        super().__init__()
        if ssma_dilations not in DILATIONS:
            hint = suggest(str(ssma_dilations), DILATIONS)
            raise ValueError(f"ssma_dilations must be {' or '.join(DILATIONS)}, got {ssma_dilations!r}{hint}")
        if not aspp_rates or min(aspp_rates) < 1:
            raise ValueError(f"aspp_rates must be dilations from 1 on, got {tuple(aspp_rates)}")
        self.bn0 = plain_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], 7, 2, padding=3, bias=False)
        self.bn1 = norm(WIDTHS[0])
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        _, depths = RESNETS[ENCODERS[name]]
        blocks, channels = [], WIDTHS[0]
        for number, (depth, width, rates, stride) in enumerate(
            zip(depths, WIDTHS, DILATIONS[ssma_dilations], (1, 2, 2, 1), strict=True)
        ):
            units = []
            for unit in range(depth):
                last = depth - unit  # from 1 on, counted from the end
                units.append(
                    Unit(
                        channels,
                        width,
                        stride if unit == 0 else 1,
                        rates[-last] if last <= len(rates) else None,
                        dropout=dropout if (number, last) == (3, 1) else 0.0,
                        first=number == unit == 0,
                    )
                )
                channels = EXPANSION * width
            blocks.append(nn.Sequential(*units))
        self.layer1, self.layer2, self.layer3, self.layer4 = blocks
        self.norm = norm(channels)
        self.pyramid = EfficientPyramid(channels, aspp_rates)
        self.skips = nn.ModuleList(_conv1x1(EXPANSION * width, SKIP, relu=False) for width in WIDTHS[1::-1])
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[N, in_channels, H, W]`` to the pyramid's output at 1/16 and the skips at 1/8 and 1/4."""
        x = self.maxpool(self.bn1(self.conv1(self.bn0(x))))
        fine = self.layer1(x)
        middle = self.layer2(fine)
        coarse = self.pyramid(self.norm(self.layer4(self.layer3(middle))))
        return [coarse, self.skips[0](middle), self.skips[1](fine)]

    @property
    def stem_weights(self) -> tuple[str, ...]:
        return ("conv1.weight",)

    def from_pretrained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate a torchvision ResNet's state dict, as far as a pre-activation network can take it; ours.

        Taken are the stem, each unit's convolutions, and its norms between them. The norm after a unit's last
        convolution, or after its shortcut's, has no place here: its scale goes into that convolution, and its
        shift is left out, as the norms that read the sum take it away. They start as they were made, and so
        does the first unit's shortcut, which reads other channels.

        Raises:
            ValueError: one of these convolutions comes without its norm.
        """
        taken = {}
        for key, value in state.items():
            if key.startswith(("fc.", "layer1.0.downsample.")) or re.search(r"\.(bn3|downsample\.1)\.", key):
                continue
            if match := re.fullmatch(r"(.*\.)(conv3|downsample\.0)\.weight", key):
                follows = "bn3" if match[2] == "conv3" else "downsample.1"
                norm_name = match[1] + follows
                if f"{norm_name}.weight" not in state or f"{norm_name}.running_var" not in state:
                    raise ValueError(f"weights must be {self.weights_kind}'s, but {key} has no {norm_name}")
                value = value * _scale(state, norm_name)[:, None, None, None]
            taken[key.replace(".downsample.0.", ".downsample.")] = value
        return taken


class Refinement(nn.Module):
    """A stage of the decoder: twice the size, beside a skip, two 3x3 convolutions.

    Args:
        width: channels of input and output.
        skip: channels of the skip.
        gated: whether the skip is weighted, channel by channel, by the image's mean of what it is put beside.
    """

    def __init__(self, width: int = WIDTH, skip: int = SKIP, *, gated: bool = False) -> None:
        super().__init__()
        enlarge = nn.ConvTranspose2d(width, width, 4, 2, padding=1, bias=False)
        self.enlarge = ConvNorm(enlarge, plain_norm)
        self.gate = _conv1x1(width, skip) if gated else None
        self.refine = nn.Sequential(
            ConvNorm(Conv3x3(width + skip, width, bias=False), norm),
            ConvNorm(Conv3x3(width, width, bias=False), norm),
        )

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, width, h, w]``: the enlarged x, and the output; both of the skip's size."""
        x = cropped(self.enlarge(x), skip.shape[-2:])
        if self.gate is not None:
            skip = skip * self.gate(x.mean((2, 3), keepdim=True))
        return x, self.refine(torch.cat([x, skip], 1))


class Classifier(nn.Module):
    """Logits of the image's size, and side outputs of the decoder's stages."""

    def __init__(self, num_classes: int, num_sides: int) -> None:
        super().__init__()
        self.conv = _conv1x1(WIDTH, num_classes)
        enlarge = nn.ConvTranspose2d(num_classes, num_classes, 8, 4, padding=2, bias=False)
        self.enlarge = ConvNorm(enlarge, plain_norm)
        self.sides = nn.ModuleList(_conv1x1(WIDTH, num_classes, relu=False) for _ in range(num_sides))


class AdapNetDecoder(nn.Module):
    """The decoder of AdapNet++, and with gates that of SSMA.

    Args:
        num_classes: K.
        gated: as in ``Refinement``.
    """

    def __init__(self, num_classes: int, *, gated: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Refinement(gated=gated) for _ in range(2))
        self.classifier = Classifier(num_classes, len(self.stages))
        initialize_convolutions(self)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Logits:
        """Compute logits of an image's size.

        Args:
            features: as ``AdapNetEncoder`` returns them.
            size: height and width.
        """
        x, *skips = features
        enlarged = []
        for stage, skip in zip(self.stages, skips, strict=True):
            large, x = stage(x, skip)
            enlarged.append(large)
        output = cropped(self.classifier.enlarge(self.classifier.conv(x)), size)
        if not self.training:
            return Logits(output)
        finest_first = zip(self.classifier.sides, reversed(enlarged), strict=True)
        return Logits(output, tuple(head(y) for head, y in finest_first))


@register_system
class AdapNetPlusPlus(System):
    """AdapNet++ for one modality.

    Side outputs, in training, are at 1/4 and 1/8. In training the norm of the pyramid's image mean needs two
    values per channel: at least two images.

    Args:
        num_classes, channels: as ``System``.
        encoder: ``"adapnet_resnet50"`` or ``"adapnet_resnet101"``.
        dropout: probability in the encoder's last unit; published is 0.7, of which 0.3 is kept.
        ssma_dilations: of the multi-scale units: ``paper``, or ``released``, as in the authors' program:
            (1, 2) in blocks 2 and 3, (2, 2) in block 4.
        aspp_rates: dilations of the pyramid; (6, 12, 18) in the paper's 19 classes of Cityscapes.

    Raises:
        ValueError: as ``System``; an unknown choice, a dropout outside of [0, 1], rates below 1.
    """

    name: ClassVar[str] = "adapnetpp"
    encoders: ClassVar[tuple[str, ...]] = tuple(ENCODERS)
    options: ClassVar[tuple[str, ...]] = ("dropout", "ssma_dilations", "aspp_rates")
    takes: ClassVar[tuple[int, ...]] = (1,)
    sides: ClassVar[int] = 2
    pooled: ClassVar[bool] = True

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[int],
        encoder: str = "adapnet_resnet50",
        dropout: float = 0.7,
        ssma_dilations: Dilations = "paper",
        aspp_rates: tuple[int, ...] = RATES,
    ) -> None:
        super().__init__(num_classes, channels)
        self.encoder = AdapNetEncoder(encoder, channels[0], dropout, ssma_dilations, aspp_rates)
        self.decoder = AdapNetDecoder(num_classes)

    def logits(self, images: Sequence[Tensor]) -> Logits:
        (image,) = images
        logits: Logits = self.decoder(self.encoder(image), image.shape[-2:])
        return logits


def _conv1x1(in_channels: int, out_channels: int, *, relu: bool = True) -> ConvNorm:
    return ConvNorm(nn.Conv2d(in_channels, out_channels, 1, bias=False), norm if relu else plain_norm)


def _scale(state: Mapping[str, Tensor], name: str) -> Tensor:
    """What a norm in eval mode multiplies its input with, of torchvision's eps."""
    return state[f"{name}.weight"] * (state[f"{name}.running_var"] + 1e-5).rsqrt()
