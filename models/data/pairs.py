"""Pairs of any modalities that a ``layout.json`` describes, as translation's networks see them.

Files are read as segmentation reads them (``modalities.Reader``). Networks see, from -1 to 1,

| kind | encoded |
|---|---|
| color, hha | stored / 127.5 - 1 |
| normals | the components |
| depth | 2·ln(1 + 512 m) / 11.1 - 1 of m meters: Taskonomy's encoding, which ends at 129 m |
| intensity, categorical, depth without a scale | 2·v - 1, v from 0 to 1 over the range or the file's type |

What lies outside is cut off. Missing values become 0 in color, HHA and normals, and -1 in all others, where
no measured value is -1 but the very low end of a range.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.data import kinds
from models.data.files import Entry, find_samples
from models.data.images import DepthScale, Frame, Image, read_stored
from models.data.inputs import InputSpec, input_specs, layout_from_plain, to_plain
from models.data.layout_file import LAYOUT_FILE, has_own_layout, read_layout
from models.data.layouts import CAMERA, LABELS, Layout
from models.data.modalities import FROM_DEPTH, Reader, with_kinds
from models.data.taskonomy import DEPTH_UNITS, find_domain

_BRIGHTEST = 255 / find_domain("depth_zbuffer").scale  # ln(1 + 512 m) that becomes 1: 11.1
FARTHEST = float(np.expm1(_BRIGHTEST)) / DEPTH_UNITS  # meters
# What a measured value is at least, where -1 stands for a missing one.
_MEASURED = np.nextafter(np.float32(-1), np.float32(0))
_SHADES = ((0.5,) * 3, (0.5,) * 3)  # mean and standard deviation that make colors -1 ... 1
_CENTERED = frozenset({"color", "hha", "normals"})  # whose missing pixels are 0
_PNG_TYPES = ("uint8", "uint16")


class FileType(NamedTuple):
    """How a modality's numbers are stored: the type, by NumPy's name, and the suffix of files of them."""

    dtype: str
    suffix: str


@dataclass(frozen=True)
class LayoutDomain:
    """A modality of a ``layout.json``; the table above says how its images are encoded.

    Attributes:
        name: the layout's.
        kind: decides how it is encoded.
        resizing: the kind by which ``models.data.kinds`` resizes.
        hole: the encoded value, of all channels, of missing pixels; None: none is missing.
        limits: the stored values, of intensity and depth without a scale, that become -1 and 1; None: 0 and
            the largest of the file's type.
        depth_scale: stored units per meter; None: no scale.
        bit_shift: by how many bits stored depth is rotated.
        described: as it goes with a network's weights.
        file: the type of its files; None of what is computed from depth.
    """

    name: str
    kind: str
    resizing: str | None
    hole: float | None
    limits: tuple[float, float] | None
    depth_scale: DepthScale
    bit_shift: int
    described: InputSpec
    file: FileType | None = None

    @property
    def channels(self) -> int:
        """Of its images."""
        return 3 if self.kind in _CENTERED else 1

    @property
    def value_range(self) -> tuple[float, float]:
        """What -1 and 1 stand for in MAE and MSE: stored values where the layout gives a range."""
        if self.is_logarithmic:
            return (0.0, _BRIGHTEST)
        low, high = self.limits or (0.0, 1.0)
        return (min(low, high), max(low, high))

    @property
    def suffix(self) -> str:
        """Of the files of what a network makes."""
        assert self.file is not None, "asked of targets only"
        return self.file.suffix

    def encode(self, image: Image) -> Image:
        """What networks see of an image ``[H, W, C]`` that a ``Reader`` with ``_SHADES`` made."""
        if self.kind in _CENTERED:
            return image
        values = image
        if self.is_logarithmic:
            values = np.log1p(image * np.float32(DEPTH_UNITS)) / np.float32(_BRIGHTEST)
        encoded = np.clip(2 * values - 1, -1 if self.hole is None else _MEASURED, 1)
        if self.hole is not None:
            encoded[image == 0] = self.hole
        return np.asarray(encoded, np.float32)

    def stored(self, image: Tensor) -> NDArray[Any]:
        """Convert to what a file of the training's type would hold; the inverse of reading and ``encode``.

        Args:
            image: ``[C, H, W]`` in [-1, 1].

        Returns:
            ``[H, W, 3]`` or ``[H, W]`` of ``file.dtype``.
        """
        assert self.file is not None, "asked of targets only"
        values = image.double().cpu().numpy().transpose(1, 2, 0)
        if self.kind in _CENTERED:
            colors = (127.5 * (values + 1)).round().clip(0, 255).astype(np.uint8)
            if self.hole is not None:
                colors[(values == self.hole).all(axis=-1)] = 0
            return np.asarray(colors)
        shares, dtype = (values[:, :, 0].clip(-1, 1) + 1) / 2, np.dtype(self.file.dtype)
        if self.kind == "depth":
            return self._stored_depth(shares, dtype)
        low, high = self.limits or (0, np.iinfo(dtype).max)
        return _rounded(low + shares * (high - low), dtype)

    def _stored_depth(self, shares: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
        if not self.is_logarithmic:
            return _rounded(shares * np.iinfo(dtype).max, dtype)
        meters = np.expm1(shares * _BRIGHTEST) / DEPTH_UNITS
        if dtype.kind == "f":
            return np.asarray(meters, dtype)
        assert isinstance(self.depth_scale, int | float), "files of integers are read by their scale"
        units = np.minimum(meters * self.depth_scale, np.iinfo(dtype).max - 1)  # the largest is missing
        rounded = _rounded(units, dtype)
        if self.bit_shift and dtype == np.uint16:
            return np.asarray(rounded << self.bit_shift | rounded >> (16 - self.bit_shift))
        return rounded

    @property
    def is_logarithmic(self) -> bool:
        """Whether it is depth in meters."""
        metric = self.file is None or self.depth_scale is not None or np.dtype(self.file.dtype).kind == "f"
        return self.kind == "depth" and metric

    def resized(self, image: Image, size: Sequence[int]) -> Image:
        """An encoded image in another size, height and width."""
        if self.resizing != kinds.SPARSE or not self.hole:
            return kinds.resized(image, size, self.resizing, averaged=True)
        hole = np.float32(self.hole)  # which is 0 there
        return np.asarray(kinds.resized(image - hole, size, self.resizing, averaged=True) + hole)

    def mirrored(self, image: Image) -> Image:
        """An encoded image, mirrored; of normals the one of the mirrored scene."""
        return kinds.mirrored(image, self.kind)

    def spec(self) -> InputSpec:
        """Its meaning, in words."""
        return self.described


def _rounded(values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Values as numbers of the type, the nearest ones that it has."""
    if dtype.kind == "f":
        return np.asarray(values, dtype)
    limits = np.iinfo(dtype)
    return np.asarray(values.round().clip(limits.min, limits.max), dtype)


