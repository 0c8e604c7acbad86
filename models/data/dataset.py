"""Samples of a data set on disk, in any layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.data.classes import MERGES, class_names
from models.data.files import find_samples
from models.data.images import DataError, read_labels, size_of
from models.data.layouts import LABELS, SPLITS, find_layout
from models.data.modalities import Reader, configured


class Sample(NamedTuple):
    """One scene: a picture a modality, all of one size, and its labels."""

    images: tuple[NDArray[np.float32], ...]  # M times [H, W, C]; C differs between modalities
    target: NDArray[np.uint8]  # [H, W], classes and ignore_index
    name: str  # path of the label file below its kind's folder, without suffix: unique in a split
    modalities: tuple[str, ...]  # the names of the images


class SegmentationSet:
    """The samples of a split.

    Every file is looked for (not opened) when the set is made, so that a missing one stops a training before
    it starts. Inputs larger than the labels are cropped around the centre, as the paper's archive wants it.

    Args:
        root: folder of the data set.
        split: ``train``, ``val``, or the name of another list there.
        modalities: see ``Reader``; samples give them in this order.
        num_classes: labels are ``0 .. num_classes-1``.
        layout: a name in ``LAYOUTS``; None: what the folder's ``layout.json`` says, or what it looks like.
        lists: paths of the training and the validation list, in place of the layout's.
        depth_scale, bit_shift, camera, label_offset: in place of the layout's, where given.
        ignore_index: value of void pixels in ``Sample.target``; in the files it stands for them as well.
        merge: a name in ``MERGES``: classes of the files that become one.

    Raises:
        DataError: a list or file is missing, a line is malformed, the layout is not clear, or its classes are
            not ``num_classes``; from ``dataset[i]``: a file is broken, has the wrong size, bit depth or
            channel count, or holds a label out of range.
        ValueError: an argument is out of range, a modality or layout unknown.
    """

    def __init__(
        self,
        root: Path | str,
        split: str,
        *,
        modalities: Sequence[str] = ("rgb", "depth"),
        num_classes: int = 40,
        layout: str | None = None,
        lists: Sequence[str] = (),
        depth_scale: float | None = None,
        bit_shift: int | None = None,
        camera: Sequence[float] = (),
        label_offset: int | None = None,
        ignore_index: int = 255,
        merge: str | None = None,
    ) -> None:
        self.root, self.split = Path(root), split
        self.modalities, self.num_classes = tuple(modalities), num_classes
        if not 1 <= num_classes <= 255:
            raise ValueError(f"num_classes must be 1 to 255, got {num_classes}")
        if lists and len(lists) != len(SPLITS):
            raise ValueError(f"lists must be two paths, for training and validation, got {','.join(lists)}")
        self.layout = configured(
            find_layout(self.root, layout),
            depth_scale=depth_scale,
            bit_shift=bit_shift,
            camera=camera,
            label_offset=label_offset,
        )
        if not 0 <= ignore_index <= 255:
            raise ValueError(f"ignore_index must be 0 to 255, got {ignore_index}")
        self.ignore_index = ignore_index
        self.reader = Reader(self.layout, self.modalities)
        self.label_map = self._label_map(merge)
        self.class_names = class_names(self.root, num_classes, () if merge else self.layout.classes)
        list_file = dict(zip(SPLITS, lists, strict=False)).get(split, "")
        kinds = (*self.reader.kinds(), LABELS)
        self._entries = find_samples(self.layout, self.root, split, kinds, list_file)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        paths = dict(self._entries[index])
        label_path = paths.pop(LABELS)
        layout = self.layout
        target = read_labels(
            label_path,
            self.num_classes,
            layout.label_offset,
            self.ignore_index,
            self.label_map,
            layout.ignore_index,
        )
        images = self.reader.read(paths)
        size = images[0].shape
        if size[0] < target.shape[0] or size[1] < target.shape[1]:
            raise DataError(
                f"{next(iter(paths.values()))} is {size_of(images[0])}, smaller than its labels {label_path}"
                f" of {size_of(target)}"
            )
        cropped = tuple(_centre(image, target.shape) for image in images)
        return Sample(cropped, target, self._name(label_path), self.modalities)

    def _name(self, label_path: Path) -> str:
        # Of the file alone scenes of several folders share it, as all of SUN RGB-D's label/label.npy do.
        path = os.path.relpath(label_path, self.root / self.layout.folder(LABELS, self.split))
        return Path(path).with_suffix("").as_posix()

    def _label_map(self, merge: str | None) -> tuple[int, ...]:
        """What the classes of the files become."""
        if merge is None:
            return self.layout.label_map
        if merge not in MERGES:
            raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
        if self.layout.label_map:
            raise ValueError(f"merge={merge} is not for the classes of the layout {self.layout.name}")
        merged = MERGES[merge]
        if self.num_classes != max(merged) + 1:
            raise ValueError(
                f"merge={merge} gives {max(merged) + 1} classes, not num_classes={self.num_classes}"
            )
        # SUN RGB-D's 37 classes are the first of NYUDv2's 40.
        return merged[: len(self.layout.classes) or None]


def _centre(image: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    """The middle ``[height, width]`` of an image."""
    top, left = ((have - want) // 2 for have, want in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]]
