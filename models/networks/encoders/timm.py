"""Any network of timm with norms that exchange, as an encoder for M modalities: ``encoder="timm:NAME"``.

timm's pyramid (``features_only``) goes through ``cen_ext.convert.replace_norms``: all else is shared, norms
come from the fusion. Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020, exchange
channels after the norms of spatial convolutions; which those are, one traced forward pass tells. Where layer
norms exchange, in transformers, is our choice: ``Trace.exchange_points``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cen_ext.convert import layer_for, replace_norms
from cen_ext.modules import ExchangeNorm
from models.networks.branches import stacked_input
from models.networks.encoders.base import (
    FAMILIES,
    STRIDES,
    Encoder,
    Normalization,
    check_counts,
    feature_strides,
)
from models.networks.encoders.trace import Trace, trace
from models.networks.fusion.base import Fusion
from models.networks.messages import first_line, suggest
from models.networks.private import PrivateConv2d


class TimmEncoder(Encoder):
    """A network of timm, with random weights, whose M modalities share all but the norms.

    Most of timm's networks are a chain of modules, which this class runs in four stages; the stem belongs to
    the first. Others (HRNet, Xception) run as timm wrote them, and take no fusion that treats stages
    differently. Features are ``[.., C, h, w]``, also of those that compute channels last (Swin).

    Args:
        name: from ``timm.list_models()``, with a pretrained tag or without. Nothing is downloaded.
        num_modalities: M >= 1.
        fusion: how the modalities meet.
        in_channels: channels of every modality's input.
        frozen_statistics: as ``Encoder``.
        output_stride: of the last feature, 32, 16 or 8, by timm's argument of that name.
        dilated: the older spelling of ``output_stride=8``.

    Attributes:
        network: the pyramid, with timm's names.
        normalization: what timm's pretrained weights expect.

    Raises:
        ImportError: timm is not installed, or cannot be imported.
        ValueError: timm has no such network, or one that is no pyramid of these strides, has no norms that
            exchange, or norms that would mix the modalities; a fusion that the network cannot serve;
            num_modalities or in_channels below 1.
    """

    def __init__(
        self,
        name: str,
        num_modalities: int,
        fusion: Fusion,
        *,
        in_channels: int = 3,
        frozen_statistics: bool = True,
        output_stride: int = STRIDES[-1],
        dilated: bool = False,
    ) -> None:
        check_counts(num_modalities=num_modalities, in_channels=in_channels)
        record = _record(name)
        plan = _plan(name, in_channels, record.input_size[1:], record.fixed_input_size)
        super().__init__(
            num_modalities,
            fusion,
            channels=plan.channels,
            strides=feature_strides(output_stride, dilated),
            in_channels=in_channels,
            frozen_statistics=frozen_statistics,
        )
        self.name = name
        self.weights_kind = f"timm's {name}"
        self.normalization = Normalization(tuple(record.mean), tuple(record.std))
        self._left_out = plan.left_out
        self._stem_weights = tuple(f"network.{key}" for key in plan.stem_weights)
        self._stage_of = {unit: number for number, units in enumerate(plan.stages, 1) for unit in units}
        self._check_fusion(plan)

        self._channels_last = plan.channels_last
        pyramid = _pyramid(name, in_channels, self.strides)
        names = {norm: key for key, norm in pyramid.named_modules()}

        def make_norm(norm: nn.Module, exchange_point: bool, activation: str) -> nn.Module:
            key = names[norm]
            make = self.norm_layer(self._stage(key), downsampling=key in plan.downsampling)
            layer, channels = layer_for(norm)
            return make(channels, layer=layer, exchange_point=exchange_point, activation=activation)

        try:
            self.network = replace_norms(pyramid, make_norm, lambda key, _: key in plan.exchange_points)
        except ValueError as error:
            raise ValueError(f"encoder: timm's {name} cannot be converted: {error}") from error
        self.make_convolutions_private()
        # Beside the network, which owns the modules; as a tuple they are not registered again.
        self._chain = tuple(
            nn.Sequential(*(self.network.get_submodule(unit) for unit in units)) for units in plan.stages
        )
        self.add_fusion_stages()
        self.train()

    @property
    def stem_weights(self) -> tuple[str, ...]:
        """Names, in the state dict, of weights ``[C, in_channels, h, w]`` that read the image: one in most
        networks, several where branches begin at it, none where it is rearranged before."""
        return self._stem_weights

    def stem(self, x: Tensor) -> Tensor:
        return x  # timm does not tell where it ends

    def stages(self) -> Sequence[nn.Module]:
        return self._chain

    def forward(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        if self._chain:
            return super().forward(x)
        features = self.network(stacked_input(x, self.num_present, self.in_channels))
        return [self._channels_second(feature) for feature in features]

    def fuse(self, stage: int, x: Tensor) -> tuple[Tensor, Tensor]:
        following, feature = super().fuse(stage, self._channels_second(x))
        return following.movedim(1, -1) if self._channels_last else following, feature

    def _channels_second(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1) if self._channels_last else x

    def from_pretrained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate timm's state dict of the whole network to this encoder's names, without classifier.

        What lies behind the last feature is left out with it; names that timm's network does not have stay.
        """
        own = self.network.state_dict()
        return {
            f"network.{_own_name(key, own)}": value
            for key, value in state.items()
            if key not in self._left_out
        }

    def make_convolutions_private(self) -> None:
        """Make private the convolutions that the fusion wants so.

        Raises:
            ValueError: there are layers that have no private form.
        """
        private = [
            (key, layer)
            for key, layer in self.network.named_modules()
            if next(layer.parameters(recurse=False), None) is not None
            and not isinstance(layer, ExchangeNorm)
            and self.fusion.private_convolutions(self._stage(key))
        ]
        strange = {type(layer).__name__ for _, layer in private if type(layer) is not nn.Conv2d}
        if strange:
            raise self._refusal(f"has layers without a private form ({', '.join(sorted(strange))})")
        for key, conv in private:
            parent, _, child = key.rpartition(".")
            streams = self._entering(self._stage(key))
            setattr(self.network.get_submodule(parent), child, PrivateConv2d(conv, streams))

    def _stage(self, key: str) -> int:
        """The stage of a module; 1, which is like all others, where the network is no chain."""
        parts = key.split(".")
        names = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return next((self._stage_of[name] for name in names if name in self._stage_of), 1)

    def _check_fusion(self, plan: _Plan) -> None:
        """Refuse a fusion that asks for what the network has not."""
        fusion, stages = self.fusion, range(1, 5)
        private = [fusion.private_convolutions(stage) for stage in range(5)]
        if private[0] != private[1]:
            raise self._refusal("does not tell its stem from stage 1")
        if not plan.stages:
            with torch.device("meta"):
                acts = any(
                    fusion.after_stage(stage, channels, self.num_modalities) is not None
                    for stage, channels in zip(stages, self.channels, strict=True)
                )
            joins = any(fusion.streams(stage, self.num_modalities) != self.num_modalities for stage in stages)
            if acts or joins or len(set(private)) > 1:
                raise self._refusal("is no chain of stages")
        if not plan.downsampling.intersection(plan.exchange_points) and self.acts_where_halving_only():
            raise self._refusal("halves the resolution in no block with a spatial convolution's norm")

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(
            f"encoder: timm's {self.name} {reason}, so it cannot serve {self.fusion}; choose fusion=exchange "
            "with its defaults, or another encoder, resnet50 for example"
        )

    @staticmethod
    def normalization_of(name: str) -> Normalization:
        """The normalization of colors that the weights of timm's network expect, by timm's own record.

        Raises:
            ImportError, ValueError: as the class.
        """
        record = _record(name)
        return Normalization(tuple(record.mean), tuple(record.std))


