"""The share of channels that a network exchanges, for the progress bar and TensorBoard."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from cen_ext import exchanging_layers


def exchanged_share(network: nn.Module) -> Tensor:
    """Share of replaced channels among all channels of all modalities in the layers that exchange by scales.

    0-d; a mask of the fusion's own replaces the same channels in every step.
    """
    layers = exchanging_layers(network).values()
    replaced = [layer.replaced().flatten() for layer in layers if layer.replaced_mask is None]
    return torch.cat(replaced).float().mean() if replaced else torch.zeros(())


def record_exchange(network: nn.Module, names: tuple[str, ...], board: SummaryWriter, step: int) -> None:
    """Write each exchanging layer's share of replaced channels, and histograms of its scales γ."""
    for layer_name, layer in exchanging_layers(network).items():
        board.add_scalar(f"exchanged/{layer_name}", layer.replaced().float().mean(), step)
        for name, weight in zip(names, layer.weight.detach(), strict=True):
            board.add_histogram(f"gamma_{name}/{layer_name}", weight, step)
