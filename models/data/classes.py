"""Names and colors of classes."""

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


# SUN RGB-D's, the first of NYUDv2's (Song et al., CVPR 2015).
SUN37 = NYU40[:37]

# Couprie et al. (ICLR 2013), in the alphabetical order that SceneNet and its successors count them in.
NYU13 = (
    *("bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table"),
    *("television", "wall", "window"),
)

# By merge, the class that each of 40 becomes. nyu13 is class13Mapping.mat of Handa's nyuv2-meta-data.
MERGES = {
    "nyu13": (
        *(11, 4, 5, 0, 3, 8, 9, 11, 12, 5),  # wall ... bookshelf
        *(7, 5, 12, 9, 5, 12, 5, 6, 6, 4),  # picture ... floor mat
        *(6, 2, 1, 5, 10, 6, 6, 6, 6, 6),  # clothes ... whiteboard
        *(6, 5, 6, 6, 6, 6, 6, 6, 5, 6),  # person ... other prop
    ),
}

# The classes that Cityscapes (Cordts et al., CVPR 2016) trains and judges, and the trainId of every labelId.
CITYSCAPES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle"),
    "bicycle",
)
CITYSCAPES_IDS = (
    *(-1, -1, -1, -1, -1, -1, -1, 0, 1, -1, -1, 2, 3, 4, -1, -1, -1, 5, -1, 6),
    *(7, 8, 9, 10, 11, 12, 13, 14, 15, -1, -1, 16, 17, 18),
)

_NAMES = {len(names): names for names in (NYU40, SUN37, NYU13, CITYSCAPES)}

# Colors that readers of these data sets know: SceneNet's and Cityscapes' own.
_PALETTES = {
    13: (
        *((0, 0, 255), (233, 89, 48), (0, 218, 0), (149, 0, 240), (222, 241, 24), (255, 206, 206)),
        *((0, 224, 229), (106, 136, 204), (117, 29, 41), (240, 35, 235), (0, 167, 156), (249, 139, 0)),
        (225, 229, 194),
    ),
    19: (
        *((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153)),
        *((250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60)),
        *((255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
    ),
}


def class_names(root: Path | None, num_classes: int, names: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names from ``classes.txt`` in a data set's root, else ``names`` or the known ones of so many classes.

    The known ones are NYUDv2's 40 or 13, SUN RGB-D's 37, and Cityscapes' 19; other classes are numbered.

    Args:
        root: the data set's folder; None: there is none.
        num_classes: how many there are to be.
        names: of the classes as the files have them, where the layout fixes them; none where they are merged.

    Raises:
        DataError: ``classes.txt``, or else ``names``, are not of ``num_classes`` classes.
    """
    path = None if root is None else root / NAMES_FILE
    if path is not None and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as a list of names ({error})") from error
        found = tuple(line.strip() for line in lines if line.strip())
        if len(found) != num_classes:
            raise DataError(f"{path}: {len(found)} names for num_classes={num_classes}")
        return found
    if names and len(names) != num_classes:
        raise DataError(
            f"{'the layout' if root is None else root}: {len(names)} classes, {names[0]} to {names[-1]}, but"
            f" num_classes={num_classes}; give data.num_classes={len(names)}"
        )
    if names:
        return names
    return _NAMES.get(num_classes) or tuple(f"class {label}" for label in range(num_classes))


def palette(num_classes: int) -> NDArray[np.uint8]:
    """Colors that tell classes apart, ``[num_classes, 3]`` uint8, red first; none is black, which is void's.

    Cityscapes' own colors for 19 classes, SceneNet's for 13. For other counts the bits of label + 1 are
    dealt in turn to red, green and blue, the lowest to the highest bits of the colors: neighboring labels
    get very different ones.
    """
    if not 1 <= num_classes <= 255:
        raise ValueError(f"num_classes must be 1 to 255, got {num_classes}")
    if num_classes in _PALETTES:
        return np.array(_PALETTES[num_classes], np.uint8)
    bits = np.arange(1, num_classes + 1)[:, None] >> np.arange(8) & 1  # [K, 8], lowest first
    colors = np.zeros((num_classes, 3), np.uint8)
    for bit in range(8):
        colors[:, bit % 3] |= (bits[:, bit] << (7 - bit // 3)).astype(np.uint8)
    return colors
