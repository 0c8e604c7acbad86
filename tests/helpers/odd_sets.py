"""Data sets with one oddity each: ``python -m tests.helpers.odd_sets FOLDER`` writes them all.

Every set is that of ``sound`` with one change; ``ODD_SETS`` says what of it must be told, and in which words.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

SIZE = (24, 32)
SCENES = {"train": ("t0", "t1", "t2", "t3"), "val": ("v0", "v1")}
CLASSES = 3


class OddSet(NamedTuple):
    """An oddity of a data set, and what comes of it.

    Attributes:
        change: makes the sound set in a folder odd.
        words: a regular expression that the warning or error must match.
        refused: whether it is an error; else a warning.
        in_one_set: whether it shows in the training split alone, as ``SegmentationSet`` looks at it.
        num_classes, modalities: that it is opened with.
    """

    change: Callable[[Path], None]
    words: str
    refused: bool = False
    in_one_set: bool = True
    num_classes: int = CLASSES
    modalities: tuple[str, ...] = ("rgb", "depth")


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, image)
    else:
        assert cv2.imwrite(str(path), image)


def names() -> list[str]:
    return [name for those in SCENES.values() for name in those]


def rgb_of(name: str) -> np.ndarray:
    rng = np.random.default_rng(names().index(name))
    soft = rng.integers(0, 256, (4, 5, 3), np.uint8)
    return cv2.resize(soft, SIZE[::-1], interpolation=cv2.INTER_LINEAR)


def millimetres_of(name: str) -> np.ndarray:
    """A slanted floor, 1.0 to about 3.5 m, with a hole."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    depth = 1000 + 71 * rows + 23 * columns + 10 * names().index(name)
    depth[:3, :4] = 0
    return depth.astype(np.uint16)


def classes_of(name: str) -> np.ndarray:
    """Blocks of every class, a corner of void."""
    rng = np.random.default_rng((1, names().index(name)))
    blocks = rng.permutation(np.arange(12) % CLASSES).reshape(3, 4)
    labels = np.kron(blocks, np.ones((8, 8), int)).astype(np.uint8)
    labels[:2, :2] = 255
    return labels


def describe(root: Path, **fields: Any) -> None:
    """``layout.json`` with these fields in place of what it has; None takes one out."""
    path = root / "layout.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    found |= fields
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}, indent=1))


def sound(root: Path) -> Path:
    """Six scenes of color, depth and labels in millimetres and classes, nothing to be said of them."""
    root.mkdir(parents=True, exist_ok=True)
    kinds = ("rgb", "depth", "labels")
    describe(
        root,
        files={kind: f"{kind}/{{name}}.*" for kind in kinds},
        lists="{split}.txt",
        depth_scale=1000,
        camera=[30, 30, 15.5, 11.5],
    )
    for split, those in SCENES.items():
        (root / f"{split}.txt").write_text("".join(f"{name}\n" for name in those))
    for name in names():
        write(root / f"rgb/{name}.png", rgb_of(name))
        write(root / f"depth/{name}.png", millimetres_of(name))
        write(root / f"labels/{name}.png", classes_of(name))
    return root


