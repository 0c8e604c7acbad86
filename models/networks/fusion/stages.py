"""Fusions that join the modalities after encoder stages: what the paper's Table 2 and Table 4 compare with.

Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020, section 4.1. Early, middle and late
fusion join after stage 2, 3 and 4, "all-stage" after each of the four. A block joins the streams
``[M, N, C, h, w]`` of a stage to F, ``[N, C, h, w]``; what becomes of F depends on the setting:

- ``shared``, the columns "same as ours": the modalities share convolutions, have private norms, and all M
  branches reach the decoder. F takes the place of the first branch's feature, there and in the decoder.
- ``separate``, the columns "commonly used": every modality has an encoder of its own, up to the last stage
  that joins. From there F alone goes on, so that the network has one branch.

The paper does not say where F goes in either; these readings give its parameter counts. The fields
``fused_to``, ``fused_on`` and ``skips`` hold the other ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext import Conv3x3, max_pool_same
from models.networks.fusion.base import Fusion, FusionStage, check_several, option, register_fusion

SQUEEZE = 16  # η of SSMA: channels of one modality for each channel of the bottleneck

Setting = Literal["shared", "separate"]
STAGES_HELP = "encoder stages after which the modalities meet, such as 3 or 1,2,3,4; levels of a U-Net"
FUSED_ON_HELP = "setting=separate: stream in which the joined feature of all but the last stage goes on"
SETTING_HELP = "shared: convolutions are, and norms private; separate: an encoder for each modality"


class Join(nn.Module):
    """Base of the blocks that join M streams to one."""

    def forward(self, streams: Tensor) -> Tensor:
        """``[M, N, C, h, w]`` to ``[N, C, h, w]``."""
        raise NotImplementedError


class AverageJoin(Join):
    """The mean of the streams."""

    def forward(self, streams: Tensor) -> Tensor:
        return streams.mean(0)


class ConcatJoin(Join):
    """A 1x1 convolution ``M*C -> C`` of the concatenated streams; ``M*C²`` parameters.

    It starts as their mean, from which an encoder's pretrained weights go on as they were.
    """

    def __init__(self, channels: int, num_modalities: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_modalities * channels, channels, 1, bias=False)
        mean = torch.eye(channels).repeat(1, num_modalities) / num_modalities
        self.conv.weight = nn.Parameter(mean[:, :, None, None])

    def forward(self, streams: Tensor) -> Tensor:
        joined: Tensor = self.conv(concatenated(streams))
        return joined


class SelfAttentionJoin(Join):
    """The SSMA block: the concatenated streams, weighted by a gate of their own, convolved and normalized.

    Valada et al., "Self-Supervised Model Adaptation for Multimodal Semantic Segmentation", IJCV 2020:
    ``z = [x_0; ...]; s = sigmoid(conv3x3(relu(conv3x3(z)))); F = BN(conv3x3(s * z))``. The gate's bottleneck
    has ``C/16`` channels; for two modalities that is ``20.25 C²`` parameters, biases and norm aside.

    Args:
        norm: ``"batch"``, or ``"none"``, with a bias instead, where a batch may be a single pixel.
        bottleneck: other channels of the gate's bottleneck.
        kernel: of the last convolution, 3 or 1.
    """

    def __init__(
        self,
        channels: int,
        num_modalities: int,
        norm: str = "batch",
        *,
        bottleneck: int | None = None,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        wide, narrow = num_modalities * channels, bottleneck or max(channels // SQUEEZE, 1)
        self.squeeze = nn.Conv2d(wide, narrow, 3, padding=1)
        self.excite = nn.Conv2d(narrow, wide, 3, padding=1)
        self.conv = nn.Conv2d(wide, channels, kernel, padding=kernel // 2, bias=norm == "none")
        self.norm = nn.Identity() if norm == "none" else nn.BatchNorm2d(channels)
        initialize_convolutions(self)

    def forward(self, streams: Tensor) -> Tensor:
        z = concatenated(streams)
        gate = self.excite(F.relu(self.squeeze(z))).sigmoid()
        joined: Tensor = self.norm(self.conv(gate * z))
        return joined


class ResidualUnit(nn.Module):
    """RDFNet's residual convolution unit: ``x + conv3x3(relu(conv3x3(relu(x))))``, the first with bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv3x3(channels, channels)
        self.conv2 = Conv3x3(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv2(F.relu(self.conv1(F.relu(x))))
        return y


class MMFJoin(Join):
    """RDFNet's multi-modal feature fusion block, by default as AsymFusion's table counts it.

    Park et al., "RDFNet: RGB-D Multi-Level Residual Feature Fusion for Indoor Semantic Segmentation", ICCV
    2017: ``r_m = conv3x3(RCU(RCU(conv1x1(x_m))))`` with weights of each modality's own,
    ``f = relu(sum of r_m)``, ``F = f + conv3x3(maxpool5(f))``.

    Args:
        channels: C, of the streams.
        num_modalities: M.
        width: channels inside and of F. None: half as many as C inside, and F of C, ``37 C² + 2 C``
            parameters for two modalities.
    """

    def __init__(self, channels: int, num_modalities: int, width: int | None = None) -> None:
        super().__init__()
        inner, outer = (max(channels // 2, 1), channels) if width is None else (width, width)
        self.streams = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, inner, 1, bias=False),
                ResidualUnit(inner),
                ResidualUnit(inner),
                Conv3x3(inner, outer, bias=False),
            )
            for _ in range(num_modalities)
        )
        self.pooled = Conv3x3(outer, outer, bias=False)
        initialize_convolutions(self)

    def forward(self, streams: Tensor | Sequence[Tensor]) -> Tensor:
        parts = [refine(stream) for refine, stream in zip(self.streams, streams, strict=True)]
        f = F.relu(torch.stack(parts).sum(0))
        joined: Tensor = f + self.pooled(max_pool_same(f, 5))
        return joined


