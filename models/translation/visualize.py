"""Images of a translation: inputs, branches, ensemble and target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.data import Domain
from models.visualize import Image


def show(image: Tensor) -> Image:
    """``[3, H, W]`` in [-1, 1], black to white, as an image; of any domain."""
    gray = (127.5 * (image.float().cpu() + 1)).round().clamp(0, 255)
    return gray.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def view_images(
    images: Tensor,  # [M, 3, H, W]
    outputs: Sequence[Tensor],  # M + 1 of [3, H, W]
    names: Sequence[str],  # outputs: the domains, then the ensemble
    target: Tensor | None = None,  # [3, H, W]
) -> dict[str, Image]:
    """A view's inputs, as ``input <domain>``, its branches and ensemble, and the ``target`` where given."""
    shown = {f"input {name}": show(image) for name, image in zip(names, images, strict=False)}
    shown |= {name: show(output) for name, output in zip(names, outputs, strict=True)}
    return shown if target is None else {**shown, "target": show(target)}


def stored(image: Tensor, domain: Domain) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Convert to what a file of the domain would hold: ``[H, W, 3]`` of 8 bits, or ``[H, W]`` of 16.

    Args:
        image: ``[3, H, W]`` in [-1, 1]; a domain of one channel gets the mean of the three.
        domain: the image's.
    """
    image = image.double().cpu()
    if domain.bits == 16:
        return _rounded(domain.decode(image.mean(0)), 2**16 - 1).numpy().astype(np.uint16)
    return _rounded(domain.decode(image.permute(1, 2, 0)), 255).numpy().astype(np.uint8)


def _rounded(values: Tensor, largest: int) -> Tensor:
    return values.round().clamp(0, largest)
