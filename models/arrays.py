"""Images in memory, which trained networks take where they take files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.data.images import Frame
from models.training.errors import UsageError

Given = str | Path | Frame | NDArray[Any]


def as_sources(images: Mapping[str, Given]) -> dict[str, Path | Frame]:
    """Map each kind to its file, or to a frame of what is in memory, which messages call by its kind.

    Args:
        images: by kind a path, a frame, or an array: colors ``[H, W, 3]`` uint8, red first; depth ``[H, W]``
            in integers as files store them, or in floating meters.

    Raises:
        UsageError: one is neither.
    """
    return {kind: _as_source(kind, image) for kind, image in images.items()}


def _as_source(kind: str, image: Given) -> Path | Frame:
    if isinstance(image, str):
        return Path(image)
    if isinstance(image, np.ndarray):
        return Frame(kind, image)
    if not isinstance(image, Path | Frame):
        raise UsageError(f"{kind}: expected a path or a NumPy array, got {type(image).__name__}")
    return image
