"""What a data set holds, summed up from a sample of its scenes, and what of it contradicts its layout.

Files that are broken raise; what is whole but looks wrong (a depth scale, labels that count from another
number, a class that never appears) is put in words, for a warning before any work is done.
"""

from __future__ import annotations

import hashlib
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from models.data.images import DataError, kind_of, read_label_values, size_of
from models.data.layouts import CAMERA, LABELS

if TYPE_CHECKING:
    from models.data.dataset import SegmentationSet
    from models.data.layouts import Layout
    from models.data.modalities import File, Reader

SCENES = 50  # looked at as a whole
_LABEL_MAPS = 1000  # looked at while classes are missing
_FIRST_SCENES = 8  # looked at with a set's first sample
_INDOORS = (0.3, 15.0)  # metres: where the median depth of rooms lies
_HIDDEN = 0.9  # a share of missing depth that leaves little to learn from
_NARROW = 0.1  # a share of 16 bits' range that is worth a range of its own
_ROTATED, _VALUES = 8, 50  # the greatest common divisor of so many values: SUN RGB-D's rotated bits


class Overview(NamedTuple):
    """What is said of a data set before work starts: what it holds, and what of it looks wrong."""

    lines: list[str]
    warnings: list[str]

    def show(self, stream: TextIO | None = None) -> None:
        """Print the lines to a stream, or standard output; and the warnings where errors go."""
        print("\n".join(self.lines), file=stream, flush=True)
        for warning in self.warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)


