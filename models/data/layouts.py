"""Data sets on disk: which files make up a sample, and whether they fit together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.data.classes import NAMES_FILE, class_names
from models.data.images import DataError, read_depth, read_labels, read_rgb, size_of
from models.messages import suggest

MODALITIES = ("rgb", "depth")
_LABELS = "masks"


class Sample(NamedTuple):
    """One scene: a picture a modality, all of one size, and its labels."""

    images: tuple[NDArray[np.float32], ...]  # M times [H, W, C]; C differs between modalities
    target: NDArray[np.uint8]  # [H, W], classes and ignore_index
    name: str  # stem of the label file
    modalities: tuple[str, ...]  # the names of the images


class NyuCen:
    """The layout of the paper's NYUDv2 archive: ``rgb/``, ``masks/``, ``depth/``, ``train.txt``, ``val.txt``.

    A list gives one sample a line, the paths relative to the root and separated by tabs or spaces:
    ``rgb/000003.png masks/000003.png depth/000003.png``. Columns are told apart by their folder's name, so
    their order is free and further columns are allowed; any suffix that OpenCV reads is. Every file is looked
    for (not opened) when the data set is made, so that a missing one stops a training before it starts.

    Inputs larger than the labels are cropped around the centre, as the archive wants it.

    Args:
        root: folder of the lists.
        split: name of the list without ``.txt``.
        modalities: any of ``MODALITIES`` in the order in which samples give them.
        num_classes: labels are ``0 .. num_classes-1``. The file ``classes.txt`` in the root, if there is one,
            names them a line each.
        depth_scale: stored units of depth in one metre.
        label_offset: what the label files add to the class; values below it are void.
        ignore_index: value of void pixels, stored and in ``Sample.target``; 0 to 255.

    Raises:
        DataError: a list or file is missing, a line is malformed; from ``dataset[i]``: a file is broken, has
            the wrong size, bit depth or channel count, or holds a label out of range.
        ValueError: an argument is out of range, a modality unknown.
    """

    def __init__(
        self,
        root: Path | str,
        split: str,
        *,
        modalities: Sequence[str] = MODALITIES,
        num_classes: int = 40,
        depth_scale: float = 5000.0,
        label_offset: int = 0,
        ignore_index: int = 255,
    ) -> None:
        self.root, self.split, self.modalities = Path(root), split, tuple(modalities)
        self.num_classes, self.depth_scale = num_classes, depth_scale
        self.label_offset, self.ignore_index = label_offset, ignore_index
        self._check_arguments()
        self.class_names = class_names(self.root, num_classes)
        self._entries = self._read_list(self._list_path())
        self._check_files()

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        *paths, label_path = (self.root / path for path in self._entries[index])
        target = read_labels(label_path, self.num_classes, self.label_offset, self.ignore_index)
        images = [
            read_rgb(path) if modality == "rgb" else read_depth(path, self.depth_scale)
            for modality, path in zip(self.modalities, paths, strict=True)
        ]
        for image, path in zip(images, paths, strict=True):
            if image.shape[:2] != images[0].shape[:2]:
                raise DataError(f"{path} is {size_of(image)}, but {paths[0]} is {size_of(images[0])}")
            if image.shape[0] < target.shape[0] or image.shape[1] < target.shape[1]:
                raise DataError(
                    f"{path} is {size_of(image)}, smaller than its labels {label_path} of {size_of(target)}"
                )
        cropped = tuple(_centre(image, target.shape) for image in images)
        return Sample(cropped, target, label_path.stem, self.modalities)

    def _check_arguments(self) -> None:
        for modality in self.modalities:
            if modality not in MODALITIES:
                raise ValueError(
                    f"unknown modality {modality!r}: expected {', '.join(MODALITIES)}"
                    + suggest(modality, MODALITIES)
                )
        if not self.modalities:
            raise ValueError(f"modalities is empty: expected some of {', '.join(MODALITIES)}")
        if not 1 <= self.num_classes <= 255:
            raise ValueError(f"num_classes must be 1 to 255, got {self.num_classes}")
        if not self.depth_scale > 0:
            raise ValueError(f"depth_scale must be positive, got {self.depth_scale}")
        if self.label_offset < 0:
            raise ValueError(f"label_offset must not be negative, got {self.label_offset}")
        if not 0 <= self.ignore_index <= 255:
            raise ValueError(f"ignore_index must be 0 to 255, got {self.ignore_index}")

    def _list_path(self) -> Path:
        if not self.root.is_dir():
            raise DataError(
                f"{self.root}: no such folder; expected the data set's root with {self.split}.txt in it"
            )
        path = self.root / f"{self.split}.txt"
        if not path.is_file():
            found = sorted(other.stem for other in self.root.glob("*.txt") if other.name != NAMES_FILE)
            there = f"the lists there: {', '.join(found)}" if found else "the folder holds no list at all"
            raise DataError(f"{path}: no such list; {there}" + suggest(self.split, found))
        return path

    def _read_list(self, path: Path) -> list[tuple[str, ...]]:
        """For each line the paths of the modalities and, last, of the labels."""
        wanted, entries = (*self.modalities, _LABELS), []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            columns = line.strip().split("\t" if "\t" in line else None)
            if columns in ([], [""]):
                continue
            folders = {Path(column).parent.name: column for column in columns}
            if len(folders) < len(columns) or not folders.keys() >= set(wanted):
                raise DataError(
                    f"{path}, line {number}: expected one path in each folder, such as"
                    f" {' '.join(f'{folder}/000003.png' for folder in wanted)}, found {line.strip()!r}"
                )
            entries.append(tuple(folders[folder] for folder in wanted))
        if not entries:
            raise DataError(f"{path}: the list is empty")
        return entries

    def _check_files(self) -> None:
        missing = [path for entry in self._entries for path in entry if not (self.root / path).is_file()]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DataError(
                f"{self.root / missing[0]}: listed in {self.split}.txt, but there is no such file{more}"
            )


def _centre(image: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    """The middle ``[height, width]`` of an image."""
    top, left = ((have - want) // 2 for have, want in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]]
