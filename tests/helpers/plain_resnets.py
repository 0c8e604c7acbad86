"""Networks by the names of torchvision's ResNets, written a second time on plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.networks.encoders import resnet

DEPTHS = (3, 4, 6, 3)  # ResNet-50's
NARROW = (4, 6, 8, 10)  # inner widths of the four stages, for tests


def make_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNets of tests have stages of few channels."""
    monkeypatch.setattr(resnet, "WIDTHS", NARROW)


def norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{leaf}": (channels,) for leaf in leaves}, f"{name}.num_batches_tracked": ()}


def resnet_shapes(
    widths: Sequence[int] = (64, 128, 256, 512), in_channels: int = 3, suffix: str = "", stem: bool = True
) -> dict[str, tuple[int, ...]]:
    """The entries of a ResNet-50 without a classifier.

    Args:
        suffix: behind the first part of every name.
        stem: whether there is a first convolution with its norm.
    """
    found: dict[str, tuple[int, ...]] = {}
    if stem:
        found = {f"conv1{suffix}.weight": (64, in_channels, 7, 7), **norm_shapes(f"bn1{suffix}", 64)}
    before = 64
    for number, (depth, width) in enumerate(zip(DEPTHS, widths, strict=True), 1):
        for i in range(depth):
            name = f"layer{number}{suffix}.{i}"
            sizes = ((width, before, 1), (width, width, 3), (4 * width, width, 1))
            for j, (out, into, side) in enumerate(sizes, 1):
                found[f"{name}.conv{j}.weight"] = (out, into, side, side)
                found |= norm_shapes(f"{name}.bn{j}", out)
            if i == 0:
                found[f"{name}.downsample.0.weight"] = (4 * width, before, 1, 1)
                found |= norm_shapes(f"{name}.downsample.1", 4 * width)
            before = 4 * width
    return found


def made_up(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random float64 entries, which keep the scale of activations."""

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.tensor(7)
        if len(shape) == 4:
            return torch.randn(shape, dtype=torch.float64) / math.sqrt(math.prod(shape[1:]))
        if name.endswith(("running_var", "weight")):
            return torch.rand(shape, dtype=torch.float64) + 0.5
        return torch.randn(shape, dtype=torch.float64) * 0.1

    return {name: value(name, shape) for name, shape in shapes.items()}


class Plain:
    """Functions of a network's entries by name.

    Args:
        state: they; a norm's are one-dimensional.
        training: norms use the batch's statistics.
    """

    def __init__(self, state: Mapping[str, Tensor], training: bool = False) -> None:
        self.state = state
        self.training = training

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        if self.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        scale = self.state[f"{name}.weight"] / (variance.flatten() + 1e-5).sqrt()
        shift = self.state[f"{name}.bias"] - mean.flatten() * scale
        return x * scale[:, None, None] + shift[:, None, None]

    def transposed(self, name: str, x: Tensor, padding: int = 0, more: int = 0) -> Tensor:
        """A transposed convolution of stride 2: the plain one of x with zeros between its pixels.

        Args:
            more: rows and columns at the bottom and right.
        """
        weight = self.state[f"{name}.weight"]
        spread = x.new_zeros(*x.shape[:2], 2 * x.shape[2] - 1, 2 * x.shape[3] - 1)
        spread[..., ::2, ::2] = x
        around = weight.shape[-1] - 1 - padding
        spread = F.pad(spread, (around, around + more, around, around + more))
        return F.conv2d(spread, weight.flip(2, 3).transpose(0, 1), self.state.get(f"{name}.bias"))

    def stage(self, name: str, x: Tensor, depth: int, stride: int, strided: str = "3x3") -> Tensor:
        """Bottleneck blocks, the first of a stride in the convolution ``strided``."""
        for i in range(depth):
            block, step = f"{name}.{i}", stride if i == 0 else 1
            steps = (step, 1, 1) if strided == "1x1" else (1, step, 1)
            skip = (
                self.norm(f"{block}.downsample.1", self.conv(f"{block}.downsample.0", x, step))
                if i == 0
                else x
            )
            for j, each in enumerate(steps, 1):
                x = self.norm(f"{block}.bn{j}", self.conv(f"{block}.conv{j}", x, each))
                x = (x + skip if j == 3 else x).clamp_min(0)
        return x