@dataclass
class Values:
    """What the looked-at files of one modality hold.

    Attributes:
        kinds: how many files there are of each type and channel count, in words.
        sizes: how many of each size.
        low, high: the stored values' range.
        known, pixels: how many pixels are measured, of how many.
        metres: samples of measured depth; empty for what is not in metres.
        stored: a sample of distinct stored values.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    low: float = np.inf
    high: float = -np.inf
    known: int = 0
    pixels: int = 0
    metres: list[NDArray[np.float32]] = field(default_factory=list)
    stored: set[float] = field(default_factory=set)

    def add(self, file: File, is_depth: bool) -> None:
        """Count one file."""
        stored, image = file.stored, file.image
        known = image.any(axis=-1)
        self.kinds[kind_of(stored)] += 1
        self.sizes[size_of(stored)] += 1
        self.known += int(known.sum())
        self.pixels += known.size
        if known.any():
            values = stored[known]
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
            self.stored.update(np.unique(values[:: max(1, values.size // 1000)]).tolist())
            if is_depth and file.metric:
                self.metres.append(image[known][:, 0])

    def distances(self) -> tuple[float, float, float]:
        """The least, median and greatest measured distance in metres."""
        every = np.concatenate([metres[:: max(1, len(metres) // 5000)] for metres in self.metres])
        ends = min(m.min() for m in self.metres), max(m.max() for m in self.metres)
        return float(ends[0]), float(np.median(every)), float(ends[1])


@dataclass
class Survey:
    """What some scenes of a split hold.

    Attributes:
        split: its name.
        source: of the scenes: a list's name, or a folder.
        scenes, looked: how many there are, and how many were looked at.
        label_maps: how many label maps were looked at; more than scenes where classes are rare.
        classes: ``[K]`` pixels of every class.
        void: pixels without one.
        voids: the stored values that turned out void, and their pixels.
        values: by modality, of those that are files.
    """

    split: str
    source: str
    scenes: int
    class_names: tuple[str, ...] = ()
    looked: int = 0
    label_maps: int = 0
    void: int = 0
    voids: Counter[int] = field(default_factory=Counter)
    values: dict[str, Values] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.classes = np.zeros(len(self.class_names), np.int64)

    def add_labels(self, stored: NDArray[Any], target: NDArray[np.uint8], ignore_index: int) -> None:
        """Count a label map: as stored, and as classes."""
        counts = np.bincount(target.ravel(), minlength=256)
        if counts[ignore_index]:
            values, pixels = np.unique(stored[target == ignore_index], return_counts=True)
            self.voids.update(dict(zip(values.tolist(), pixels.tolist(), strict=True)))
        self.void += int(counts[ignore_index])
        counts[ignore_index] = 0
        self.classes += counts[: len(self.class_names)]
        self.label_maps += 1

    def add_file(self, name: str, file: File, is_depth: bool) -> None:
        """Count a file of a modality."""
        self.values.setdefault(name, Values()).add(file, is_depth)

    @property
    def void_share(self) -> float:
        return self.void / max(1, self.void + int(self.classes.sum()))

    def missing_classes(self) -> list[str]:
        """The names of the classes without a pixel."""
        return [name for name, count in zip(self.class_names, self.classes, strict=True) if not count]

    def lines(self) -> list[str]:
        """The survey in words, a few lines."""
        lines = [f"{self.split}: {self.source} lists {self.scenes}, {self.looked} of them looked at"]
        for name, values in self.values.items():
            parts = [" or ".join(values.kinds), " or ".join(_some(values.sizes))]
            if values.metres:
                low, median, high = values.distances()
                parts.append(f"{low:.2f} to {high:.2f} m, median {median:.2f} m")
            elif values.known:
                parts.append(f"stored {values.low:g} to {values.high:g}")
            parts.append(f"{1 - values.known / max(1, values.pixels):.1%} missing")
            lines.append(f"  {name}: {', '.join(parts)}")
        if not self.label_maps:
            return lines
        counted = int(self.classes.sum())
        void = f" ({' and '.join(map(str, sorted(self.voids)))} as stored)" if self.voids else ""
        shares = [
            f"{name} {count / max(1, counted):.2%}"
            for name, count in zip(self.class_names, self.classes, strict=True)
        ]
        text = (
            f"labels: {self.label_maps} maps looked at, void {self.void_share:.1%}{void}; of the rest"
            f" {', '.join(shares)}"
        )
        return lines + textwrap.wrap(text, 108, initial_indent="  ", subsequent_indent="    ")


def survey(dataset: SegmentationSet, scenes: int = SCENES, label_maps: int = _LABEL_MAPS) -> Survey:
    """Look at scenes spread evenly over a set, and at further label maps while a class has not appeared.

    The first scene is read as a whole, so that a camera or scale that is missing is refused at once; the set
    then looks at nothing more by itself.

    Args:
        dataset: the set.
        scenes, label_maps: how many at most.

    Raises:
        DataError: a file is broken or not what the layout says.
    """
    dataset.surveyed = True
    reader = dataset.reader
    found = Survey(dataset.split, dataset.source, len(dataset), dataset.class_names)
    if len(dataset) == 0:
        return found
    dataset.sample(0)
    chosen = spread(len(dataset), scenes)
    add_files(found, reader, dataset.scenes, chosen)
    for index in chosen:
        _add_labels(found, dataset, index)
    for index in sorted(set(spread(len(dataset), label_maps)) - set(chosen)):
        if not found.missing_classes():
            break
        _add_labels(found, dataset, index)
    return found


def add_files(
    found: Survey, reader: Reader, scenes: Sequence[Mapping[str, Path]], chosen: Sequence[int]
) -> None:
    """Count the files of some scenes.

    Raises:
        DataError: one is broken or not what the layout says.
    """
    names = [name for name in reader.files() if name != CAMERA]
    for index in chosen:
        for name in names:
            file = reader.read_file(name, scenes[index][name])
            found.add_file(name, file, reader.layout.modality(name).kind == "depth")
    found.looked = len(chosen)


def _add_labels(found: Survey, dataset: SegmentationSet, index: int) -> None:
    path = dataset.scenes[index][LABELS]
    stored = read_label_values(path).values
    found.add_labels(stored, dataset.classes_of(path, stored), dataset.ignore_index)


def first_look(dataset: SegmentationSet) -> None:
    """Warn of what contradicts the layout in a few scenes; what is merely rare in so few is left out."""
    try:
        found = survey(dataset, _FIRST_SCENES, _FIRST_SCENES)
    except DataError:
        return  # of one of the scenes, and said where that one is asked for
    for message in contradictions(found, dataset.layout, dataset.guessed_kinds, thorough=False):
        warnings.warn(f"{dataset.root}, {message}", stacklevel=3)


def check(dataset: SegmentationSet, found: Survey) -> list[str]:
    """What is to be warned of before a set is trained or evaluated on.

    Raises:
        DataError: nothing is labeled.
    """
    if found.label_maps and not found.classes.any():
        raise DataError(
            f"{dataset.root}: everything is void in the {found.label_maps} label maps of {dataset.split} that"
            f" were looked at (stored {_numbers(found.voids)}); check label_offset and ignore_index"
        )
    return contradictions(found, dataset.layout, dataset.guessed_kinds)


def contradictions(
    found: Survey, layout: Layout, guessed_kinds: Sequence[str] = (), thorough: bool = True
) -> list[str]:
    """In words, each with its remedy, what looks unlike the layout.

    Args:
        found: the survey.
        layout: what should be there.
        guessed_kinds: modalities whose kind only the files have told.
        thorough: whether enough was looked at for any class that has not appeared to be worth a word.
    """
    messages = [*_of_labels(found, layout.label_offset, thorough)]
    for name, values in found.values.items():
        messages += [f"{name}: {message}" for message in _of_values(layout, name, values)]
    for name in guessed_kinds:
        kind = layout.modality(name).kind
        messages.append(
            f"{name}: nobody says what it is; its files look like {kind} and are read so: give its kind in"
            " layout.json"
        )
    return [f"{found.split}: {message}" for message in messages]


def _of_labels(found: Survey, offset: int, thorough: bool) -> Iterable[str]:
    missing = found.missing_classes()
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
    if offset and any(value >= offset + len(found.class_names) for value in found.voids) and found.voids[0]:
        yield (
            f"label_offset={offset} makes 0 void, but {max(found.voids)} stands for void as well: labels that"
            " count from 0 need label_offset=0"
        )
    if missing:
        hint = _of_missing_classes(found, offset)
        if thorough or (hint and found.label_maps == found.scenes):
            yield f"no pixel in {where} is of {_listed(missing)}{hint}"


def _of_missing_classes(found: Survey, offset: int) -> str:
    """Why classes may have no pixel, where the others suggest it."""
    present = np.flatnonzero(found.classes)
    if len(present) == 1 and found.voids[255]:
        return "; 255 is void: if it stands for a class, store that as the class's number"
    if not offset and present[0] > 0 and not found.void:
        return "; do the labels count from 1? Then give label_offset=1"
    if offset and present[-1] < len(found.classes) - 1 and found.voids[0]:
        return f"; label_offset={offset} makes 0 void: do the labels count from 0? Then give label_offset=0"
    return ""


def _of_values(layout: Layout, name: str, values: Values) -> Iterable[str]:
    """In words what looks unlike the layout in the files of a modality."""
    kind = layout.modality(name).kind
    if len(values.kinds) > 1:
        counts = ", ".join(f"{kind} in {count}" for kind, count in values.kinds.items())
        yield f"its files differ in what they hold: {counts}"
    if not values.known:
        yield "every pixel looked at is missing"
        return
    if values.low == values.high:
        yield f"every pixel looked at is {values.low:g}"
    wide = any("16 bits" in stored for stored in values.kinds)
    if kind == "depth":
        if layout.depth_scale is None and wide:
            yield "16 bits in a layout without a scale: if metric, give depth_scale, stored units per metre"
        if values.metres:
            yield from _of_distances(layout, values)
    narrow = wide and layout.modality(name).range is None and values.high - values.low < _NARROW * 2**16
    if kind == "intensity" and narrow:
        yield (
            f"stored {values.low:g} to {values.high:g} becomes {values.low / 65535:.2f} to"
            f" {values.high / 65535:.2f}: give its range in layout.json"
        )
    if kind in ("depth", "disparity") and values.known < (1 - _HIDDEN) * values.pixels:
        yield f"{1 - values.known / values.pixels:.0%} of the pixels are missing"


def _of_distances(layout: Layout, values: Values) -> Iterable[str]:
    low, median, high = values.distances()
    whole = all(float(value).is_integer() for value in values.stored)
    # Depth of 8 bits that was stretched to 16 has another step: 257, 256, ...
    rotated = whole and layout.bit_shift == 0 and len(values.stored) >= _VALUES
    rotated = rotated and np.gcd.reduce(np.array([int(value) for value in values.stored])) == _ROTATED
    if rotated:
        yield "all values are multiples of 8: SUN RGB-D's bits are rotated, and need bit_shift=3"
    if not _INDOORS[0] <= median <= _INDOORS[1]:
        unit = (
            f"depth_scale={layout.depth_scale:g}"
            if isinstance(layout.depth_scale, int | float)
            else "depth_scale"
        )
        yield (
            f"{low:.3g} to {high:.3g} m, the median {median:.3g} m, is unlike a room: check {unit}"
            f" (stored units per metre) and bit_shift={layout.bit_shift}"
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


def spread(count: int, most: int) -> list[int]:
    """Indices spread evenly."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def _some(counts: Counter[str], most: int = 3) -> list[str]:
    names = [name for name, _ in counts.most_common(most)]
    return [*names, "others"] if len(counts) > most else names


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
