"""Layers that several decoders are built of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.networks.encoders.base import NormLayer

INITS = ("torch", "kaiming")


class ConvNorm(nn.Module):
    """Convolution, which may be a transposed one, norm, relu."""

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm_layer(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y


def region_means(x: Tensor, bins: int) -> Tensor:
    """Means over ``bins`` x ``bins`` regions, ``[N, C, H, W]`` to ``[N, C, bins, bins]``."""
    if not torch.compiler.is_exporting():
        return F.adaptive_avg_pool2d(x, bins)
    if bins == 1:
        return x.mean((2, 3), keepdim=True)
    # That function's regions would be fixed in ONNX; as matrices they follow the size of the image.
    down, across = (_regions(size, bins, x) for size in x.shape[-2:])
    return F.linear(F.linear(x, across).mT, down).mT


def _regions(size: int, bins: int, like: Tensor) -> Tensor:
    """The weights ``[bins, size]`` of the positions in each region, of sum 1."""
    numbers = torch.arange(bins, device=like.device)[:, None]
    positions = torch.arange(size, device=like.device)
    starts, ends = numbers * size // bins, ((numbers + 1) * size + bins - 1) // bins
    inside = (positions >= starts) & (positions < ends)
    return inside.to(like.dtype) / (ends - starts)


def initialize(init: str, convolutions: Iterable[nn.Conv2d | None]) -> None:
    """Start a decoder's convolutions as torch makes them, or so that they keep the scale of activations.

    Args:
        init: ``"torch"`` or ``"kaiming"``.
        convolutions: None among them counts for nothing.

    Raises:
        ValueError: another init.
    """
    if init not in INITS:
        raise ValueError(f"decoder_init must be 'torch' or 'kaiming', got {init!r}")
    for conv in convolutions:
        if conv is not None and init == "kaiming":
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")


def cropped(x: Tensor, size: Sequence[int]) -> Tensor:
    """Rows and columns up to a size ``(h, w)``, from the top left."""
    down, across = (wanted - own for wanted, own in zip(size, x.shape[-2:], strict=True))
    # Not slices, which would fix the size in exported programs.
    return F.pad(x, (0, across, 0, down))
