"""Whether an exported network says what the one it was made of says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.deployment.formats import Run
from models.deployment.interface import Interface


@dataclass(frozen=True)
class Agreement:
    """How far two networks agree.

    Attributes:
        scenes: that both have seen.
        difference: the largest one between their outputs.
        largest: the largest absolute output.
        pixels: share of the pixels with the same class in the first output; None where there are no classes.
    """

    scenes: int
    difference: float
    largest: float
    pixels: float | None

    def holds(self, half: bool) -> bool:
        """Whether it is that of the same network: to 1e-4 of the largest output, or in float16 to 2e-2, and
        on 99.99 % of the pixels, or 99 %.
        """
        relative, share = (2e-2, 0.99) if half else (1e-4, 0.9999)
        alike = self.pixels is None or self.pixels >= share
        return self.difference <= relative * max(1.0, self.largest) and alike

    def __str__(self) -> str:
        told = f"{self.scenes} scenes: largest difference {self.difference:.1e} of {self.largest:.3g}"
        if self.pixels is not None:
            told += f", {100 * self.pixels:.4g} % of pixels with the same class"
        return told


def batches(scenes: Sequence[Tensor], interface: Interface) -> Iterator[Tensor]:
    """Scenes ``[M, 3, H, W]`` as stacked inputs of several sizes ``[M*N, 3, H', W']``.

    Each by itself; the first one less a few rows and columns, so that its sides are odd, where the interface
    takes such; and three together.
    """
    yield from scenes
    first = scenes[0]
    height, width = first.shape[-2:]
    if interface.multiple == 1 and interface.size is None:
        yield first[..., : (height - 2) | 1, : (width - 6) | 1].contiguous()
    alike = [scene for scene in scenes if scene.shape == first.shape]
    three = [alike[i % len(alike)] for i in range(3)]
    yield torch.stack(three, 1).flatten(0, 1)


def compare(
    reference: Run, found: Run, interface: Interface, scenes: Sequence[Tensor], *, classes: bool
) -> Agreement:
    """Run two networks on the same inputs.

    Args:
        reference, found: the networks, on the interface's inputs.
        scenes: ``[M, 3, H, W]`` each.
        classes: whether outputs are logits.
    """
    count, same, pixels = 0, 0, 0
    gaps, sizes = list[Tensor](), list[Tensor]()
    for images in batches(scenes, interface):
        inputs = interface.arguments(images)
        expected, outputs = reference(inputs), found(inputs)
        count += images.shape[0] // len(interface.modalities)
        for y, z in zip(expected, outputs, strict=True):
            gaps.append((y - z).abs().max())
            sizes.append(y.abs().max())
        if classes:
            labels = [each[0].argmax(-3) for each in (expected, outputs)]
            same += int((labels[0] == labels[1]).sum())
            pixels += labels[0].numel()
    # Of tensors, as a maximum of numbers passes over NaN.
    difference, largest = (torch.stack(each).max().item() for each in (gaps, sizes))
    return Agreement(count, difference, largest, same / pixels if classes else None)
