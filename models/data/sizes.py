"""Images of a scene brought to one size: copies of other resolution resized, larger ones cropped if told."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.data.images import DataError, Image, Source, size_of
from models.data.kinds import Modality, is_mixed, resized

Size = tuple[int, int]  # height and width

_LIKE_A_CROP = 0.8  # share of a side: the paper's archive keeps 0.875 and 0.885


class Reference(NamedTuple):
    """What tells the size of a scene's images: its label map, or one of them."""

    file: Source | str
    size: Size
    is_labels: bool = False

    def __str__(self) -> str:
        """As messages begin, up to the verb's complement: ``its labels x.png are 640x480``."""
        height, width = self.size
        return f"{f'its labels {self.file} are' if self.is_labels else f'{self.file} is'} {width}x{height}"


def fitted(image: Image, kind: str | None, modality: Modality, file: Source, to: Reference) -> Image:
    """An image ``[H, W, C]`` of the reference's size.

    Args:
        image: of any size.
        kind: what it is resized as: only kinds that may be averaged are.
        modality: what is told of it; without a word of its size it must be a copy of other resolution.
        file: that messages name.
        to: the reference.

    Raises:
        DataError: it may not be resized.
    """
    check_size(image, modality, file, to)
    if image.shape[:2] == to.size:
        return image
    return resized(image, to.size, kind) if is_mixed(kind) else nearest(image, to.size)


def check_size(image: Image, modality: Modality, file: Source, to: Reference) -> None:
    """Refuse an image that may not become one of the reference's size.

    Raises:
        DataError: it may not.
    """
    if image.shape[:2] != to.size and (problem := _unlike_a_copy(image.shape[:2], modality, to.size)):
        raise DataError(f"{file} is {size_of(image)}, but {to}: {problem}")


def nearest(image: NDArray[Any], size: Size) -> NDArray[Any]:
    """An image ``[H, W, ...]`` of the pixels below its own centers: ``floor((i + 0.5) * in / out)``."""
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, image.shape[:2], strict=True)
    )
    return np.asarray(image[rows[:, None], columns])


def is_strict(modality: Modality) -> bool:
    """Whether a modality must be of its labels' size: told so, or a color image, on which they are drawn."""
    return modality.size == "same" or (modality.size is None and modality.kind in ("color", None))


def _unlike_a_copy(size: tuple[int, ...], modality: Modality, other: Size) -> str:
    """A reason why an image of a size may not become one of another; empty for none."""
    if modality.size == "any":
        return ""
    told = '"size": "any" of the modality in layout.json resizes it all the same'
    if modality.size == "same":
        return '"size": "same" in layout.json forbids to resize it'
    if is_strict(modality):
        return f"label maps are drawn on color images of their size; {told}"
    (height, width), (rows, columns) = size, other
    small, large = ((height, width), other) if height * width < rows * columns else (other, (height, width))
    off = min(abs(small[0] * large[1] - large[0] * small[1]) / side for side in large)
    if off >= 1:  # pixels of the smaller one, more than rounding leaves
        return (
            "another proportion of the sides, as another camera has; give its camera and pose in layout.json,"
            f" or, if both show the same, {told}"
        )
    if max(small[0] / large[0], small[1] / large[1]) >= _LIKE_A_CROP:
        return f"about the same size, as of a crop or a border; cut it as the others, or {told}"
    return ""


def cropped(image: Image, size: Size, path: Source, reference: object, is_labels: bool) -> Image:
    """The middle of an image, height and width ``size``, which ``reference`` has.

    Raises:
        DataError: it is smaller, or a copy of other resolution.
    """
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    if height < size[0] or width < size[1]:
        labels = "its labels " if is_labels else ""
        raise DataError(
            f"{path} is {size_of(image)}, smaller than {labels}{reference} of {size[1]}x{size[0]}"
        )
    if height % size[0] == 0 and width % size[1] == 0:
        raise DataError(
            f"{reference} is {size[1]}x{size[0]}, but {path} is {size_of(image)}: a copy of fewer pixels,"
            " and not its middle; resize one of them"
        )
    share = max(size[0] / height, size[1] / width)
    if share < _LIKE_A_CROP or size[0] * width == size[1] * height:
        what = "label maps" if is_labels else "images"
        warnings.warn(
            f"{what} of {size[1]}x{size[0]} are taken for the middle of images of {size_of(image)}: where"
            " they are smaller copies, resize one of them",
            stacklevel=2,
        )
    return middle(image, *size)


def middle(image: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """The middle ``height`` rows and ``width`` columns of an image ``[H, W, ...]``."""
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
