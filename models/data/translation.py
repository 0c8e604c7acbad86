"""Samples and batches of image translation: one image per input domain, and one of the target's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.data.images import DataError, Frame, size_of
from models.data.layout_file import has_own_layout
from models.data.layouts import SPLITS
from models.data.pairs import LayoutDomain, LayoutReader, Pairs, find_pairs
from models.data.taskonomy import Domain, ViewFiles, find_domain, find_views
from models.data.transforms import broaden

Image = NDArray[np.float32]  # [H, W, C] from -1 to 1; C is 3 or 1
AnyDomain: TypeAlias = Domain | LayoutDomain

_CHANNELS = 3  # of inputs; a single one is tiled


class TranslationSample(NamedTuple):
    """One view: an image per domain, all of one size."""

    images: tuple[Image, ...]  # M
    target: Image
    name: str  # building, point and view
    domains: tuple[AnyDomain, ...]  # M + 1: of the images, then of the target


@dataclass
class TranslationBatch:
    """N samples of M domains, stacked domain-major: rows ``m*N .. m*N+N-1`` are domain m."""

    images: Tensor  # [M*N, 3, H, W] float32 from -1 to 1, channels_last
    target: Tensor  # [N, C', H, W] likewise; C' is the target domain's ``channels``
    names: list[str]  # N

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TranslationBatch:
        images, target = (
            tensor.to(device, non_blocking=non_blocking) for tensor in (self.images, self.target)
        )
        return replace(self, images=images, target=target)

    def of(self, domains: Sequence[int] | None) -> TranslationBatch:
        """The batch with these input domains alone; None: with all."""
        if domains is None:
            return self
        every = self.images.split(len(self.target))
        return replace(self, images=torch.cat([every[m] for m in domains]))

    def pin_memory(self) -> TranslationBatch:
        return replace(self, images=self.images.pin_memory(), target=self.target.pin_memory())


class TaskonomyReader:
    """Makes what networks see of a view's files, one for each of Taskonomy's domains.

    Args:
        names: of the domains, in the order of the images.

    Raises:
        ValueError: a domain is unknown.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.domains = tuple(map(find_domain, names))

    def files(self) -> tuple[str, ...]:
        """The files that are read, by what they hold."""
        return tuple(domain.name for domain in self.domains)

    def endings(self) -> dict[str, str]:
        """By what they hold, what the names of files end in that is not the view's."""
        return {domain.name: f"_domain_{domain.name}" for domain in self.domains}

    def absent(self, files: Collection[str]) -> tuple[int, ...]:
        """The numbers of the domains that files of these kinds do not give."""
        return tuple(m for m, domain in enumerate(self.domains) if domain.name not in files)

    def read(self, files: Mapping[str, Path | Frame]) -> tuple[Image, ...]:
        """The encoded images, of the domains that are not ``absent``.

        Raises:
            DataError: a file is broken, not what its domain stores, or of another size than the last one.
        """
        domains = [domain for domain in self.domains if domain.name in files]
        paths = [files[domain.name] for domain in domains]
        images = tuple(domain.read(path) for domain, path in zip(domains, paths, strict=True))
        for image, path in zip(images, paths, strict=True):
            if image.shape[:2] != images[-1].shape[:2]:
                raise DataError(f"{path} is {size_of(image)}, but {paths[-1]} is {size_of(images[-1])}")
        return images


ViewReader: TypeAlias = TaskonomyReader | LayoutReader


