"""Alignment: modalities whose common features are drawn together by a discrepancy in the loss.

Table 2, "Align", of Wang et al., NeurIPS 2020, after Wang et al., "Learning Common and Specific Features for
RGB-D Semantic Segmentation with Deconvolutional Networks", ECCV 2016.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.networks.fusion.base import FusionStage, option, register_fusion
from models.networks.fusion.stages import StageFusion

BANDWIDTHS = tuple(2.0**exponent for exponent in range(-5, 6))  # σ_u = 2^(u - 6), u = 1 ... 11


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of two samples under the mean of eleven Gaussian kernels.

    ``k(a, b) = 1/11 * sum over u of exp(-||a - b||² / (2 C σ_u²))``, with σ_u = 2^(u - 6). Distances are
    divided by C, so that the fixed bandwidths suit features of any width. The estimate is the unbiased one
    over pairs i != j, ``k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)``: 0 for equal samples, and
    sometimes negative. One sample each makes no pairs, and gives the biased estimate ``2 - 2 k(x, y)``.

    Args:
        x, y: ``[n, C]``, n >= 1, the same n.

    Returns:
        A 0-d tensor, float32, or float64 of float64 samples.

    Raises:
        ValueError: the shapes differ, or there are no samples.
    """
    if x.shape != y.shape or x.dim() != 2 or len(x) == 0:
        raise ValueError(
            f"x and y must both be [n, C] with n of at least 1, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.dtype != torch.float64:
        x, y = x.float(), y.float()
    n, channels = x.shape
    with torch.autocast(x.device.type, enabled=False):
        both = torch.cat([x, y])
        both = both - both.detach().mean(0)  # distances from products of small numbers
        norms = both.square().sum(1)
        squares = (norms[:, None] + norms[None, :] - 2 * both @ both.T).clamp_min(0) / channels
        kernel = torch.stack([(squares / (-2 * width**2)).exp() for width in BANDWIDTHS]).mean(0)
        cross = kernel[:n, n:]
        terms = kernel[:n, :n] + kernel[n:, n:] - cross - cross.T
        if n == 1:
            return terms.sum()
        return (terms.sum() - terms.diagonal().sum()) / (n * (n - 1))


class AlignStage(FusionStage):
    """Common and specific features of each modality, and the others' common ones, to its next feature.

    ``c_m = relu(conv1x1(x_m))``, ``t_m = relu(conv1x1(x_m))``, ``x_m <- relu(conv1x1([t_m; c_m; c_others]))``
    with weights of each modality's own: ``5 C²`` parameters for each. Starts near the identity: both features
    are x_m, and the third convolution averages.

    Args:
        channels, num_modalities: C and M.
        weight: of the discrepancy between the common features, averaged over the pairs, in the loss.
        specific_weight: of that between the specific features, which is subtracted.
        samples: pixels of the batch that are drawn for it, at most.
    """

    def __init__(
        self, channels: int, num_modalities: int, weight: float, specific_weight: float, samples: int
    ) -> None:
        super().__init__()
        self.weight = weight
        self.specific_weight = specific_weight
        self.samples = samples

        def convolutions(parts: int) -> nn.ModuleList:
            return nn.ModuleList(_averaging(channels, parts) for _ in range(num_modalities))

        self.common, self.specific, self.fuse = convolutions(1), convolutions(1), convolutions(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        modalities = len(self.common)
        streams = x.chunk(modalities)
        common = [F.relu(conv(s)) for conv, s in zip(self.common, streams, strict=True)]
        specific = [F.relu(conv(s)) for conv, s in zip(self.specific, streams, strict=True)]
        total = torch.stack(common).sum(0)
        aligned = []
        for m, fuse in enumerate(self.fuse):
            borrowed = common[1 - m] if modalities == 2 else (total - common[m]) / (modalities - 1)
            aligned.append(F.relu(fuse(torch.cat([specific[m], common[m], borrowed], 1))))
        self.loss = self._discrepancy(common, specific) if self.training else None
        x = torch.cat(aligned)
        return x, x

    def _discrepancy(self, common: list[Tensor], specific: list[Tensor]) -> Tensor:
        n, _, h, w = common[0].shape
        pixels = n * h * w
        chosen = torch.arange(pixels, device=common[0].device)
        if pixels > self.samples:
            chosen = torch.randperm(pixels, device=common[0].device)[: self.samples]
        loss = self.weight * _mean_over_pairs(common, chosen)
        if self.specific_weight:
            loss = loss - self.specific_weight * _mean_over_pairs(specific, chosen)
        return loss


@register_fusion
@dataclass(frozen=True)
class Align(StageFusion):
    """Aligns the modalities by a multi-kernel MMD between their common features.

    With ``setting=separate`` the networks of the modalities have nothing in common but the alignment, decoder
    included, and the ensemble.

    Raises:
        ValueError: stages as ``StageFusion``; a negative weight; fewer than 2 samples.
    """

    weight: float = option(1.0, "of the discrepancy between the common features in the loss")
    specific_weight: float = option(0.0, "of that between the specific features, which is subtracted")
    samples: int = option(1024, "pixels of a batch that the discrepancy is taken of, at most")

    name: ClassVar[str] = "align"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("weight", "specific_weight"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}")
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2, got {self.samples}")

    def after_stage(self, stage: int, channels: int, num_modalities: int) -> FusionStage | None:
        if stage not in self.stages:
            return None
        return AlignStage(channels, num_modalities, self.weight, self.specific_weight, self.samples)

    def private_convolutions(self, stage: int) -> bool:
        return self.setting == "separate"


def _averaging(channels: int, parts: int) -> nn.Conv2d:
    """A 1x1 convolution of ``parts`` concatenated features that starts as their mean."""
    conv = nn.Conv2d(parts * channels, channels, 1, bias=False)
    conv.weight = nn.Parameter((torch.eye(channels).repeat(1, parts) / parts)[:, :, None, None])
    return conv


def _mean_over_pairs(features: list[Tensor], chosen: Tensor) -> Tensor:
    """The mean discrepancy of all pairs of features ``[N, C, h, w]`` at the chosen pixels."""
    samples = [feature.movedim(1, -1).flatten(0, 2)[chosen] for feature in features]
    return torch.stack([mmd(a, b) for a, b in itertools.combinations(samples, 2)]).mean()
