"""VGG-16's convolutions, of which FCN-32s and FuseNet are made, and the names of its pretrained weights.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
configuration D: five stages of two or three 3x3 convolutions, a 2x2 max pooling after each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext import Conv3x3
from models.networks.encoders.base import Backbone

WIDTHS = (64, 128, 256, 512, 512)  # of the five stages
DEPTHS = (2, 2, 3, 3, 3)  # convolutions in each
COLORS = 3  # red, green and blue, which the pretrained weights read
STEM = "stages.0.0.conv.weight"  # of a stream


class ConvUnit(nn.Module):
    """A convolution, batch norm where there is one, relu: ``[N, C, H, W]`` to ``[N, K, h, w]``."""

    def __init__(self, conv: nn.Conv2d, *, norm: bool = False) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu_(x if self.norm is None else self.norm(x))


def conv_units(in_channels: int, widths: Sequence[int], *, norm: bool = False) -> list[ConvUnit]:
    """Make 3x3 convolutions with what follows them, each of the channels that the one before it gives.

    Args:
        in_channels: of the first one's input.
        widths: the output channels of each.
        norm: whether a batch norm follows each.
    """
    inputs = (in_channels, *widths)
    return [
        ConvUnit(Conv3x3(before, width), norm=norm) for before, width in zip(inputs, widths, strict=False)
    ]


class VGGStream(nn.Module):
    """VGG-16's convolutions for one input; what pools after each stage is left to its user.

    Args:
        first: the first convolution.
        widths: channels of the stages; fewer than five of them for the first stages alone.
        norm: whether a batch norm follows each convolution.
    """

    def __init__(self, first: nn.Conv2d, widths: Sequence[int] = WIDTHS, *, norm: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        channels = first.out_channels
        for width, depth in zip(widths, DEPTHS, strict=False):
            begun = [] if self.stages else [ConvUnit(first, norm=norm)]
            rest = conv_units(channels, [width] * (depth - len(begun)), norm=norm)
            self.stages.append(nn.Sequential(*begun, *rest))
            channels = width


class VGGBackbone(Backbone):
    """Base of encoders of several streams, all of which start from the same weights.

    A stream that reads a single channel starts from the mean over red, green and blue, as it is in the file:
    weights of Caffe, of colors from 0 to 255, fit the depth from 0 to 255 that FuseNet takes.

    Args:
        streams: their entries that are named ``fc6`` and ``fc7`` are VGG-16's linear layers.
    """

    weights_kind = "a torchvision VGG-16"

    def __init__(self, streams: Sequence[VGGStream]) -> None:
        super().__init__()
        self.streams = nn.ModuleList(streams)

    @property
    def stem_weights(self) -> tuple[str, ...]:
        names = [f"streams.{m}.{STEM}" for m in range(len(self.streams))]
        return tuple(name for name in names if self.get_parameter(name).shape[1] == COLORS)

    def from_pretrained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate torchvision's names, of ``vgg16`` or ``vgg16_bn``, to those of every stream.

        Raises:
            ValueError: the weights have batch norms, and this part has none.
        """
        has_norms = "features.1.weight" in state
        if has_norms and not any(isinstance(module, nn.BatchNorm2d) for module in self.modules()):
            raise ValueError("weights must be those of vgg16, got vgg16_bn's, whose convolutions need norms")
        layers, own = torchvision_layers(has_norms), self.state_dict()
        found = {}
        for key, value in state.items():
            layer, _, entry = key.rpartition(".")
            if layer not in layers and not layer.startswith("classifier."):
                found[key] = value
            for m in range(len(self.streams)):
                name = f"streams.{m}.{layers.get(layer)}.{entry}"
                if name in own:  # a stream may lack the last stages, or the linear layers
                    found[name] = _fitted(value, own[name].shape)
        return found


def torchvision_layers(norm: bool) -> dict[str, str]:
    """Torchvision's names of the layers of ``vgg16``, or with norms of ``vgg16_bn``, and a stream's."""
    layers, position = {}, 0
    for stage, depth in enumerate(DEPTHS):
        for unit in range(depth):
            for part in ("conv", "norm", "relu") if norm else ("conv", "relu"):
                layers[f"features.{position}"] = f"stages.{stage}.{unit}.{part}"
                position += 1
        position += 1  # of the pooling
    return {**layers, "classifier.0": "fc6", "classifier.3": "fc7"}


def mean_over_colors(weight: Tensor, channels: int = 1) -> Tensor:
    """The weight ``[K, C, kh, kw]`` of a first convolution for inputs that are no colors, ``[K, channels, kh,
    kw]``: the mean over its input channels for each of them.
    """
    return weight.mean(1, keepdim=True).repeat(1, channels, 1, 1)


def _fitted(value: Tensor, shape: torch.Size) -> Tensor:
    """A linear layer's weight as the convolution's of that shape, and a single channel's first weight."""
    if value.dim() == 2 and value.numel() == shape.numel():
        return value.reshape(shape)
    if value.dim() == len(shape) == 4 and (value.shape[1], shape[1]) == (COLORS, 1):
        return mean_over_colors(value)
    return value