FAMILIES["timm"] = TimmEncoder


class _Plan(NamedTuple):
    """Facts of a network that is yet to be built; names are those in its pyramid."""

    channels: tuple[int, ...]
    exchange_points: tuple[str, ...]  # norms
    downsampling: frozenset[str]  # norms in blocks that halve the resolution
    stages: tuple[tuple[str, ...], ...]  # modules of each, to be run one after the other; none: no chain
    stem_weights: tuple[str, ...]
    left_out: frozenset[str]  # names in timm's whole network that the pyramid does without
    channels_last: bool  # its features


def _plan(name: str, in_channels: int, size: Sequence[int], fixed_size: bool) -> _Plan:
    with torch.device("meta"):  # to look at: names, shapes and the order of computation take no memory
        whole = _timm().create_model(name, pretrained=False, in_chans=in_channels).state_dict()
        pyramid = _pyramid(name, in_channels)
        seen = trace(pyramid, torch.empty(1, in_channels, *size))
        if fixed_size:
            _check_other_sizes(name, pyramid, torch.empty(1, in_channels, *(side + 32 for side in size)))
    points = seen.exchange_points()
    if seen.norms and not points:
        raise ValueError(
            f"encoder: timm's {name} has norms, but none after a spatial convolution or in a block"
        )
    own = pyramid.state_dict()
    return _Plan(
        tuple(pyramid.feature_info.channels()),
        points,
        seen.downsampling(),
        _stages(pyramid, seen),
        tuple(key for key in seen.stem if own[key].shape[1] == in_channels),
        frozenset(key for key in whole if _own_name(key, own) not in own),
        getattr(pyramid, "output_fmt", "NCHW") == "NHWC",
    )


