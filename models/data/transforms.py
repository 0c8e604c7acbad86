"""Augmentation of training samples, and channel counts made equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from models.data.dataset import Sample
from models.data.kinds import kind_by_name, mirrored, resized


@dataclass(frozen=True)
class TrainTransform:
    """Random scale, mirror and crop of the paper's training (section 4.1), the same for all modalities.

    The shorter side becomes ``shorter_side`` times a factor uniform in ``scales``; with ``scale_of="image"``
    the sample's own size is scaled by the factor, which is raised where the shorter side would be less than
    ``shorter_side``, as the released code does. Half of the samples are mirrored; a square of ``crop`` pixels
    is cut out. What is smaller than the square is padded on both sides: RGB with the mean color (0 once
    normalized), depth and what comes of it with 0 (missing), labels with ``ignore_index``. A modality's kind
    decides how it is resized and mirrored (``models.data.kinds``).

    Images come normalized as float32: OpenCV resizes those at least as fast as 8-bit ones (0.20 against
    0.32 ms for 640x480), so that nothing would be gained by normalizing the crop instead.

    Raises:
        ValueError: a side is not positive, ``scales`` is not an interval of positive numbers, or ``scale_of``
            is neither "shorter_side" nor "image".
    """

    crop: int = 500
    shorter_side: int = 350
    scales: tuple[float, float] = (0.5, 2.0)
    ignore_index: int = 255
    scale_of: str = "shorter_side"

    def __post_init__(self) -> None:
        for name in ("crop", "shorter_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.scales[0] <= self.scales[1]:
            raise ValueError(f"scales must be two positive factors, the lower one first, got {self.scales}")
        if self.scale_of not in ("shorter_side", "image"):
            raise ValueError(f"scale_of must be 'shorter_side' or 'image', got {self.scale_of!r}")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The augmented sample; images ``[crop, crop, C]``, target ``[crop, crop]``."""
        height, width = sample.target.shape
        factor, to_side = rng.uniform(*self.scales), self.shorter_side / min(height, width)
        scale = factor * to_side if self.scale_of == "shorter_side" else max(factor, to_side)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        rows, columns = (self._window(length, rng) for length in size)
        mirror = rng.random() < 0.5

        def cut(image: NDArray[Any], fill: int) -> NDArray[Any]:
            out = np.full((self.crop, self.crop, *image.shape[2:]), fill, image.dtype)
            out[rows.inside, columns.inside] = image[rows.source, columns.source]
            return out

        kinds = sample.kinds or tuple(map(kind_by_name, sample.modalities))
        images = [
            cut(resized(image, size, kind), 0) for image, kind in zip(sample.images, kinds, strict=True)
        ]
        target = cv2.resize(sample.target, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        labels = np.asarray(cut(target.reshape(size), self.ignore_index), np.uint8)
        if mirror:
            images = [mirrored(image, kind) for image, kind in zip(images, kinds, strict=True)]
            labels = np.ascontiguousarray(labels[:, ::-1])
        return sample._replace(images=tuple(images), target=labels)

    def _window(self, length: int, rng: np.random.Generator) -> _Window:
        if length > self.crop:
            start = int(rng.integers(length - self.crop + 1))
            return _Window(slice(start, start + self.crop), slice(None))
        margin = (self.crop - length) // 2
        return _Window(slice(None), slice(margin, margin + length))


@dataclass(frozen=True)
class _Window:
    """Along one axis: which pixels of the resized image fill which of the crop."""

    source: slice
    inside: slice


def broaden(images: Sequence[NDArray[Any]], channels: int = 1) -> list[NDArray[Any]]:
    """Tile the channels of each ``[H, W, C]`` image up to one count (CEN, footnote 3).

    Args:
        images: one per modality.
        channels: a count of which the result is to be a multiple as well: 3 for a network that starts from
            ImageNet weights, whatever the modalities are.

    Returns:
        Images of ``lcm(channels, C_0, ..., C_{M-1})`` channels: RGB stays, depth is repeated three times.
    """
    count = lcm(channels, *(image.shape[2] for image in images))
    return [np.tile(image, (1, 1, count // image.shape[2])) for image in images]
