"""Names and colours of classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.data.images import DataError

NAMES_FILE = "classes.txt"

# The 40 classes of Gupta et al. (CVPR 2013) on NYUDv2, in the order of their label maps.
NYU40 = (
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf"),
    *(
        "picture",
        "counter",
        "blinds",
        "desk",
        "shelves",
        "curtain",
        "dresser",
        "pillow",
        "mirror",
        "floor mat",
    ),
    *("clothes", "ceiling", "books", "refrigerator", "television", "paper", "towel", "shower curtain", "box"),
    *("whiteboard", "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "other structure"),
    *("other furniture", "other prop"),
)


def class_names(root: Path, num_classes: int) -> tuple[str, ...]:
    """Names from ``classes.txt`` in a data set's root, else NYUDv2's for 40 classes, else numbers.

    Raises:
        DataError: ``classes.txt`` does not give ``num_classes`` names.
    """
    path = root / NAMES_FILE
    if path.is_file():
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        if len(names) != num_classes:
            raise DataError(f"{path}: {len(names)} names for num_classes={num_classes}")
        return names
    return NYU40 if num_classes == len(NYU40) else tuple(f"class {label}" for label in range(num_classes))


def palette(num_classes: int) -> NDArray[np.uint8]:
    """Colours that tell classes apart, ``[num_classes, 3]`` uint8, red first; none is black, which is void's.

    The bits of label + 1 are dealt in turn to red, green and blue, the lowest to the highest bits of the
    colours: neighbouring labels get very different ones.
    """
    if not 1 <= num_classes <= 255:
        raise ValueError(f"num_classes must be 1 to 255, got {num_classes}")
    bits = np.arange(1, num_classes + 1)[:, None] >> np.arange(8) & 1  # [K, 8], lowest first
    colours = np.zeros((num_classes, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= (bits[:, bit] << (7 - bit // 3)).astype(np.uint8)
    return colours
