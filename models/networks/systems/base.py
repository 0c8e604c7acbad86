"""The contract of a system: a whole network that is no encoder, fusion and decoder of this library's kinds.

Each of the published systems that the papers compare with is one class in one file. It gets an image for each
modality, of as many channels as the modality has, and returns logits; everything else, such as training,
evaluation, prediction and reports, is that of all networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from cen_ext.ops.streams import Streams
from models.networks.backend import runs_on_backend
from models.networks.branches import stacked_input
from models.networks.fusion.base import Fusion
from models.networks.fusion.exchange import NoFusion
from models.networks.messages import suggest
from models.networks.outputs import AuxiliaryOutput, SegmentationOutput, with_ensemble
from models.networks.registry import Registry
from models.networks.segmentor import SegmentationNetwork

LEAST = 33  # height and width of images at the least: at 1/32 more than one pixel
CHANNELS = 3  # of every modality's image, where a single one is repeated


class Logits(NamedTuple):
    """What a system computes.

    Attributes:
        output: ``[N, K, h, w]``.
        sides: of side outputs, each ``[N, K, h_i, w_i]``; empty outside of training.
    """

    output: Tensor
    sides: tuple[Tensor, ...] = ()


class System(SegmentationNetwork):
    """Base of systems. A subclass makes its modules and gives ``logits``.

    It has one branch, the fused one, whatever the number of modalities.

    Args:
        num_classes: K.
        channels: of every modality's image: 1 or 3 each.

    Attributes:
        name: by which ``model.network`` chooses it; where it is not given, the class's in snake case.
        encoders: names of the encoders that it can be built on, the first by default.
        options: names of further arguments of the constructor, which are settings of ``model``.
        modalities: names that the modalities must have, in their order; empty for any.
        takes: numbers of modalities that it can be built for; empty for any.
        sides: how many side outputs it has in training.
        least: height and width that an exported program takes at the least, with more than one pixel in its
            coarsest feature.
        pooled: whether a norm of it has a single value per image, so that a batch needs two images.
        encoder: the part that pretrained weights fill, a ``models.networks.encoders.base.Backbone``.

    Raises:
        ValueError: a number of modalities that it does not take; other numbers of channels.
    """

    name: ClassVar[str]
    encoders: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()
    modalities: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[int, ...]] = ()
    sides: ClassVar[int] = 0
    least: ClassVar[int] = LEAST
    pooled: ClassVar[bool] = False

    def __init__(self, num_classes: int, channels: Sequence[int]) -> None:
        super().__init__()
        if self.takes and len(channels) not in self.takes:
            expected = " or ".join(map(str, self.takes))
            raise ValueError(
                f"network={name_of(type(self))} takes {expected} modalities, got {len(channels)}"
            )
        if wrong := [count for count in channels if count not in (1, CHANNELS)]:
            raise ValueError(f"channels of a modality must be 1 or {CHANNELS}, got {wrong[0]}")
        self.num_classes = num_classes
        self.channels = tuple(channels)
        self.num_branches = 1
        self.alpha = nn.Parameter(torch.zeros(1))

    @property
    def num_modalities(self) -> int:
        return len(self.channels)

    @property
    def fusion(self) -> Fusion:
        """None of those that are chosen: the system's own is part of it."""
        return NoFusion()

    @property
    def num_sides(self) -> int:
        return self.sides

    def check_subset(self) -> None:
        self.refuse_subset()

    @classmethod
    def refuse_subset(cls) -> None:
        """Refuse to run with some of the modalities.

        Raises:
            ValueError: always: the system joins all of them.
        """
        raise ValueError(
            f"network={name_of(cls)} joins all modalities and cannot do without one; an encoder and a "
            "decoder with fusion=exchange or none can"
        )

    def logits(self, images: Sequence[Tensor]) -> Logits:
        """Compute the logits of any size, and in training those of the side outputs.

        Args:
            images: of every modality ``[N, channels[m], H, W]``, H and W of any size from ``LEAST`` on.
        """
        raise NotImplementedError

    @runs_on_backend
    def forward(self, x: Tensor | Sequence[Tensor]) -> SegmentationOutput | AuxiliaryOutput:
        stacked = stacked_input(x, self.num_modalities, CHANNELS)
        parts = Streams.of(stacked, self.num_modalities).parts
        found = self.logits([part[:, :count] for part, count in zip(parts, self.channels, strict=True)])
        output = with_ensemble(found.output, cast(Tensor, self.alpha))
        if not (self.training and self.sides):
            return output
        return AuxiliaryOutput(*output, tuple(side[None] for side in found.sides))

    def from_experts(self, experts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Entries of the state dict as networks that were trained before have them, one for each modality.

        Args:
            experts: their state dicts.

        Raises:
            ValueError: it does not start from experts, or theirs do not fit.
        """
        raise ValueError(f"network={name_of(type(self))} does not start from experts")

    def from_released(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate the state dict of a public checkpoint to this network's names.

        Raises:
            ValueError: the layout of none is known.
        """
        raise ValueError(f"network={name_of(type(self))}: no public checkpoint's layout is known")


SystemKind = TypeVar("SystemKind", bound="type[System]")
SYSTEMS: Registry[Callable[..., System]] = Registry("network")


def register_system(kind: SystemKind) -> SystemKind:
    """Decorator: list a system under its name.

    Raises:
        ValueError: it names no encoder; the name is taken.
    """
    if not kind.encoders:
        raise ValueError(f"encoders of {kind.__name__} must name what model.encoder may be, got none")
    SYSTEMS.register(kind)
    return kind


def name_of(kind: type[System]) -> str:
    """The name that a system is registered by, or its class's."""
    return {member: name for name, member in SYSTEMS.members.items()}.get(kind, kind.__name__)


def make_system(
    name: str, num_classes: int, channels: Sequence[int], *, encoder: str | None = None, **options: Any
) -> System:
    """Build a registered system.

    Args:
        name: its name.
        num_classes, channels: as ``System``.
        encoder: one of the system's ``encoders``; None: the first.
        options: as the system has them, such as ``dropout``.

    Raises:
        ValueError: an unknown name or encoder; what the system refuses.
    """
    kind = cast("type[System]", SYSTEMS[name])
    encoder = kind.encoders[0] if encoder is None else encoder
    if encoder not in kind.encoders:
        hint = suggest(encoder, kind.encoders)
        raise ValueError(
            f"encoder must be {' or '.join(kind.encoders)} with network={name}, got {encoder!r}{hint}"
        )
    chosen = {"encoder": encoder} if len(kind.encoders) > 1 else {}
    return kind(num_classes, channels, **chosen, **options)
