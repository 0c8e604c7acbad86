"""SegFormer on a channel-exchanging encoder: Mix Transformer and a decoder of linear layers.

Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers", NeurIPS
2021, section 3.2. Wang et al., "Multimodal Token Fusion for Vision Transformers", CVPR 2022 ("TokenFusion"),
run it on RGB and depth, with 256 channels in the decoder of every size, private layer norms, and in their
appendix with an exchange of channels at these.

Trainable parameters with 40 classes and two modalities, alpha aside: 24,758,376 on MiT-B2, of which 536,104
are the decoder's and 25,984 the layer norms of the second modality; 44,657,256 on MiT-B3 and 82,071,912 on
MiT-B5. With the score networks of TokenFusion, which choose the tokens to exchange and which are not here
(1,260,048), and alpha (2) these are the 26.0 and 45.9 million of its tables.

The paper writes the fusing layer as linear; those counts have a norm behind it and no bias, as the public
networks do, whose features are concatenated coarsest first and resized without aligned corners.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.networks.backend import with_backend
from models.networks.decoders.blocks import ConvNorm
from models.networks.dropout import Dropout
from models.networks.encoders.base import NormLayer, check_counts, make_encoder
from models.networks.fusion import DECODER, Exchange, Fusion
from models.networks.fusion.base import resolve
from models.networks.segmentor import EncoderDecoder


class LinearDecoder(nn.Module):
    """Every feature by a linear layer to the same channels, all enlarged to the finest, fused, classified.

    Args:
        in_channels: channels of the encoder's four features, finest first.
        num_classes: K.
        width: channels inside.
        dropout: probability, before the classifier.
        norm_layer: makes the norm.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        width: int,
        dropout: float,
        norm_layer: NormLayer,
    ) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(channels, width) for channels in in_channels)
        self.fuse = ConvNorm(nn.Conv2d(len(in_channels) * width, width, 1, bias=False), norm_layer)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Four features, finest first, to logits ``[M*N, K, h, w]`` of the finest feature's size."""
        size = features[0].shape[-2:]
        parts = [
            F.interpolate(linear(x.movedim(1, -1)).movedim(-1, 1), size, mode="bilinear")
            for linear, x in zip(self.linears, features, strict=True)
        ]
        logits: Tensor = self.classifier(self.dropout(self.fuse(torch.cat(parts[::-1], 1))))
        return logits


class SegFormer(EncoderDecoder):
    """``segformer`` builds one and describes the arguments; its output is a ``SegmentationOutput``."""


def segformer(
    encoder: str = "mit_b2",
    num_classes: int = 40,
    num_modalities: int = 2,
    *,
    fusion: Fusion | str | None = None,
    threshold: float | str | None = None,
    region: str | None = None,
    criterion: str | None = None,
    dropout: float = 0.1,
    width: int = 256,
    in_channels: int = 3,
    frozen_statistics: bool = True,
    backend: str | None = None,
) -> SegFormer:
    """A channel-exchanging SegFormer for M modalities (Xie et al. 2021), its logits at 1/4.

    Args:
        encoder: ``"mit_b0"`` to ``"mit_b5"``, which exchange at the layer norms of their blocks; or any other
            encoder, as of ``models.refinenet``.
        num_classes, num_modalities, in_channels, backend: as of ``models.refinenet``.
        fusion, threshold, region, criterion: as there.
        frozen_statistics: as there. The decoder's norm, which the modalities share, always trains with batch
            statistics.
        dropout: probability, before the classifier.
        width: channels of the decoder; 256 in TokenFusion, and in Xie et al. for MiT-B0 and B1.

    Returns:
        A module with ``encoder``, ``decoder`` and ``alpha`` (``[M]``, zeros: equal weights); its output is a
        ``SegmentationOutput``.

    Raises:
        ValueError, ImportError: as ``models.refinenet``; a fusion that gives each modality a decoder.
    """
    check_counts(num_classes=num_classes, width=width)
    fusion = resolve(
        fusion, Exchange(), num_modalities, threshold=threshold, region=region, criterion=criterion
    )
    if fusion.private_convolutions(DECODER):
        raise ValueError(f"fusion: the modalities share a SegFormer's decoder, so it cannot serve {fusion}")
    body = make_encoder(
        encoder, num_modalities, fusion, in_channels=in_channels, frozen_statistics=frozen_statistics
    )
    norm_layer = functools.partial(fusion.norm, streams=1, activation="relu")
    decoder = LinearDecoder(body.channels, num_classes, width, dropout, norm_layer)
    return with_backend(SegFormer(body, decoder, num_classes), backend)
