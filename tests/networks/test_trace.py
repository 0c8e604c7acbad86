"""Traces of networks: norms after spatial convolutions, stages, blocks that halve."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks.encoders.trace import trace


class Tangled(nn.Module):
    """Registered in another order than run, with all that comes between a convolution and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.after_sum, self.after_cat, self.after_point, self.after_stem, self.after_wide = (
            nn.BatchNorm2d(channels) for channels in (4, 6, 4, 4, 4)
        )
        self.wide = nn.Conv2d(4, 4, (1, 3), padding=(0, 1), groups=4)
        self.point = nn.Conv2d(4, 4, 1)
        self.narrow = nn.Conv2d(4, 2, 3, padding=1)
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_stem(self.stem(nn.functional.pad(x, (1, 1, 1, 1))))
        x = self.after_point(self.point(x))
        x = self.after_wide(self.wide(x))
        x = self.after_sum(x + self.wide(x))
        return self.after_cat(torch.cat([x, self.narrow(x)], 1))


def test_spatial_norms_go_by_the_tensors_and_change_nothing() -> None:
    net = Tangled()
    net.after_cat.eval()
    assert trace(net, torch.randn(2, 3, 5, 5)).spatial == ("after_wide", "after_cat")
    assert net.training
    assert net.stem.training
    assert not net.after_cat.training
    assert net.after_sum.num_batches_tracked == 0
    assert torch.equal(net.after_sum.running_mean, torch.zeros(4))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def block(channels: int, stride: int) -> nn.Sequential:
    """Two convolutions, each with its norm."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, padding=1),
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
    )


class Pyramid(nn.Module):
    """A stem with an activation in place, and two features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.first = nn.ModuleList([block(4, 1), block(4, 2)])
        self.down = nn.Sequential(nn.Conv2d(4, 4, 2, 2), nn.BatchNorm2d(4))
        self.last = block(4, 1)
        self.again = False

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.act(self.stem(x))
        for each in self.first:
            x = each(x)
        y = self.last(self.down(x))
        return [x, self.last(y) if self.again else y]


def test_a_chain_is_cut_where_features_leave_it() -> None:
    net, image = Pyramid(), torch.randn(1, 3, 8, 8)
    units = ["stem", "act", "first.0", "first.1", "down", "last"]
    seen = trace(net, image)
    assert seen.chain(units) == (("stem", "act", "first.0", "first.1"), ("down", "last"))
    assert seen.chain(units[1:]) == ()  # the image is none of theirs
    assert seen.chain(units[:4]) == ()  # a feature is missing
    assert seen.chain([*units, "never"]) == ()
    net.again = True
    assert trace(net, image).chain(units) == ()


def test_downsampling_norms_are_those_of_the_blocks_that_halve() -> None:
    seen = trace(Pyramid(), torch.randn(1, 3, 8, 8))
    assert seen.downsampling() == {"first.1.1", "first.1.3", "down.1"}


class Attention(nn.Module):
    """A block of a transformer: norms before what they are for, one of them within attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.attn = nn.Sequential(nn.Conv1d(4, 4, 1), nn.LayerNorm(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.norm1(x))


class ConvNeXt(nn.Module):
    """A block with a norm after a spatial convolution, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last = nn.LayerNorm(4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x + self.last(y)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 2, 2), nn.LayerNorm(4)
        self.blocks = nn.ModuleList([Attention(), ConvNeXt(), nn.Sequential(Attention(), nn.LayerNorm(4))])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).permute(0, 2, 3, 1))
        for block in self.blocks:
            x = block(x)
        return x


def test_layer_norms_of_blocks_are_exchange_points() -> None:
    seen = trace(Transformer(), torch.randn(1, 3, 8, 8))
    assert seen.exchange_points() == (
        "blocks.0.norm1",
        "blocks.0.norm2",
        "blocks.1.norm",
        "blocks.2.0.norm1",
        "blocks.2.0.norm2",
    )
    assert trace(Tangled(), torch.randn(2, 3, 5, 5)).exchange_points() == ("after_cat", "after_wide")
