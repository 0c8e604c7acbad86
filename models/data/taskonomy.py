"""The layout and the domains of Taskonomy (Zamir et al., CVPR 2018), encoded as CEN's translation wants them.

A view has one file per domain, ``<domain>/point_<P>_view_<V>_domain_<domain>.png``; the folder of a building,
or any other, may lie above or below that of the domain.

| domain | stored | encoded, 0 ... 255 |
|---|---|---|
| rgb, reshading | 8 bits | as stored |
| normal | 8 bits, 127.5 + 127.5·(right, down, towards the camera) | as stored |
| principal_curvature | 8 bits, the two curvatures in red and green, 127 where flat | as stored |
| segment_unsup2d, segment_unsup25d | 8 bits, numbers of segments | as stored |
| depth_euclidean, depth_zbuffer | 16 bits, 1/512 m along ray or axis; 65535: none | ln(1 + stored)·255/11.1 |
| edge_texture | 16 bits | stored·255/11355, at most 255 |
| edge_occlusion | 16 bits | stored·255/11584, at most 255 |

What networks see is the encoded value / 127.5 - 1; a single channel is tiled to three.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.data import kinds
from models.data.files import read_lines, walk
from models.data.images import DataError, Frame, kind_of, read_stored
from models.data.inputs import InputSpec
from models.data.layouts import SPLITS
from models.networks.messages import suggest

DEPTH_UNITS = 512  # a meter
MISSING_DEPTH = 2**16 - 1
PLACEHOLDER = "{domain}"

_LISTS = ("{split}.txt", "{split}_domain.txt")  # the second are the names in the authors' code
_THIRD = 3  # every third point is for validation where no list says otherwise


@dataclass(frozen=True)
class Domain:
    """The values in a domain's files, and how networks see them; see the table above.

    Attributes:
        name: Taskonomy's.
        bits: of the files: 8 with one or three channels, or 16 with one.
        scale: the encoded value of a stored 1, or of a logarithm of 1.
        logarithmic: ln(1 + stored) takes the place of the stored value.
        mixed: whether neighboring pixels may be averaged when an image is resized. Nothing lies between an
            object and the wall behind it, nor between two numbers of segments.
    """

    name: str
    bits: Literal[8, 16] = 8
    scale: float = 1.0
    logarithmic: bool = False
    mixed: bool = True

    @property
    def channels(self) -> int:
        """As many as the generator gives where it is the target: three, alike where files have one."""
        return 3

    @property
    def hole(self) -> float | None:
        """The encoded value of pixels that no loss and no score counts: none, as in the paper all count."""
        return None

    @property
    def value_range(self) -> tuple[float, float]:
        """What -1 and 1 stand for in MAE and MSE."""
        return (0.0, 255 / self.scale if self.logarithmic else 1.0)

    @property
    def suffix(self) -> str:
        """Of the files of what a network makes."""
        return ".png"

    def read(self, path: Path | Frame) -> NDArray[np.float32]:
        """A file as networks see it, ``[H, W, 3]`` or ``[H, W, 1]`` float32 from -1 to 1.

        Depth in floating point is in meters; what is not finite, 0 or negative is missing.

        Raises:
            DataError: unreadable, broken or truncated file; other bits or channels.
        """
        stored = read_stored(path)
        if self.logarithmic and stored.dtype.kind == "f":
            stored = _stored_depth(stored)
        channels = 1 if stored.ndim == 2 else stored.shape[2]
        unsigned = stored.dtype.kind == "u" and 8 * stored.itemsize == self.bits
        if not unsigned or channels not in ((1,) if self.bits == 16 else (1, 3)):
            expected = "16 bits and 1 channel" if self.bits == 16 else "8 bits and 1 or 3 channels"
            raise DataError(f"{path}: expected {self.name} of {expected}, found {kind_of(stored)}")
        return self.encode(stored.reshape(*stored.shape[:2], channels))

    def encode(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Stored values to those that networks see, from -1 to 1."""
        values = stored.astype(np.float32)
        if self.logarithmic:
            np.log1p(values, out=values)
        return np.asarray(np.minimum(values * np.float32(self.scale), 255) / np.float32(127.5) - 1)

    def decode(self, values: Tensor) -> Tensor:
        """The inverse of ``encode``, for what a network makes: stored values, not rounded.

        Depth / ``DEPTH_UNITS`` is meters, a normal (stored - 127.5) / 127.5. Edges that were cut off at 255
        stay so.
        """
        values = (values + 1) * (127.5 / self.scale)
        return torch.expm1(values) if self.logarithmic else values

    def stored(self, image: Tensor) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """Convert to what a file would hold: ``[H, W, 3]`` of 8 bits, or ``[H, W]`` of 16.

        Args:
            image: ``[3, H, W]`` in [-1, 1]; a domain of one channel gets the mean of the three.
        """
        image = image.double().cpu()
        if self.bits == 16:
            return _rounded(self.decode(image.mean(0)), 2**16 - 1).numpy().astype(np.uint16)
        return _rounded(self.decode(image.permute(1, 2, 0)), 255).numpy().astype(np.uint8)

    def resized(self, image: NDArray[np.float32], size: Sequence[int]) -> NDArray[np.float32]:
        """An image as ``read`` gives it in another size, height and width."""
        return kinds.resized(image, size, None if self.mixed else "categorical", averaged=True)

    def mirrored(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """An image as ``read`` gives it, mirrored; of normals the one of the mirrored scene."""
        return kinds.mirrored(image, "normals" if self.name == "normal" else None)

    def spec(self) -> InputSpec:
        """Encoded values / 127.5 - 1, in words."""
        white = f"{255 / self.scale:g}"
        unit = f"{white} of ln(1 + stored)" if self.logarithmic else f"{white} as stored"
        order = "rgb" if self.name == "rgb" else None
        return InputSpec(self.name, unit, 1 if self.bits == 16 else None, order, (0.5,), (0.5,))


def _rounded(values: Tensor, largest: int) -> Tensor:
    return values.round().clamp(0, largest)


def _stored_depth(meters: NDArray[Any]) -> NDArray[np.uint16]:
    """Meters as files store them."""
    units = np.minimum(meters.astype(np.float64) * DEPTH_UNITS, MISSING_DEPTH).round()
    return np.where(units > 0, units, MISSING_DEPTH).astype(np.uint16)


DOMAINS = {
    domain.name: domain
    for domain in (
        Domain("rgb"),
        Domain("normal"),
        Domain("reshading"),
        Domain("depth_euclidean", 16, 255 / 11.1, logarithmic=True, mixed=False),
        Domain("depth_zbuffer", 16, 255 / 11.1, logarithmic=True, mixed=False),
        Domain("principal_curvature"),
        Domain("edge_occlusion", 16, 255 / 11584),
        Domain("edge_texture", 16, 255 / 11355),
        Domain("segment_unsup2d", mixed=False),
        Domain("segment_unsup25d", mixed=False),
    )
}


def find_domain(name: str) -> Domain:
    """The domain of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in DOMAINS:
        raise ValueError(f"unknown domain {name!r}: expected {', '.join(DOMAINS)}{suggest(name, DOMAINS)}")
    return DOMAINS[name]


def file_of(domain: str, point: int, view: int = 0) -> str:
    """The path of a view's file in a data set without buildings."""
    return f"{domain}/point_{point}_view_{view}_domain_{domain}.png"


class ViewFiles:
    """The files of one view: a path below the root in which ``{domain}`` stands for every domain's name."""

    def __init__(self, template: str) -> None:
        self.template = template
        parts = [part for part in Path(template).with_suffix("").parts if part != PLACEHOLDER]
        self.name = "_".join(parts).removesuffix(f"_domain_{PLACEHOLDER}")  # building_point_0_view_1

    def path(self, root: Path, domain: str) -> Path:
        return root / self.template.replace(PLACEHOLDER, domain)

    def split(self) -> str:
        """The split where no list gives one: validation takes a third of the points, with all their views.

        The third is told from the names alone, so that further files leave every view where it is.
        """
        point = self.name.rpartition("_view_")[0]
        return SPLITS[zlib.crc32(point.encode()) % _THIRD == 0]


def find_views(root: Path, split: str, domains: Sequence[str], lists: Sequence[str] = ()) -> list[ViewFiles]:
    """The views of a split, in the order of its list or of their names; every file of them is looked for.

    Lists are the ones given, else ``train.txt`` and ``val.txt`` (or ``train_domain.txt`` and
    ``val_domain.txt``) in the root, one path with ``{domain}`` a line. Without any, all views that have a
    file of the last domain are found, and split as ``ViewFiles.split`` says.

    Args:
        root: folder of the data set.
        split: ``train`` or ``val``.
        domains: those that every view must have.
        lists: paths of the training and the validation list.

    Raises:
        DataError: there is no such folder, no view in the split, a list or file is missing, a line is wrong.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected a data set's root")
    path = _list_path(root, split, lists)
    if path is not None:
        views = list(_read_list(path))
    else:
        views = sorted(_scan(root, domains[-1]), key=lambda view: view.name)
        if not views:
            raise DataError(
                f"{root}: neither lists ({', '.join(_LISTS).format(split=split)}) nor a file named like"
                f" {file_of(domains[-1], 0)}, at any depth"
            )
        views = [view for view in views if view.split() == split]
        if not views:
            raise DataError(f"{root}: too few points for a split by names; give {' and '.join(SPLITS)}.txt")
    _check(root, views, domains)
    return views


def _list_path(root: Path, split: str, lists: Sequence[str]) -> Path | None:
    """The list of a split; None where there are no lists at all."""
    if lists:
        return root / dict(zip(SPLITS, lists, strict=True))[split]
    for name in _LISTS:
        if any((root / name.format(split=other)).is_file() for other in SPLITS):
            return root / name.format(split=split)
    return None


def _read_list(path: Path) -> Iterator[ViewFiles]:
    for number, line in read_lines(path):
        if PLACEHOLDER not in line:
            raise DataError(
                f"{path}, line {number}: expected a path such as {file_of(PLACEHOLDER, 0)}, found {line!r}"
            )
        yield ViewFiles(line)


def _scan(root: Path, domain: str) -> Iterator[ViewFiles]:
    """All views below the root that have a file of the domain."""
    pattern = re.compile(rf"(point_\d+_view_\d+_domain_){domain}(\.png)")
    others = DOMAINS.keys() - {domain}
    for folder, folders, files in walk(root):
        folders[:] = [name for name in folders if name not in others]
        parts = folder.relative_to(root).parts
        place = Path(*(PLACEHOLDER if part == domain else part for part in parts))
        for match in filter(None, map(pattern.fullmatch, files)):
            yield ViewFiles((place / f"{match[1]}{PLACEHOLDER}{match[2]}").as_posix())


def _check(root: Path, views: Sequence[ViewFiles], domains: Sequence[str]) -> None:
    """Raise if a file is missing; folders are read once."""
    there: dict[Path, set[str]] = {}
    missing = []
    for view in views:
        for domain in domains:
            path = view.path(root, domain)
            if path.parent not in there:
                folder = path.parent.iterdir() if path.parent.is_dir() else ()
                there[path.parent] = {file.name for file in folder}
            if path.name not in there[path.parent]:
                missing.append((path, view))
    if missing:
        path, view = missing[0]
        more = f" (and {len(missing) - 1} more files are missing)" if len(missing) > 1 else ""
        raise DataError(f"{path}: no such file, but {view.name} is to have {', '.join(domains)}{more}")
