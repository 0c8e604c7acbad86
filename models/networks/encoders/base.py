"""The contract of an encoder: what the decoders and the fusions need of one.

An encoder is built of a stem and four stages. Every norm in it comes from ``norm_layer``, so that a fusion
decides what happens after each convolution; ``finish`` makes private what the fusion wants private and adds
what it does after stages. ``forward`` is the same for all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cen_ext import ExchangeBatchNorm2d
from cen_ext.modules import ExchangeNorm
from cen_ext.tables import PerModality
from models.networks.branches import stacked_input
from models.networks.fusion.base import Fusion, exchange_points
from models.networks.messages import suggest
from models.networks.private import make_convolutions_private
from models.networks.registry import Registry

# norm_layer(channels, *, exchange_point=False, activation="relu"); called after every convolution
NormLayer = Callable[..., ExchangeNorm]


STRIDES = (4, 8, 16, 32)  # of the four features, in an encoder that is not dilated


class Normalization(NamedTuple):
    """Mean and standard deviation of red, green and blue in [0, 1], by which an input is normalized."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Backbone(nn.Module):
    """A network's part that starts from pretrained weights; ``load_imagenet`` loads them.

    Attributes:
        weights_kind: the networks whose weights it loads, in words.
    """

    weights_kind: str = "this encoder"

    @property
    def stem_weights(self) -> tuple[str, ...]:
        """Names in the state dict of the weights that read red, green and blue."""
        raise NotImplementedError

    def from_pretrained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate a state dict of pretrained weights to this part's names, without its classifier."""
        raise NotImplementedError