class LayoutReader:
    """Makes what networks see of a view's files.

    Args:
        layout: of the files; all of ``names`` have a kind.
        names: modalities, in the order of the images.
        stored: by modality the type of its files.

    Attributes:
        domains: of the images.

    Raises:
        ValueError: the layout has no such modality.
    """

    def __init__(self, layout: Layout, names: Sequence[str], stored: Mapping[str, FileType]) -> None:
        self.layout, self._stored = layout, dict(stored)
        self.reader = Reader(layout, tuple(names), *_SHADES)
        kinds_of = zip(names, self.reader.kinds(), input_specs(self.reader), strict=True)
        self.domains = tuple(self._domain(*each) for each in kinds_of)

    def files(self) -> tuple[str, ...]:
        """The files that are read, by what they hold."""
        return self.reader.files()

    def absent(self, files: Collection[str]) -> tuple[int, ...]:
        """The numbers of the domains that files of these kinds do not give."""
        return self.reader.absent(files)

    def read(self, files: Mapping[str, Path | Frame]) -> tuple[Image, ...]:
        """The encoded images, all of one size, of the domains that are not ``absent``.

        Raises:
            DataError: as ``Reader.read``.
        """
        absent, images = self.absent(files), self.reader.read(files)
        both = enumerate(zip(self.domains, images, strict=True))
        return tuple(domain.encode(image) for m, (domain, image) in both if m not in absent)

    def endings(self) -> dict[str, str]:
        """By what they hold, what the names of files end in that is not the view's."""
        return {name: _ending(template) for name, template in self.layout.files.items()}

    def record(self) -> dict[str, Any]:
        """What goes with a network's weights, from which ``recorded_reader`` makes the reader again."""
        return {"layout": to_plain(self.layout), "stored": {k: list(v) for k, v in self._stored.items()}}

    def _domain(self, name: str, resizing: str | None, spec: InputSpec) -> LayoutDomain:
        told, file = self.layout.modality(name), self._stored.get(name)
        assert told.kind is not None, "with_kinds has told it"
        has_holes = self.reader.has_holes(name)
        if told.kind == "intensity" and file is not None and np.dtype(file.dtype).kind == "f":
            has_holes, resizing = True, kinds.SPARSE  # any of them may be NaN
        hole = 0.0 if told.kind in _CENTERED else -1.0
        domain = LayoutDomain(
            name,
            told.kind,
            resizing,
            hole if has_holes else None,
            told.range,
            self.layout.depth_scale,
            self.layout.bit_shift,
            spec,
            file,
        )
        if told.kind in _CENTERED:
            return domain
        unit = f"{_BRIGHTEST:g} of ln(1 + {DEPTH_UNITS} meters)" if domain.is_logarithmic else spec.unit
        return replace(domain, described=replace(spec, unit=unit, mean=(0.5,), std=(0.5,)))


