"""ESANet: a context module, three decoder modules and learned upsampling on a channel-exchanging encoder.

Seichter et al., "Efficient RGB-D Semantic Segmentation for Indoor Scene Analysis", ICRA 2021. With
``fusion="se_add"`` it is their network, ESANet-R34-NBt1D: 46,962,112 trainable parameters with 40 classes,
side outputs included, of which 6,272 read the second and the third channel of depth images, which have a
single one there. With exchange in one encoder for both modalities they are 32,118,144.

Tables of later papers, DFormer's for one, have 31.2 million parameters and 34.9 billion multiply-adds beside
the scores of the paper. That is another decoder than the one of the scores: with 128 channels everywhere and
one block in each module (``width=128, decreasing=False, blocks=1``) they are 31,219,392 and 35.4 billion, or
31,213,120 and 34.9 billion for depth of one channel.

Ours: exchange in one encoder for all modalities instead of a fusion; and what follows from M branches. The
decoder's convolutions are shared, its norms are private, for the reason that ``pspnet`` gives, and none of
them exchanges. Where the size of an image is not divisible by 32, upsampling ends at the size of the skip
that it is added to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext import Conv3x3
from cen_ext.modules import ExchangeNorm
from models.networks.backend import with_backend
from models.networks.decoders.blocks import ConvNorm, region_means
from models.networks.dropout import Dropout
from models.networks.encoders.base import NormLayer, check_counts, make_encoder
from models.networks.encoders.nbt1d import NonBottleneck1D
from models.networks.fusion import DECODER, Exchange, Fusion
from models.networks.fusion.base import STAGES, resolve
from models.networks.segmentor import EncoderDecoder

STAGES_READ = tuple(range(1, STAGES + 1))
BINS = (1, 5)  # regions of the image, across and down, whose means are the context


class LearnedUpsampling(nn.Module):
    """Nearest-neighbor upsampling and a 3x3 depthwise convolution, at first bilinear but for the borders."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        tent = torch.tensor([0.25, 0.5, 0.25])
        self.conv.weight = nn.Parameter((tent[:, None] * tent).repeat(channels, 1, 1, 1))
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]  # torch declares that it may be None

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """``[N, C, h, w]`` to ``[N, C, *size]``; None for twice h and w."""
        size = [2 * length for length in x.shape[-2:]] if size is None else list(size)
        y: Tensor = self.conv(F.interpolate(x, size, mode="nearest"))
        return y