def _check_other_sizes(name: str, pyramid: nn.Module, image: Tensor) -> None:
    """Raise ValueError for a network that is built for images of one size, and cannot be told otherwise."""
    try:
        pyramid(image)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"encoder: timm's {name} takes images of one size alone: {first_line(error)}"
        ) from None


def _stages(pyramid: nn.Module, seen: Trace) -> tuple[tuple[str, ...], ...]:
    """The modules of the four stages, containers opened, or nothing."""
    units: list[str] = []
    for name, child in pyramid.named_children():
        inner = [f"{name}.{key}" for key, _ in child.named_children()]
        units += inner if isinstance(child, nn.Sequential) else [name]
    return seen.chain(units)


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm")  # only now, so that the other networks need torch alone
    except ImportError as error:
        if error.name == "timm":
            raise ImportError("encoder: timm is not installed: pip install 'cen_ext[timm]'") from error
        raise ImportError(f"encoder: timm cannot be imported: {first_line(error)}") from error
    except RuntimeError as error:  # of torchvision, "operator torchvision::nms does not exist"
        raise ImportError(
            f"encoder: timm cannot be imported: {first_line(error)}. Its torchvision was built for another "
            f"torch than {torch.__version__}: install the one that belongs to this torch"
        ) from error


def _record(name: str) -> Any:
    """timm's record of a network's pretrained weights."""
    timm = _timm()
    if not timm.is_model(name):
        raise ValueError(f"encoder: timm has no network {name!r}{suggest(name, timm.list_models())}")
    try:
        record = timm.get_pretrained_cfg(name)
    except RuntimeError:  # another tag than those of the network
        record = None
    if record is None:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise ValueError(f"encoder: timm has no record of weights {name!r}{suggest(name, tags)}")
    return record


def _pyramid(name: str, in_channels: int, expected: tuple[int, ...] = STRIDES) -> Any:
    """The network without what follows its last feature, returning the last four."""
    options: dict[str, Any] = {"features_only": True, "out_indices": tuple(range(-len(STRIDES), 0))}
    form = "features"
    if expected != STRIDES:
        options["output_stride"] = expected[-1]
        taker = "PSPNet" if expected[-1] == 8 else "DeepLabv3+"
        form = f"dilated features, which {taker} takes,"
    try:
        pyramid = _of_any_size(name, options | {"in_chans": in_channels})
    except (AssertionError, AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"encoder: timm's {name} has no {form} of strides {expected}: {first_line(error)}"
        ) from error
    strides = tuple(pyramid.feature_info.reduction())
    if strides != expected:
        raise ValueError(
            f"encoder: timm's {name} ends in features of strides {strides}, and decoders take {expected}"
        )
    return pyramid


def _of_any_size(name: str, options: dict[str, Any]) -> Any:
    """timm's network, which takes images of other sizes than its record's, too, if it can be told to."""
    create = partial(_timm().create_model, name, pretrained=False, **options)
    if not _record(name).fixed_input_size:
        return create()
    try:
        return create(strict_img_size=False)
    except TypeError:  # it has no such argument
        return create()


def _own_name(key: str, own: Mapping[str, Tensor]) -> str:
    """The pyramid's name for the whole network's: the same, with a container flattened, or wrapped."""
    candidates = (key, key.replace(".", "_", 1), f"model.{key}")
    return next((name for name in candidates if name in own), key)