class Encoder(PerModality, Backbone):
    """Base of encoders for M modalities stacked on the batch axis.

    A subclass makes its modules, with ``norm_layer`` for norms, calls ``finish`` last, and gives ``stem`` and
    ``stages``. With ``stem_channels``, its ``stem`` calls ``fuse(0, ...)``. An encoder whose computation is
    no such chain overrides ``forward`` instead, and refuses in its constructor the fusions that it cannot
    serve.

    Args:
        num_modalities: M >= 1.
        fusion: how the modalities meet.
        channels: of the four stages' features, finest first.
        strides: by which they are smaller than the input.
        in_channels: channels of every modality's input.
        frozen_statistics: ``train()`` leaves the norms in eval mode: running statistics are used and not
            updated, while weight and bias train.
        asks_for_lateral: whether it calls ``fusion.lateral`` in the last block of each stage.
        stem_channels: of what its ``stem`` lets the fusion act on; None: a fusion has no place there.

    Attributes:
        stem_weight: the name of the first convolution's weight in the state dict.
        stem_weights: those of all weights that read the image: that one, unless a subclass says otherwise.
        normalization: of colors, which its pretrained weights expect; None stands for ImageNet's.

    Raises:
        ValueError: num_modalities or in_channels below 1; a fusion after stages that there are not, after a
            stem without a place for it, or within blocks that there are not.
    """

    stem_weight: ClassVar[str] = "conv1.weight"
    normalization: Normalization | None = None

    def __init__(
        self,
        num_modalities: int,
        fusion: Fusion,
        *,
        channels: Sequence[int],
        strides: Sequence[int],
        in_channels: int = 3,
        frozen_statistics: bool = True,
        asks_for_lateral: bool = False,
        stem_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_counts(num_modalities=num_modalities, in_channels=in_channels)
        if fusion.uses_lateral and num_modalities > 1 and not asks_for_lateral:
            raise ValueError(
                f"fusion={fusion.name} acts around the spatial convolution of bottleneck blocks, of which "
                "this encoder has none it could use; take resnet50, 101 or 152, or xception65 or 71"
            )
        if fusion.after_stem and stem_channels is None:
            raise ValueError(
                f"fusion={fusion.name} acts after the stem, where this encoder has no place for it; give "
                "fusion.stages without 0, or take a ResNet"
            )
        fusion.check_stages(len(channels))
        self.num_modalities = num_modalities
        self.fusion = fusion
        self.channels = tuple(channels)
        self.stem_channels = stem_channels
        self.strides = tuple(strides)
        self.in_channels = in_channels
        self.frozen_statistics = frozen_statistics

    @property
    def stem_weights(self) -> tuple[str, ...]:
        return (self.stem_weight,)

    def check_subset(self) -> None:
        self.fusion.check_subset()

    def norm_layer(self, stage: int, *, downsampling: bool = False) -> NormLayer:
        """Make the norms of a stage, 0 for the stem; ``downsampling`` where the block halves the resolution.

        Returns:
            A function ``(channels, *, exchange_point=False, activation="relu")`` of a norm;
            ``exchange_point`` is to be True after the stage's spatial convolutions, 3x3 and larger.
        """
        return functools.partial(
            self.fusion.norm, streams=self._entering(stage), downsampling=downsampling, activation="relu"
        )

    def stem(self, x: Tensor) -> Tensor:
        """Compute what enters the first stage, of the checked input ``[M*N, in_channels, H, W]``."""
        raise NotImplementedError

    def stages(self) -> Sequence[nn.Module]:
        """Return the four stages."""
        raise NotImplementedError

    def finish(self) -> None:
        """Make private what the fusion wants private, and add what it does after stages."""
        self.make_convolutions_private()
        self.add_fusion_stages()

    def make_convolutions_private(self) -> None:
        """Give each stream convolutions of its own where the fusion wants so."""
        stages = self.stages()
        if self.fusion.private_convolutions(0):
            make_convolutions_private(self, self.num_modalities, outside=stages)
        for number, stage in enumerate(stages, 1):
            if self.fusion.private_convolutions(number):
                make_convolutions_private(stage, self._entering(number))

    def add_fusion_stages(self) -> None:
        """Add what the fusion does after stages."""
        fused = {}
        stages = dict(enumerate(self.channels, 1))
        if self.fusion.after_stem and self.stem_channels is not None:
            stages[0] = self.stem_channels
        for number, channels in stages.items():
            block = self.fusion.after_stage(number, channels, self.num_modalities)
            if block is not None:
                fused[str(number)] = block
        self.fusion_stages = nn.ModuleDict(fused)

    def acts_where_halving_only(self) -> bool:
        """Whether the fusion acts on norms in blocks that halve the resolution, and on no others."""

        def acts(downsampling: bool) -> bool:
            with torch.device("meta"):
                norm = self.fusion.norm(
                    8, self.num_modalities, exchange_point=True, downsampling=downsampling
                )
            return any(exchange_points(norm))

        return acts(True) and not acts(False)

    def _entering(self, stage: int) -> int:
        """Streams that enter a stage."""
        return self.num_modalities if stage == 0 else self.fusion.streams(stage - 1, self.num_modalities)

    def train(self, mode: bool = True) -> Encoder:
        """Set the mode as ``nn.Module.train``, but with ``frozen_statistics`` the norms stay in eval mode."""
        super().train(mode)
        if self.frozen_statistics:
            for module in self.modules():
                if isinstance(module, ExchangeBatchNorm2d):
                    module.eval()
        return self

    def forward(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Compute the stages' features.

        Args:
            x: ``[M*N, in_channels, H, W]`` stacked modality-major, or a sequence of M tensors
                ``[N, in_channels, H, W]``.

        Returns:
            Four ``[B*N, channels[i], h, w]``, finest first, of B = ``fusion.branches(M)`` branches.

        Raises:
            ValueError: another number of modalities or channels, or modalities of different shapes.
        """
        x = stacked_input(x, self.num_present, self.in_channels)
        x = self.stem(x)
        features = []
        for number, stage in enumerate(self.stages(), 1):
            x, feature = self.fuse(number, stage(x))
            features.append(feature)
        return features

    def fuse(self, stage: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """What goes on from a stage's output, the stem's being 0, and the feature that the decoder gets."""
        fused: tuple[Tensor, Tensor] = (x, x)
        if str(stage) in self.fusion_stages:
            fused = self.fusion_stages[str(stage)](x)
        return fused

    def from_pretrained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in state.items() if not key.startswith("fc.")}


ENCODERS: Registry[Callable[..., Encoder]] = Registry("encoder")
# Encoders of a library, named "family:name": a class (name, num_modalities, fusion, **options), which tells
# the Normalization of a name by ``normalization_of``.
FAMILIES: dict[str, Any] = {}
register_encoder = ENCODERS.register


def encoders() -> tuple[str, ...]:
    """The names of the registered encoders."""
    return ENCODERS.names()


def make_encoder(
    name: str,
    num_modalities: int,
    fusion: Fusion,
    *,
    output_stride: int = STRIDES[-1],
    dilated: bool = False,
    **options: Any,
) -> Encoder:
    """Build a registered encoder, or one of timm's networks.

    Args:
        name: under which a class or function ``(num_modalities, fusion, *, in_channels, frozen_statistics)``
            is registered; or ``"timm:NAME"``, a network of timm.
        output_stride: by which the features are smaller than the input at the most, 32, 16 or 8, as
            ``feature_strides`` has it; for less than 32 the builder takes ``output_stride`` as well.
        dilated: the same as ``output_stride=8``, also for builders that take ``dilated`` alone.
        options: ``in_channels``, ``frozen_statistics``.

    Raises:
        ValueError: an unknown name; an encoder that cannot be dilated; as ``TimmEncoder``.
        ImportError: as ``TimmEncoder``.
    """
    family, member = _family(name)
    if family is None and name not in ENCODERS.members:
        known = [*encoders(), *(f"{prefix}:NAME" for prefix in FAMILIES)]
        raise ValueError(f"encoder must be one of {', '.join(known)}, got {name!r}{suggest(name, known)}")
    build = ENCODERS[name] if family is None else functools.partial(family, member)
    output_stride = feature_strides(output_stride, dilated)[-1]
    if output_stride != STRIDES[-1]:
        taken = inspect.signature(build).parameters
        if "output_stride" in taken:
            options["output_stride"] = output_stride
        elif "dilated" in taken and output_stride == 8:
            options["dilated"] = True
        else:
            raise ValueError(f"encoder {name!r} has no dilated form, whose features end at 1/{output_stride}")
    return build(num_modalities, fusion, **options)


def feature_strides(output_stride: int, dilated: bool = False) -> tuple[int, ...]:
    """Strides of an encoder's features: 4, 8, 16 and 32, of which none exceeds ``output_stride``.

    Args:
        output_stride: 32; or 16 or 8 of a dilated encoder.
        dilated: the older spelling of ``output_stride=8``.

    Raises:
        ValueError: another output stride.
    """
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
    return tuple(min(stride, 8 if dilated else output_stride) for stride in STRIDES)


def input_normalization(name: str) -> Normalization | None:
    """The normalization of colors that an encoder's pretrained weights expect; None stands for ImageNet's.

    Raises:
        ValueError, ImportError: as ``TimmEncoder``.
    """
    family, member = _family(name)
    if family is not None:
        found: Normalization = family.normalization_of(member)
        return found
    return getattr(ENCODERS.members.get(name), "normalization", None)


def check_counts(**counts: int) -> None:
    """Refuse numbers below 1, by the names of their arguments.

    Raises:
        ValueError: there is one.
    """
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _family(name: str) -> tuple[Any, str]:
    """The family that an encoder's name begins with, and the rest of it; or None, and the name."""
    prefix, colon, member = name.partition(":")
    return (FAMILIES[prefix], member) if colon and prefix in FAMILIES else (None, name)
