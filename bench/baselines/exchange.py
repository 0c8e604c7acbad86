"""Channel exchange on lists of M tensors, as usually written, with the parts that all baselines share."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def each(layer: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    return [layer(x) for x in xs]


def replaced(weights: list[Tensor], threshold: float, region: str) -> list[Tensor]:
    """Masks of the channels that each modality gives up: M of ``[C]`` from M scales ``[C]``."""
    masks = []
    for m, weight in enumerate(weights):
        mask = weight.abs() < threshold
        if region == "own":
            share = torch.zeros_like(mask)
            share[m * len(mask) // len(weights) : (m + 1) * len(mask) // len(weights)] = True
            mask = mask & share
        masks.append(mask)
    return masks


def donor(xs: list[Tensor], m: int) -> Tensor:
    """Mean of the other modalities, which takes the place of modality m's replaced channels."""
    others = xs[:m] + xs[m + 1 :]
    return others[0] if len(others) == 1 else torch.stack(others).mean(0)


def exchange(xs: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Replace the masked channels of each modality by indexing with booleans, into a fresh tensor."""
    exchanged = []
    for m, (x, mask) in enumerate(zip(xs, masks, strict=True)):
        y = torch.zeros_like(x)
        y[:, ~mask] = x[:, ~mask]
        y[:, mask] = donor(xs, m)[:, mask]
        exchanged.append(y)
    return exchanged


def exchange_where(xs: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Exchange by ``torch.where``, which a compiler can fuse: how many channels a mask has is data."""
    return [
        torch.where(mask.view(-1, 1, 1), donor(xs, m), x)
        for m, (x, mask) in enumerate(zip(xs, masks, strict=True))
    ]


def compiled(net: nn.Module) -> nn.Module:
    """Compile ``net`` by ``torch.compile``, as one graph."""
    for module in net.modules():
        if hasattr(module, "exchange"):
            module.exchange = exchange_where
    return torch.compile(net, dynamic=False, fullgraph=True)


def eager_penalty(net: nn.Module) -> Tensor | float:
    """Sum of |γ| over every modality's share of the channels that it may exchange."""
    penalty: Tensor | float = 0.0
    for norms in net.modules():
        if isinstance(norms, nn.ModuleList) and getattr(norms, "threshold", 0) > 0 and len(norms) > 1:
            for m, norm in enumerate(norms):
                first, last = (i * len(norm.weight) // len(norms) for i in (m, m + 1))
                penalty = penalty + norm.weight[first:last].abs().sum()
    return penalty


def split_state(state: Mapping[str, Tensor], usual: nn.Module) -> dict[str, Tensor]:
    """Convert the state dict of a network of ours to that of ``usual``, its eager twin."""
    shared = {key: state[key] for key in usual.state_dict() if key in state}
    private: dict[str, list[str]] = defaultdict(list)  # by our key, those of the modalities in their order
    for key in usual.state_dict():
        if key not in shared:
            private[_stacked_key(key)].append(key)
    return shared | {
        key: state[stacked].view(len(keys), -1)[m] if state[stacked].dim() else state[stacked]  # a counter
        for stacked, keys in private.items()
        for m, key in enumerate(keys)
    }


def _stacked_key(key: str) -> str:
    """Our name for an entry of a modality's norm, ``bn1.0.weight``."""
    *module, _, leaf = key.split(".")
    return ".".join([*module, leaf])


def stacked_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert ``split_state``; for gradients too."""
    stacked = {}
    private: dict[str, list[Tensor]] = defaultdict(list)
    for key, value in state.items():
        match = re.fullmatch(r"(.*(?:bn\d|downsample\.1|norm))\.\d+\.(\w+)", key)
        if match:
            private[f"{match[1]}.{match[2]}"].append(value)
        else:
            stacked[key] = value
    for key, values in private.items():
        together = torch.stack if ".running_" in key else torch.cat  # scales and shifts are [M*C]
        stacked[key] = together(values) if values[0].dim() else values[0]
    return stacked
