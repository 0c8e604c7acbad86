"""AsymFusion: channel shuffle and pixel shift, in both directions and without parameters.

Wang et al., "Learning Deep Multimodal Feature Representation with Asymmetric Multi-layer Fusion", ACM
Multimedia 2020. The paper's text could not be had; this is the block of the authors' released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cen_ext import pixel_shift
from cen_ext.tables import PerModality
from models.networks.fusion.base import Fusion, Lateral, option, register_fusion

GROUPS = 5  # of channels: four are shifted, and the rest, which is the last group or more, is swapped


class PixelShift(PerModality, nn.Module):
    """Adds to every modality the shifted channels of the next present one (``cen_ext.pixel_shift``)."""

    def __init__(self, num_modalities: int) -> None:
        super().__init__()
        self.num_modalities = num_modalities

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Shift x and add it to y, ``[M*N, C, H, W]`` both."""
        if self.num_present == 1:
            return y
        return pixel_shift(x, self.num_present, base=y, groups=GROUPS)


def swapped_tail(channels: int, num_modalities: int, step: int) -> dict[str, Tensor]:
    """``replaced`` and ``lender`` of norms that take the last channels from the modality ``step`` further on.

    The tail begins after four groups of ``channels // 5`` channels.
    """
    begin = (GROUPS - 1) * (channels // GROUPS)
    tail = [[c >= begin for c in range(channels)]] * num_modalities
    lender = [[(m + step) % num_modalities] * channels for m in range(num_modalities)]
    # On the CPU in any case: on the meta device, where a network may be built, they would have no values.
    return {
        name: torch.tensor(table, device="cpu") for name, table in (("replaced", tail), ("lender", lender))
    }


@register_fusion
@dataclass(frozen=True)
class AsymFusion(Fusion):
    """Swaps channels of the modalities and adds shifted ones, in the last block of every stage.

    With C inner channels, g = C // 5 and s = 4g, and a_m what enters the 3x3 convolution of modality m:
    ``u_m = [a_m[:s]; a_n[s:]]``, ``v_m = relu(norm(conv(u_m))) + S(a_n)``, and v's tails are swapped back. n
    is the other modality, and S moves a group of g channels each down, right, left and up by a pixel. With
    M > 2 modalities, where the released code fuses nothing, n is the next one, cyclically: that is ours.

    Ours, too, is where it acts in other networks. In an Xception: around the second separable convolution of
    each block before one that halves the resolution (or, dilated, would), that is in blocks 0, 1 and 18 of
    Xception-65; where a feature leaves there, in block 1, the relu follows the addition. In a U-Net: at every
    level with a norm, where what the norm returns gets its tail swapped and S of the other modality added.
    """

    shuffle: bool = option(
        True, "swap the last channels, a fifth and what no group has, around a convolution"
    )
    shift: bool = option(True, "add the other modality's channels, shifted by a pixel")

    name: ClassVar[str] = "asymfusion"
    subsets: ClassVar[bool] = True
    uses_lateral: ClassVar[bool] = True

    def check(self, num_modalities: int) -> None:
        if not (self.shuffle or self.shift):
            raise ValueError(
                "shuffle and shift are both false, so that nothing is fused; that is fusion=none"
            )

    def lateral(self, channels: int, num_modalities: int) -> Lateral | None:
        if num_modalities == 1:
            return None
        if channels < GROUPS:
            raise ValueError(
                f"fusion={self.name} divides channels into {GROUPS} groups, but a block has {channels}"
            )
        before: dict[str, Any] = {}
        after: dict[str, Any] = {}
        if self.shuffle:
            before = swapped_tail(channels, num_modalities, 1)
            after = swapped_tail(channels, num_modalities, -1)
        return Lateral(before, after, PixelShift(num_modalities) if self.shift else None)
