"""PSPNet on a dilated channel-exchanging ResNet, the paper's other segmentation network.

Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, with the encoder of Wang et al., "Deep Multimodal
Fusion by Channel Exchanging", NeurIPS 2020. Unlike RefineNet's decoder, PSPNet's heads hold norms, and the
statistics there differ between the modalities. Section 3.4 of the latter rules: "with the exception of BN
layers, all sub-networks share all parameters with each other including convolutional filters", as "leveraging
private BN layers is able to characterize the traits of different domains or modalities". So every norm of the
heads is private, like the encoder's. None of them exchanges: "we only perform multimodal fusion within the
encoders" (section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext import Conv3x3
from models.networks.backend import with_backend
from models.networks.decoders.blocks import ConvNorm, region_means
from models.networks.dropout import Dropout
from models.networks.encoders.base import NormLayer, make_encoder
from models.networks.fusion import DECODER, Exchange, Fusion
from models.networks.fusion.base import resolve
from models.networks.segmentor import EncoderDecoder

BINS = (1, 2, 3, 6)


class PyramidHead(nn.Module):
    """Pyramid pooling and classifier: stage 4 beside its averages over 1x1, 2x2, 3x3 and 6x6 regions.

    Args:
        channels: of stage 4; each of the averages is reduced to a quarter of them.
        num_classes: K.
        width: channels before the classifier.
        dropout: probability, before the classifier.
        norm_layer: makes the norms.
    """

    def __init__(
        self, channels: int, num_classes: int, width: int, dropout: float, norm_layer: NormLayer
    ) -> None:
        super().__init__()
        reduced = channels // len(BINS)
        self.pyramid = nn.ModuleList(
            ConvNorm(nn.Conv2d(channels, reduced, 1, bias=False), norm_layer) for _ in BINS
        )
        self.merge = ConvNorm(Conv3x3(channels + len(BINS) * reduced, width, bias=False), norm_layer)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The encoder's four features to logits ``[M*N, K, h, w]`` of the last one's size."""
        x = features[3]
        levels = zip(BINS, self.pyramid, strict=True)
        means = F.adaptive_avg_pool2d if self.training else region_means
        averages = [level(means(x, bins)) for bins, level in levels]
        context = [F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=True) for y in averages]
        logits: Tensor = self.classifier(self.dropout(self.merge(torch.cat([x, *context], 1))))
        return logits


class AuxiliaryHead(nn.Module):
    """Logits from stage 3, for a loss that helps the lower stages to train; arguments as ``PyramidHead``."""

    def __init__(self, channels: int, num_classes: int, dropout: float, norm_layer: NormLayer) -> None:
        super().__init__()
        self.reduce = ConvNorm(Conv3x3(channels, channels // 4, bias=False), norm_layer)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Conv2d(channels // 4, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The encoder's four features to logits ``[M*N, K, h, w]`` of the third one's size."""
        logits: Tensor = self.classifier(self.dropout(self.reduce(features[2])))
        return logits


class PSPNet(EncoderDecoder):
    """``pspnet`` builds one and describes the arguments; its output is a ``SegmentationOutput``."""


def stages_read(aux: bool) -> tuple[int, ...]:
    """The encoder's stages whose features a PSPNet reads, with its auxiliary head or without."""
    return (3, 4) if aux else (4,)


def pspnet(
    encoder: str = "resnet101",
    num_classes: int = 40,
    num_modalities: int = 2,
    *,
    fusion: Fusion | str | None = None,
    threshold: float | str | None = None,
    region: str | None = None,
    criterion: str | None = None,
    dropout: float = 0.1,
    width: int = 512,
    aux: bool = True,
    in_channels: int = 3,
    frozen_statistics: bool = True,
    backend: str | None = None,
) -> PSPNet:
    """A channel-exchanging PSPNet for M modalities (Wang et al. 2020, section 4.1), its logits at 1/8.

    Args:
        encoder: a registered encoder that has a dilated form, ``"resnet18"`` to ``"resnet152"`` for example;
            or ``"timm:NAME"``, a network of timm that has one.
        num_classes: K.
        num_modalities: M >= 1; 1 is a plain PSPNet, its ensemble the detached branch.
        fusion: how the modalities meet, a ``models.fusion`` object or a registered name with its defaults;
            None for ``Exchange(threshold, region, criterion)``.
        threshold, region, criterion: of the exchange, as ``cen_ext.norm_exchange`` describes them; 0.02,
            ``"own"`` and ``"abs"`` where not given. With threshold 0 nothing is exchanged. A threshold may be
            ``"0.05*median"``, as for ``models.fusion.Exchange``.
        dropout: probability, before the classifiers; 0.1 in Zhao et al.
        width: channels before the classifier; 512 in Zhao et al.
        aux: add the auxiliary head on stage 3; the output in training is an ``AuxiliaryOutput`` with its
            logits, whose loss has the weight 0.4 in Zhao et al.
        in_channels: channels of every modality's input.
        frozen_statistics: the encoder's norms use their running statistics in training too (the paper's
            recipe, for encoders with ImageNet weights); False trains with batch statistics. The heads' norms,
            which no weights come with, always do: in training a batch needs two images, as the pyramid's
            first level is a single value per image and channel.
        backend: whose ops the forward pass runs, a name as for ``cen_ext.use_backend``; None for that of the
            context, or else the best that can run.

    Returns:
        A module with ``encoder``, ``decoder``, ``auxiliary`` and ``alpha`` (``[M]``, zeros: equal weights);
        its output is a ``SegmentationOutput``.

    Raises:
        ValueError: an unknown name, or a number out of its range; a fusion that contradicts itself,
            or one beside threshold, region or criterion.
        ImportError: an encoder of timm without timm.
    """
    for name, value in (("num_classes", num_classes), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    fusion = resolve(
        fusion, Exchange(), num_modalities, threshold=threshold, region=region, criterion=criterion
    )
    fusion.check_read(stages_read(aux))
    body = make_encoder(
        encoder,
        num_modalities,
        fusion,
        in_channels=in_channels,
        frozen_statistics=frozen_statistics,
        output_stride=8,
    )
    norm_layer = body.norm_layer(DECODER)
    head = PyramidHead(body.channels[3], num_classes, width, dropout, norm_layer)
    auxiliary = AuxiliaryHead(body.channels[2], num_classes, dropout, norm_layer) if aux else None
    return with_backend(PSPNet(body, head, num_classes, auxiliary=auxiliary), backend)
