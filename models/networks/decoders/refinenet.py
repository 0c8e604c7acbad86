"""RefineNet on a channel-exchanging ResNet, the paper's segmentation network.

Decoder: Lin et al., "RefineNet: Multi-Path Refinement Networks for High-Resolution Semantic Segmentation",
CVPR 2017, in the layout of the released channel-exchanging networks. The decoder is shared by the modalities
and holds no norm, so that the stacked batch runs through it like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext import Conv3x3, max_pool_same
from models.networks.backend import with_backend
from models.networks.decoders.blocks import initialize
from models.networks.dropout import Dropout
from models.networks.encoders.base import make_encoder
from models.networks.fusion import Exchange, Fusion
from models.networks.fusion.base import resolve
from models.networks.segmentor import EncoderDecoder


class ResidualConvUnit(nn.Module):
    """Residual convolution unit: ``r + conv2(relu(conv1(r)))`` with ``r = relu(x)``.

    The skip carries r where Lin et al. draw x: the released networks rectify x in place, and their weights
    were trained so.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv3x3(channels, channels)
        self.conv2 = Conv3x3(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(x)
        update: Tensor = self.conv2(F.relu_(self.conv1(x)))
        return update.add_(x)


class ChainedResidualPooling(nn.Module):
    """Chained residual pooling: x plus the outputs of a chain of 5x5 max pooling and convolution.

    Args:
        channels: of input and output.
        length: links of the chain.
        kernel: side of the convolutions, 3 or 1.
    """

    def __init__(self, channels: int, length: int = 4, kernel: int = 3) -> None:
        super().__init__()
        conv = Conv3x3 if kernel == 3 else functools.partial(nn.Conv2d, kernel_size=kernel)
        self.convs = nn.ModuleList(conv(channels, channels, bias=False) for _ in range(length))

    def forward(self, x: Tensor) -> Tensor:
        total = link = x
        for conv in self.convs:
            link = conv(max_pool_same(link, 5))
            total = total + link
        return total


class RefineNetBlock(nn.Module):
    """One level of the decoder: adapt the encoder's feature, join the coarser level, pool, refine.

    Attributes:
        unit: the kind of residual unit, a module of ``channels``.
        links: of the chained pooling.
        resizing: by which the coarser level gets the size of this one.

    Args:
        in_channels: channels of the encoder's feature.
        channels: channels inside.
        out_channels: channels for the next level, or None at the finest.
        joins: whether a coarser level comes in, of ``channels`` channels.
    """

    unit: ClassVar[type[nn.Module]] = ResidualConvUnit
    links: ClassVar[int] = 4
    resizing: ClassVar[str] = "bilinear"

    def __init__(self, in_channels: int, channels: int, out_channels: int | None, joins: bool) -> None:
        super().__init__()
        self.reduce = self.reduction(in_channels, channels)
        self.adapt = nn.Sequential(*(self.unit(channels) for _ in range(2)))
        self.join = Conv3x3(channels, channels, bias=False) if joins else None
        self.pool = ChainedResidualPooling(channels, self.links)
        self.refine = nn.Sequential(*(self.unit(channels) for _ in range(3)))
        self.project = None if out_channels is None else Conv3x3(channels, out_channels, bias=False)

    def reduction(self, in_channels: int, channels: int) -> nn.Module:
        """Make what brings the encoder's feature to ``channels``."""
        return Conv3x3(in_channels, channels, bias=False)

    def forward(self, feature: Tensor, coarser: Tensor | None) -> Tensor:
        x = self.adapt(self.reduce(feature))
        if self.join is not None and coarser is not None:
            large = F.interpolate(coarser, x.shape[-2:], mode=self.resizing, align_corners=True)
            x = large.add_(self.join(x))
        # F.relu keeps its result for the gradient, as nothing else does here; this keeps a byte per value.
        x = self.refine(self.pool(torch.where(x <= 0, 0, x)))
        y: Tensor = x if self.project is None else self.project(x)
        return y


class RefineNetDecoder(nn.Module):
    """Four cascades from the coarsest feature to the finest, and a classifier.

    Attributes:
        block: the kind of cascade: a module of ``RefineNetBlock``'s arguments, with its ``reduce``, ``join``
            and ``project``.

    Args:
        in_channels: channels of the encoder's four features, finest first.
        num_classes: K.
        width: channels of the three finer cascades; the coarsest has twice as many.
        dropout: probability, on the two coarsest features and before the classifier.
        init: ``"torch"`` or ``"kaiming"``, see ``refinenet``.
    """

    block: ClassVar[type[nn.Module]] = RefineNetBlock

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, width: int, dropout: float, init: str
    ) -> None:
        super().__init__()
        finest, fine, coarse, coarsest = in_channels
        blocks: list[Any] = [
            self.block(coarsest, 2 * width, width, joins=False),
            self.block(coarse, width, width, joins=True),
            self.block(fine, width, width, joins=True),
            self.block(finest, width, None, joins=True),
        ]
        self.cascades = nn.ModuleList(blocks)
        self.dropout = Dropout(dropout)
        self.classifier: nn.Conv2d = Conv3x3(width, num_classes)
        for block in blocks:
            initialize(init, (block.reduce, block.join, block.project))

    def levels(self, features: Sequence[Any]) -> Sequence[Any]:
        """Return what the cascades get of the features, coarsest first."""
        finest, fine, coarse, coarsest = features
        return self.dropout(coarsest), self.dropout(coarse), fine, finest

    def forward(self, features: Sequence[Any]) -> Tensor:
        """Four features, finest first, to logits ``[M*N, K, h, w]`` of the finest feature's size."""
        x = None
        for cascade, feature in zip(self.cascades, self.levels(features), strict=True):
            x = cascade(feature, x)
        logits: Tensor = self.classifier(self.dropout(x, inplace=True))
        return logits


