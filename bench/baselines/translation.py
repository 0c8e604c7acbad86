"""The translation networks as they are usually written: a baseline, and a check of ``models.translation``.

Lists of M tensors everywhere, one call per modality for every shared layer, one ``nn.InstanceNorm2d`` each,
the exchange by boolean masks into a fresh tensor. Parameter names are those of ``models.unet`` and
``models.patchgan``, with the modality's number inside the norms' (``norm.0.weight``);
``bench.baselines.exchange.split_state`` and ``stacked_state`` convert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.baselines.exchange import each, exchange, replaced


class Norm(nn.ModuleList):
    """One instance norm per modality, or one for all, and, with a threshold, the exchange after it."""

    def __init__(self, channels: int, number: int, threshold: float = 0.0, region: str = "own") -> None:
        super().__init__(
            nn.InstanceNorm2d(channels, affine=True, track_running_stats=True) for _ in range(number)
        )
        self.threshold = threshold
        self.region = region
        self.exchange = exchange

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        norms = list(self) if len(self) == len(xs) else [self[0]] * len(xs)
        xs = [norm(x) for norm, x in zip(norms, xs, strict=True)]
        if self.threshold == 0 or len(xs) == 1:
            return xs
        return self.exchange(xs, replaced([norm.weight for norm in norms], self.threshold, self.region))


class Block(nn.Module):
    """Activation, convolution and norm, of which the first and the last may be missing."""

    def __init__(self, conv: nn.Module, norm: Norm | None, activation: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.activation = activation

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        if self.activation is not None:
            xs = each(self.activation, xs)
        xs = each(self.conv, xs)
        return xs if self.norm is None else self.norm(xs)


class Encoder(nn.Module):
    def __init__(self, widths: list[int], num_modalities: int, threshold: float, region: str) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for i, (channels, width) in enumerate(zip([3, *widths], widths, strict=False)):
            normalized = 0 < i < len(widths) - 1
            norm = Norm(width, num_modalities, threshold, region) if normalized else None
            conv = nn.Conv2d(channels, width, 4, 2, 1)
            self.levels.append(Block(conv, norm, nn.LeakyReLU(0.2) if i > 0 else None))

    def forward(self, xs: list[Tensor]) -> list[list[Tensor]]:
        features = []
        for level in self.levels:
            xs = level(xs)
            features.append(xs)
        return features


class Decoder(nn.Module):
    def __init__(self, widths: list[int], num_norms: int, dropout: float) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        channels = widths[-1]
        for width in reversed(widths[:-1]):
            conv = nn.ConvTranspose2d(channels, width, 4, 2, 1)
            self.levels.append(Block(conv, Norm(width, num_norms), nn.ReLU()))
            channels = 2 * width
        self.image = nn.ConvTranspose2d(channels, 3, 4, 2, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: list[list[Tensor]]) -> list[Tensor]:
        *features, xs = features
        for i, (level, skips) in enumerate(zip(self.levels, reversed(features), strict=True)):
            xs = level(xs)
            if i < 3:
                xs = each(self.dropout, xs)
            xs = [torch.cat([x, skip], 1) for x, skip in zip(xs, skips, strict=True)]
        return [torch.tanh(self.image(F.relu(x))) for x in xs]


class EagerUNet(nn.Module):
    """Arguments as ``models.unet``; a list of M ``[N, 3, H, W]`` to M branches and the ensemble."""

    def __init__(
        self,
        num_modalities: int = 2,
        *,
        size: int = 256,
        base_width: int = 64,
        threshold: float = 0.01,
        region: str = "own",
        dropout: float = 0.5,
        decoder_norms: str = "shared",
    ) -> None:
        super().__init__()
        widths = [base_width * min(2**i, 8) for i in range(size.bit_length() - 1)]
        self.encoder = Encoder(widths, num_modalities, threshold, region)
        self.decoder = Decoder(widths, num_modalities if decoder_norms == "private" else 1, dropout)
        self.alpha = nn.Parameter(torch.zeros(num_modalities))

    def forward(self, xs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        branches = self.decoder(self.encoder(xs))
        weights = F.softmax(self.alpha, dim=0)
        ensemble = sum(weights[m] * branch.detach() for m, branch in enumerate(branches))
        return branches, ensemble


class EagerPatchGAN(nn.Module):
    """Arguments as ``models.patchgan``; lists of M inputs and of M images to a list of M logits."""

    def __init__(self, in_channels: int = 6, base_width: int = 64) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        channels = in_channels
        for i in range(4):
            width = base_width * 2**i
            conv = nn.Conv2d(channels, width, 4, 2 if i < 3 else 1, 1)
            norm, activation = (Norm(width, 1), nn.LeakyReLU(0.2)) if i > 0 else (None, None)
            self.levels.append(Block(conv, norm, activation))
            channels = width
        self.decide = nn.Conv2d(channels, 1, 4, padding=1)

    def forward(self, inputs: list[Tensor], images: list[Tensor]) -> list[Tensor]:
        xs = [torch.cat(pair, 1) for pair in zip(inputs, images, strict=True)]
        for level in self.levels:
            xs = level(xs)
        return [self.decide(F.leaky_relu(x, 0.2)) for x in xs]
