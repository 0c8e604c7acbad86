"""ACNet: RGB, depth and a third branch that gathers both through channel attention, and a residual decoder.

Hu, Yang, Fei and Wang, "ACNET: Attention Based Network to Exploit Complementary Features for RGBD Semantic
Segmentation", ICIP 2019. The decoder, its transposed convolutions and its side outputs are those of Jiang et
al., "RedNet: Residual Encoder-Decoder Network for Indoor RGB-D Semantic Segmentation", arXiv 1806.01054. With
depth of one channel it has 116,628,168 parameters at 40 classes, of which 20,640 are side outputs', and
116,625,849 at 37.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from cen_ext import ExchangeBatchNorm2d
from cen_ext.tables import table_shapes
from models.networks.decoders.blocks import ConvNorm, cropped
from models.networks.encoders.resnet import BasicBlock, ExchangeResNet
from models.networks.encoders.streams import ResNetStreams
from models.networks.encoders.weights import misfits
from models.networks.fusion.exchange import NoFusion
from models.networks.systems.base import Logits, System, register_system

STEM = 64  # channels of a ResNet's stem
AGENTS = (64, 64, 128, 256, 512)  # channels in the decoder, finest first
DEPTHS = (6, 4, 3, 3)  # blocks of the decoder's stages, coarsest first
REFINING = 3  # blocks at 1/2, before the classifier


class ChannelAttention(nn.Module):
    """The paper's attention module: ``x * sigmoid(conv1x1(mean of x over the image))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.conv(x.mean((2, 3), keepdim=True)).sigmoid()
        return y


class AttentionSum(nn.Module):
    """The sum of RGB's and depth's feature, each weighted by attention of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rgb = ChannelAttention(channels)
        self.depth = ChannelAttention(channels)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        y: Tensor = self.rgb(rgb) + self.depth(depth)
        return y


class MergingResNet(ExchangeResNet):
    """A ResNet-50 without its first convolution and norm: it pools what comes from the others' stems."""

    def __init__(self) -> None:
        super().__init__("resnet50", 1, NoFusion(), in_channels=STEM, frozen_statistics=False)
        del self.conv1, self.bn1

    @property
    def stem_weights(self) -> tuple[str, ...]:
        return ()

    def stem(self, x: Tensor) -> Tensor:
        y: Tensor = self.maxpool(x)
        return y

    def from_pretrained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: value
            for key, value in super().from_pretrained(state).items()
            if not key.startswith(("conv1.", "bn1."))
        }


class PlainBlock(BasicBlock):
    """Two 3x3 convolutions around which the input goes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1, (1, 1), _norm)


class DoublingBlock(PlainBlock):
    """The same with a transposed second convolution, which doubles the resolution, as another in the skip."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels)
        self.conv2 = nn.ConvTranspose2d(channels, out_channels, 3, 2, padding=1, output_padding=1, bias=False)
        self.bn2 = _norm(out_channels)
        self.downsample = nn.Sequential(
            nn.ConvTranspose2d(channels, out_channels, 2, 2, bias=False),
            _norm(out_channels, activation="identity"),
        )


class UpStage(nn.Module):
    """A stage of the decoder: blocks of which the last one doubles the resolution, and a side output.

    The doubled feature has a row or column more than the encoder's where that has an odd number: it loses it.
    """

    def __init__(self, channels: int, out_channels: int, depth: int, num_classes: int) -> None:
        super().__init__()
        plain = (PlainBlock(channels) for _ in range(depth - 1))
        self.blocks = nn.Sequential(*plain, DoublingBlock(channels, out_channels))
        self.classifier = nn.Conv2d(out_channels, num_classes, 1)

    def forward(self, x: Tensor, feature: Tensor) -> tuple[Tensor, Tensor | None]:
        """The doubled x plus the encoder's feature; in training also the side output, of the doubled x."""
        x = cropped(self.blocks(x), feature.shape[-2:])
        return x + feature, self.classifier(x) if self.training else None


