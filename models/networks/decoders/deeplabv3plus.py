"""DeepLabv3+ on a dilated channel-exchanging encoder.

Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018;
Wang et al., "Learning Deep Multimodal Feature Representation with Asymmetric Multi-layer Fusion", ACM MM
2020 ("AsymFusion"), run it on Xception-65 with RGB and disparity on Cityscapes.

Trainable parameters with 19 classes, alpha aside: 41,054,899 on Xception-65 and 43,477,323 on Xception-71, of
one modality; 41,240,099 and 43,676,299 with private norms in the encoders of two. AsymFusion's table names
Xception-65 and prints 43.48 M for one modality and 43.52 M for two. Neither is its count: 43.48 M is that of
Xception-71, and stands in an older table of Valada et al. for a "Modified Xception"; 0.04 M more is no whole
set of private norms. The shapes here are those of the published weights.

Which norms of pyramid and decoder are private there is not public. Here the modalities share them unless
``decoder_norms`` says otherwise; none of them exchanges.
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
from models.networks.encoders.base import Encoder, NormLayer, make_encoder
from models.networks.encoders.xception import SeparableConv
from models.networks.fusion import DECODER, Exchange, Fusion
from models.networks.fusion.base import resolve
from models.networks.segmentor import EncoderDecoder

STAGES_READ = (1, 4)  # the encoder's: low-level feature and pyramid
LOW_LEVEL = 48  # channels that the low-level feature is reduced to
RATES = (6, 12, 18)  # dilations of the pyramid at 1/16


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three dilated separable convolutions, and the image's mean.

    Args:
        channels: of the input.
        width: channels of each of the five parts, and of what they are merged to.
        rates: dilations of the separable convolutions.
        dropout: probability, at the end.
        norm_layer: makes the norms.
    """

    def __init__(
        self, channels: int, width: int, rates: Sequence[int], dropout: float, norm_layer: NormLayer
    ) -> None:
        super().__init__()

        def conv1x1(channels: int) -> ConvNorm:
            return ConvNorm(nn.Conv2d(channels, width, 1, bias=False), norm_layer)

        self.point = conv1x1(channels)
        self.atrous = nn.ModuleList(
            SeparableConv(channels, width, norm_layer, dilation=rate) for rate in rates
        )
        self.pool = conv1x1(channels)
        self.merge = conv1x1((2 + len(rates)) * width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[M*N, channels, h, w]`` to ``[M*N, width, h, w]``."""
        mean = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        parts = [self.point(x), *(atrous(x) for atrous in self.atrous), mean]
        y: Tensor = self.dropout(self.merge(torch.cat(parts, 1)))
        return y


class DeepLabDecoder(nn.Module):
    """The pyramid's output, enlarged to the low-level feature's size, refined with it and classified.

    Args:
        channels: of the encoder's first feature, the low-level one, and of its last.
        num_classes: K.
        width: channels inside.
        rates, dropout, norm_layer: as in ``AtrousPyramid``.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        num_classes: int,
        width: int,
        rates: Sequence[int],
        dropout: float,
        norm_layer: NormLayer,
    ) -> None:
        super().__init__()
        low_level, high_level = channels
        self.pyramid = AtrousPyramid(high_level, width, rates, dropout, norm_layer)
        self.reduce = ConvNorm(nn.Conv2d(low_level, LOW_LEVEL, 1, bias=False), norm_layer)
        self.refine = nn.Sequential(
            SeparableConv(width + LOW_LEVEL, width, norm_layer), SeparableConv(width, width, norm_layer)
        )
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The encoder's four features to logits ``[M*N, K, h, w]`` of the first one's size."""
        low_level = self.reduce(features[0])
        high_level = self.pyramid(features[3])
        high_level = F.interpolate(high_level, low_level.shape[-2:], mode="bilinear", align_corners=True)
        logits: Tensor = self.classifier(self.refine(torch.cat([high_level, low_level], 1)))
        return logits


class DeepLabV3Plus(EncoderDecoder):
    """``deeplabv3plus`` builds one and describes the arguments; its output is a ``SegmentationOutput``."""


def deeplabv3plus(
    encoder: str = "xception65",
    num_classes: int = 19,
    num_modalities: int = 2,
    *,
    fusion: Fusion | str | None = None,
    threshold: float | str | None = None,
    region: str | None = None,
    criterion: str | None = None,
    dropout: float = 0.1,
    width: int = 256,
    output_stride: int = 16,
    decoder_norms: str = "shared",
    in_channels: int = 3,
    frozen_statistics: bool = True,
    backend: str | None = None,
) -> DeepLabV3Plus:
    """A channel-exchanging DeepLabv3+ for M modalities (Chen et al. 2018), its logits at 1/4.

    Args:
        encoder: a registered encoder that has a dilated form: ``"xception65"``, ``"xception71"``,
            ``"resnet18"`` to ``"resnet152"`` for example; or ``"timm:NAME"``, a network of timm that has one.
            The first stage's feature is the low-level one, 256 channels in Xceptions and deep ResNets.
        num_classes: K.
        num_modalities: M >= 1; 1 is a plain DeepLabv3+, its ensemble the detached branch.
        fusion: how the modalities meet, a ``models.fusion`` object or a registered name with its defaults;
            None for ``Exchange(threshold, region, criterion)``.
        threshold, region, criterion: of the exchange, as ``cen_ext.norm_exchange`` describes them; 0.02,
            ``"own"`` and ``"abs"`` where not given. With threshold 0 nothing is exchanged. A threshold may be
            ``"0.05*median"``, as for ``models.fusion.Exchange``.
        dropout: probability, after the pyramid; 0.1 in Chen et al.
        width: channels of pyramid and decoder; 256 in Chen et al.
        output_stride: of the encoder's last feature: 16, or 8 with twice the pyramid's dilations.
        decoder_norms: ``"shared"`` by the modalities, as the convolutions there, or ``"private"``.
        in_channels: channels of every modality's input.
        frozen_statistics: the encoder's norms use their running statistics in training too; False trains with
            batch statistics. Those of the decoder always do: in training, the norm of the pyramid's image
            mean needs two values per channel, so two images, or two modalities where it is shared.
        backend: whose ops the forward pass runs, a name as for ``cen_ext.use_backend``; None for that of the
            context, or else the best that can run.

    Returns:
        A module with ``encoder``, ``decoder`` and ``alpha`` (``[M]``, zeros: equal weights); its output is a
        ``SegmentationOutput``.

    Raises:
        ValueError: an unknown name, or a number out of its range; a fusion that contradicts itself or
            ``decoder_norms``, or one beside threshold, region or criterion.
        ImportError: an encoder of timm without timm.
    """
    for name, value in (("num_classes", num_classes), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if output_stride not in (8, 16):
        raise ValueError(f"output_stride must be 8 or 16, got {output_stride}")
    fusion = resolve(
        fusion, Exchange(), num_modalities, threshold=threshold, region=region, criterion=criterion
    )
    fusion.check_read(STAGES_READ)
    body = make_encoder(
        encoder,
        num_modalities,
        fusion,
        in_channels=in_channels,
        frozen_statistics=frozen_statistics,
        output_stride=output_stride,
    )
    rates = [rate * 16 // output_stride for rate in RATES]
    norm_layer = _norm_layer(body, decoder_norms)
    channels = (body.channels[0], body.channels[3])
    decoder = DeepLabDecoder(channels, num_classes, width, rates, dropout, norm_layer)
    return with_backend(DeepLabV3Plus(body, decoder, num_classes), backend)


def _norm_layer(body: Encoder, norms: str) -> NormLayer:
    """Make the decoder's norms.

    Raises:
        ValueError: an unknown choice; shared norms of convolutions that are not.
    """
    if norms not in ("shared", "private"):
        raise ValueError(f"decoder_norms must be 'shared' or 'private', got {norms!r}")
    if norms == "private":
        return body.norm_layer(DECODER)
    if body.fusion.private_convolutions(DECODER):
        raise ValueError(
            "decoder_norms must be 'private' where the fusion gives each modality convolutions of its own "
            "in the decoder, got 'shared': the channels of different filters have no statistics in common"
        )
    return functools.partial(body.fusion.norm, streams=1, activation="relu")