def _labels(make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for name in names():
            write(root / f"labels/{name}.png", make(classes_of(name)))

    return change


def _depth(
    make: Callable[[np.ndarray], np.ndarray], suffix: str = ".png", **fields: Any
) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        describe(root, **fields)
        for name in names():
            (root / f"depth/{name}.png").unlink()
            write(root / f"depth/{name}{suffix}", make(millimetres_of(name)))

    return change


def _fields(**fields: Any) -> Callable[[Path], None]:
    return lambda root: describe(root, **fields)


def _both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for each in changes:
            each(root)

    return change


def _thermal(told: dict[str, Any] | None, make: Callable[[str], np.ndarray]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        files = {kind: f"{kind}/{{name}}.*" for kind in ("rgb", "thermal", "labels")}
        describe(root, files=files, **({"modalities": {"thermal": told}} if told else {}))
        for name in names():
            write(root / f"thermal/{name}.png", make(name))

    return change


def _kelvin(name: str) -> np.ndarray:
    """Hundredths of a kelvin, as thermal cameras store them."""
    return (28000 + millimetres_of(name)).astype(np.uint16)


def _zeros_are_classes(labels: np.ndarray) -> np.ndarray:
    return np.where(labels == 255, 0, labels).astype(np.uint8)


def _val_is_train(root: Path) -> None:
    (root / "val.txt").write_text("t1\nv1\n")


def _val_copies_train(root: Path) -> None:
    for kind in ("rgb", "depth", "labels"):
        (root / kind / "v0.png").write_bytes((root / kind / "t1.png").read_bytes())


def _labels_of_another_size(root: Path) -> None:
    write(root / "labels/t0.png", np.kron(classes_of("t0"), np.ones((2, 2), np.uint8)))


def _jpeg_labels(root: Path) -> None:
    for name in names():
        (root / f"labels/{name}.png").unlink()
        write(root / f"labels/{name}.jpg", classes_of(name))


def _turned_photograph(root: Path) -> None:
    file, data = io.BytesIO(), Image.Exif()
    data[274] = 6
    Image.fromarray(rgb_of("t0")).save(file, "JPEG", exif=data)
    (root / "rgb/t0.png").unlink()
    (root / "rgb/t0.jpg").write_bytes(file.getvalue())


def _rotated(depth: np.ndarray) -> np.ndarray:
    """As SUN RGB-D stores millimetres: three bits to the left, the highest come in again at the right."""
    wide = depth.astype(np.uint32)
    return ((wide << 3 | wide >> 13) & 0xFFFF).astype(np.uint16)


def _mostly_void(labels: np.ndarray) -> np.ndarray:
    voids = np.full_like(labels, 255)
    voids[:, :12] = labels[:, :12]
    return voids


ODD_SETS: dict[str, OddSet] = {
    "masks_of_0_and_255": OddSet(
        _labels(lambda labels: np.where(labels == 1, 255, 0).astype(np.uint8)),
        r"no pixel .* is of class 1; 255 is void: if it stands for a class, store that",
        num_classes=2,
    ),
    "labels_from_one": OddSet(
        _labels(lambda labels: np.where(labels == 255, 0, labels + 1).astype(np.uint8)),
        r"labels/\w\d\.png: label 3 .* out of range.*count from 1.*label_offset=1",
        refused=True,
    ),
    "labels_from_one_with_a_class_to_spare": OddSet(
        _labels(lambda labels: np.where(labels == 255, 1, labels + 1).astype(np.uint8)),
        r"no pixel .* is of class 0; do the labels count from 1\? Then give label_offset=1",
        num_classes=CLASSES + 1,
    ),
    "labels_from_zero_where_the_layout_counts_from_one": OddSet(
        _both(_labels(_zeros_are_classes), _fields(label_offset=1)),
        r"no pixel .* is of class 2; label_offset=1 makes 0 void: .*Then give label_offset=0",
    ),
    "labels_from_zero_with_255_where_the_layout_counts_from_one": OddSet(
        _fields(label_offset=1),
        r"label_offset=1 makes 0 void, but 255 stands for void as well: .* label_offset=0",
    ),
    "no_depth_scale": OddSet(
        _fields(depth_scale=...),
        r"depth/\w\d\.png: depth_scale is not known: .*data\.depth_scale",
        refused=True,
    ),
    "sixteen_bits_of_depth_without_a_scale": OddSet(
        _fields(depth_scale=None), r"depth: 16 bits in a layout without a scale: .*give depth_scale"
    ),
    "millimetres_read_at_100000_a_metre": OddSet(
        _fields(depth_scale=100000), r"depth: .* m, the median 0\.0\d+ m, .*check depth_scale=100000"
    ),
    "metres_read_as_millimetres": OddSet(
        _depth(lambda depth: depth.astype(np.float32), ".npy"),
        r"depth: .* the median 2\S* m, is unlike a room: floating point .* whatever depth_scale says",
    ),
    "bits_rotated_as_in_sun_rgbd": OddSet(
        _depth(_rotated), r"depth: all values are multiples of 8: .* need bit_shift=3"
    ),
    "a_class_that_is_void": OddSet(_fields(ignore_index=1), r"stored 1 is a class, but void by ignore_index"),
    "a_label_map_beyond_the_classes": OddSet(
        _fields(label_map=[0, 7, 1]), r"label_map gives class 7, but num_classes=3", refused=True
    ),
    "everything_void": OddSet(
        _labels(lambda labels: np.full_like(labels, 255)),
        r"everything is void in the .* label maps.*check label_offset and ignore_index",
        refused=True,
    ),
    "more_than_half_void": OddSet(
        _labels(_mostly_void), r"6\d% of the labels is void \(stored 255\); .*label_offset and ignore_index"
    ),
    "validation_in_the_training_list": OddSet(
        _val_is_train,
        r"1 of the 2 validation scenes are training scenes as well, such as .*rgb/t1\.png",
        in_one_set=False,
    ),
    "validation_copied_from_training": OddSet(
        _val_copies_train,
        r"1 of the 2 validation scenes are training scenes as well, such as .*rgb/v0\.png",
        in_one_set=False,
    ),
    "thermal_without_a_kind": OddSet(
        _thermal(None, lambda name: _kelvin(name)),
        r"thermal: .*files look like intensity and are read so: give its kind in layout\.json",
        modalities=("rgb", "thermal"),
    ),
    "thermal_without_a_range": OddSet(
        _thermal({"kind": "intensity"}, lambda name: _kelvin(name)),
        r"thermal: stored 28\d+ to 3\d+ becomes 0\.4\d to 0\.4\d: give its range in layout\.json",
        modalities=("rgb", "thermal"),
    ),
    "thermal_in_two_bit_depths": OddSet(
        _thermal(
            {"kind": "intensity"},
            lambda name: (
                (millimetres_of(name) // 16).astype(np.uint8)
                if name in ("t2", "v1")
                else 16 * millimetres_of(name)
            ),
        ),
        r"thermal: its files differ in what they hold: (16 bits|8 bits) and 1 channel in \d, .* bits and 1",
        modalities=("rgb", "thermal"),
    ),
    "a_class_that_never_appears": OddSet(
        lambda root: (root / "classes.txt").write_text("soil\ncrop\nweed\nstone\n") and None,
        r"no pixel in the \d label maps looked at is of stone",
        in_one_set=False,
        num_classes=CLASSES + 1,
    ),
    "labels_of_another_size": OddSet(
        _labels_of_another_size,
        r"rgb/t0\.png is 32x24, but its labels .*labels/t0\.png are 64x48",
        refused=True,
    ),
    "labels_in_jpeg": OddSet(_jpeg_labels, r"labels/\w\d\.jpg: labels in JPEG", refused=True),
    "a_photograph_to_be_turned": OddSet(
        _turned_photograph, r"rgb/t0\.jpg: its EXIF data .*orientation 6", refused=True
    ),
    "depth_of_nothing": OddSet(_depth(np.zeros_like), r"depth: every pixel looked at is missing"),
    "depth_of_one_distance": OddSet(
        _depth(lambda depth: np.full_like(depth, 2000)), r"depth: every pixel looked at is 2000"
    ),
    "depth_mostly_holes": OddSet(
        _depth(lambda depth: np.where(np.arange(SIZE[1]) < 31, 0, depth).astype(np.uint16)),
        r"depth: 97% of the pixels are missing",
    ),
}


def make(name: str, root: Path) -> OddSet:
    """Write the set of a name to a folder."""
    odd = ODD_SETS[name]
    odd.change(sound(root))
    return odd


if __name__ == "__main__":
    for each in ODD_SETS:
        make(each, Path(sys.argv[1]) / each)
    sound(Path(sys.argv[1]) / "sound")