class ReplaceStream(FusionStage):
    """F goes on in the place of the first stream, or of all.

    Args:
        join: makes F.
        num_modalities: M.
        fused_to: ``"first"``, ``"all"``, or ``"none"``: the streams go on as they were.
        to_decoder: whether F alone is the decoder's feature; otherwise it gets what goes on.
    """

    def __init__(self, join: Join, num_modalities: int, fused_to: str, *, to_decoder: bool) -> None:
        super().__init__()
        self.join = join
        self.num_modalities = num_modalities
        self.fused_to = fused_to
        self.to_decoder = to_decoder

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fused = self.join(x.unflatten(0, (self.num_modalities, -1)))
        if self.fused_to == "first":
            x = torch.cat([fused, x[fused.shape[0] :]])  # len() would fix the size in exported programs
        elif self.fused_to == "all":
            x = torch.cat([fused] * self.num_modalities)
        return x, fused if self.to_decoder else x


class LeaveOneStream(FusionStage):
    """F alone goes on, to the next stage and to the decoder."""

    def __init__(self, join: Join, num_modalities: int) -> None:
        super().__init__()
        self.join = join
        self.num_modalities = num_modalities

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fused: Tensor = self.join(x.unflatten(0, (self.num_modalities, -1)))
        return fused, fused


class SkipOfStreams(FusionStage):
    """All streams go on unfused; the decoder gets the first one's feature, or the mean."""

    def __init__(self, num_modalities: int, skips: str) -> None:
        super().__init__()
        self.num_modalities = num_modalities
        self.skips = skips

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        streams = x.unflatten(0, (self.num_modalities, -1))
        return x, streams[0] if self.skips == "first" else streams.mean(0)


@dataclass(frozen=True)
class StageFusion(Fusion):
    """Base of the fusions that act after chosen stages.

    Attributes:
        first_stage: the least number of a stage; 0 where it may act after the stem.

    Raises:
        ValueError: stages that are none, below the first, or not in ascending order; an unknown choice.
    """

    stages: tuple[int, ...] = option((1, 2, 3, 4), STAGES_HELP, carried=True)
    setting: Setting = option("shared", SETTING_HELP, carried=True)

    first_stage: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        stages, first = self.stages, self.first_stage
        if not stages or stages[0] < first or list(stages) != sorted(set(stages)):
            raise ValueError(f"stages must be ascending numbers from {first} on, got {stages}")

    def check(self, num_modalities: int) -> None:
        check_several(self, num_modalities)

    def check_stages(self, count: int) -> None:
        if self.stages[-1] > count:
            raise ValueError(f"stages must be at most {count}, as the encoder has no more, got {self.stages}")


