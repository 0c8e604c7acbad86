"""Layouts of data sets on disk: which files make up a sample, what is stored in them, how a folder is told.

A layout is a description, not a loader. People's own folders are described in the same terms by a file
``layout.json`` in the data set's root; see README.md in this folder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from models.data.classes import CITYSCAPES, CITYSCAPES_IDS, NYU40, SUN37
from models.data.geometry import Camera
from models.data.images import DataError
from models.messages import suggest

LAYOUT_FILE = "layout.json"
SPLITS = ("train", "val")
LABELS, CAMERA = "labels", "camera"

_LARGEST = 2**16 - 1  # of stored values
_TEST = ("train", "test")  # where validation is on what is called the test set

# Of the colour camera that NYUDv2's depth is projected to (camera_params.m of its toolbox, which counts
# pixels from 1).
KINECT = Camera(518.85790, 519.46961, 324.58245, 252.73617, (640, 480))


@dataclass(frozen=True)
class Layout:
    """What a folder holds.

    Paths are relative to the root. In them ``{name}`` is the sample's name, ``{split}`` the split's in this
    layout, ``{number}`` the name as a number to which ``label_shift`` is added in those of labels (with a
    format: ``{number:06d}``), and an ending ``.*`` any suffix.

    Attributes:
        name: of the layout.
        files: the path of every kind of file: of modalities (``rgb depth disparity hha normals``, or any
            name), of ``labels``, and of ``camera`` where every picture has its own.
        lists: path of a split's list; with ``{file}`` there is one for every kind of file. Empty: a split
            has a sample for every file of the first kind.
        lines: what a list's line holds: ``paths`` of all kinds, told apart by their folders; a ``path``, of
            which the file's name without suffix counts; or the ``name``.
        splits: what the layout calls ``train`` and ``val``.
        label_offset: what stored labels add to the class; those below it are void.
        ignore_index: stored value of void pixels.
        label_map: the class of each stored one, in place of itself; -1 is void.
        label_shift: what the number of a split's labels adds to its images'.
        classes: their names, if they are fixed.
        depth_scale: stored units a metre; None: brightness without a metric scale.
        bit_shift: by how many bits stored depth is rotated to the right before it is scaled.
        ranges: by modality the two stored values that become 0 and 1, of single-channel pictures other than
            depth; without them 0 and the largest value that can be stored do.
        camera: of the depth; None: unknown.
    """

    name: str
    files: Mapping[str, str]
    lists: str = "{split}.txt"
    lines: Literal["paths", "path", "name"] = "name"
    splits: tuple[str, str] = SPLITS
    label_offset: int = 0
    ignore_index: int = 255
    label_map: tuple[int, ...] = ()
    label_shift: Mapping[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    depth_scale: float | None = 5000.0
    bit_shift: int = 0
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    camera: Camera | None = None

    def split(self, name: str) -> str:
        """What the layout calls ``train`` or ``val``; other names are its own."""
        return dict(zip(SPLITS, self.splits, strict=True)).get(name, name)

    def folder(self, kind: str, split: str) -> str:
        """The part of a kind's path that all samples of a split share."""
        shared = re.split(r"\{(?:name|number|rgb)", self.files[kind])[0].rpartition("/")[0]
        return shared.format(split=self.split(split))

    def list_file(self, split: str, kind: str = LABELS) -> str:
        """The path of a split's list; empty where there is none."""
        return self.lists.format(split=self.split(split), file={LABELS: "label"}.get(kind, kind))


def _layouts(*layouts: Layout) -> dict[str, Layout]:
    return {layout.name: layout for layout in layouts}


