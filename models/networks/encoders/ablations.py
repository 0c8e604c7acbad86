"""What the paper compares its exchange with: other ways to mix the modalities' channels after a norm.

Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020, section 4.1, "Additional ablation
studies". Each is a module that takes ``z [M, N, C, H, W]``, the normalised activations of Eq. 5, and the
scales ``weight [M, C]``, and returns what goes on to residual and activation. Plain PyTorch and its autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cen_ext import replaced_channels


class Mix(nn.Module):
    """Base: ``z [M, N, C, H, W]`` and ``weight [M, C]`` to the like of z."""

    def replaced(self, weight: Tensor) -> Tensor:
        """``[M, C]`` bool: the channels that go on without their own activations."""
        return torch.zeros_like(weight, dtype=torch.bool)

    def forward(self, z: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError


class FixedPortion(Mix):
    """Ablation 1 and 5: a fixed share of the channels is replaced by the others' mean, Eq. 6's second case.

    "Naively exchanging channels with a fixed portion (without using l1 and threshold)": the paper exchanges
    30 % and does not say which. ``"portion"``: the first of the region; ``"smallest"``: those of the region's
    smallest |γ|, anew at every step; ``"random"``: drawn once, when the network is made, and kept ("exchange
    channels randomly like ShuffleNet", whose pattern is fixed as well).

    Args:
        kind: ``"portion"``, ``"smallest"`` or ``"random"``.
        num_modalities, channels: M and C.
        portion: each modality replaces ``round(portion * C)`` channels.
        region: ``"own"``, from its own share of the channels, or ``"all"``.
    """

    allowed: Tensor
    scores: Tensor | None

    def __init__(self, kind: str, num_modalities: int, channels: int, portion: float, region: str) -> None:
        super().__init__()
        self.count = round(portion * channels)
        # Zero lies below every threshold: so the operator itself says what the region is.
        allowed = replaced_channels(torch.zeros(num_modalities, channels), 1.0, region)
        self.register_buffer("allowed", allowed, persistent=False)
        if kind == "random":
            self.register_buffer("scores", torch.rand(num_modalities, channels))
        elif kind == "portion":
            places = torch.arange(channels, dtype=torch.float32).expand(num_modalities, -1)
            self.register_buffer("scores", places.clone(), persistent=False)
        else:
            self.scores = None

    def replaced(self, weight: Tensor) -> Tensor:
        scores = weight.detach().abs() if self.scores is None else self.scores
        lowest = scores.masked_fill(~self.allowed, torch.inf).topk(self.count, largest=False).indices
        return torch.zeros_like(self.allowed).scatter(1, lowest, True) & self.allowed

    def forward(self, z: Tensor, weight: Tensor) -> Tensor:
        return torch.where(_spread(self.replaced(weight)), _others(z), z)


class Discard(Mix):
    """Ablation 5: "directly discard unimportant channels without channel exchanging".

    Channels that Eq. 6 would replace are zero. Arguments as in ``cen_ext.norm_exchange``.
    """

    def __init__(self, threshold: float, region: str, criterion: str) -> None:
        super().__init__()
        self.threshold = threshold
        self.region = region
        self.criterion = criterion

    def replaced(self, weight: Tensor) -> Tensor:
        return replaced_channels(weight, self.threshold, self.region, self.criterion)

    def forward(self, z: Tensor, weight: Tensor) -> Tensor:
        return z.masked_fill(_spread(self.replaced(weight)), 0)


class Sum(Mix):
    """Ablation 3: "directly summing activations (discarding the 1st term in Equation 6)".

    No channel goes on as it is: every modality gets the sum of all modalities' activations, in every channel.
    """

    def forward(self, z: Tensor, weight: Tensor) -> Tensor:
        return z.sum(0, keepdim=True).expand_as(z)


class GatedSum(Mix):
    """Ablation 3, "summing with a learnt soft gate": ``sum over m of sigmoid(gate[m, c]) * z[m, c]``.

    The paper does not describe the gate. This one is the least there is: a number a channel and modality, 0
    at first, so that two modalities begin as their mean.
    """

    def __init__(self, num_modalities: int, channels: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(num_modalities, channels))

    def forward(self, z: Tensor, weight: Tensor) -> Tensor:
        return (_spread(self.gate.sigmoid()).to(z.dtype) * z).sum(0, keepdim=True).expand_as(z)


def _spread(table: Tensor) -> Tensor:
    """``[M, C]`` to ``[M, 1, C, 1, 1]``."""
    return table[:, None, :, None, None]


def _others(z: Tensor) -> Tensor:
    """For every modality the mean of the others."""
    return torch.stack([torch.cat([z[:m], z[m + 1 :]]).mean(0) for m in range(len(z))])
