"""SSMA: two AdapNet++ encoders whose features are joined by gates, and one decoder.

Valada, Mohan and Burgard, "Self-Supervised Model Adaptation for Multimodal Semantic Segmentation", IJCV 2020.
Trainable parameters, the side heads aside: 56,182,428 with 12 classes on ResNet-50 (the paper: 56.44
million), 56,282,892 with 40; 94,267,148 with 40 on ResNet-101.

The blocks are those of the authors' program, to which these counts belong: of the pyramids' outputs the gate
has a bottleneck of 32 channels, and a 1x1 convolution with a norm follows; of the skips the bottleneck has 8
channels, and a 3x3 convolution with a bias follows, without norm. The gates' convolutions have biases. The
paper has 3x3 convolutions everywhere.

Published is the training in two steps: an AdapNet++ for each modality, then this network from them. Ours is
that it takes their encoders, pyramids and skips, while gates and decoder start anew, and that the second step
has the side outputs as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.networks.encoders.streams import BackboneStreams
from models.networks.encoders.weights import misfits_of
from models.networks.fusion.stages import SelfAttentionJoin
from models.networks.systems.adapnet import (
    ENCODERS,
    RATES,
    SKIP,
    WIDTH,
    AdapNetDecoder,
    AdapNetEncoder,
    Dilations,
)
from models.networks.systems.base import Logits, System, register_system

ENCODER = "encoder."  # before the names of an AdapNet++ encoder's entries
BOTTLENECKS = (32, 8)  # channels of the gates': of pyramids, and of skips


class ExpertEncoders(BackboneStreams):
    """An AdapNet++ encoder for each modality; pretrained weights start all of them.

    Args:
        experts: the encoders.
    """

    weights_kind = AdapNetEncoder.weights_kind

    def __init__(self, experts: Sequence[AdapNetEncoder]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    @property
    def named_streams(self) -> dict[str, nn.Module]:
        return {f"experts.{number}": expert for number, expert in enumerate(self.experts)}


@register_system
class SSMA(System):
    """SSMA for two modalities.

    Side outputs and the least size of a training's batches are as in ``AdapNetPlusPlus``.

    Args:
        num_classes, channels: as ``System``.
        encoder, dropout, ssma_dilations, aspp_rates: as ``AdapNetPlusPlus``, of both encoders.

    Raises:
        ValueError: as ``AdapNetPlusPlus``.
    """

    name: ClassVar[str] = "ssma"
    encoders: ClassVar[tuple[str, ...]] = tuple(ENCODERS)
    options: ClassVar[tuple[str, ...]] = ("dropout", "ssma_dilations", "aspp_rates")
    takes: ClassVar[tuple[int, ...]] = (2,)
    sides: ClassVar[int] = 2
    pooled: ClassVar[bool] = True

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[int],
        encoder: str = "adapnet_resnet50",
        dropout: float = 0.7,
        ssma_dilations: Dilations = "paper",
        aspp_rates: tuple[int, ...] = RATES,
    ) -> None:
        super().__init__(num_classes, channels)
        self.encoder = ExpertEncoders(
            [AdapNetEncoder(encoder, count, dropout, ssma_dilations, aspp_rates) for count in channels]
        )
        pyramid, skip = BOTTLENECKS
        self.joins = nn.ModuleList(
            [
                SelfAttentionJoin(WIDTH, len(channels), bottleneck=pyramid, kernel=1),
                *(SelfAttentionJoin(SKIP, len(channels), "none", bottleneck=skip) for _ in range(2)),
            ]
        )
        self.decoder = AdapNetDecoder(num_classes, gated=True)

    def logits(self, images: Sequence[Tensor]) -> Logits:
        streams = zip(*self.encoder(images), strict=True)
        joined = [join(torch.stack(each)) for join, each in zip(self.joins, streams, strict=True)]
        logits: Logits = self.decoder(joined, images[0].shape[-2:])
        return logits

    def from_experts(self, experts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The encoders' entries, with pyramids and skips, of an AdapNet++ for each modality.

        Their numbers of classes may differ from this network's. Gates and decoder start anew; ours.

        Args:
            experts: state dicts of ``AdapNetPlusPlus``, in the order of the modalities.

        Raises:
            ValueError: not one for each modality, or of another encoder or other channels.
        """
        if len(experts) != self.num_modalities:
            raise ValueError(f"experts must be {self.num_modalities} state dicts, got {len(experts)}")
        entries: dict[str, Tensor] = {}
        for number, (state, own) in enumerate(zip(experts, self.encoder.experts, strict=True)):
            theirs = {
                name.removeprefix(ENCODER): value for name, value in state.items() if name.startswith(ENCODER)
            }
            if problems := misfits_of(own, theirs):
                raise ValueError(
                    f"experts[{number}] must be the state dict of an AdapNet++ with this encoder: {problems}"
                )
            entries |= {f"{ENCODER}experts.{number}.{name}": value for name, value in theirs.items()}
        return entries