@dataclass(frozen=True)
class JoiningFusion(StageFusion):
    """Base of the fusions that join the streams of a stage to one."""

    fused_to: Literal["first", "all"] = option(
        "first", "setting=shared: branches whose feature the joined one replaces", carried=True
    )
    fused_on: Literal["first", "none"] = option("first", FUSED_ON_HELP)
    skips: Literal["first", "mean"] = option(
        "first", "setting=separate: what the decoder gets of the stages that join nothing"
    )

    def join(self, channels: int, num_modalities: int) -> Join:
        """Make the block of one stage."""
        raise NotImplementedError

    def check_read(self, stages: Sequence[int]) -> None:
        unread = [stage for stage in self.stages if stage not in stages]
        if unread and self.setting == "separate" and self.fused_on == "none":
            raise ValueError(
                f"fused_on must be first where the decoder reads the features of stages {tuple(stages)} "
                f"alone, got none: the blocks of stages {tuple(unread)} would have no effect"
            )

    def streams(self, stage: int, num_modalities: int) -> int:
        return 1 if self.setting == "separate" and stage >= self.stages[-1] else num_modalities

    def after_stage(self, stage: int, channels: int, num_modalities: int) -> FusionStage | None:
        last = self.stages[-1]
        if stage not in self.stages:
            unfused = self.setting == "separate" and stage < last
            return SkipOfStreams(num_modalities, self.skips) if unfused else None
        join = self.join(channels, num_modalities)
        if self.setting == "shared":
            return ReplaceStream(join, num_modalities, self.fused_to, to_decoder=False)
        if stage == last:
            return LeaveOneStream(join, num_modalities)
        return ReplaceStream(join, num_modalities, self.fused_on, to_decoder=True)

    def private_convolutions(self, stage: int) -> bool:
        return self.setting == "separate" and stage <= self.stages[-1]


@register_fusion
@dataclass(frozen=True)
class Concat(JoiningFusion):
    """Concatenates the modalities' features and reduces them by a 1x1 convolution (Table 2, "Concat")."""

    name: ClassVar[str] = "concat"

    def join(self, channels: int, num_modalities: int) -> Join:
        return ConcatJoin(channels, num_modalities)


@register_fusion
@dataclass(frozen=True)
class Average(JoiningFusion):
    """Averages the modalities' features (Table 4, "Average")."""

    name: ClassVar[str] = "average"

    def join(self, channels: int, num_modalities: int) -> Join:
        return AverageJoin()


@register_fusion
@dataclass(frozen=True)
class SelfAttention(JoiningFusion):
    """Joins the modalities' features by the SSMA block (Table 2, "Self-att.")."""

    norm_at_end: Literal["batch", "none"] = option(
        "batch", "norm that ends the block; none for U-Nets, whose batch may be a single pixel"
    )

    name: ClassVar[str] = "self_attention"

    def join(self, channels: int, num_modalities: int) -> Join:
        return SelfAttentionJoin(channels, num_modalities, self.norm_at_end)


@register_fusion
@dataclass(frozen=True)
class MMF(JoiningFusion):
    """Joins the modalities' features by RDFNet's block, which AsymFusion compares with.

    By default the encoders stay separate and unfused, and the joined features go to the decoder alone, as
    in RDFNet. With ResNet-101 and 152 that makes the 366.71 and 398.00 million parameters of AsymFusion's
    table.
    """

    setting: Setting = option("separate", SETTING_HELP, carried=True)
    fused_on: Literal["first", "none"] = option("none", FUSED_ON_HELP)

    name: ClassVar[str] = "mmf"

    def join(self, channels: int, num_modalities: int) -> Join:
        return MMFJoin(channels, num_modalities)


def concatenated(streams: Tensor) -> Tensor:
    """``[M, N, C, h, w]`` to ``[N, M*C, h, w]``, modality-major."""
    return torch.cat(streams.unbind(), 1)


def initialize_convolutions(module: nn.Module) -> None:
    """He et al.'s normal weights and zero biases, which the papers' blocks leave open."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