LAYOUTS = _layouts(
    Layout(
        "nyu_cen",
        {"rgb": "rgb/{name}.*", LABELS: "masks/{name}.*", "depth": "depth/{name}.*"},
        lines="paths",
        camera=KINECT,
    ),
    Layout(
        "nyu_lwrf",
        {"rgb": "{split}_images/{name}.*", LABELS: "{split}_labels/{name}.*"},
        lists="{split}.nyu",
        lines="paths",
    ),
    Layout(
        "nyu_rgbx",
        {
            "rgb": "RGB/{name}.*",
            "hha": "HHA/{name}.*",
            "depth": "Depth/{name}.*",
            LABELS: "Label/{name}.*",
        },
        splits=_TEST,
        label_offset=1,
        depth_scale=None,
        camera=KINECT,
    ),
    Layout(
        "nyu_dformer",
        {"rgb": "RGB/{name}.*", "depth": "Depth/{name}.*", LABELS: "Label/{name}.*"},
        lines="path",
        splits=_TEST,
        label_offset=1,
        depth_scale=None,
        camera=KINECT,
    ),
    Layout(
        "sun_dformer",
        {"rgb": "RGB/{name}.*", "depth": "Depth/{name}.*", LABELS: "labels/{name}.*"},
        lines="path",
        splits=_TEST,
        label_offset=1,
        classes=SUN37,
        depth_scale=None,
    ),
    Layout(
        "nyu_esanet",
        {
            "rgb": "{split}/rgb/{name}.*",
            "depth": "{split}/depth/{name}.*",
            "depth_raw": "{split}/depth_raw/{name}.*",
            LABELS: "{split}/labels_40/{name}.*",
        },
        splits=_TEST,
        label_offset=1,
        classes=NYU40,
        depth_scale=1000.0,
        camera=KINECT,
    ),
    Layout(
        "sun_handa",
        {
            "rgb": "SUNRGBD-{split}_images/img-{number:06d}.*",
            "depth": "sunrgbd_{split}_depth/{number}.*",
            LABELS: "sunrgbd_train_test_labels/img-{number:06d}.*",
        },
        lists="",
        splits=_TEST,
        label_offset=1,
        label_shift={"train": 5050},
        classes=SUN37,
        depth_scale=10000.0,
    ),
    Layout(
        "sun_original",
        {
            "rgb": "SUNRGBD/{name}",
            "depth": "SUNRGBD/{name}",
            LABELS: "SUNRGBD/{name}",
            CAMERA: "{rgb}/../../intrinsics.txt",
        },
        lists="{split}_{file}.txt",
        splits=_TEST,
        label_offset=1,
        classes=SUN37,
        depth_scale=1000.0,
        bit_shift=3,
    ),
    Layout(
        "cityscapes",
        {
            "rgb": "leftImg8bit/{split}/{name}_leftImg8bit.png",
            "disparity": "disparity/{split}/{name}_disparity.png",
            LABELS: "gtFine/{split}/{name}_gtFine_labelIds.png",
            CAMERA: "camera/{split}/{name}_camera.json",
        },
        lists="",
        label_map=CITYSCAPES_IDS,
        classes=CITYSCAPES,
    ),
)


def find_layout(root: Path, name: str | None = None) -> Layout:
    """The layout of a folder: the one named, else that of its ``layout.json``, else the one it looks like.

    Raises:
        ValueError: there is no such layout.
        DataError: there is no such folder, ``layout.json`` is wrong, or the folder looks like no layout or
            like several.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected a data set's root")
    if name is not None:
        if name not in LAYOUTS:
            raise ValueError(
                f"unknown layout {name!r}: expected {', '.join(LAYOUTS)}{suggest(name, LAYOUTS)}"
            )
        return LAYOUTS[name]
    if (root / LAYOUT_FILE).is_file():
        return read_layout(root / LAYOUT_FILE)
    found = [layout for layout in LAYOUTS.values() if looks_like(root, layout)]
    if len(found) != 1:
        what = ", ".join(layout.name for layout in found) or "none"
        raise DataError(
            f"{root}: which layout is it? It looks like {what} of {_expectations()};"
            f" name one with data.layout, or describe the folder in {LAYOUT_FILE}"
        )
    return found[0]


def looks_like(root: Path, layout: Layout) -> bool:
    """Whether either split has its folders of images and labels and, if a list at all, one of the kind."""
    return any(_has_split(root, layout, split) for split in SPLITS)


def _has_split(root: Path, layout: Layout, split: str) -> bool:
    if not all((root / layout.folder(kind, split)).is_dir() for kind in ("rgb", LABELS)):
        return False
    path = root / layout.list_file(split)
    if not layout.lists or "{file}" in layout.lists or not path.is_file():
        return True
    with path.open(encoding="utf-8", errors="replace") as file:
        first = next((line.strip() for line in file if line.strip()), "")
    return not first or ("/" in first) == (layout.lines != "name")


def _expectations() -> str:
    """The layouts, each with the folders and the list that tell it."""
    told = []
    for layout in LAYOUTS.values():
        wanted = [f"{layout.folder(kind, 'train')}/" for kind in ("rgb", LABELS)]
        wanted += [layout.list_file("train")] if layout.lists else []
        told.append(f"{layout.name} ({' '.join(dict.fromkeys(wanted))})")
    return ", ".join(told)


def read_layout(path: Path) -> Layout:
    """The layout that a ``layout.json`` describes: fields of ``Layout``, those of ``base`` where absent.

    Raises:
        DataError: the file cannot be read, or a field is unknown, missing, of the wrong type or out of range;
            a path cannot be filled in.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected an object of fields such as files and lists")
    base_name = found.pop("base", None)
    if base_name is not None and str(base_name) not in LAYOUTS:
        raise DataError(
            f"{path}: base is {base_name!r}; expected {', '.join(LAYOUTS)}{suggest(str(base_name), LAYOUTS)}"
        )
    known = {part.name for part in fields(Layout)}
    for name in found:
        if name not in known:
            raise DataError(f"{path}: unknown field {name!r}; expected {', '.join(sorted(known))}, base")
    base = LAYOUTS[base_name] if base_name else Layout(path.parent.name, {})
    layout = replace(base, **{name: _checked(path, name, value) for name, value in found.items()})
    if LABELS not in layout.files or len(layout.files) < 2:
        raise DataError(f"{path}: files must give the paths of labels and of every modality")
    _check_template(path, "lists", layout.lists, ("split", "file"))
    for kind, template in layout.files.items():
        beside = ("rgb",) if kind != "rgb" and "rgb" in layout.files else ()
        _check_template(path, f"files of {kind}", template, ("name", "number", "split", *beside))
    first, template = next(iter(layout.files.items()))
    if not layout.lists and "{name}" not in template and "{number" not in template:
        raise DataError(
            f"{path}: files of {first} is {template!r}; expected {{name}} in it, as there are no lists"
        )
    for kind in layout.ranges:
        if kind not in layout.files:
            raise DataError(
                f"{path}: ranges of {kind!r}; expected those of {', '.join(layout.files)}"
                f"{suggest(kind, layout.files)}"
            )
    return layout


