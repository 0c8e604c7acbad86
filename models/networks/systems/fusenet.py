"""FuseNet: two VGG-16 encoders, depth's features added to the colors', and a mirrored decoder.

Hazirbas, Ma, Domokos and Cremers, "FuseNet: Incorporating Depth into Semantic Segmentation via Fusion-Based
CNN Architecture", ACCV 2016, section 3. A batch norm follows each convolution. At the end of a stage, before
its pooling, depth's features are added to those of the colors; the decoder puts what it enlarges where the
pooling found the maxima of the sums. SFn fuses after the first n stages, and depth's encoder ends there.
With 40 classes and depth in one channel, SF5 has 44,188,072 parameters and SF1 29,503,912.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, cast

from torch import Tensor, nn

from cen_ext import Conv3x3
from models.networks.dropout import Dropout
from models.networks.encoders.vgg import COLORS, DEPTHS, WIDTHS, VGGBackbone, VGGStream, conv_units
from models.networks.fusion.stages import initialize_convolutions
from models.networks.systems.base import Logits, System, register_system

DROPPED = (3, 4, 5)  # stages, of encoder and decoder, that end with dropout


class Maxima(NamedTuple):
    """Where a pooling found its maxima.

    Attributes:
        positions: ``[N, C, h, w]`` in the rows of what was pooled, one after another.
        height, width: of that; an odd one's last row or column was left out.
    """

    positions: Tensor
    height: int
    width: int


def unpool(x: Tensor, maxima: Maxima) -> Tensor:
    """Put values where a pooling found its maxima, and zeros elsewhere.

    Args:
        x: ``[N, C, h, w]``.

    Returns:
        ``[N, C, maxima.height, maxima.width]``.
    """
    zeros = x.new_zeros(*x.shape[:2], maxima.height * maxima.width)
    flat = zeros.scatter(2, maxima.positions.flatten(2), x.flatten(2))
    y: Tensor = flat.unflatten(2, (maxima.height, maxima.width))
    return y


class FuseNetEncoder(VGGBackbone):
    """Two streams of VGG-16 with batch norms; the second's features are added to the first's.

    Args:
        depth_channels: of the second modality.
        fused_stages: stages of the second stream.
        widths: of the stages.
        dropout: probability after each of the last three stages.
    """

    def __init__(self, depth_channels: int, fused_stages: int, widths: Sequence[int], dropout: float) -> None:
        firsts = [Conv3x3(channels, widths[0]) for channels in (COLORS, depth_channels)]
        super().__init__(
            [VGGStream(firsts[0], widths, norm=True), VGGStream(firsts[1], widths[:fused_stages], norm=True)]
        )
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.dropout = Dropout(dropout)

    def forward(self, images: Sequence[Tensor]) -> tuple[Tensor, list[Maxima]]:
        """Compute what goes to the decoder.

        Args:
            images: of both modalities ``[N, C, H, W]``.

        Returns:
            The last stage's features ``[N, widths[-1], H // 32, W // 32]``, and the poolings', first to last.
        """
        x, depth = images
        colors_stages, depth_stages = (cast(VGGStream, stream).stages for stream in self.streams)
        found = []
        for number, stage in enumerate(colors_stages, 1):
            x = stage(x)
            if number <= len(depth_stages):
                depth = depth_stages[number - 1](depth)
                x = x + depth
            height, width = x.shape[-2:]
            x, positions = self._pooled(x, number)
            found.append(Maxima(positions, height, width))
            if number < len(depth_stages):
                depth, _ = self._pooled(depth, number)
        return x, found

    def _pooled(self, x: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """What goes on to the next stage, and where the pooling found it."""
        pooled, positions = self.pool(x)
        return self.dropout(pooled) if stage in DROPPED else pooled, positions


class FuseNetDecoder(nn.Module):
    """VGG-16 backwards: unpooling before each stage, and convolutions of which the last one goes to the width
    of the stage before.

    Args:
        widths: of the encoder's stages.
        dropout: probability after each of the first three stages.
    """

    def __init__(self, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        lasts: list[list[int]] = [[], *([width] for width in widths)]  # the classifier ends the first stage
        self.stages = nn.ModuleList(
            nn.Sequential(*conv_units(width, [width] * (depth - 1) + last, norm=True))
            for width, depth, last in zip(widths, DEPTHS, lasts, strict=False)
        )
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, maxima: Sequence[Maxima]) -> Tensor:
        """Enlarge the last stage's features to ``[N, widths[0], H, W]``."""
        for number in range(len(self.stages), 0, -1):
            x = self.stages[number - 1](unpool(x, maxima[number - 1]))
            x = self.dropout(x) if number in DROPPED else x
        return x


@register_system
class FuseNet(System):
    """FuseNet SF1 to SF5; its logits are of the image's height and width.

    Pooling leaves out the last row and column of an odd size, where unpooling puts zeros (ours).

    Weights: ``vgg16`` of torchvision, as published, or ``vgg16_bn`` with its norms (ours), into both
    encoders; depth in one channel starts from the mean over red, green and blue (published). All else, and
    all of it without weights, starts as He et al. have it (ours).

    Args:
        num_classes: K.
        channels: 3 of the colors, 1 or 3 of the second modality.
        dropout: probability, after the last three poolings and after three stages of the decoder.
        fused_stages: n of SFn, 1 to 5.
        widths: of the five stages, as published.

    Raises:
        ValueError: a first modality that has not 3 channels; other fused_stages; as ``System``.
    """

    name: ClassVar[str] = "fusenet"
    encoders: ClassVar[tuple[str, ...]] = ("vgg16",)
    options: ClassVar[tuple[str, ...]] = ("dropout", "fused_stages")
    least: ClassVar[int] = 64
    takes: ClassVar[tuple[int, ...]] = (2,)

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[int],
        *,
        dropout: float = 0.5,
        fused_stages: int = len(WIDTHS),
        widths: Sequence[int] = WIDTHS,
    ) -> None:
        super().__init__(num_classes, channels)
        if channels[0] != COLORS:
            raise ValueError(
                f"data.modalities must begin with one of colors with model.network=fusenet, got one of "
                f"{channels[0]} channel"
            )
        if not 1 <= fused_stages <= len(widths):
            raise ValueError(f"fused_stages must be 1 to {len(widths)}, got {fused_stages}")
        self.encoder = FuseNetEncoder(channels[1], fused_stages, widths, dropout)
        self.decoder = FuseNetDecoder(widths, dropout)
        self.classifier = Conv3x3(widths[0], num_classes)
        initialize_convolutions(self)

    def logits(self, images: Sequence[Tensor]) -> Logits:
        return Logits(self.classifier(self.decoder(*self.encoder(images))))
