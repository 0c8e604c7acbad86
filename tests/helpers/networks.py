"""Parts that the network tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import cen_ext
from cen_ext import ExchangeBatchNorm2d, ExchangeInstanceNorm2d, ExchangeLayerNorm
from cen_ext.network import exchanging_layers


def randomise_norms(net: nn.Module, small_scales: float = 0.3) -> None:
    """Random private norms; a share ``small_scales`` of the scales lies in (-0.01, 0.01)."""
    for module in net.modules():
        if isinstance(module, ExchangeBatchNorm2d | ExchangeInstanceNorm2d | ExchangeLayerNorm):
            with torch.no_grad():
                module.weight.uniform_(0.3, 0.8).mul_(torch.randn_like(module.weight).sign())
                small = torch.rand_like(module.weight) < small_scales
                module.weight[small] = module.weight[small].uniform_(-0.01, 0.01)
                module.bias.normal_(std=0.1)
                if not isinstance(module, ExchangeLayerNorm):
                    module.running_mean.normal_(std=0.1)
                    module.running_var.uniform_(0.5, 1.5)


def exchange_share(net: nn.Module, share: float) -> None:
    """Random positive scales, by which each modality exchanges a share of a layer's channels, of its own."""
    for layer in exchanging_layers(net).values():
        if layer.threshold == 0:
            continue  # it exchanges by a mask
        modalities, channels = layer.table_shape()
        scales = 0.5 + torch.rand(modalities, channels)
        for m in range(modalities):
            first, end = m * channels // modalities, (m + 1) * channels // modalities
            chosen = first + torch.randperm(end - first)[: round(share * channels)]
            scales[m, chosen] = layer.threshold / 2
        layer.weight.data.copy_(scales)


@contextmanager
def only_backend(name: str) -> Iterator[None]:
    """Networks run on this backend; the test is skipped where it cannot run."""
    state = cen_ext.available_backends()[name]
    if state != "ok":
        pytest.skip(f"backend {name}: {state}")
    with cen_ext.use_backend(name):
        yield
