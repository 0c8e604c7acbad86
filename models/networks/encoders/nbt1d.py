"""ResNets of Non-Bottleneck-1D blocks for M modalities that share every convolution.

Romera et al., "ERFNet: Efficient Residual Factorized ConvNet for Real-Time Semantic Segmentation", IEEE T-ITS
2018, factorize a basic block's 3x3 convolutions into 3x1 and 1x3 ones, with a relu between them. Seichter et
al., "Efficient RGB-D Semantic Segmentation for Indoor Scene Analysis", ICRA 2021 (ESANet), make ResNet-18 and
34 of such blocks, one encoder for colors and one for depth. Names are those of their weights, torchvision's
where it has them.

Ours: one encoder for all modalities, with private norms, which exchange where basic blocks do: bn1 and bn2.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.networks.encoders.base import ENCODERS, NormLayer
from models.networks.encoders.resnet import Block, Dilations, ExchangeResNet, Strided, downsample
from models.networks.fusion.base import STAGES, Lateral

EPS = 1e-3  # of the blocks' norms, as in ERFNet

# Prefixes of the names in weights of ImageNet, and in those of a whole ESANet.
_ENCODER = "encoder."
_PAIR = ("encoder_rgb.", "encoder_depth.")
# In the fusion blocks of the latter, and in ours.
_GATES = {
    f"se_{kind}.fc.{place}": f"join.gates.{m}.{layer}"
    for m, kind in enumerate(("rgb", "depth"))
    for place, layer in ((0, "squeeze"), (2, "excite"))
}


class NonBottleneck1D(nn.Module):
    """3x1, 1x3, 3x1 and 1x3 convolutions with biases; a relu follows each 3x1, a norm each 1x3 convolution.

    Both norms may exchange, the second before the skip is added.

    Args:
        stride: of the first pair of convolutions.
        dilations: of the first pair and of the second. ERFNet dilates the second alone, ``(1, d)``. A dilated
            encoder does as with basic blocks: it computes at every second or fourth position what the
            strided one computes (ours; ESANet has strides alone).
        norm_layer: makes the norms.
        lateral, strided: of other blocks.
    """

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
        first, second = dilations
        self.conv3x1_1 = nn.Conv2d(in_channels, width, (3, 1), (stride, 1), (first, 0), (first, 1))
        self.conv1x3_1 = nn.Conv2d(width, width, (1, 3), (1, stride), (0, first), (1, first))
        self.bn1 = norm_layer(width, exchange_point=True, eps=EPS)
        self.conv3x1_2 = nn.Conv2d(width, width, (3, 1), 1, (second, 0), (second, 1))
        self.conv1x3_2 = nn.Conv2d(width, width, (1, 3), 1, (0, second), (1, second))
        self.bn2 = norm_layer(width, exchange_point=True, eps=EPS)
        self.downsample = downsample(in_channels, width, stride, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        """``[M*N, in_channels, H, W]`` to ``[M*N, width, h, w]``."""
        skip = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1x3_1(F.relu(self.conv3x1_1(x))))
        y: Tensor = self.bn2(self.conv1x3_2(F.relu(self.conv3x1_2(x))), skip)
        return y


NBT1D_RESNETS: dict[str, tuple[Block, tuple[int, int, int, int]]] = {
    "resnet18_nbt1d": (NonBottleneck1D, (2, 2, 2, 2)),
    "resnet34_nbt1d": (NonBottleneck1D, (3, 4, 6, 3)),
}


class NBt1DResNet(ExchangeResNet):
    """An ``ExchangeResNet`` of Non-Bottleneck-1D blocks: ``"resnet18_nbt1d"`` or ``"resnet34_nbt1d"``.

    It loads the weights of one encoder, plain or under ``encoder.`` as ESANet's of ImageNet, and those of
    both in a whole ESANet, ``encoder_rgb.``, ``encoder_depth.`` and ``se_layer0`` to ``se_layer4``.
    """

    weights_kind = "a ResNet of Non-Bottleneck-1D blocks"
    variants: ClassVar[Mapping[str, tuple[Block, tuple[int, int, int, int]]]] = NBT1D_RESNETS

    def from_pretrained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate ESANet's weights, without its decoder or classifier.

        Of a whole ESANet, colors are the first modality and depth is the second. Ours: convolutions that the
        modalities share get those of colors. The stem of depth reads one channel there; here it reads that
        channel repeated, and divides its weights by their number.

        Raises:
            ValueError: weights of a whole ESANet for another number of modalities.
        """
        if any(key.startswith(_PAIR) for key in state):
            return self._of_pair(state)
        return super().from_pretrained(_below(_ENCODER, state) or state)

    def _of_pair(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Entries from both encoders of a whole ESANet."""
        if self.num_modalities != len(_PAIR):
            raise ValueError(
                f"num_modalities must be 2 for weights of a whole ESANet, got {self.num_modalities}; those "
                "of its encoder alone, trained on ImageNet, start any number"
            )
        own = self.state_dict()
        found, depth = (_below(prefix, state) for prefix in _PAIR)
        stem = depth.get(self.stem_weight)
        if stem is not None and stem.shape[1] == 1:
            depth[self.stem_weight] = stem.repeat(1, self.in_channels, 1, 1) / self.in_channels
        for key in found.keys() & depth.keys() & own.keys():
            if own[key].numel() == found[key].numel() + depth[key].numel():
                found[key] = torch.cat([found[key], depth[key]]).view_as(own[key])
        for stage in range(STAGES + 1):
            for theirs, ours in _GATES.items():
                for kind in ("weight", "bias"):
                    key = f"fusion_stages.{stage}.{ours}.{kind}"
                    value = state.get(f"se_layer{stage}.{theirs}.{kind}")
                    if key in own and value is not None:
                        found[key] = value
        return found


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


for _name in NBT1D_RESNETS:
    ENCODERS.members[_name] = functools.partial(NBt1DResNet, _name)
