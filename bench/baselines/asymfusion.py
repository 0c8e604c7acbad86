"""AsymFusion's block as usually written: lists of tensors, slices, concatenations, one norm per modality."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.baselines.exchange import each
from bench.baselines.segmentation import Block, Encoder


def shift(x: Tensor) -> Tensor:
    """Groups of a fifth of the channels moved by a pixel: down, right, left and up."""
    y = torch.zeros_like(x)
    g = x.shape[1] // 5
    y[:, :g, 1:] = x[:, :g, :-1]
    y[:, g : 2 * g, :, 1:] = x[:, g : 2 * g, :, :-1]
    y[:, 2 * g : 3 * g, :, :-1] = x[:, 2 * g : 3 * g, :, 1:]
    y[:, 3 * g : 4 * g, :-1] = x[:, 3 * g : 4 * g, 1:]
    return y


def shuffle(xs: list[Tensor]) -> list[Tensor]:
    """The tails of two modalities, swapped."""
    s = 4 * (xs[0].shape[1] // 5)
    return [torch.cat([xs[m][:, :s], xs[1 - m][:, s:]], 1) for m in range(2)]


class AsymBlock(Block):
    """A bottleneck of two modalities with channel shuffle and pixel shift around its 3x3 convolution."""

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        skips = xs
        a = each(self.relu, self.bn1(each(self.conv1, xs)))
        v = each(self.relu, self.bn2(each(self.conv2, shuffle(a))))
        w = shuffle([v[m] + shift(a[1 - m]) for m in range(2)])
        xs = self.bn3(each(self.conv3, w))
        return each(self.relu, [x + skip for x, skip in zip(xs, skips, strict=True)])


class AsymEncoder(Encoder):
    """A ResNet of two modalities whose stages end with an ``AsymBlock``."""

    def __init__(self, name: str) -> None:
        super().__init__(name, 2, 0.0, "own")
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            last = stage[-1]
            pairs = [(last.conv1, last.bn1), (last.conv2, last.bn2), (last.conv3, last.bn3)]
            stage[-1] = AsymBlock([conv for conv, _ in pairs], [norm for _, norm in pairs], None)
