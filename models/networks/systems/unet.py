"""The paper's translation network: a U-Net whose encoder exchanges channels between the modalities.

Generator of Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017, with
the instance norms and the exchange of Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS
2020, section 4.2: "We adopt individual INs in the encoder, and share all other parameters including INs in
the decoder."
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext.tables import PerModality
from models.networks.backend import runs_on_backend, with_backend
from models.networks.branches import split_branches, stacked_input, weighted_ensemble
from models.networks.fusion.base import Fusion, FusionStage, resolve
from models.networks.fusion.exchange import Exchange
from models.networks.systems.blocks import INSTANCE_NORM, SLOPE, Down, initialize, instance_norm
from models.networks.systems.output import TranslationOutput

DROPOUT_LEVELS = 3  # the coarsest ones of the decoder


class Up(nn.Module):
    """4x4 transposed convolution of stride 2, norm, ReLU, dropout, beside the encoder's feature.

    Args:
        in_channels, out_channels: of the convolution; the output has those of the feature more.
        num_norms: M for private norms, 1 for one that the modalities share.
        dropout: probability.
    """

    def __init__(self, in_channels: int, out_channels: int, num_norms: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 4, 2, padding=1)
        self.norm = instance_norm(out_channels, num_norms, activation="relu")
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, feature: Tensor) -> Tensor:
        # The next level rectifies what it reads. Here that is part of the norm, commutes with dropout, and
        # is the same for the feature before and after the encoder's LeakyReLU.
        return torch.cat([self.dropout(self.norm(self.conv(x))), F.relu(feature)], 1)


class LateralStage(FusionStage):
    """Joins what a level's norm returns with itself, as a lateral does within a block."""

    def __init__(self, join: nn.Module) -> None:
        super().__init__()
        self.join = join

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.join(x, x)
        return y, y


class UNetEncoder(nn.Module):
    """Halves the resolution at every level; the fusion's norms on all but the first and the last.

    A fusion that acts after stages acts at the levels of those numbers, between norm and LeakyReLU; one that
    acts within blocks does so at every level with a norm.

    Args:
        in_channels: of the input.
        widths: channels of the levels, finest first.
        num_modalities, fusion: as in ``unet``.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], num_modalities: int, fusion: Fusion) -> None:
        super().__init__()
        blocks = {
            str(number): block
            for number, width in enumerate(widths, 1)
            if (block := fusion.after_stage(number, width, num_modalities)) is not None
        }
        self.fusion_stages = nn.ModuleDict(blocks)
        for module in self.fusion_stages.modules():
            if isinstance(module, nn.BatchNorm2d):
                raise ValueError(
                    "fusion must not normalize over the batch in a U-Net, whose batch may be one image "
                    f"(norm_at_end=none), got {fusion}"
                )
        last = len(widths)
        levels = []
        for number, (before, width) in enumerate(zip([in_channels, *widths], widths, strict=False), 1):
            has_norm = 1 < number < last
            lateral = fusion.lateral(width, num_modalities) if has_norm else None
            if lateral is not None and lateral.join is not None:
                if str(number) in blocks:
                    raise ValueError(
                        f"fusion must act after level {number} of a U-Net or within it, got both: {fusion}"
                    )
                self.fusion_stages[str(number)] = LateralStage(lateral.join)
            fused = str(number) in self.fusion_stages
            norm = None
            if has_norm:
                options = {**INSTANCE_NORM, **({} if lateral is None else lateral.before)}
                options |= {"activation": "identity"} if fused else {}
                norm = fusion.norm(width, num_modalities, exchange_point=True, downsampling=True, **options)
            levels.append(Down(before, width, norm, activates=not fused))
        self.levels = nn.ModuleList(levels)

    def stages(self) -> Sequence[nn.Module]:
        """Return the levels."""
        return tuple(self.levels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[M*N, in_channels, H, W]`` to every level's output after LeakyReLU, finest first."""
        features = []
        for number, level in enumerate(self.levels, 1):
            x = feature = level(x)
            if str(number) in self.fusion_stages:
                onward, kept = self.fusion_stages[str(number)](x)
                x = F.leaky_relu(onward, SLOPE)
                feature = x if kept is onward else F.leaky_relu(kept, SLOPE)
            features.append(feature)
        return features


