"""Images in memory, which trained networks take where they take files."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.data.images import DataError, Frame
from models.training.errors import UsageError

Given = str | Path | Frame | NDArray[Any]


def as_sources(images: Mapping[str, Given]) -> dict[str, Path | Frame]:
    """Map each kind to its file, or to a frame of what is in memory, which messages call by its kind.

    Args:
        images: by kind a path, a frame, or an array: colors ``[H, W, 3]`` uint8, red first; depth ``[H, W]``
            in integers as files store them, or in floating meters. Read-only arrays and views with any
            strides will do.

    Raises:
        UsageError: one is none of these, or masked, which would lose its mask.
    """
    return {kind: _as_source(kind, image) for kind, image in images.items()}


def _as_source(kind: str, image: Given) -> Path | Frame:
    if isinstance(image, str):
        return Path(image)
    if isinstance(image, np.ma.MaskedArray):
        raise UsageError(
            f"{kind}: the mask of an array would be lost; give array.filled(0): 0 is missing depth"
        )
    if isinstance(image, np.ndarray):
        return Frame(kind, image)
    if not isinstance(image, Path | Frame):
        raise UsageError(f"{kind}: expected a path or a NumPy array, got {type(image).__name__}")
    return image


@contextmanager
def advising(sources: Mapping[str, Path | Frame]) -> Iterator[None]:
    """Let the message about an array that is no image of its modality end in what to do.

    Raises:
        DataError: the block does.
    """
    try:
        yield
    except DataError as error:
        for source in sources.values():
            if isinstance(source, Frame) and str(error).startswith(f"{source}: "):
                raise DataError(f"{error}{_remedy(source.pixels)}") from error
        raise


def _remedy(array: NDArray[Any]) -> str:
    """How to make an image of an array that is none; empty where it cannot be guessed."""
    if array.ndim == 4 and len(array) == 1:
        return "; give one scene, array[0]"
    if array.ndim != 3:
        return ""
    if array.shape[0] in (1, 3, 4) and array.shape[2] > 4:
        return "; channels come last: give array.transpose(1, 2, 0)"
    if array.dtype.kind == "f":
        return "; give colors from 0 to 1 as (255 * array).round().astype(np.uint8)"
    return "; give array[:, :, :3] of colors with alpha" if array.shape[2] == 4 else ""


class Buffers:
    """Arrays of one shape that are handed out again once nothing refers to them or to a view of them.

    A loop that drops its results before long is given the same memory again and again, and results that are
    kept stay what they are: theirs is not handed out. Threads may share it.
    """

    _KEPT = 4  # arrays; a program that keeps more results is given new ones

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.float32]] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Buffers], tuple[()]]:
        return Buffers, ()  # copies have memory of their own

    def take(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """A float32 array whose values are left over; arrays of another shape are forgotten."""
        with self._lock:
            kept = self._arrays = [array for array in self._arrays if array.shape == tuple(shape)]
            for index in range(len(kept)):
                if _references(kept, index) == _ALONE:
                    return kept[index]
            kept.append(np.empty(shape, np.float32))
            del kept[: -self._KEPT]
            return kept[-1]


def _references(arrays: Sequence[NDArray[Any]], index: int) -> int:
    """How often an array is referred to. Tensors and views refer to the array that owns their memory."""
    return sys.getrefcount(arrays[index])


_ALONE = _references([np.empty(0)], 0)  # in nothing but a list, as this version of Python counts
