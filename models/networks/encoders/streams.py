"""ResNets that share nothing, one for each modality, in systems that join what they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from models.networks.encoders.base import Backbone
from models.networks.encoders.resnet import ExchangeResNet


class ResNetStreams(Backbone):
    """ResNets beside each other, which all start from the weights of one.

    A stem of one channel starts as the mean over red, green and blue (``load_imagenet``).

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
        """In the order in which they were given."""
        return cast(dict[str, ExchangeResNet], dict(self.named_children()))

    @property
    def streams(self) -> tuple[ExchangeResNet, ...]:
        return tuple(self.named_streams.values())

    @property
    def stem_weights(self) -> tuple[str, ...]:
        return tuple(f"{name}.{key}" for name, net in self.named_streams.items() for key in net.stem_weights)

    def from_pretrained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, stream in self.named_streams.items()
            for key, value in stream.from_pretrained(state).items()
        }

    def forward(self, images: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Compute the features of every stage, finest first, in each the streams'.

        Args:
            images: for each stream ``[N, its in_channels, H, W]``.
        """
        features = [stream(image) for stream, image in zip(self.streams, images, strict=True)]
        return list(zip(*features, strict=True))
