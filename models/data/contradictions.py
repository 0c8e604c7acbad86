"""Contradictions of a data set to its layout, in words, for a warning before any work is done.

Files that are broken raise. What is whole may still be wrong: a depth scale, labels that count from another
number, a class that never appears.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from models.data.images import DataError
from models.data.layouts import LABELS, Layout
from models.data.survey import Scenes, Survey, Values, survey

_FIRST_SCENES = 8  # looked at with a set's first sample
_INDOORS = (0.3, 15.0)  # meters: where the median depth of rooms lies
_HIDDEN = 0.9  # a share of missing depth that leaves little to learn from
_FAR_AWAY = 2.0  # meters between two cameras of one rig
_NARROW = 0.1  # a share of 16 bits' range that is worth a range of its own
_ROTATED, _VALUES = 8, 50  # the greatest common divisor of so many values: SUN RGB-D's rotated bits


def first_look(dataset: Scenes) -> None:
    """Warn of what contradicts the layout in a few scenes; what is merely rare in so few is left out."""
    try:
        found = survey(dataset, _FIRST_SCENES, _FIRST_SCENES)
    except DataError:
        return  # an error of one scene is raised where that scene is read
    messages = contradictions(found, dataset.layout, dataset.guessed_kinds, thorough=False)
    for name, notes in found.resized.items():
        if dataset.layout.modality(name).size is None:
            messages.append(f"{found.split}: {next(iter(notes))}")
    for message in messages:
        warnings.warn(f"{dataset.root}, {message}", stacklevel=3)


def check(dataset: Scenes, found: Survey) -> list[str]:
    """List the warnings to give before a set is trained or evaluated on.

    Raises:
        DataError: nothing is labeled.
    """
    if found.label_maps and not found.classes.any():
        raise DataError(
            f"{dataset.root}: everything is void in the {found.label_maps} label maps of {dataset.split} that"
            f" were looked at (stored {_numbers(found.voids)}); check label_offset and ignore_index"
        )
    messages = contradictions(found, dataset.layout, dataset.guessed_kinds)
    labels = [scene[LABELS] for scene in dataset.scenes]
    if twice := len(labels) - len(set(labels)):
        messages.append(f"{dataset.split}: {twice} of the {len(labels)} scenes are listed more than once")
    return messages


def contradictions(
    found: Survey, layout: Layout, guessed_kinds: Sequence[str] = (), thorough: bool = True
) -> list[str]:
    """Describe what looks unlike the layout, each with its remedy.

    Args:
        found: the survey.
        layout: what should be there.
        guessed_kinds: modalities whose kind only the files have told.
        thorough: whether enough was looked at for any class that has not appeared to be worth a word.
    """
    messages = [*_of_labels(found, layout, thorough)]
    for name, values in found.values.items():
        messages += [f"{name}: {message}" for message in _of_values(layout, name, values)]
    messages += [*_of_views(found, layout)]
    for name in guessed_kinds:
        kind = layout.modality(name).kind
        messages.append(
            f"{name}: nobody says what it is; its files look like {kind} and are read so: give its kind in"
            " layout.json"
        )
    return [f"{found.split}: {message}" for message in messages]


def _of_labels(found: Survey, layout: Layout, thorough: bool) -> Iterable[str]:
    offset, missing = layout.label_offset, found.missing_classes()
    counted = int(found.classes.sum())
    if not found.label_maps:
        return
    where = f"the {found.label_maps} label maps looked at"
    if not counted:
        yield f"everything is void in {where}; check label_offset and ignore_index"
        return
    if found.void_share > 0.5:
        yield (
            f"{found.void_share:.0%} of the labels is void (stored {_numbers(found.voids)});"
            " if that is a class, check label_offset and ignore_index"
        )
    twice = [value for value in found.voids if offset <= value < offset + len(found.class_names)]
    if twice and not layout.label_map:
        yield (
            f"stored {_numbers(twice)} is a class, but void by ignore_index: no such pixel counts; give an"
            " ignore_index that is none"
        )
        swallowed = {found.class_names[value - offset] for value in twice}
        missing = [name for name in missing if name not in swallowed]
    beyond = any(value >= offset + len(found.class_names) for value in found.voids)
    if offset and beyond and found.voids[0] and not found.classes[-1]:
        yield (
            f"label_offset={offset} makes 0 void, but {max(found.voids)} stands for void as well: labels that"
            " count from 0 need label_offset=0"
        )
    if missing:
        hint = _of_missing_classes(found, offset)
        if thorough or (hint and found.label_maps == found.scenes):
            yield f"no pixel in {where} is of {_listed(missing)}{hint}"


def _of_missing_classes(found: Survey, offset: int) -> str:
    """A reason why classes may have no pixel, where the others suggest it."""
    present = np.flatnonzero(found.classes)
    if len(present) == 1 and found.voids[255]:
        return "; 255 is void: if it stands for a class, store that as the class's number"
    if not offset and present[0] > 0 and not found.void:
        return "; do the labels count from 1? Then give label_offset=1"
    if offset and present[-1] < len(found.classes) - 1 and found.voids[0]:
        return f"; label_offset={offset} makes 0 void: do the labels count from 0? Then give label_offset=0"
    return ""


def _of_values(layout: Layout, name: str, values: Values) -> Iterable[str]:
    """Describe what looks unlike the layout in the files of a modality."""
    kind = layout.modality(name).kind
    if len(values.kinds) > 1:
        counts = ", ".join(f"{stored} in {count}" for stored, count in values.kinds.items())
        yield f"its files differ in what they hold: {counts}"
    if not values.known:
        yield "every pixel looked at is missing"
        return
    if values.low == values.high:
        yield f"every pixel looked at is {values.low:g}"
    wide = any("16 bits" in stored for stored in values.kinds)
    if kind == "depth":
        if layout.depth_scale is None and wide:
            yield "16 bits in a layout without a scale: if metric, give depth_scale, stored units per meter"
        if values.meters:
            yield from _of_distances(layout, values)
    narrow = wide and layout.modality(name).range is None and values.high - values.low < _NARROW * 2**16
    if kind == "intensity" and narrow:
        yield (
            f"stored {values.low:g} to {values.high:g} becomes {values.low / 65535:.2f} to"
            f" {values.high / 65535:.2f}: give its range in layout.json"
        )
    if kind in ("depth", "disparity") and values.known < (1 - _HIDDEN) * values.pixels:
        yield f"{1 - values.known / values.pixels:.0%} of the pixels are missing"


def _of_views(found: Survey, layout: Layout) -> Iterable[str]:
    """Describe what looks wrong in the poses by which files come into the others' view."""
    for name, (known, pixels) in found.registered.items():
        away = math.hypot(*layout.modality(name).pose[3::4])
        if away > _FAR_AWAY:
            yield (
                f"{name}: its pose puts its camera {away:.3g} m away from that of the images: give the shift"
                " in meters in layout.json"
            )
        if known < (1 - _HIDDEN) * pixels:
            yield (
                f"{name}: once registered {1 - known / pixels:.0%} of the pixels are missing: does its pose"
                " map its camera's points to the other camera (X_ref = R X + t), and is each camera in pixels"
                " of its own files?"
            )


