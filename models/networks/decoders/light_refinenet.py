"""Light-Weight RefineNet on a channel-exchanging encoder: RefineNet at a twentieth of its decoder's cost.

Nekrasov, Shen and Reid, "Light-Weight RefineNet for Real-Time Semantic Segmentation", BMVC 2018: without
residual convolution units, and with 1x1 in place of 3x3 convolutions everywhere but in the classifier. On
ResNet-50 and 101 with 21 classes and 256 channels it has 27 and 46 million parameters, as they report.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.networks.decoders.refinenet import ChainedResidualPooling, RefineNetDecoder, assemble
from models.networks.fusion import Exchange, Fusion
from models.networks.fusion.base import resolve
from models.networks.segmentor import EncoderDecoder


class LightRefineNetBlock(nn.Module):
    """One level of the decoder: reduce the encoder's feature, add the coarser level, pool.

    Args:
        in_channels: channels of the encoder's feature.
        channels: channels inside.
        out_channels: channels for the next level, or None at the finest.
        joins: whether a coarser level comes in, of ``channels`` channels.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int | None, joins: bool) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.join = nn.Conv2d(channels, channels, 1, bias=False) if joins else None
        self.pool = ChainedResidualPooling(channels, kernel=1)
        self.project = None if out_channels is None else nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(self, feature: Tensor, coarser: Tensor | None) -> Tensor:
        x: Tensor = self.reduce(feature)
        if self.join is not None and coarser is not None:
            large = F.interpolate(coarser, x.shape[-2:], mode="bilinear", align_corners=True)
            x = large.add_(self.join(x))
        x = self.pool(F.relu_(x))
        y: Tensor = x if self.project is None else self.project(x)
        return y


class LightRefineNetDecoder(RefineNetDecoder):
    """``RefineNetDecoder`` of lighter cascades."""

    block = LightRefineNetBlock


class LightRefineNet(EncoderDecoder):
    """``light_refinenet`` builds one and describes the arguments; its output is a ``SegmentationOutput``."""


def light_refinenet(
    encoder: str = "resnet50",
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
) -> LightRefineNet:
    """A channel-exchanging Light-Weight RefineNet for M modalities, its logits at 1/4 (Nekrasov et al. 2018).

    Args:
        encoder, num_classes, num_modalities: as of ``models.refinenet``.
        fusion, threshold, region, criterion: as there.
        in_channels, frozen_statistics, decoder_init, backend: as there.
        dropout: probability, on the features at 1/16 and 1/32 and before the classifier.
        width: channels of the decoder (the coarsest level has twice as many); 256 in the paper.

    Returns:
        A module with ``encoder``, ``decoder`` and ``alpha`` (``[M]``, zeros: equal weights); its output is a
        ``SegmentationOutput``.

    Raises:
        ValueError, ImportError: as ``models.refinenet``.
    """
    return assemble(
        LightRefineNet,
        LightRefineNetDecoder,
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
