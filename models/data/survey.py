"""A summary of a data set, from a sample of its scenes."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from models.data.images import kind_of, read_label_values, size_of
from models.data.layouts import CAMERA, LABELS, Layout
from models.data.modalities import Reader
from models.data.sizes import check_size
from models.data.views import File, registered, resizing

SCENES = 50  # looked at as a whole
_REGISTERED = 8  # of them, whose depth is brought into the view of another camera
_THINNED = 2000  # values of a file that medians and steps are told from
_LABEL_MAPS = 1000  # looked at while classes are missing


class Scenes(Protocol):
    """The part of a ``SegmentationSet`` that a survey reads, which knows the attributes' meaning."""

    root: Path
    split: str
    source: str
    class_names: tuple[str, ...]
    ignore_index: int
    layout: Layout
    guessed_kinds: tuple[str, ...]
    reader: Reader
    surveyed: bool

    @property
    def scenes(self) -> Sequence[Mapping[str, Path]]: ...
    def __len__(self) -> int: ...
    def sample(self, index: int, /) -> Any: ...
    def classes_of(self, path: Path, values: NDArray[Any], /) -> NDArray[np.uint8]: ...


class Overview(NamedTuple):
    """A summary of a data set before work starts: what it holds, and what of it looks wrong."""

    lines: list[str]
    warnings: list[str]

    def show(self, stream: TextIO | None = None) -> None:
        """Print the lines to a stream, or standard output; and the warnings where errors go."""
        print("\n".join(self.lines), file=stream, flush=True)
        for warning in self.warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)


@dataclass
class Values:
    """A summary of the sampled files of one modality.

    Attributes:
        kinds: how many files there are of each type and channel count, in words.
        sizes: how many of each size.
        low, high: the stored values' range.
        known, pixels: how many pixels are measured, of how many.
        meters: samples of measured depth, with the extremes of each file; none of what is not in meters.
        stored: a sample of the distinct stored values of depth.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    low: float = np.inf
    high: float = -np.inf
    known: int = 0
    pixels: int = 0
    meters: list[NDArray[np.float32]] = field(default_factory=list)
    stored: set[float] = field(default_factory=set)

    def add(self, file: File, is_depth: bool, has_holes: bool) -> None:
        """Count one file; of one with holes, what is 0 is missing."""
        stored, image = file.stored, file.image
        known = image.any(axis=-1) if has_holes else np.ones(image.shape[:2], bool)
        if stored.dtype.kind == "f":  # what is not finite is missing in any case
            known &= np.isfinite(stored).reshape(*known.shape, -1).all(axis=-1)
        self.kinds[kind_of(stored)] += 1
        self.sizes[size_of(stored)] += 1
        self.known += int(known.sum())
        self.pixels += known.size
        if known.any():
            values = stored[known]
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
            if is_depth and stored.ndim == 2:
                self.stored.update(_thinned(values).tolist())
            if is_depth and file.metric:
                meters = image[known][:, 0]
                self.meters.append(np.array([meters.min(), *_thinned(meters), meters.max()]))

    def distances(self) -> tuple[float, float, float]:
        """The least, median and greatest measured distance in meters."""
        every = np.concatenate(self.meters)
        return float(every.min()), float(np.median(every)), float(every.max())


@dataclass
class Survey:
    """A summary of some scenes of a split.

    Attributes:
        split: its name.
        source: of the scenes: a list's name, or a folder.
        scenes, looked: how many there are, and how many were looked at.
        label_maps: how many label maps were looked at; more than scenes where classes are rare.
        classes: ``[K]`` pixels of every class.
        void: pixels without one.
        voids: the stored values that turned out void, and their pixels.
        values: by modality, of those that are files.
        resized: by modality, of files of another size than their scene's in words how they are resized.
        registered: by depth of a camera of its own the pixels with a value once registered, and all.
        views: scenes whose sizes were compared; of the first few files were registered.
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
    resized: dict[str, Counter[str]] = field(default_factory=dict)
    registered: dict[str, tuple[int, int]] = field(default_factory=dict)
    views: int = 0

    def __post_init__(self) -> None:
        self.classes = np.zeros(len(self.class_names), np.int64)

    def add_labels(self, stored: NDArray[Any], target: NDArray[np.uint8], ignore_index: int) -> None:
        """Count a label map: as stored, and as classes."""
        counts = np.bincount(target.ravel(), minlength=256)
        if counts[ignore_index]:
            void = stored[target == ignore_index]
            if void.dtype == np.uint8:  # a tenth of the time that sorting takes
                pixels = np.bincount(void, minlength=256)
                values = np.flatnonzero(pixels)
                pixels = pixels[values]
            else:
                values, pixels = np.unique(void, return_counts=True)
            self.voids.update(dict(zip(values.tolist(), pixels.tolist(), strict=True)))
        self.void += int(counts[ignore_index])
        counts[ignore_index] = 0
        self.classes += counts[: len(self.class_names)]
        self.label_maps += 1

    def add_file(self, name: str, file: File, is_depth: bool = False, has_holes: bool = False) -> None:
        """Count a file of a modality."""
        self.values.setdefault(name, Values()).add(file, is_depth, has_holes)

    def add_views(
        self, reader: Reader, files: Mapping[str, File], paths: Mapping[str, Path], size: Sequence[int] | None
    ) -> None:
        """Count which files of a scene are resized and, of the first scenes, what is left of registered ones.

        Raises:
            DataError: one cannot be registered, or is of a size that is not to be resized.
        """
        layout, to = reader.layout, reader.reference(files, paths, size)
        for name, file in files.items():
            told = layout.modality(name)
            if layout.registered(name) or (layout.crop_to_labels and told.size != "any"):
                continue
            check_size(file.image, told, paths[name], to)
            if file.image.shape[:2] != to.size:
                self.resized.setdefault(name, Counter())[resizing(name, file.image, to)] += 1
        if self.views < _REGISTERED:
            for name, file in registered(layout, files, paths, size).items():
                if layout.registered(name) != name:
                    continue  # as much is left as of the depth that it comes with
                seen = file.image.any(axis=-1)
                known, pixels = self.registered.get(name, (0, 0))
                self.registered[name] = known + int(seen.sum()), pixels + seen.size
        self.views += 1

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
            if values.meters:
                low, median, high = values.distances()
                parts.append(f"{low:.2f} to {high:.2f} m, median {median:.2f} m")
            elif values.known:
                parts.append(f"stored {values.low:g} to {values.high:g}")
            if values.known < values.pixels or values.meters:
                parts.append(f"{1 - values.known / max(1, values.pixels):.1%} missing")
            lines.append(f"  {name}: {', '.join(parts)}")
        lines += [f"  {note}" for notes in self.resized.values() for note in _some(notes)]
        lines += [
            f"  {name} registered: {known / pixels:.1%} of pixels have a value"
            for name, (known, pixels) in self.registered.items()
        ]
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