def _of_distances(layout: Layout, values: Values) -> Iterable[str]:
    low, median, high = values.distances()
    whole = all(float(value).is_integer() for value in values.stored)
    # Depth of 8 bits that was stretched to 16 has another step: 257, 256, ...
    rotated = whole and layout.bit_shift == 0 and len(values.stored) >= _VALUES
    rotated = rotated and np.gcd.reduce(np.array([int(value) for value in values.stored])) == _ROTATED
    if rotated:
        yield "all values are multiples of 8: SUN RGB-D's bits are rotated, and need bit_shift=3"
    if not _INDOORS[0] <= median <= _INDOORS[1] and all("floating" in kind for kind in values.kinds):
        yield (
            f"{low:.3g} to {high:.3g} m, the median {median:.3g} m, is unlike a room: floating point is read"
            " as meters, whatever depth_scale says; if it is not, divide it, or store integers"
        )
    elif not _INDOORS[0] <= median <= _INDOORS[1]:
        unit = (
            f"depth_scale={layout.depth_scale:g}"
            if isinstance(layout.depth_scale, int | float)
            else "depth_scale"
        )
        yield (
            f"{low:.3g} to {high:.3g} m, the median {median:.3g} m, is unlike a room: check {unit}"
            f" (stored units per meter) and bit_shift={layout.bit_shift}"
        )


def shared_scenes(train: Sequence[Path], val: Sequence[Path]) -> list[str]:
    """A warning where validation scenes are training scenes: files of one path, or else of the same bytes.

    Args:
        train, val: of every scene the file of one modality, the same for all.
    """
    paths = (train, val)
    seen = {path.resolve() for path in paths[0]}
    both = [path for path in paths[1] if path.resolve() in seen]
    if not both:
        sizes = [{path: path.stat().st_size for path in those} for those in paths]
        common = set(sizes[0].values()) & set(sizes[1].values())
        contents = {_digest(path) for path, size in sizes[0].items() if size in common}
        both = [path for path, size in sizes[1].items() if size in common and _digest(path) in contents]
    if not both:
        return []
    return [
        f"{len(both)} of the {len(val)} validation scenes are training scenes as well, such as {both[0]}:"
        " their scores say nothing of other images"
    ]


def _digest(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