@register_system
class ACNet(System):
    """ACNet for RGB and depth, logits at the image's size.

    Three ResNets, whose norms train with batch statistics. What the stem and the stages of RGB's and depth's
    compute is weighted by attention and added to the features of the third, while both go on as they were.
    The third's features go to the decoder through 1x1 convolutions.

    Where the image's size is no multiple of 32, doubled features and logits are cropped by a row or column to
    the feature that is added, or the image. Ours, as are the initial weights, which are torch's.

    Args:
        num_classes: K.
        channels: of the two modalities' images, the first RGB's: 1 or 3 each.

    Raises:
        ValueError: as ``System``.
    """

    name: ClassVar[str] = "acnet"
    encoders: ClassVar[tuple[str, ...]] = ("resnet50",)
    takes: ClassVar[tuple[int, ...]] = (2,)
    sides: ClassVar[int] = len(DEPTHS)

    def __init__(self, num_classes: int, channels: Sequence[int]) -> None:
        super().__init__(num_classes, channels)
        rgb, depth = (
            ExchangeResNet("resnet50", 1, NoFusion(), in_channels=count, frozen_statistics=False)
            for count in channels
        )
        self.encoder = ResNetStreams(rgb=rgb, depth=depth, merged=MergingResNet())
        widths = (STEM, *rgb.channels)
        self.attention = nn.ModuleList(map(AttentionSum, widths))
        self.agents = nn.ModuleList(
            ConvNorm(nn.Conv2d(width, agent, 1, bias=False), _norm)
            for width, agent in zip(widths, AGENTS, strict=True)
        )
        before, after = AGENTS[:0:-1], AGENTS[-2::-1]  # coarsest first
        self.decoder = nn.ModuleList(
            UpStage(*sizes, num_classes) for sizes in zip(before, after, DEPTHS, strict=True)
        )
        self.refine = nn.Sequential(*(PlainBlock(AGENTS[0]) for _ in range(REFINING)))
        self.classifier = nn.ConvTranspose2d(AGENTS[0], num_classes, 2, 2)

    def merge(self, images: Sequence[Tensor]) -> list[Tensor]:
        """The five features of the third branch, at 1/2 to 1/32, of the two images."""
        rgb, depth, merged = self.encoder.streams
        pairs = zip(_levels(rgb, images[0]), _levels(depth, images[1]), strict=True)
        x, *added = (attend(*pair) for attend, pair in zip(self.attention, pairs, strict=True))
        features = [x]
        x = merged.stem(x)
        for stage, more in zip(merged.stages(), added, strict=True):
            x = stage(x) + more
            features.append(x)
        return features

    def logits(self, images: Sequence[Tensor]) -> Logits:
        features = [agent(each) for agent, each in zip(self.agents, self.merge(images), strict=True)]
        x, sides = features[-1], []
        for stage, feature in zip(self.decoder, features[-2::-1], strict=True):
            x, side = stage(x, feature)
            if side is not None:
                sides.append(side)
        return Logits(cropped(self.classifier(self.refine(x)), images[0].shape[-2:]), tuple(sides))

    def from_released(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate the state dict of a checkpoint that the authors published.

        Its layout: RGB has torchvision's names (``layer1.0.conv1.weight``), the others a suffix behind the
        first part of them (``layer1_d``, ``layer1_m``); attention is ``atten_rgb_0.1`` and on, an agent's
        convolution ``agant0.0``, the decoder's blocks are ``deconv1.5`` and such, a skip's transposed
        convolution is ``deconv1.5.upsample.0``. Inferred: ``conv1_d`` and ``bn1_d``, ``atten_depth_0.1``, an
        agent's norm ``agant0.1``; and from RedNet, whose decoder it is, ``final_conv``, ``final_deconv`` and
        the side outputs' ``out5_conv``, the coarsest one's, to ``out2_conv``.

        Raises:
            ValueError: entries are missing, left over or of another shape; the message names them.
        """
        own, tables = self.state_dict(), table_shapes(self)
        alpha = own.pop("alpha")  # which weighs branches, of which there is one
        names = {key: _released_name(key) for key in own}
        # Files of torch before 0.4.1 have no batch counters.
        counters = {names[key]: own[key] for key in own if key.endswith(".num_batches_tracked")}
        released = {**counters, **state}
        shapes = {names[key]: tables[key][1:] if key in tables else own[key].shape for key in own}
        if problems := misfits(shapes, released):
            raise ValueError(f"the checkpoint does not fit network={self.name}: {problems}")
        return {**{key: released[name] for key, name in names.items()}, "alpha": alpha}


def _norm(channels: int, *, exchange_point: bool = False, activation: str = "relu") -> ExchangeBatchNorm2d:
    """The decoder's norms, where nothing is exchanged."""
    return ExchangeBatchNorm2d(channels, 1, activation=activation)


def _levels(stream: ExchangeResNet, image: Tensor) -> list[Tensor]:
    """A stream's features: of the stem before pooling, and of the four stages."""
    x = stream.bn1(stream.conv1(image))
    features = [x]
    x = stream.maxpool(x)
    for stage in stream.stages():
        x = stage(x)
        features.append(x)
    return features


_SUFFIXES = {"rgb": "", "depth": "_d", "merged": "_m"}  # of the public names

# Patterns of our names' beginnings and the public ones, as ``re.sub`` takes them.
_RELEASED = (
    (r"attention\.(\d)\.(\w+)\.conv", r"atten_\2_\1.1"),
    (r"agents\.(\d)\.conv", r"agant\1.0"),
    (r"agents\.(\d)\.norm", r"agant\1.1"),
    (r"refine\.", "final_conv."),
    (r"classifier\.", "final_deconv."),
)


def _released_name(key: str) -> str:
    """The public name of an entry of the state dict but ``alpha``."""
    if found := re.match(r"encoder\.(\w+)\.(\w+)", key):
        return f"{found[2]}{_SUFFIXES[found[1]]}{key[found.end() :]}"
    if found := re.match(r"decoder\.(\d)\.(classifier|blocks)", key):
        stage = int(found[1])
        name = f"out{5 - stage}_conv" if found[2] == "classifier" else f"deconv{stage + 1}"
        return f"{name}{key[found.end() :].replace('downsample', 'upsample')}"
    for pattern, name in _RELEASED:
        key = re.sub(f"^{pattern}", name, key)
    return key