def _checked(path: Path, name: str, value: Any) -> Any:
    """A field's value as ``Layout`` has it."""
    valid, expected = _FIELDS[name]
    if not valid(value):
        raise DataError(f"{path}: {name} is {value!r}; expected {expected}")
    if name == "camera":
        return None if value is None else Camera(*map(float, value))
    if name == "ranges":
        return {kind: tuple(limits) for kind, limits in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _check_template(path: Path, what: str, template: str, names: Sequence[str]) -> None:
    """Raise unless ``{name}`` and the like are all that is to be filled in."""
    try:
        template.format(**{name: 0 if name == "number" else "0" for name in names})
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        known = ", ".join(f"{{{name}}}" for name in names)
        problem = f"{error} is unknown" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: {what} is {template!r} ({problem}); expected a path with {known}") from None


def _is_int(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(valid: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list) and (length is None or len(value) == length) and all(map(valid, value))
    )


def _dict_of(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(valid, value.values()))


_is_pair = _list_of(_is_finite, 2)
_is_four = _list_of(_is_finite, 4)

# By field of layout.json, what its value must satisfy, and that in words.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_text, "a text"),
    "files": (_dict_of(_is_text), "a path for every kind of file"),
    "lists": (_is_text, "a path, or nothing"),
    "lines": (lambda value: value in ("paths", "path", "name"), "paths, path or name"),
    "splits": (_list_of(_is_text, 2), "two names, of the training and validation list"),
    "label_offset": (lambda value: _is_int(value, 0, _LARGEST), f"an integer from 0 to {_LARGEST}"),
    "ignore_index": (lambda value: _is_int(value, 0, _LARGEST), f"an integer from 0 to {_LARGEST}"),
    "label_map": (_list_of(lambda value: _is_int(value, -1, 254)), "a list of classes, -1 for void"),
    "label_shift": (_dict_of(_is_int), "an integer by split"),
    "classes": (_list_of(_is_text), "a list of names"),
    "depth_scale": (
        lambda value: value is None or (_is_finite(value) and value > 0),
        "stored units a metre, more than 0, or null",
    ),
    "bit_shift": (lambda value: _is_int(value, 0, 15), "an integer from 0 to 15"),
    "ranges": (
        _dict_of(lambda value: _is_pair(value) and value[0] != value[1]),
        "two different numbers by modality",
    ),
    "camera": (
        lambda value: value is None or (_is_four(value) and min(value[:2]) > 0),
        "fx, fy, cx, cy in pixels, or null",
    ),
}