def survey(dataset: Scenes, scenes: int = SCENES, label_maps: int = _LABEL_MAPS) -> Survey:
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
    sizes = [_add_labels(found, dataset, index) for index in chosen]
    add_files(found, reader, dataset.scenes, chosen, sizes)
    for index in sorted(set(spread(len(dataset), label_maps)) - set(chosen)):
        if not found.missing_classes():
            break
        _add_labels(found, dataset, index)
    return found


def add_files(
    found: Survey,
    reader: Reader,
    scenes: Sequence[Mapping[str, Path]],
    chosen: Sequence[int],
    sizes: Sequence[tuple[int, ...]] = (),
) -> None:
    """Count the files of some scenes.

    Args:
        found: where they are counted.
        reader, scenes: what reads them, and all of them.
        chosen: those to count.
        sizes: height and width of the chosen ones' labels; empty: an image tells the size.

    Raises:
        DataError: one is broken or not what the layout says.
    """
    names = [name for name in reader.files() if name != CAMERA]
    for position, index in enumerate(chosen):
        paths = scenes[index]
        files = {name: reader.read_file(name, paths[name]) for name in names if name in paths}
        for name, file in files.items():
            is_depth = reader.layout.modality(name).kind == "depth"
            found.add_file(name, file, is_depth, reader.has_holes(name))
        found.add_views(reader, files, paths, sizes[position] if sizes else None)
    found.looked = len(chosen)


def _add_labels(found: Survey, dataset: Scenes, index: int) -> tuple[int, ...]:
    """Count a label map; its height and width."""
    path = dataset.scenes[index][LABELS]
    stored = read_label_values(path).values
    found.add_labels(stored, dataset.classes_of(path, stored), dataset.ignore_index)
    return stored.shape


def spread(count: int, most: int) -> list[int]:
    """Indices spread evenly."""
    indices: list[int] = np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
    return indices


def _thinned(values: NDArray[Any]) -> NDArray[Any]:
    """Some thousand of the values, however many there are."""
    return values[:: max(1, values.size // _THINNED)]


def _some(counts: Counter[str], most: int = 3) -> list[str]:
    names = [name for name, _ in counts.most_common(most)]
    return [*names, "others"] if len(counts) > most else names
