"""Samples of a data set on disk, in any layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from models.data.classes import MERGES, class_names
from models.data.contradictions import first_look
from models.data.files import find_samples
from models.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataError,
    DepthScale,
    classes_of,
    read_label_values,
)
from models.data.layout_file import find_layout
from models.data.layouts import LABELS, SPLITS
from models.data.missing import CHOICES, REMEDY, Absences, Missing, settle
from models.data.modalities import Reader, configured, with_kinds

_PALETTE_SUFFIXES = frozenset({".png", ".bmp", ".tif", ".tiff"})


class Sample(NamedTuple):
    """One scene: an image per modality, all of one size, and its labels."""

    images: tuple[NDArray[np.float32], ...]  # M times [H, W, C]; C differs between modalities
    target: NDArray[np.uint8]  # [H, W], classes and ignore_index
    name: str  # path of the label file below its kind's folder, without suffix: unique in a split
    modalities: tuple[str, ...]  # the names of the images
    kinds: tuple[str | None, ...] = ()  # the images' (``Reader.kinds``); empty: told by their names
    absent: tuple[int, ...] = ()  # the numbers of the modalities whose images stand for nothing


class SegmentationSet:
    """The samples of a split.

    Every file is looked for when the set is made, so that a missing one stops a training before it starts;
    only some of modalities whose kind nobody has told are opened. Inputs come in their labels' size: those of
    another one are resized or registered, or cropped to their middle in the paper's archive. With the first
    sample a few scenes are looked at as a whole: what contradicts the layout becomes a warning.

    Args:
        root: folder of the data set.
        split: ``train``, ``val``, or the name of another list there.
        modalities: see ``Reader``; samples give them in this order.
        num_classes: labels are ``0 .. num_classes-1``.
        layout: a name in ``LAYOUTS``; None: what the folder's ``layout.json`` says, or what it looks like.
        lists: paths of the training and the validation list, in place of the layout's.
        depth_scale, bit_shift, camera, label_offset, hha_floor: in place of the layout's, where given.
        ignore_index: value of void pixels in ``Sample.target``; in the files it stands for them as well.
        merge: a name in ``MERGES``: classes of the files that become one.
        mean, std, depth_mean, depth_std: as ``Reader``.
        missing: what to do about scenes that lack a file of some modality: ``"refuse"`` them, ``"skip"`` the
            scene, or ``"fill"`` the image with 0 and name it in ``Sample.absent``. Labels must be there.
        without: modalities that are absent from every sample; their files are not looked for.

    Raises:
        DataError: a list or file is missing, a line is malformed, the layout is not clear, or its classes are
            not ``num_classes``; from ``dataset[i]``: a file is broken, has the wrong size, bit depth or
            channel count, or holds a label out of range.
        ValueError: an argument is out of range, a modality or layout unknown.

    Attributes:
        layout: with what was given, and the kinds of all modalities.
        reader: makes the images.
        scenes: by what they hold the files of each.
        source: the list, or the folder, that the scenes were found in.
        guessed_kinds: the modalities whose kind the files told, as nothing else did.
        gray_in_color: those of them that are gray, but stored in three channels.
        class_names: of the ``num_classes`` classes.
        absences: what the scenes lack.
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
        depth_scale: DepthScale = None,
        bit_shift: int | None = None,
        camera: Sequence[float] = (),
        label_offset: int | None = None,
        hha_floor: int | None = None,
        ignore_index: int = 255,
        merge: str | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        depth_mean: float = 0.0,
        depth_std: float = 1.0,
        missing: Missing = "refuse",
        without: Sequence[str] = (),
    ) -> None:
        self.root, self.split = Path(root), split
        self.modalities, self.num_classes = tuple(modalities), num_classes
        if not 1 <= num_classes <= 255:
            raise ValueError(f"num_classes must be 1 to 255, got {num_classes}")
        if lists and len(lists) != len(SPLITS):
            raise ValueError(f"lists must be two paths, for training and validation, got {','.join(lists)}")
        if missing not in CHOICES:
            raise ValueError(f"missing must be one of {', '.join(CHOICES)}, got {missing!r}")
        if without and not set(without) < set(self.modalities):
            raise ValueError(
                f"without must be some of {','.join(self.modalities)}, not all, got {','.join(without)}"
            )
        known = configured(
            find_layout(self.root, layout),
            depth_scale=depth_scale,
            bit_shift=bit_shift,
            camera=camera,
            label_offset=label_offset,
            hha_floor=hha_floor,
        )
        if not 0 <= ignore_index <= 255:
            raise ValueError(f"ignore_index must be 0 to 255, got {ignore_index}")
        self.ignore_index = ignore_index
        self.layout = known
        self.label_map = self._label_map(merge)
        self.class_names = class_names(self.root, num_classes, () if merge else known.classes)
        list_file = dict(zip(SPLITS, lists, strict=False)).get(split, "")
        files = Reader(known, self.modalities, without=tuple(without)).files()
        optional = files if missing != "refuse" else ()
        entries = find_samples(known, self.root, split, (*files, LABELS), list_file, optional, REMEDY)
        self.absences = Absences(split, without=tuple(without))
        if missing != "refuse":
            source = list_file or known.list_file(split) or split
            entries, self.absences = settle(entries, split, missing, source, tuple(without))
        self.scenes = entries
        self.layout, self.gray_in_color = with_kinds(known, self.scenes, self.modalities)
        self.reader = Reader(self.layout, self.modalities, mean, std, tuple(without), depth_mean, depth_std)
        self.guessed_kinds = tuple(
            name for name in known.files if name in self.modalities and known.modality(name).kind is None
        )
        self.source = list_file or known.list_file(split) or known.folder(next(iter(known.files)), split)
        self.surveyed = False

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        if not self.surveyed:
            self.surveyed = True
            worker = get_worker_info()
            if worker is None or worker.id == 0:  # each worker has a set of its own, and one word is enough
                first_look(self)
        return self.sample(index)

    def sample(self, index: int) -> Sample:
        """A sample, without a look at others."""
        paths = self.scenes[index]
        target = self.classes_of(paths[LABELS], read_label_values(paths[LABELS]).values)
        images = self.reader.read(paths, target.shape)
        return Sample(
            images,
            target,
            self.name(index),
            self.modalities,
            self.reader.kinds(),
            self.reader.absent(paths),
        )

    def classes_of(self, path: Path, values: NDArray[Any]) -> NDArray[np.uint8]:
        """The target that stored label values stand for.

        Raises:
            DataError: a value is no class.
        """
        return classes_of(
            path,
            values,
            self.num_classes,
            self.layout.label_offset,
            self.ignore_index,
            self.label_map,
            self.layout.ignore_index,
        )

    @cached_property
    def palette(self) -> NDArray[np.uint8] | None:
        """The classes' colors, ``[num_classes, 3]`` uint8, red first, where the first label map is a palette
        image that has one for each; None otherwise."""
        path, offset = self.scenes[0][LABELS], self.layout.label_offset
        if path.suffix.lower() not in _PALETTE_SUFFIXES or self.label_map:
            return None
        colors = read_label_values(path).palette
        if colors is None:
            return None
        colors = colors[offset : offset + self.num_classes]
        # Gray ramps are how some programs store gray, and padding has one color for all.
        told_apart = len(np.unique(colors, axis=0)) == self.num_classes and np.ptp(colors, axis=1).any()
        return colors if told_apart else None

    def name(self, index: int) -> str:
        """A sample's ``Sample.name``; no file is opened."""
        # The file's name alone is shared by scenes of several folders, as SUN RGB-D's label/label.npy is.
        path = os.path.relpath(self.scenes[index][LABELS], self.root / self.layout.folder(LABELS, self.split))
        return Path(path).with_suffix("").as_posix()

    def _label_map(self, merge: str | None) -> tuple[int, ...]:
        """Map the classes of the files to those of the samples."""
        if merge is None:
            if max(self.layout.label_map, default=-1) >= self.num_classes:
                raise DataError(
                    f"{self.root}: the layout's label_map gives class {max(self.layout.label_map)}, but"
                    f" num_classes={self.num_classes}"
                )
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
