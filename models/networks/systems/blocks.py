"""What generator and discriminator are built of: pix2pix's down-sampling block and initial weights.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017, appendix A.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext import ExchangeInstanceNorm2d

SLOPE = 0.2  # of LeakyReLU


class Down(nn.Module):
    """4x4 convolution, norm if there is one, LeakyReLU(0.2).

    Args:
        in_channels, out_channels: of the convolution.
        norm: ``instance_norm(out_channels, …)``, which activates as well.
        stride: of the convolution, whose padding is 1.
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: ExchangeInstanceNorm2d | None = None, stride: int = 2
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 4, stride, padding=1)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.leaky_relu_(x, SLOPE) if self.norm is None else self.norm(x)


def instance_norm(channels: int, num_modalities: int, **options: Any) -> ExchangeInstanceNorm2d:
    """Instance norm with affine and running statistics, then LeakyReLU(0.2) unless options say otherwise."""
    options = {"activation": "leaky_relu", "negative_slope": SLOPE, **options}
    return ExchangeInstanceNorm2d(channels, num_modalities, track_running_stats=True, **options)


def initialise(net: nn.Module) -> None:
    """Pix2pix's start: convolutions from N(0, 0.02), scales of norms from N(1, 0.02), biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | ExchangeInstanceNorm2d):
            centre = 1.0 if isinstance(module, ExchangeInstanceNorm2d) else 0.0
            nn.init.normal_(module.weight, centre, 0.02)
            nn.init.zeros_(module.bias)
