"""State dicts of torchvision's VGG-16, and its layers a second time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

WIDTHS = (64, 128, 256, 512, 512)
STAGES = (2, 2, 3, 3, 3)
# Where vgg16 and vgg16_bn of torchvision have their convolutions; the norms of the latter come right behind.
PLACES = {
    False: (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    True: (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40),
}
NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var")


def unit_names(stages: int = 5) -> list[str]:
    """Stage and number of each convolution, both from 0, such as ``"2.1"``."""
    return [f"{stage}.{unit}" for stage in range(stages) for unit in range(STAGES[stage])]


def vgg16_shapes(
    widths: Sequence[int] = WIDTHS, hidden: int = 4096, *, norm: bool = False
) -> dict[str, tuple[int, ...]]:
    """The state of vgg16 or vgg16_bn, name by name, or of one with other widths."""
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    outs = [width for width, depth in zip(widths, STAGES, strict=True) for _ in range(depth)]
    for place, width in zip(PLACES[norm], outs, strict=True):
        shapes[f"features.{place}.weight"] = (width, channels, 3, 3)
        shapes[f"features.{place}.bias"] = (width,)
        if norm:
            shapes |= {f"features.{place + 1}.{entry}": (width,) for entry in NORM_ENTRIES}
            shapes[f"features.{place + 1}.num_batches_tracked"] = ()
        channels = width
    for layer, (out, before) in {0: (hidden, 49 * channels), 3: (hidden, hidden), 6: (1000, hidden)}.items():
        shapes |= {f"classifier.{layer}.weight": (out, before), f"classifier.{layer}.bias": (out,)}
    return shapes


def vgg16_state(widths: Sequence[int], hidden: int, path: Path, *, norm: bool = False) -> dict[str, Tensor]:
    """A random one, which is written to the path as well."""
    state = {name: torch.randn(shape) for name, shape in vgg16_shapes(widths, hidden, norm=norm).items()}
    for name in state:
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(5)
    torch.save(state, path)
    return state
