"""Encoders that share nothing, one for each modality, in systems that join what they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from models.networks.encoders.base import Backbone
from models.networks.encoders.resnet import ExchangeResNet


class BackboneStreams(Backbone):
    """Base of encoders beside each other, which all start from the weights of one.

    A stem of one channel starts as the mean over red, green and blue (``load_imagenet``).
    """

    @property
    def named_streams(self) -> dict[str, Any]:
        """The encoders, each a ``Backbone``, by their names in the state dict, in the modalities' order."""
        raise NotImplementedError

    @property
    def stem_weights(self) -> tuple[str, ...]:
        return tuple(f"{name}.{key}" for name, net in self.named_streams.items() for key in net.stem_weights)

    def from_pretrained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, stream in self.named_streams.items()
            for key, value in stream.from_pretrained(state).items()
        }

    def forward(self, images: Sequence[Tensor]) -> list[Any]:
        """Compute what each stream makes of its image.

        Args:
            images: for each stream ``[N, its in_channels, H, W]``.
        """
        return [stream(image) for stream, image in zip(self.named_streams.values(), images, strict=True)]


class ResNetStreams(BackboneStreams):
    """ResNets beside each other.

    Args:
        streams: by the names that they have in the state dict, each of a single modality.
    """

    weights_kind = ExchangeResNet.weights_kind

    def __init__(self, **streams: ExchangeResNet) -> None:
        super().__init__()
        for name, stream in streams.items():
            self.add_module(name, stream)

    @property
    def named_streams(self) -> dict[str, ExchangeResNet]:
        return cast(dict[str, ExchangeResNet], dict(self.named_children()))

    @property
    def streams(self) -> tuple[ExchangeResNet, ...]:
        return tuple(self.named_streams.values())

    def forward(self, images: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Compute the features of every stage, finest first, in each the streams'."""
        return list(zip(*super().forward(images), strict=True))
