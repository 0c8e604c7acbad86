"""Convolutions that the modalities do not share: the first row of the paper's Table 1, the fair baseline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext.ops.streams import Streams
from cen_ext.tables import PerModality


class PrivateConv2d(PerModality, nn.Conv2d):
    """A set of filters for each of M modalities, all of them in one stacked call.

    Takes and returns the stacked ``[M*N, C, H, W]`` as a shared convolution does, so that norms and exchange
    between them stay as they are. A state dict's ``[out, in, kh, kw]`` loads into every modality.

    Args:
        conv: what every modality starts as; padded with zeros.
        num_modalities: M.

    Attributes:
        weight: ``[M*out, in, kh, kw]``, modality-major.
        bias: ``[M*out]`` or None.
    """

    def __init__(self, conv: nn.Conv2d, num_modalities: int) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            # Torch declares these four as tuples of any length, and takes pairs.
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            device="meta",  # its own initial values are not needed
        )
        self.num_modalities = num_modalities
        self.weight = nn.Parameter(conv.weight.detach().repeat(num_modalities, 1, 1, 1))
        if conv.bias is not None:
            self.bias = nn.Parameter(conv.bias.detach().repeat(num_modalities))

    def of_one_modality(self) -> nn.Conv2d:
        """A convolution of the same kind, on the meta device, for one modality's weight and bias."""
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]  # as above
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            self.bias is not None,
            device="meta",
        )

    def forward(self, x: Tensor | Streams) -> Tensor:
        count = self.num_modalities
        weights = self.weight.chunk(count)
        biases = [None] * count if self.bias is None else self.bias.chunk(count)
        modalities = range(count) if self.present is None else self.present
        parts = Streams.of(x, len(modalities)).parts  # x.chunk would fix the batch in exported programs
        return torch.cat(
            [
                F.conv2d(rows, weights[m], biases[m], self.stride, self.padding, self.dilation, self.groups)
                for rows, m in zip(parts, modalities, strict=True)
            ]
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            value = state_dict.get(prefix + name)
            if value is not None and value.shape[0] == self.out_channels:
                state_dict[prefix + name] = torch.cat([value] * self.num_modalities)
        super()._load_from_state_dict(state_dict, prefix, *args)


def make_convolutions_private(
    module: nn.Module, num_modalities: int, outside: Iterable[nn.Module] = ()
) -> None:
    """Replace every ``nn.Conv2d`` below ``module`` by a ``PrivateConv2d`` that starts as it.

    Args:
        outside: modules below ``module`` that stay as they are.
    """
    kept = {id(inner) for each in outside for inner in each.modules()}
    for parent in [each for each in module.modules() if id(each) not in kept]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and id(child) not in kept:
                setattr(parent, name, PrivateConv2d(child, num_modalities))
