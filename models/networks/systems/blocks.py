"""Parts of generator and discriminator: pix2pix's down-sampling block and initial weights.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017, appendix A.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext import ExchangeInstanceNorm2d
from cen_ext.modules import ExchangeNorm
from models.networks.fusion.base import FusionStage

SLOPE = 0.2  # LeakyReLU's


class Down(nn.Module):
    """4x4 convolution, norm if there is one, LeakyReLU(0.2).

    Args:
        in_channels, out_channels: of the convolution.
        norm: of ``out_channels``, which activates as well.
        stride: of the convolution, whose padding is 1.
        activates: False leaves LeakyReLU out where there is no norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: ExchangeNorm | None = None,
        stride: int = 2,
        *,
        activates: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 4, stride, padding=1)
        self.norm = norm
        self.activates = activates

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            y: Tensor = self.norm(x)
            return y
        return F.leaky_relu_(x, SLOPE) if self.activates else x


# Instance norm with running statistics, then LeakyReLU(0.2): the arguments of a fusion's norm.
INSTANCE_NORM: dict[str, Any] = {
    "layer": ExchangeInstanceNorm2d,
    "activation": "leaky_relu",
    "negative_slope": SLOPE,
    "track_running_stats": True,
}


def instance_norm(channels: int, num_modalities: int, **options: Any) -> ExchangeInstanceNorm2d:
    """Make an instance norm without exchange; LeakyReLU(0.2) follows unless options say otherwise."""
    options = {**INSTANCE_NORM, **options}
    norm: ExchangeInstanceNorm2d = options.pop("layer")(channels, num_modalities, **options)
    return norm


def initialize(net: nn.Module) -> None:
    """Pix2pix's start: convolutions from N(0, 0.02), scales of norms from N(1, 0.02), biases 0.

    The blocks that a fusion puts after stages start as the fusion wants.
    """
    stages = [module for module in net.modules() if isinstance(module, FusionStage)]
    started = {id(module) for stage in stages for module in stage.modules()}
    for module in net.modules():
        if id(module) in started:
            continue
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | ExchangeInstanceNorm2d):
            center = 1.0 if isinstance(module, ExchangeInstanceNorm2d) else 0.0
            nn.init.normal_(module.weight, center, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
