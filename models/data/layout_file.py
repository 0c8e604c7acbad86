"""The layout of a folder: the one named, that of its ``layout.json``, or the one it looks like."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.data.geometry import Camera
from models.data.images import DataError
from models.data.kinds import KINDS, SPELLINGS, Modality
from models.data.layouts import CAMERA, LABELS, LAYOUTS, SPLITS, Layout
from models.data.registration import is_rigid
from models.networks.messages import suggest

LAYOUT_FILE = "layout.json"

_LARGEST = 2**16 - 1  # the largest stored value


def has_own_layout(root: Path) -> bool:
    """Whether a folder describes itself, by a ``layout.json``."""
    return (root / LAYOUT_FILE).is_file()


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
    if has_own_layout(root):
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
        first = next((line.strip("\ufeff \n") for line in file if line.strip("\ufeff \n")), "")
    return not first or ("/" in first or "\\" in first) == (layout.lines != "name")


def _expectations() -> str:
    """The layouts, each with the folders and the list that tell it."""
    told = []
    for layout in LAYOUTS.values():
        wanted = [f"{layout.folder(kind, 'train')}/" for kind in ("rgb", LABELS)]
        wanted += [layout.list_file("train")] if layout.lists else []
        told.append(f"{layout.name} ({' '.join(dict.fromkeys(wanted))})")
    return ", ".join(told)


def read_layout(path: Path, labels: bool = True) -> Layout:
    """The layout that a ``layout.json`` describes: fields of ``Layout``, those of ``base`` where absent.

    Args:
        path: the file.
        labels: whether it must say where label maps are, which translation does without.

    Raises:
        DataError: the file cannot be read, or a field is unknown, missing, of the wrong type or out of range;
            a path cannot be filled in.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected an object of fields such as files and lists")
    base_name = found.pop("base", None)
    if base_name is not None and str(base_name) not in LAYOUTS:
        raise DataError(
            f"{path}: base is {base_name!r}; expected {', '.join(LAYOUTS)}{suggest(str(base_name), LAYOUTS)}"
        )
    for name in found:
        if name not in _FIELDS:
            expected = ", ".join(sorted(_FIELDS))
            raise DataError(
                f"{path}: unknown field {name!r}; expected {expected}, base{suggest(name, _FIELDS)}"
            )
    base = LAYOUTS[base_name] if base_name else Layout(path.parent.name, {})
    values = {name: _checked(path, name, value) for name, value in found.items()}
    # Whose files are others is no longer the archive whose images are larger than their labels.
    crop = base.crop_to_labels and "files" not in values
    layout = replace(base, **values, crop_to_labels=crop, stated=tuple(values))
    if not layout.files.keys() - {LABELS, CAMERA} or (labels and LABELS not in layout.files):
        wanted = "labels and of " if labels else ""
        raise DataError(f"{path}: files must give the paths of {wanted}every modality")
    _check_template(path, "lists", layout.lists, ("split", "file"))
    for kind, template in layout.files.items():
        beside = ("rgb",) if kind != "rgb" and "rgb" in layout.files else ()
        _check_template(path, f"files of {kind}", template, ("name", "number", "split", *beside))
    first, template = next(iter(layout.files.items()))
    if not layout.lists and "{name}" not in template and "{number" not in template:
        raise DataError(
            f"{path}: files of {first} is {template!r}; expected {{name}} in it, as there are no lists"
        )
    for name in ("ranges", "modalities"):
        for kind in getattr(layout, name):
            if kind not in layout.files or kind in (LABELS, CAMERA):
                raise DataError(
                    f"{path}: {name} of {kind!r}; expected those of {', '.join(layout.files)}"
                    f"{suggest(kind, layout.files)}"
                )
    for name, told in layout.modalities.items():
        if problem := _problem_of_view(layout, name, told):
            raise DataError(f"{path}: {problem}")
    for name, told in layout.modalities.items():
        own_kind = layout.modality(name).kind
        if told.range is not None and own_kind not in (None, "intensity", "categorical"):
            raise DataError(
                f"{path}: range of {name} is for intensity and categorical ones, but its kind is {own_kind}"
            )
    return layout