def recorded_reader(
    record: Mapping[str, Any], names: Sequence[str], root: Path | None = None
) -> LayoutReader:
    """The reader of a network's files.

    Args:
        record: what ``LayoutReader.record`` returned.
        names: its modalities, or some of them.
        root: a folder whose ``layout.json``, if there is one, says how files are stored, in place of the
            training's; kinds that only files had told stay.

    Raises:
        DataError: that ``layout.json`` is wrong.
        ValueError: it has no such modality.
    """
    layout = layout_from_plain(record["layout"])
    if root is not None and has_own_layout(root):
        here = read_layout(root / LAYOUT_FILE, labels=False)
        kinds_here = {
            name: replace(here.modality(name), kind=here.modality(name).kind or layout.modality(name).kind)
            for name in names
        }
        layout = replace(here, modalities={**here.modalities, **kinds_here})
    return LayoutReader(layout, names, {name: FileType(*told) for name, told in record["stored"].items()})


class Pairs(NamedTuple):
    """The views of a split.

    Attributes:
        reader: of their files.
        scenes: by what they hold the files of each.
        names: of the views.
        source: the list or the folder that they were found in.
        guessed_kinds: the modalities whose kind only the files told.
    """

    reader: LayoutReader
    scenes: list[Entry]
    names: list[str]
    source: str
    guessed_kinds: tuple[str, ...]


def find_pairs(root: Path, split: str, names: Sequence[str], list_file: str = "") -> Pairs:
    """The views of a split of a folder with a ``layout.json``.

    Every file is looked for, the first view's are opened.

    Args:
        root: the folder.
        split: ``train`` or ``val``.
        names: modalities, the last one that of the target.
        list_file: path of a list to read in place of the layout's.

    Raises:
        DataError: the layout is wrong; a list or file is missing, a line is malformed; a file that is opened
            is broken.
        ValueError: a modality that the layout does not have, or that cannot be a domain or the target.
    """
    known = read_layout(root / LAYOUT_FILE, labels=False)
    _check(known, names)
    files = Reader(known, tuple(names)).files()
    scenes = find_samples(known, root, split, files, list_file)
    layout, _ = with_kinds(known, scenes, names)
    target = names[-1]
    folder, ending = root / known.folder(target, split), _ending(known.files[target])
    paths = (Path(os.path.relpath(scene[target], folder)) for scene in scenes)
    return Pairs(
        LayoutReader(layout, names, {name: _type_of(scenes[0][name]) for name in names if name in files}),
        scenes,
        [path.with_suffix("").as_posix().removesuffix(ending) for path in paths],
        list_file or known.list_file(split) or known.folder(next(iter(known.files)), split),
        tuple(name for name in names if name in files and known.modality(name).kind is None),
    )


def _ending(template: str) -> str:
    """What stands behind the name in a file's name, without its suffix: ``_ir`` of ``a/{name}_ir.png``."""
    return Path(template).with_suffix("").name.rpartition("}")[2]


def _check(layout: Layout, names: Sequence[str]) -> None:
    """Refuse modalities that networks cannot be fed, or cannot make."""
    for name in names:
        if name in (LABELS, CAMERA):
            hint = "; for label maps as input, give them another name and the kind categorical in layout.json"
            raise ValueError(f"{name!r} is no modality{hint * (name == LABELS)}")
        if (kind := layout.modality(name).kind) in ("disparity", "points"):
            raise ValueError(f"{name!r} is {kind}, whose values have no upper end: give depth instead")
    target = names[-1]
    if target in FROM_DEPTH and target not in layout.files:
        raise ValueError(
            f"the target {target!r} is computed from depth: make files of it and name them in layout.json"
        )
    if layout.modality(target).kind == "categorical":
        raise ValueError(
            f"the target {target!r} is of the kind categorical, between whose numbers there is nothing: "
            "train a segmentation, or give it the kind intensity in layout.json"
        )


def _type_of(path: Path) -> FileType:
    """The type in which values like a file's are to be written."""
    dtype = read_stored(path).dtype.name
    if path.suffix.lower() == ".npy":
        return FileType(dtype, ".npy")
    return FileType(dtype, {"float32": ".tiff"}.get(dtype, ".png" if dtype in _PNG_TYPES else ".npy"))
