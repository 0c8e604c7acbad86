"""Parameters and multiply-adds, by hand."""

from __future__ import annotations

import torch
from torch import nn

import models
from models.networks.counting import count_fusion_parameters, count_multiply_adds, count_parameters


def test_multiply_adds_of_layers() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 3 * 4, 5),
    )
    products = 8 * 3 * 9 * 12 + 8 * 2 * 9 * 12 + 8 * 12 * 5
    assert count_multiply_adds(net, (2, 3, 6, 8)) == 2 * products
    assert net.training


def test_multiply_adds_of_cen() -> None:
    """DFormer's table has 618.7 billion at 480x640, of whatever else it counts."""
    with torch.device("meta"):
        net = models.refinenet("resnet101", 40, 2)
    assert round(count_multiply_adds(net, (2, 3, 480, 640)) / 1e9, 1) == 617.9


def test_parameters() -> None:
    net = models.unet(3, 3, 2, size=8, base_width=4, fusion=models.fusion.Concat(stages=(2,)))
    plain = models.unet(3, 3, 2, size=8, base_width=4)
    block = 2 * 8 * 8
    assert count_fusion_parameters(net) == block
    assert count_parameters(net) == count_parameters(plain) + block
    assert count_parameters(plain) == sum(p.numel() for p in plain.parameters()) - 2  # alpha
