"""The contract of a fusion: how the modalities of one network meet.

A fusion is a frozen dataclass whose fields are its options, each with a default (``option``). A network asks
it, while it is built, for every norm, for a module after each encoder stage, for the module that joins the
branches and for the convolutions that are private; and, while it trains, for its penalty and its loss. What a
fusion does not override is what the paper's network does without exchange: shared convolutions, private
norms, M branches to the end, their ensemble weighted by a softmax.

Stages are numbered as in the papers: 0 is the stem, 1 to 4 are a ResNet's stages, and ``DECODER`` follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from cen_ext import ExchangeBatchNorm2d, replaced_channels
from cen_ext.modules import ExchangeNorm
from models.networks.fusion.thresholds import Threshold, threshold_at_ones
from models.networks.messages import suggest
from models.networks.registry import Registry

MakeLayer = Callable[..., ExchangeNorm]  # (channels, num_modalities, **options) -> a kind of norm
STAGES = 4  # of a segmentation encoder; a U-Net's are its levels, and it has more
DECODER = STAGES + 1


def option(default: Any, help: str, *, carried: bool = False) -> Any:
    """A fusion's field with its one-line description.

    Args:
        carried: a recipe keeps the value when it changes from one fusion to another that has the field.
    """
    return dataclasses.field(default=default, metadata={"help": help, "carried": carried})


class FusionStage(nn.Module):
    """Base of what acts after an encoder stage.

    Attributes:
        loss: 0-d, what ``forward`` adds to the training loss, weight included; None where it adds nothing.
    """

    loss: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse the stage's output, ``[B*N, C, h, w]`` of B streams.

        Returns:
            What goes on to the next stage, of ``streams(stage, M)`` streams; and the feature that the decoder
            gets, of ``branches(M)``.
        """
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loss": None}  # it belongs to a forward pass, whose graph cannot be copied


class Lateral(NamedTuple):
    """What a fusion does around a spatial convolution in the middle of a block.

    The block passes ``before`` to the norm before that convolution, ``after`` to the norm after it, as
    further options, and goes on with ``join(x, y)`` of what the two returned in place of y. A U-Net's level
    has one norm, which gets ``before``, and goes on with ``join(x, x)``.
    """

    before: Mapping[str, Any] = MappingProxyType({})
    after: Mapping[str, Any] = MappingProxyType({})
    join: nn.Module | None = None


@dataclass(frozen=True)
class Fusion:
    """Base of all fusions.

    Attributes:
        uses_lateral: it needs an encoder that asks for ``lateral``.
        subsets: networks with it run with some of their modalities as well (``cen_ext.present``): what it
            adds to them is ``cen_ext.tables.PerModality``, or takes any number of modalities.
        after_stem: it is asked for ``after_stage(0, ...)`` as well, and needs an encoder with a place for it.

    Raises:
        ValueError: a value that is not among a field's choices; the message begins with the field's name.
    """

    name: ClassVar[str]
    uses_lateral: ClassVar[bool] = False
    subsets: ClassVar[bool] = False

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), get_args(hints[field.name])
            if get_origin(hints[field.name]) is Literal and value not in choices:
                hint = suggest(str(value), choices)
                raise ValueError(
                    f"{field.name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}"
                )

    def check(self, num_modalities: int) -> None:
        """Refuse options that contradict each other or the number of modalities, before a network is built.

        Raises:
            ValueError: the message begins with the option's name, or with ``fusion=`` and the fusion's.
        """

    def check_stages(self, count: int) -> None:
        """Refuse options that name stages beyond ``count``, which the encoder has.

        Raises:
            ValueError: the message begins with the option's name.
        """

    def check_read(self, stages: Sequence[int]) -> None:
        """Refuse options that leave parameters unused by a decoder which reads these stages' features alone.

        Raises:
            ValueError: the message begins with the option's name.
        """

    def check_subset(self) -> None:
        """Refuse to run with some of the modalities.

        Raises:
            ValueError: the fusion needs all of them.
        """
        if not self.subsets:
            able = [name for name, member in FUSIONS.members.items() if member.subsets]
            raise ValueError(
                f"fusion={name_of(self)} joins all modalities and cannot do without one; networks with "
                f"fusion={' or '.join(able)} can"
            )

    def streams(self, stage: int, num_modalities: int) -> int:
        """Streams that leave a stage, each of one modality or of several together."""
        return num_modalities

    def branches(self, num_modalities: int) -> int:
        """Branches B that the decoder gets and the network returns; M, or 1 where one stream is left."""
        return self.streams(4, num_modalities)

    def norm(
        self,
        channels: int,
        streams: int,
        *,
        exchange_point: bool = False,
        downsampling: bool = False,
        layer: MakeLayer = ExchangeBatchNorm2d,
        **options: Any,
    ) -> ExchangeNorm:
        """Make the norm after a convolution.

        Args:
            channels, streams: of what it normalizes, ``[streams*N, channels, h, w]``.
            exchange_point: it follows a spatial convolution of the encoder, where the paper exchanges.
            downsampling: it belongs to a block that halves the resolution.
            layer: the kind of norm: a class, or what ``cen_ext.convert.layer_for`` returns.
            options: further arguments of ``layer``, such as ``activation``.
        """
        return layer(channels, streams, **options)

    @property
    def after_stem(self) -> bool:
        return False

    def lateral(self, channels: int, num_modalities: int) -> Lateral | None:
        """Make what happens around a spatial convolution of a stage's last block; None for nothing.

        The encoder says which blocks and which convolution.

        Args:
            channels: of what enters the convolution and of what leaves it, which is of the same size.
        """
        return None

    def after_stage(self, stage: int, channels: int, num_modalities: int) -> FusionStage | None:
        """Make what acts after a stage, whose output has so many channels; None for nothing.

        Stage 0, the stem, is asked for where ``after_stem`` says so; the decoder gets no feature of it.
        """
        return None

    def private_convolutions(self, stage: int) -> bool:
        """Whether each stream has convolutions of its own in a stage."""
        return False

    def head(self, branches: int, num_classes: int) -> nn.Module | None:
        """Make what joins the branches' detached logits ``[B, N, K, h, w]`` to ``[N, K, h, w]``.

        None for the paper's ensemble, weighted by the softmax of the network's ``alpha``.
        """
        return None

    def penalty_on_scales(self, net: nn.Module) -> Tensor:
        """The ℓ1 penalty on the network's scales, 0-d and without λ; 0 where there is none."""
        return torch.zeros(())

    def loss(self, net: nn.Module) -> Tensor | None:
        """Further loss after a forward pass, 0-d with its weight: the sum of the stages'; None for none."""
        losses = [stage.loss for stage in net.modules() if isinstance(stage, FusionStage)]
        losses = [loss for loss in losses if loss is not None]
        return torch.stack(cast("list[Tensor]", losses)).sum() if losses else None


