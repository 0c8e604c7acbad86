"""Images of a translation: inputs, branches, ensemble and target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.visualize import Image


def show(image: Tensor) -> Image:
    """``[3, H, W]`` or ``[1, H, W]`` in [-1, 1], black to white, as an image; of any domain."""
    gray = (127.5 * (image.float().cpu() + 1)).round().clamp(0, 255)
    return gray.to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


def view_images(
    images: Tensor,  # [M, 3, H, W]
    outputs: Sequence[Tensor],  # M + 1 of [C', H, W]
    names: Sequence[str],  # outputs: the domains, then the ensemble
    target: Tensor | None = None,  # [C', H, W]
) -> dict[str, Image]:
    """A view's inputs, as ``input <domain>``, its branches and ensemble, and the ``target`` where given."""
    shown = {f"input {name}": show(image) for name, image in zip(names, images, strict=False)}
    shown |= {name: show(output) for name, output in zip(names, outputs, strict=True)}
    return shown if target is None else {**shown, "target": show(target)}