class UNetDecoder(nn.Module):
    """Doubles the resolution at every level, each but the first beside the encoder's feature.

    Args:
        widths: channels of the encoder's levels, finest first.
        out_channels: of the image.
        num_norms, dropout: as in ``Up``; dropout acts in the three coarsest levels.
    """

    def __init__(self, widths: Sequence[int], out_channels: int, num_norms: int, dropout: float) -> None:
        super().__init__()
        levels = []
        channels = widths[-1]
        for i, width in enumerate(reversed(widths[:-1])):
            levels.append(Up(channels, width, num_norms, dropout if i < DROPOUT_LEVELS else 0.0))
            channels = 2 * width
        self.levels = nn.ModuleList(levels)
        self.image = nn.ConvTranspose2d(channels, out_channels, 4, 2, padding=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The encoder's features, finest first, to images ``[M*N, out_channels, H, W]`` in [-1, 1]."""
        *features, x = features
        x = F.relu(x)
        for level, feature in zip(self.levels, reversed(features), strict=True):
            x = level(x, feature)
        return torch.tanh(self.image(x))


class UNet(PerModality, nn.Module):
    """``unet`` builds one and describes the arguments and attributes.

    In ``cen_ext.present`` it takes and returns the present modalities alone, unless the fusion joins all.
    """

    def __init__(
        self,
        encoder: UNetEncoder,
        decoder: UNetDecoder,
        in_channels: int,
        num_modalities: int,
        fusion: Fusion,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.alpha = nn.Parameter(torch.zeros(num_modalities))
        self.in_channels = in_channels
        self.fusion = fusion

    @property
    def num_modalities(self) -> int:
        return len(self.alpha)

    def check_subset(self) -> None:
        self.fusion.check_subset()

    def branch_weights(self) -> list[float]:
        """The ensemble's weights, of sum 1."""
        return self.of_present(self.alpha).softmax(0).tolist()

    @runs_on_backend
    def forward(self, x: Tensor | Sequence[Tensor]) -> TranslationOutput:
        """Translate the modalities' images.

        Args:
            x: ``[M*N, in_channels, H, W]`` stacked modality-major, or a sequence of M tensors
                ``[N, in_channels, H, W]``; values in [-1, 1], H and W divisible by the network's ``size``.

        Raises:
            ValueError: x does not hold M modalities of ``in_channels`` channels, or is of another size.
        """
        x = stacked_input(x, self.num_present, self.in_channels)
        levels = len(self.encoder.levels)
        size = 1 << levels
        height, width = x.shape[-2:]
        if height % size or width % size:
            raise ValueError(
                f"x must have a height and a width divisible by {size}, since each of {levels} levels halves "
                f"them, got {height} x {width}"
            )
        branches = split_branches(self.decoder(self.encoder(x)), self.num_present)
        return TranslationOutput(branches, *weighted_ensemble(branches, self.of_present(self.alpha)))


def unet(
    in_channels: int = 3,
    out_channels: int = 3,
    num_modalities: int = 2,
    *,
    size: int = 256,
    base_width: int = 64,
    fusion: Fusion | str | None = None,
    threshold: float | str | None = None,
    region: str | None = None,
    criterion: str | None = None,
    dropout: float = 0.5,
    decoder_norms: str = "shared",
    backend: str | None = None,
) -> UNet:
    """A channel-exchanging U-Net for M modalities (Wang et al. 2020, section 4.2).

    ``train()`` normalizes with the statistics of each image and drops out; ``eval()`` uses the running
    statistics. The released code evaluates in ``train()`` mode.

    Args:
        in_channels: channels of every modality's input.
        out_channels: channels of the image to make.
        num_modalities: M >= 1; 1 is pix2pix's generator with instance norm.
        size: height and width at which the encoder's last level is a single pixel, a power of two from 8 on;
            multiples of it work as well. 256 in the paper.
        base_width: channels of the finest level; those of level i are ``base_width * min(2**i, 8)``.
        fusion: how the modalities meet in the encoder, a ``models.fusion`` object or a registered name with
            its defaults; None for ``Exchange(threshold, region, criterion)``.
        threshold, region, criterion: of the exchange, as ``cen_ext.norm_exchange`` describes them; 0.01,
            ``"own"`` and ``"abs"`` where not given. With threshold 0 nothing is exchanged. A threshold may be
            ``"0.05*median"``, as for ``models.fusion.Exchange``.
        dropout: probability, in the three coarsest levels of the decoder.
        decoder_norms: ``"shared"`` by the modalities, as in the paper, or ``"private"``, as in the released
            networks; without exchange.
        backend: whose ops the forward pass runs, a name as for ``cen_ext.use_backend``; None for that of the
            context, or else the best that can run.

    Returns:
        A module with ``encoder``, ``decoder`` and ``alpha`` (``[M]``, zeros: equal weights); its output is a
        ``TranslationOutput``. Weights start as pix2pix's.

    Raises:
        ValueError: an unknown choice, or a number out of its range; a fusion that contradicts itself, that a
            U-Net has no place for, or that is given beside threshold, region or criterion.
    """
    sizes = {"in_channels": in_channels, "out_channels": out_channels, "base_width": base_width}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if size < 8 or size & (size - 1):
        raise ValueError(f"size must be a power of two from 8 on, got {size}")
    if decoder_norms not in ("shared", "private"):
        raise ValueError(f"decoder_norms must be 'shared' or 'private', got {decoder_norms!r}")
    widths = [base_width * min(1 << i, 8) for i in range(size.bit_length() - 1)]
    fusion = resolve(
        fusion,
        Exchange(threshold=0.01),
        num_modalities,
        threshold=threshold,
        region=region,
        criterion=criterion,
    )
    _check_fusion(fusion, num_modalities, len(widths))
    net = UNet(
        UNetEncoder(in_channels, widths, num_modalities, fusion),
        UNetDecoder(widths, out_channels, num_modalities if decoder_norms == "private" else 1, dropout),
        in_channels,
        num_modalities,
        fusion,
    )
    initialize(net)
    return with_backend(net, backend)


def _check_fusion(fusion: Fusion, num_modalities: int, levels: int) -> None:
    """Refuse what a U-Net has no place for: other convolutions, other branches, another join of them."""
    fusion.check_stages(levels)
    if fusion.after_stem:
        raise ValueError(f"fusion must act after the levels of a U-Net, from 1 on (stages), got {fusion}")
    stages = range(levels + 1)
    if any(fusion.private_convolutions(stage) for stage in stages):
        raise ValueError(
            f"fusion must leave the convolutions of a U-Net to all modalities (setting=shared, "
            f"convolutions=shared), got {fusion}"
        )
    if type(fusion).head is not Fusion.head or any(
        fusion.streams(stage, num_modalities) != num_modalities for stage in stages
    ):
        raise ValueError(
            f"fusion must leave a U-Net a branch for each modality and their ensemble, got "
            f"{type(fusion).__name__}"
        )