class RefineNet(EncoderDecoder):
    """``refinenet`` builds one and describes the arguments; its output is a ``SegmentationOutput``."""


def refinenet(
    encoder: str = "resnet101",
    num_classes: int = 40,
    num_modalities: int = 2,
    *,
    fusion: Fusion | str | None = None,
    threshold: float | str | None = None,
    region: str | None = None,
    criterion: str | None = None,
    dropout: float = 0.5,
    width: int = 256,
    in_channels: int = 3,
    frozen_statistics: bool = True,
    decoder_init: str = "torch",
    backend: str | None = None,
) -> RefineNet:
    """A channel-exchanging RefineNet for M modalities (Wang et al. 2020, section 4.1).

    Args:
        encoder: a registered encoder, ``"resnet18"`` to ``"resnet152"`` for example; or ``"timm:NAME"``, a
            network of timm.
        num_classes: K.
        num_modalities: M >= 1; 1 is a plain RefineNet, its ensemble the detached branch.
        fusion: how the modalities meet, a ``models.fusion`` object or a registered name with its defaults;
            None for ``Exchange(threshold, region, criterion)``.
        threshold, region, criterion: of the exchange, as ``cen_ext.norm_exchange`` describes them; 0.02,
            ``"own"`` and ``"abs"`` where not given. With threshold 0 nothing is exchanged. A threshold may be
            ``"0.05*median"``, as for ``models.fusion.Exchange``.
        dropout: probability, on the features at 1/16 and 1/32 and before the classifier.
        width: channels of the decoder (the coarsest cascade has twice as many); 256 in the paper.
        in_channels: channels of every modality's input.
        frozen_statistics: the encoder's norms use their running statistics in training too (the paper's
            recipe, for encoders with ImageNet weights); False trains with batch statistics.
        decoder_init: how the decoder's convolutions start: ``"torch"``, as torch makes them, or
            ``"kaiming"``, which keeps the scale of activations where levels begin, join and end.
        backend: whose ops the forward pass runs, a name as for ``cen_ext.use_backend``; None for that of the
            context, or else the best that can run.

    Returns:
        A module with ``encoder``, ``decoder`` and ``alpha`` (``[M]``, zeros: equal weights); its output is a
        ``SegmentationOutput``.

    Raises:
        ValueError: an unknown name, or a number out of its range; a fusion that contradicts itself,
            or one beside threshold, region or criterion.
        ImportError: an encoder of timm without timm.
    """
    return assemble(
        RefineNet,
        RefineNetDecoder,
        encoder,
        num_classes,
        num_modalities,
        resolve(fusion, Exchange(), num_modalities, threshold=threshold, region=region, criterion=criterion),
        dropout=dropout,
        width=width,
        in_channels=in_channels,
        frozen_statistics=frozen_statistics,
        decoder_init=decoder_init,
        backend=backend,
    )


Network = TypeVar("Network", bound=EncoderDecoder)


def assemble(
    network: type[Network],
    decoder: type[RefineNetDecoder],
    encoder: str,
    num_classes: int,
    num_modalities: int,
    fusion: Fusion,
    *,
    dropout: float,
    width: int,
    in_channels: int,
    frozen_statistics: bool,
    decoder_init: str,
    backend: str | None,
) -> Network:
    """Build a network with a decoder of RefineNet's kind; arguments and errors as of ``refinenet``."""
    for name, value in (("num_classes", num_classes), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    body = make_encoder(
        encoder, num_modalities, fusion, in_channels=in_channels, frozen_statistics=frozen_statistics
    )
    head = decoder(body.channels, num_classes, width, dropout, decoder_init)
    return with_backend(network(body, head, num_classes), backend)
