"""The networks that ``model.network`` chooses: encoders with a decoder, and systems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from models.networks.decoders import deeplabv3plus as deeplab
from models.networks.decoders.esanet import esanet
from models.networks.decoders.light_refinenet import light_refinenet
from models.networks.decoders.pspnet import pspnet, stages_read
from models.networks.decoders.refinenet import refinenet
from models.networks.decoders.segformer import segformer
from models.networks.fusion import Fusion, NoFusion
from models.networks.fusion.base import STAGES
from models.networks.messages import suggest
from models.networks.segmentor import EncoderDecoder, SegmentationNetwork
from models.networks.systems import SYSTEMS, System, make_system

_EVERY_STAGE = tuple(range(1, STAGES + 1))
# Settings of ``model`` that every encoder and decoder takes.
_COMMON = ("encoder", "dropout", "width", "frozen_statistics")
# Modalities that have one channel, where a system counts channels; all others have three.
_SINGLE = ("depth", "disparity")


@dataclass(frozen=True)
class Decoder:
    """A network of any encoder and fusion with one kind of decoder.

    Attributes:
        build: as ``refinenet``.
        options: further settings of ``model`` that it takes.
        read: the encoder's stages whose features it reads.
        pooled: a norm of it has a single value per image, so that a batch needs two.
        head: it has an auxiliary head, with the argument ``aux``, which reads ``read_with_head``.
    """

    build: Callable[..., EncoderDecoder]
    options: tuple[str, ...] = ()
    read: tuple[int, ...] = _EVERY_STAGE
    pooled: bool = False
    head: bool = False
    read_with_head: tuple[int, ...] = _EVERY_STAGE

    def reads(self, auxiliary: bool) -> tuple[int, ...]:
        """The stages that are read, with an auxiliary head or without."""
        return self.read_with_head if self.head and auxiliary else self.read


DECODERS: dict[str, Decoder] = {
    "refinenet": Decoder(refinenet, ("decoder_init",)),
    "light_refinenet": Decoder(light_refinenet, ("decoder_init",)),
    "pspnet": Decoder(
        pspnet, read=stages_read(False), pooled=True, head=True, read_with_head=stages_read(True)
    ),
    "deeplabv3plus": Decoder(
        deeplab.deeplabv3plus, ("decoder_norms", "output_stride"), deeplab.STAGES_READ, pooled=True
    ),
    "segformer": Decoder(segformer),
    "esanet": Decoder(esanet, pooled=True, head=True),
}


def names() -> tuple[str, ...]:
    """What ``model.network`` may be."""
    return (*DECODERS, *SYSTEMS.names())


def check_name(name: str) -> None:
    """Refuse a network that there is not.

    Settings of a run are read without this: what needs no network works without the module of one's own.

    Raises:
        ValueError: the message begins with ``network``.
    """
    if name in DECODERS and name in SYSTEMS.members:
        raise ValueError(f"network={name} is a decoder's name: register the system by another one")
    if name not in names():
        hint = suggest(name, names())
        raise ValueError(f"network must be one of {', '.join(names())}, got {name!r}{hint}")


def is_system(name: str) -> bool:
    """Whether a network is a ``System``, which fuses in its own way."""
    return name in SYSTEMS.members


def system(name: str) -> type[System]:
    """The class of a system."""
    return cast("type[System]", SYSTEMS[name])


def taken(name: str) -> tuple[str, ...]:
    """Names of the settings of ``model`` that a network takes, beside those of weights and of the start."""
    if is_system(name):
        return ("encoder", *system(name).options)
    return (*_COMMON, "initial_scale", *DECODERS[name].options)


def num_branches(name: str, fusion: Fusion, num_modalities: int) -> int:
    """Branches of a network's output."""
    return 1 if is_system(name) else fusion.branches(num_modalities)


def is_pooled(name: str) -> bool:
    """Whether a norm of a network has a single value per image."""
    return system(name).pooled if is_system(name) else DECODERS[name].pooled


def check_subset(name: str, fusion: Fusion) -> None:
    """Refuse to run a network with some of its modalities.

    Raises:
        ValueError: it needs all of them.
    """
    if is_system(name):
        system(name).refuse_subset()
    fusion.check_subset()


def build(
    name: str,
    num_classes: int,
    modalities: tuple[str, ...],
    fusion: Fusion,
    settings: dict[str, Any],
    auxiliary: bool,
) -> SegmentationNetwork:
    """Build a network of random weights.

    Args:
        name: of ``names``.
        num_classes: K.
        modalities: names of the inputs.
        fusion: how they meet.
        settings: of ``model``, those that are ``taken``.
        auxiliary: whether the loss has a weight for side outputs.

    Raises:
        ValueError: the network refuses a setting; a fusion beside a system.
        ImportError: a library that the encoder needs is missing.
    """
    if is_system(name):
        if fusion != NoFusion():
            raise ValueError(f"fusion must be none with model.network={name}, which fuses in its own way")
        expected = system(name).modalities
        if expected and modalities != expected:
            raise ValueError(
                f"data.modalities must be {','.join(expected)} with model.network={name}, "
                f"got {','.join(modalities)}"
            )
        channels = [1 if modality in _SINGLE else 3 for modality in modalities]
        return make_system(name, num_classes, channels, **settings)
    kind = DECODERS[name]
    head = {"aux": auxiliary} if kind.head else {}
    options = {key: value for key, value in settings.items() if key != "initial_scale"}
    return kind.build(
        num_classes=num_classes, num_modalities=len(modalities), fusion=fusion, **head, **options
    )