class ContextModule(nn.Module):
    """The last feature beside its means over the image and over 5x5 regions, merged by a 1x1 convolution.

    Args:
        channels: of the input; each of the means is reduced to half of them.
        width: of the output.
        norm_layer: makes the norms.
    """

    def __init__(self, channels: int, width: int, norm_layer: NormLayer) -> None:
        super().__init__()
        reduced = channels // len(BINS)
        self.levels = nn.ModuleList(
            ConvNorm(nn.Conv2d(channels, reduced, 1, bias=False), norm_layer) for _ in BINS
        )
        merged = channels + len(BINS) * reduced
        self.merge = ConvNorm(nn.Conv2d(merged, width, 1, bias=False), norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        """``[M*N, channels, h, w]`` to ``[M*N, width, h, w]``."""
        means = [level(region_means(x, bins)) for bins, level in zip(BINS, self.levels, strict=True)]
        context = [F.interpolate(mean, x.shape[-2:], mode="nearest") for mean in means]
        y: Tensor = self.merge(torch.cat([x, *context], 1))
        return y


class DecoderModule(nn.Module):
    """3x3 convolution, Non-Bottleneck-1D blocks, learned upsampling, and a skip of the encoder that is added.

    Args:
        in_channels, skip_channels: of what comes in, and of the encoder's feature of the finer stage.
        width: of the output.
        blocks: how many there are.
        norm_layer: makes the norms.
    """

    def __init__(
        self, in_channels: int, skip_channels: int, width: int, blocks: int, norm_layer: NormLayer
    ) -> None:
        super().__init__()

        def without_exchange(
            channels: int, *, exchange_point: bool = False, **options: Any
        ) -> ExchangeNorm:  # the blocks ask for exchange points, of which a decoder has none
            return norm_layer(channels, **options)

        self.conv = ConvNorm(Conv3x3(in_channels, width, bias=False), norm_layer)
        self.blocks = nn.Sequential(
            *(NonBottleneck1D(width, width, 1, (1, 1), without_exchange) for _ in range(blocks))
        )
        self.upsample = LearnedUpsampling(width)
        self.skip = ConvNorm(nn.Conv2d(skip_channels, width, 1, bias=False), norm_layer)

    def forward(self, x: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a side output reads, of the input's size, and the output, of the feature's size."""
        inner = self.blocks(self.conv(x))
        skip = self.skip(feature)
        return inner, self.upsample(inner, skip.shape[-2:]) + skip


class ESANetDecoder(nn.Module):
    """Context, decoder modules, and a classifier whose logits are upsampled twice.

    Args:
        channels: of the encoder's four features, finest first.
        num_classes: K.
        widths: of the decoder modules, coarsest first.
        blocks: Non-Bottleneck-1D blocks in each of them.
        dropout: probability, before the classifier.
        norm_layer: makes the norms.
        aux: make the side outputs.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        widths: Sequence[int],
        blocks: int,
        dropout: float,
        norm_layer: NormLayer,
        *,
        aux: bool = True,
    ) -> None:
        super().__init__()
        *skips, last = channels
        self.context = ContextModule(last, widths[0], norm_layer)
        entering = (widths[0], *widths)
        self.levels = nn.ModuleList(
            DecoderModule(before, skip, width, blocks, norm_layer)
            for before, skip, width in zip(entering, reversed(skips), widths, strict=False)
        )
        self.sides = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in widths if aux)
        self.dropout = Dropout(dropout)
        self.classifier = Conv3x3(widths[-1], num_classes)
        self.upsample = nn.Sequential(LearnedUpsampling(num_classes), LearnedUpsampling(num_classes))

    def with_sides(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The encoder's four features to logits, and in training those of side outputs, coarsest first.

        Returns:
            ``[M*N, K, 4h, 4w]`` where the first feature is ``[.., h, w]``; and ``[M*N, K, h, w]`` of the
            sizes of the features but the first.
        """
        *skips, last = features
        x, inner = self.context(last), []
        for level, feature in zip(self.levels, reversed(skips), strict=True):
            before, x = level(x, feature)
            inner.append(before)
        logits: Tensor = self.upsample(self.classifier(self.dropout(x)))
        if not self.training:
            return logits, []
        return logits, [side(y) for side, y in zip(self.sides, inner, strict=False)]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The logits alone."""
        return self.with_sides(features)[0]


class ESANet(EncoderDecoder):
    """``esanet`` builds one and describes the arguments; its output is a ``SegmentationOutput``."""

    decoder: ESANetDecoder

    @property
    def num_sides(self) -> int:
        return len(self.decoder.sides)

    def decode(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return self.decoder.with_sides(features)


def esanet(
    encoder: str = "resnet34_nbt1d",
    num_classes: int = 40,
    num_modalities: int = 2,
    *,
    fusion: Fusion | str | None = None,
    threshold: float | str | None = None,
    region: str | None = None,
    criterion: str | None = None,
    dropout: float = 0.0,
    width: int = 512,
    decreasing: bool = True,
    blocks: int = 3,
    aux: bool = True,
    in_channels: int = 3,
    frozen_statistics: bool = True,
    backend: str | None = None,
) -> ESANet:
    """A channel-exchanging ESANet for M modalities (Seichter et al. 2021), its logits at the image's size.

    Where height or width are not divisible by 4, the logits are larger, by 3 pixels at most.

    Args:
        encoder: a registered encoder, or ``"timm:NAME"``; ``"resnet34_nbt1d"`` in Seichter et al.
        num_classes: K.
        num_modalities: M >= 1.
        fusion: how the modalities meet, a ``models.fusion`` object or a registered name with its defaults;
            ``"se_add"`` in Seichter et al.; None for ``Exchange(threshold, region, criterion)``.
        threshold, region, criterion: of the exchange, as of ``models.pspnet``.
        dropout: probability, before the classifier; none in Seichter et al.
        width: channels of the context and of the first decoder module; 512 in Seichter et al.
        decreasing: the second and the third have half and a quarter of them, as there; or as many.
        blocks: Non-Bottleneck-1D blocks of a decoder module; 3 in Seichter et al.
        aux: add a side output to each decoder module, before its upsampling, at 1/32, 1/16 and 1/8 of the
            image; the output in training is an ``AuxiliaryOutput`` with their logits, whose losses have the
            weight 1 in Seichter et al.
        in_channels: channels of every modality's input.
        frozen_statistics: the encoder's norms use their running statistics in training too; False trains with
            batch statistics, as Seichter et al. Those of the decoder always do: in training a batch needs two
            images, as the context's first level is a single value per image and channel.
        backend: whose ops the forward pass runs, a name as for ``cen_ext.use_backend``; None for that of the
            context, or else the best that can run.

    Returns:
        A module with ``encoder``, ``decoder`` and ``alpha`` (``[B]``, zeros: equal weights); its output is a
        ``SegmentationOutput``.

    Raises:
        ValueError: an unknown name, or a number out of its range; a fusion that contradicts itself,
            or one beside threshold, region or criterion.
        ImportError: an encoder of timm without timm.
    """
    check_counts(num_classes=num_classes, width=width, blocks=blocks)
    fusion = resolve(
        fusion, Exchange(), num_modalities, threshold=threshold, region=region, criterion=criterion
    )
    fusion.check_read(STAGES_READ)
    body = make_encoder(
        encoder, num_modalities, fusion, in_channels=in_channels, frozen_statistics=frozen_statistics
    )
    widths = [max(width >> number, 1) if decreasing else width for number in range(STAGES - 1)]
    norm_layer = body.norm_layer(DECODER)
    decoder = ESANetDecoder(body.channels, num_classes, widths, blocks, dropout, norm_layer, aux=aux)
    return with_backend(ESANet(body, decoder, num_classes), backend)
