"""Cases of the operator's benchmark, the layers of the networks, and the bytes that each must move."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from cen_ext.ops.norm_exchange.reference import Options

PHASES = ("forward", "backward", "both")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
STATISTICS = ("batch", "given")
SMALL_SCALES = 0.1  # share of scales below the threshold; the paper's authors logged 8 % after training


class Shape(NamedTuple):
    """One call's size: ``[num_modalities * batch, channels, *spatial]``."""

    num_modalities: int
    batch: int
    channels: int
    spatial: tuple[int, ...]

    @property
    def full(self) -> tuple[int, ...]:
        return (self.num_modalities * self.batch, self.channels, *self.spatial)


@dataclass(frozen=True)
class Group:
    """Layers of one kind: ``(batch, channels, height and width)`` of a modality and what the call does."""

    sizes: tuple[tuple[int, int, int], ...]
    options: Options
    residual: bool = False
    statistics: tuple[str, ...] = STATISTICS


_UNET = ((512, 2), (512, 4), (512, 8), (512, 16), (256, 32), (128, 64))
GROUPS = {
    # The 3x3 convolutions' norms of a ResNet at crop 500, batch 6; all of them exchange.
    "resnet": Group(((6, 64, 125), (6, 128, 63), (6, 256, 32), (6, 512, 16)), Options(threshold=0.02)),
    # The last norms of its blocks.
    "wide": Group(
        ((6, 256, 125), (6, 512, 63), (6, 1024, 32), (6, 2048, 16)),
        Options(activation="relu"),
        residual=True,
    ),
    # Image translation; instance norm has no given statistics.
    "unet": Group(
        tuple((batch, *size) for batch in (1, 8) for size in _UNET),
        Options(threshold=0.01, norm="instance", activation="leaky_relu", negative_slope=0.2),
        statistics=("batch",),
    ),
    # The norms of a Swin-T or ConvNeXt-T at 224 pixels.
    "transformer": Group(
        ((6, 96, 56), (6, 192, 28), (6, 384, 14), (6, 768, 7)),
        Options(threshold=0.02, norm="layer"),
        statistics=("batch",),
    ),
}


@dataclass(frozen=True)
class Case:
    """One benchmarked call."""

    group: str
    shape: Shape
    options: Options
    residual: bool
    statistics: str  # of the batch (of the instance or position with those norms), or given
    dtype: str
    layout: str

    def __str__(self) -> str:
        m = self.shape.num_modalities
        return f"{self.group} {self.statistics} {self.layout} {self.dtype} M={m} {self.size}"

    @property
    def size(self) -> str:
        """A modality's size for people: ``6x64x125x125``."""
        return "x".join(map(str, (self.shape.batch, self.shape.channels, *self.shape.spatial)))

    @property
    def x_bytes(self) -> int:
        """Bytes of x, all modalities: M times the S of the byte model."""
        return math.prod(self.shape.full) * DTYPES[self.dtype].itemsize


def cases(
    groups: list[str], statistics: list[str], modalities: list[int], dtypes: list[str], layouts: list[str]
) -> Iterator[Case]:
    """Every combination asked for, the last argument changing last but the shape fastest."""
    for name in groups:
        group = GROUPS[name]
        for kind in (kind for kind in group.statistics if kind in statistics):
            for m in modalities:
                for dtype in dtypes:
                    for layout in layouts:
                        for batch, channels, side in group.sizes:
                            shape = Shape(m, batch, channels, (side, side))
                            yield Case(name, shape, group.options, group.residual, kind, dtype, layout)


def full_run() -> Iterator[Case]:
    """All groups in float32 with two modalities; bfloat16 and four modalities on the ResNet's stages."""
    layouts = list(LAYOUTS)
    yield from cases(list(GROUPS), list(STATISTICS), [2], ["float32"], layouts)
    yield from cases(["resnet"], ["batch"], [2], ["bfloat16"], layouts)
    yield from cases(["resnet"], ["batch"], [4], ["float32"], layouts)


def gpu_run() -> Iterator[Case]:
    """All groups in both types with two modalities, the ResNet's stages with four."""
    kinds = (list(DTYPES), list(LAYOUTS))
    yield from cases(list(GROUPS), list(STATISTICS), [2], *kinds)
    yield from cases(["resnet"], list(STATISTICS), [4], *kinds)


def quick_run() -> Iterator[Case]:
    """About a minute: the ResNet's stages and two of the U-Net's shapes, one of each otherwise."""
    one = (["batch"], [2], ["float32"], ["contiguous"])
    yield from cases(["resnet"], *one)
    yield from (c for c in cases(["unet"], *one) if c.size in ("1x512x4x4", "8x256x32x32"))


def most_telling_first(chosen: Sequence[Case]) -> list[Case]:
    """The order for a run that may be ended: two modalities first, and of each group's shapes the first and
    the last, then the second and the one before the last, and so on, each in all that there is of it."""

    def priority(case: Case) -> tuple[int, int]:
        sizes = GROUPS[case.group].sizes
        at = sizes.index((case.shape.batch, case.shape.channels, case.shape.spatial[0]))
        return case.shape.num_modalities, min(2 * at, 2 * (len(sizes) - at) - 1)

    return sorted(chosen, key=priority)


def bare(case: Case) -> Case:
    """The case's normalization alone: nothing is exchanged, added or activated."""
    options = case.options._replace(threshold=0.0, activation="identity")
    return replace(case, options=options, residual=False)


def floor_bytes(case: Case, phase: str) -> int:
    """The bytes that must move through memory at the least, caches being as large as one could wish.

    With S the bytes of one modality's tensor, a modality: forward 2S (read x, write y), backward 3S (read x
    and dy, write dx). A residual adds S forward (read) and, with an activation, 2S backward (read it for the
    activation's sign, write its gradient; without one its gradient is dy itself). Batch statistics have the
    same floor: x is read once if it stays on chip until it is used. The ``[M, C]`` tables and what the
    exchange saves (a replaced channel's x) are neglected.
    """
    forward = 2 + case.residual
    backward = 3 + 2 * (case.residual and case.options.activation != "identity")
    tensors = {"forward": forward, "backward": backward, "both": forward + backward}
    return tensors[phase] * case.x_bytes
