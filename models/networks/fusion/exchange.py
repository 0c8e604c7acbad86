"""The paper's exchange, and what it is compared with by leaving the exchange out.

Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cen_ext import ExchangeBatchNorm2d
from cen_ext.modules import ExchangeNorm
from models.networks.fusion.base import (
    Fusion,
    MakeLayer,
    check_rule,
    check_several,
    mark,
    option,
    register_fusion,
    scale_penalty,
)
from models.networks.fusion.thresholds import THRESHOLD_HELP, Threshold, threshold_at_ones

Penalty = Literal["own", "all", "none"]
Convolutions = Literal["shared", "private"]
At = Literal["every", "downsampling"]

PENALTY_HELP = "scales under the l1 penalty: each modality's own share, all, or none"
CONVOLUTIONS_HELP = "shared by the modalities, or private: a set for each, decoder included"
AT_HELP = "after every spatial convolution of the encoder, or in the blocks that halve the resolution"
CRITERION_HELP = "quantity that the threshold is compared with: |scale| or scale"
REGION_HELP = "own: a modality gives up channels of its share only; all: any"


@register_fusion
@dataclass(frozen=True)
class Exchange(Fusion):
    """Replaces channels of small scale by the mean of the other modalities' channels (Eq. 6).

    A threshold ``"0.05*median"`` is that factor of each layer's median |scale|, those of new layers being 1,
    until ``resolve_thresholds`` sets it by the weights that training starts from.

    Raises:
        ValueError: a negative threshold, a text that is no factor of the median, an unknown choice.
    """

    threshold: Threshold = option(
        0.02, f"exchange threshold on the scales, 0: no exchange{THRESHOLD_HELP}", carried=True
    )
    region: Literal["own", "all"] = option("own", REGION_HELP, carried=True)
    criterion: Literal["abs", "signed"] = option("abs", CRITERION_HELP, carried=True)
    penalty: Penalty = option("own", PENALTY_HELP)
    at: At = option("every", AT_HELP, carried=True)
    convolutions: Convolutions = option("shared", CONVOLUTIONS_HELP)

    name: ClassVar[str] = "exchange"
    subsets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule(self.threshold, self.region, self.criterion)

    def norm(
        self,
        channels: int,
        streams: int,
        *,
        exchange_point: bool = False,
        downsampling: bool = False,
        layer: MakeLayer = ExchangeBatchNorm2d,
        **options: Any,
    ) -> ExchangeNorm:
        if not exchange_point or (self.at == "downsampling" and not downsampling):
            return layer(channels, streams, **options)
        norm = layer(
            channels,
            streams,
            threshold=threshold_at_ones(self.threshold),
            region=self.region,
            criterion=self.criterion,
            **options,
        )
        return mark(norm)

    def private_convolutions(self, stage: int) -> bool:
        return self.convolutions == "private"

    def penalty_on_scales(self, net: nn.Module) -> Tensor:
        return scale_penalty(net, self.penalty if threshold_at_ones(self.threshold) > 0 else "none")


@register_fusion
@dataclass(frozen=True)
class NoFusion(Fusion):
    """Exchanges nothing: the rows of Table 1 without exchange.

    Raises:
        ValueError: an unknown choice; options that contradict each other.
    """

    convolutions: Convolutions = option("shared", CONVOLUTIONS_HELP)
    norms: Literal["private", "shared"] = option(
        "private", "one norm for each modality, or one for all, whose batch is that of all modalities"
    )
    penalty: Penalty = option("none", PENALTY_HELP)
    at: At = option("every", "norms whose scales the penalty is on: " + AT_HELP, carried=True)

    name: ClassVar[str] = "none"
    subsets: ClassVar[bool] = True

    def check(self, num_modalities: int) -> None:
        if self.norms == "private":
            return
        if self.penalty == "own":
            raise ValueError(
                "penalty must be none or all with norms=shared, got own: no scale is any modality's own"
            )
        if self.convolutions == "private":
            raise ValueError(
                "norms must be private with convolutions=private, got shared: the channels of different "
                "filters have no statistics in common"
            )

    def norm(
        self,
        channels: int,
        streams: int,
        *,
        exchange_point: bool = False,
        downsampling: bool = False,
        layer: MakeLayer = ExchangeBatchNorm2d,
        **options: Any,
    ) -> ExchangeNorm:
        # A norm that all modalities share is a single modality's, whose batch is the whole stack.
        norm = layer(channels, 1 if self.norms == "shared" else streams, **options)
        return mark(norm) if exchange_point and (self.at == "every" or downsampling) else norm

    def private_convolutions(self, stage: int) -> bool:
        return self.convolutions == "private"

    def penalty_on_scales(self, net: nn.Module) -> Tensor:
        return scale_penalty(net, self.penalty)


class ConcatHead(nn.Module):
    """A 1x1 convolution ``B*K -> K`` of the branches' concatenated, detached logits.

    The fused output's loss trains this block alone. It starts where the ensemble starts, as the branches'
    mean.
    """

    def __init__(self, branches: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(branches * num_classes, num_classes, 1)
        mean = torch.eye(num_classes).repeat(1, branches) / branches
        self.conv.weight = nn.Parameter(mean[:, :, None, None])
        self.conv.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, branches: Tensor) -> Tensor:
        """``[B, N, K, h, w]`` to ``[N, K, h, w]``."""
        logits: Tensor = self.conv(torch.cat(branches.detach().unbind(), 1))
        return logits


@register_fusion
@dataclass(frozen=True)
class LateConcat(Exchange):
    """Exchanges, and joins the branches' logits by a learned convolution instead of the ensemble.

    Section 4.1, ablation 4: "replace the ensemble of expert with a concat-fusion block".
    """

    name: ClassVar[str] = "late_concat"
    subsets: ClassVar[bool] = False  # the convolution reads every branch

    def check(self, num_modalities: int) -> None:
        check_several(self, num_modalities)

    def head(self, branches: int, num_classes: int) -> nn.Module:
        return ConcatHead(branches, num_classes)