FUSIONS: Registry[type[Fusion]] = Registry("fusion")
register_fusion = FUSIONS.register


def fusions() -> tuple[str, ...]:
    """The names of the registered fusions."""
    return FUSIONS.names()


def name_of(fusion: Fusion) -> str:
    """The name that a fusion is registered by, or its class's."""
    names = {member: name for name, member in FUSIONS.members.items()}
    return names.get(type(fusion), type(fusion).__name__)


def resolve(
    fusion: Fusion | str | None,
    default: Fusion,
    num_modalities: int,
    **shorthand: float | str | None,
) -> Fusion:
    """A builder's ``fusion`` argument, or the exchange that its shorthand arguments describe, checked.

    Args:
        fusion: an object, a registered name, or None.
        default: an exchange, of which ``shorthand`` (threshold, region, criterion) replaces what is given.

    Raises:
        TypeError: fusion is neither.
        ValueError: both fusion and a shorthand are given; an unknown name; contradicting options.
    """
    given = {name: value for name, value in shorthand.items() if value is not None}
    if fusion is not None and given:
        raise ValueError(
            f"{', '.join(given)} must not be given beside fusion: give fusion=Exchange("
            + ", ".join(f"{name}={value!r}" for name, value in given.items())
            + ") alone"
        )
    if isinstance(fusion, str):
        fusion = FUSIONS[fusion]()
    elif fusion is None:
        fusion = dataclasses.replace(default, **given)
    elif not isinstance(fusion, Fusion):
        raise TypeError(f"fusion must be a Fusion or a registered name, got {type(fusion).__name__}")
    if num_modalities >= 1:  # another number is for the network to refuse
        fusion.check(num_modalities)
    return fusion


def check_rule(threshold: Threshold, region: str, criterion: str) -> None:
    """Refuse what the operator would refuse at the first batch only.

    Raises:
        ValueError: a negative threshold, or none; a text that is no factor of the median; an unknown region
            or criterion.
    """
    value = threshold_at_ones(threshold)
    if not value >= 0:
        raise ValueError(f"threshold must not be negative, got {value}")
    replaced_channels(torch.ones(1, 1), value, region, criterion)


def check_several(fusion: Fusion, num_modalities: int) -> None:
    """Refuse a fusion of a network that has one modality, and so nothing to fuse.

    Raises:
        ValueError: it has one.
    """
    if num_modalities == 1:
        raise ValueError(f"fusion={fusion.name} needs at least two modalities, the network has one")


def mark(norm: ExchangeNorm) -> ExchangeNorm:
    """Mark a norm as an exchange point, so that it is known in a network that exchanges nothing, too."""
    norm.exchange_point = True  # type: ignore[assignment]  # torch declares attributes to be tensors or modules
    return norm


def exchange_points(net: nn.Module) -> Iterator[ExchangeNorm]:
    """The norms after the spatial convolutions of an encoder: where a fusion may exchange."""
    yield from named_exchange_points(net).values()


def named_exchange_points(net: nn.Module) -> dict[str, ExchangeNorm]:
    """The same by their names in the network."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, ExchangeNorm) and getattr(module, "exchange_point", False)
    }


def scale_penalty(net: nn.Module, penalty: str) -> Tensor:
    """The ℓ1 penalty of Eq. 4 on the scales of the exchange points, 0-d and without λ.

    Args:
        penalty: ``"own"``, each modality's own share of the channels; ``"all"``, every scale (Table 1);
            ``"none"``. With one modality nothing is its own share.
    """
    scales: list[Tensor] = [] if penalty == "none" else [point.weight for point in exchange_points(net)]
    if penalty == "own":  # zero lies below every threshold: the operator itself says what the share is
        scales = [weight * replaced_channels(torch.zeros_like(weight), 1.0, "own") for weight in scales]
    return torch.stack([weight.abs().sum() for weight in scales]).sum() if scales else torch.zeros(())