def _checked(path: Path, name: str, value: Any) -> Any:
    """A field's value as ``Layout`` has it."""
    valid, expected = _FIELDS[name]
    if not valid(value):
        raise DataError(f"{path}: {name} is {value!r}; expected {expected}")
    if name == "camera":
        return _camera(value)
    if name == "ranges":
        return {kind: tuple(limits) for kind, limits in value.items()}
    if name == "modalities":
        return {modality: _modality(path, modality, told) for modality, told in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _camera(value: Sequence[float] | None) -> Camera | None:
    if value is None:
        return None
    fx, fy, cx, cy, *size = value
    width_height = (int(size[0]), int(size[1])) if size else None
    return Camera(float(fx), float(fy), float(cx), float(cy), width_height)


def _modality(path: Path, name: str, told: Mapping[str, Any]) -> Modality:
    """Read one modality's entry of ``layout.json``."""
    for part, value in told.items():
        if part not in _MODALITY_FIELDS:
            raise DataError(
                f"{path}: unknown field {part!r} of the modality {name}; expected"
                f" {', '.join(_MODALITY_FIELDS)}{suggest(part, _MODALITY_FIELDS)}"
            )
        valid, expected = _MODALITY_FIELDS[part]
        if not valid(value):
            near = suggest(value, KINDS) if part == "kind" and isinstance(value, str) else ""
            raise DataError(f"{path}: {part} of {name} is {value!r}; expected {expected}{near}")
    limits, missing = told.get("range"), told.get("missing", [])
    values = missing if isinstance(missing, list) else [missing]
    return Modality(
        kind=None if told.get("kind") is None else SPELLINGS.get(told["kind"], told["kind"]),
        missing=tuple(value for value in values if _is_finite(value)),  # others are missing in any case
        range=None if limits is None else (limits[0], limits[1]),
        channels=tuple(told.get("channels", ())),
        size=told.get("size"),
        camera=_camera(told.get("camera")),
        pose=tuple(float(value) for row in told.get("pose") or () for value in row),
        registered_with=told.get("registered_with"),
    )


def _problem_of_view(layout: Layout, name: str, told: Modality) -> str:
    """What is wrong in what a modality's entry says of its camera, size and sensor; empty for nothing."""
    kind, other = layout.modality(name).kind, told.registered_with
    if told.camera is not None and not told.pose:
        return (
            f"camera of {name} needs its pose beside it: three rows of R and t with X_ref = R X + t in meters"
            " ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]] where both cameras are in one place)"
        )
    if told.pose:
        if told.camera is None:
            return f"pose of {name} needs its camera beside it: fx, fy, cx, cy in pixels of its files"
        if kind != "depth":
            return (
                f"pose of {name} is for depth, but its kind is {kind}: what comes with depth from one sensor"
                ' says "registered_with" and that depth\'s name'
            )
        if not is_rigid(told.pose):
            return (
                f"pose of {name} is no rotation and shift: the first three columns must be orthonormal to"
                " 0.001, of determinant 1"
            )
    if told.size is not None and layout.registered(name) is not None:
        return f"size of {name} is that of the images it is registered to, given its pose: leave size out"
    if other is None:
        return ""
    if told.pose:
        return f"registered_with of {name} is {other!r}, but it has a pose of its own: leave one of them out"
    if not layout.modality(other).pose:
        posed = [each for each in layout.modalities if layout.modality(each).pose]
        return (
            f"registered_with of {name} is {other!r}; expected depth with a camera and a pose"
            f"{' such as ' + ', '.join(posed) if posed else ''}{suggest(other, posed)}"
        )
    if kind not in (None, "color", "intensity", "categorical"):
        return (
            f"registered_with of {name} is for color, intensity and categorical ones, but its kind is {kind}"
            + ("; give it a camera and a pose" if kind == "depth" else ": have it computed of the depth")
        )
    return ""


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
_is_pose = _list_of(_list_of(_is_finite, 4), 3)


def _is_camera(value: Any) -> bool:
    """Four numbers, and the width and height of the images that they are for, if told."""
    return (
        (_list_of(_is_finite, 4)(value) or _list_of(_is_finite, 6)(value))
        and min(value[:2]) > 0
        and all(_is_int(side, 1) for side in value[4:])
    )


def _is_missing(value: Any) -> bool:
    """A stored value that is none: NaN and infinity are, whether JSON's or as text."""
    not_finite = isinstance(value, float) or str(value).lower() in ("nan", "inf", "-inf")
    return _is_finite(value) or not_finite


_CAMERA = "fx, fy, cx, cy in pixels, after them width and height of the images if known, or null"

# The check of each field of a modality in layout.json, and the check in words.
_MODALITY_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (
        lambda value: value is None or (isinstance(value, str) and (value in KINDS or value in SPELLINGS)),
        f"one of {', '.join(KINDS)}",
    ),
    "missing": (
        lambda value: all(map(_is_missing, value)) if isinstance(value, list) else _is_missing(value),
        "a stored value, NaN, or a list of them",
    ),
    "range": (
        lambda value: value is None or (_is_pair(value) and value[0] != value[1]),
        "two different numbers, the stored values that become 0 and 1",
    ),
    "channels": (
        lambda value: (
            isinstance(value, list) and len(value) > 0 and all(_is_int(each, 0, _LARGEST) for each in value)
        ),
        "a list of the file's channels, counted from 0",
    ),
    "size": (
        lambda value: value is None or value in ("any", "same"),
        "any, to be resized whatever size it has, or same, to be refused if it is another",
    ),
    "camera": (lambda value: value is None or _is_camera(value), _CAMERA),
    "pose": (
        lambda value: value is None or _is_pose(value),
        "three rows of four numbers, of a rotation and of a shift in meters",
    ),
    "registered_with": (lambda value: value is None or _is_text(value), "the name of a modality"),
}

# The check of each field of layout.json, and the check in words.
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
        "stored units per meter, more than 0, or null",
    ),
    "bit_shift": (lambda value: _is_int(value, 0, 15), "an integer from 0 to 15"),
    "modalities": (
        _dict_of(lambda value: isinstance(value, dict)),
        "an object of kind, missing, range and channels by modality, or of size, camera, pose and"
        " registered_with",
    ),
    "ranges": (
        _dict_of(lambda value: _is_pair(value) and value[0] != value[1]),
        "two different numbers by modality",
    ),
    "camera": (lambda value: value is None or _is_camera(value), _CAMERA),
}
