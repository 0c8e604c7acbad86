"""Samples and batches of image translation: one image per input domain, and one of the target's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.data.images import DataError, size_of
from models.data.layouts import SPLITS
from models.data.taskonomy import Domain, find_domain, find_views
from models.data.transforms import broaden

Image = NDArray[np.float32]  # [H, W, C] from -1 to 1; C is 3 or 1

_CHANNELS = 3


class TranslationSample(NamedTuple):
    """One view: an image per domain, all of one size."""

    images: tuple[Image, ...]  # M
    target: Image
    name: str  # building, point and view
    domains: tuple[Domain, ...]  # M + 1: of the images, then of the target


@dataclass
class TranslationBatch:
    """N samples of M domains, stacked domain-major: rows ``m*N .. m*N+N-1`` are domain m."""

    images: Tensor  # [M*N, 3, H, W] float32 from -1 to 1, channels_last
    target: Tensor  # [N, 3, H, W] likewise
    names: list[str]  # N

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TranslationBatch:
        images, target = (
            tensor.to(device, non_blocking=non_blocking) for tensor in (self.images, self.target)
        )
        return replace(self, images=images, target=target)

    def pin_memory(self) -> TranslationBatch:
        return replace(self, images=self.images.pin_memory(), target=self.target.pin_memory())


class TranslationSet:
    """The views of a split in Taskonomy's layout; see ``models.data.taskonomy``.

    Every file is looked for (not opened) when the set is made, so that a missing one stops a training before
    it starts.

    Args:
        root: folder of the data set.
        split: ``train`` or ``val``.
        domains: names of the inputs; samples give them in this order.
        target: name of the domain to be made of them.
        lists: paths of the training and the validation list; empty: see ``taskonomy.find_views``.

    Raises:
        DataError: a list or file is missing, a line is malformed; from ``dataset[i]``: a file is broken, not
            what its domain stores, or of another size than the others of its view.
        ValueError: a domain is unknown or named twice, ``split`` or ``lists`` is none.
    """

    def __init__(
        self,
        root: Path | str,
        split: str,
        *,
        domains: Sequence[str] = ("reshading", "edge_texture"),
        target: str = "rgb",
        lists: Sequence[str] = (),
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be {' or '.join(SPLITS)}, got {split!r}")
        if lists and len(lists) != len(SPLITS):
            raise ValueError(f"lists must be two paths, for training and validation, got {','.join(lists)}")
        names = (*domains, target)
        if not domains:
            raise ValueError("domains is empty: expected at least one input")
        if len(set(names)) < len(names):
            raise ValueError(f"domains and target must differ, got {','.join(domains)} and {target}")
        self.root, self.split = Path(root), split
        self.domains = tuple(find_domain(name) for name in names)
        self._views = find_views(self.root, split, names, lists)

    def __len__(self) -> int:
        return len(self._views)

    def files(self, index: int) -> list[Path]:
        """A view's files, in the order of ``domains``."""
        return [self._views[index].path(self.root, domain.name) for domain in self.domains]

    def __getitem__(self, index: int) -> TranslationSample:
        view, paths = self._views[index], self.files(index)
        images = [domain.read(path) for domain, path in zip(self.domains, paths, strict=True)]
        for image, path in zip(images, paths, strict=True):
            if image.shape[:2] != images[-1].shape[:2]:
                raise DataError(f"{path} is {size_of(image)}, but {paths[-1]} is {size_of(images[-1])}")
        return TranslationSample(tuple(images[:-1]), images[-1], view.name, self.domains)


@dataclass(frozen=True)
class Jitter:
    """The augmentation of the paper and of pix2pix, the same for all domains of a sample and its target.

    The shorter side becomes ``resize`` pixels, a square of ``crop`` is cut out at random, half of the samples
    are mirrored (of normals: the scene is). Images are averaged when they shrink and interpolated linearly
    when they grow, but for depth and segments, of which the nearest pixel is taken.

    Raises:
        ValueError: a side is not positive, or ``crop`` larger than ``resize``.
    """

    resize: int = 286
    crop: int = 256
    mirror: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            raise ValueError(f"crop must be from 1 to resize={self.resize}, got {self.crop}")

    def __call__(self, sample: TranslationSample, rng: np.random.Generator) -> TranslationSample:
        """The augmented sample, images ``[crop, crop, C]``; draws row, column and mirror, in this order."""
        size = _with_shorter_side(self.resize, sample.target)
        top, left = (int(rng.integers(length - self.crop + 1)) for length in size)
        mirror = self.mirror and rng.random() < 0.5

        def cut(image: Image, domain: Domain) -> Image:
            cropped = _resized(image, domain, size)[top : top + self.crop, left : left + self.crop]
            return domain.mirrored(cropped) if mirror else cropped

        return _each(sample, cut)


@dataclass(frozen=True)
class Square:
    """Evaluation's transform: the shorter side becomes ``size`` pixels, and the square in the middle is kept.

    Raises:
        ValueError: ``size`` is not positive.
    """

    size: int = 256

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be positive, got {self.size}")

    def __call__(self, sample: TranslationSample, _: np.random.Generator | None = None) -> TranslationSample:
        """The sample in images ``[size, size, C]``."""
        size = _with_shorter_side(self.size, sample.target)
        top, left = ((length - self.size) // 2 for length in size)

        def cut(image: Image, domain: Domain) -> Image:
            return _resized(image, domain, size)[top : top + self.size, left : left + self.size]

        return _each(sample, cut)


def collate_translation(samples: Sequence[TranslationSample]) -> TranslationBatch:
    """Stack samples; single channels are tiled to three.

    Raises:
        DataError: the samples are of different sizes.
    """
    first = samples[0]
    for sample in samples:
        if sample.target.shape != first.target.shape:
            raise DataError(
                f"{sample.name} is {size_of(sample.target)} and {first.name} {size_of(first.target)}:"
                " samples of one batch must be of one size"
            )
    # The same memory format as segmentation's batches have, for the same reason.
    inputs = [
        image for images in zip(*(sample.images for sample in samples), strict=True) for image in images
    ]
    return TranslationBatch(
        _stack(inputs), _stack([sample.target for sample in samples]), [sample.name for sample in samples]
    )


def _stack(images: Sequence[Image]) -> Tensor:
    """``[B, 3, H, W]`` in channels_last."""
    rows = [torch.from_numpy(broaden([image], _CHANNELS)[0]) for image in images]
    return torch.stack(rows).permute(0, 3, 1, 2)


def _each(sample: TranslationSample, change: Callable[[Image, Domain], Image]) -> TranslationSample:
    sources = (*sample.images, sample.target)
    *images, target = (change(*each) for each in zip(sources, sample.domains, strict=True))
    return sample._replace(images=tuple(images), target=target)


def _with_shorter_side(length: int, image: Image) -> tuple[int, int]:
    """Height and width of an image that is resized so; never less than ``length``."""
    height, width = image.shape[:2]
    scale = length / min(height, width)
    return max(length, round(height * scale)), max(length, round(width * scale))


def _resized(image: Image, domain: Domain, size: tuple[int, int]) -> Image:
    if not domain.mixed:
        how = cv2.INTER_NEAREST_EXACT
    else:
        how = cv2.INTER_AREA if size[0] < image.shape[0] else cv2.INTER_LINEAR
    smaller = cv2.resize(image, size[::-1], interpolation=how)
    return np.asarray(smaller.reshape(*size, image.shape[2]))