class TranslationSet:
    """The views of a split: of any pairs where the folder has a ``layout.json``, else in Taskonomy's layout.

    See ``models.data.pairs`` and ``models.data.taskonomy``. Every file is looked for when the set is made, so
    that a missing one stops a training before it starts; of pairs the first view's are opened as well.

    Args:
        root: folder of the data set.
        split: ``train`` or ``val``.
        domains: names of the inputs; samples give them in this order.
        target: name of the domain to be made of them.
        lists: paths of the training and the validation list; empty: the layout's.

    Raises:
        DataError: a list or file is missing, a line is malformed, ``layout.json`` is wrong; from
            ``dataset[i]``: a file is broken, not what its domain stores, or of another size than the others
            of its view.
        ValueError: a domain is unknown, cannot be one, or is named twice; ``split`` or ``lists`` is none.

    Attributes:
        reader: of a view's files.
        domains: of the inputs, then of the target.
        source: the list or the folder that the views were found in; the root in Taskonomy's layout.
        guessed_kinds: of a ``layout.json``, the modalities whose kind only the files told.
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
        self.reader: ViewReader
        self._views: Pairs | list[ViewFiles]
        if has_own_layout(self.root):
            list_file = dict(zip(SPLITS, lists, strict=False)).get(split, "")
            pairs = self._views = find_pairs(self.root, split, names, list_file)
            self.reader, self.source, self.guessed_kinds = pairs.reader, pairs.source, pairs.guessed_kinds
        else:
            self.reader, self.source, self.guessed_kinds = TaskonomyReader(names), str(self.root), ()
            self._views = find_views(self.root, split, names, lists)

    @property
    def domains(self) -> tuple[AnyDomain, ...]:
        return self.reader.domains

    def __len__(self) -> int:
        return len(self._views.scenes if isinstance(self._views, Pairs) else self._views)

    def files(self, index: int) -> Mapping[str, Path]:
        """A view's files, by what they hold."""
        if isinstance(self._views, Pairs):
            return self._views.scenes[index]
        view = self._views[index]
        return {domain.name: view.path(self.root, domain.name) for domain in self.domains}

    def __getitem__(self, index: int) -> TranslationSample:
        name = self._views.names[index] if isinstance(self._views, Pairs) else self._views[index].name
        *images, target = self.reader.read(self.files(index))
        return TranslationSample(tuple(images), target, name, self.domains)


@dataclass(frozen=True)
class Jitter:
    """The augmentation of the paper and of pix2pix, the same for all domains of a sample and its target.

    The shorter side becomes ``resize`` pixels, a square of ``crop`` is cut out at random, half of the samples
    are mirrored (of normals: the scene is). Images are averaged when they shrink and interpolated linearly
    when they grow, but for depth and segments (and normals of a ``layout.json``), of which the nearest pixel
    is taken.

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

        def cut(image: Image, domain: AnyDomain) -> Image:
            cropped = domain.resized(image, size)[top : top + self.crop, left : left + self.crop]
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

        def cut(image: Image, domain: AnyDomain) -> Image:
            return domain.resized(image, size)[top : top + self.size, left : left + self.size]

        return _each(sample, cut)


@dataclass(frozen=True)
class Whole:
    """Evaluation's transform where images stay as large as they are."""

    def __call__(self, sample: TranslationSample, _: np.random.Generator | None = None) -> TranslationSample:
        """The sample as it is."""
        return sample


def collate_translation(samples: Sequence[TranslationSample]) -> TranslationBatch:
    """Stack samples; single channels of inputs are tiled to three, those of the target to its ``channels``.

    Raises:
        DataError: the samples are of different sizes.
    """
    first = samples[0]
    for sample in samples:
        if sample.target.shape != first.target.shape:
            raise DataError(
                f"{sample.name} is {size_of(sample.target)} and {first.name} {size_of(first.target)}:"
                " samples of one batch must be of one size; any go with a batch of one"
            )
    # The same memory format as segmentation's batches have, for the same reason.
    inputs = [
        image for images in zip(*(sample.images for sample in samples), strict=True) for image in images
    ]
    target = _stack([sample.target for sample in samples], first.domains[-1].channels)
    return TranslationBatch(_stack(inputs, _CHANNELS), target, [sample.name for sample in samples])


def _stack(images: Sequence[Image], channels: int) -> Tensor:
    """``[B, channels, H, W]`` in channels_last."""
    rows = [torch.from_numpy(broaden([image], channels)[0]) for image in images]
    return torch.stack(rows).permute(0, 3, 1, 2)


def _each(sample: TranslationSample, change: Callable[[Image, AnyDomain], Image]) -> TranslationSample:
    sources = (*sample.images, sample.target)
    *images, target = (change(*each) for each in zip(sources, sample.domains, strict=True))
    return sample._replace(images=tuple(images), target=target)


def _with_shorter_side(length: int, image: Image) -> tuple[int, int]:
    """Height and width of an image that is resized so; never less than ``length``."""
    height, width = image.shape[:2]
    scale = length / min(height, width)
    return max(length, round(height * scale)), max(length, round(width * scale))
