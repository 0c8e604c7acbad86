"""NYU Depth V2 (Silberman et al., ECCV 2012) from its official archive to the ``nyu_cen`` layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.data.archives import existing_file, load_mat, open_hdf5, prepare, write_image
from models.data.classes import NYU40
from models.data.contradictions import contradictions
from models.data.images import DataError, Frame, depth_image
from models.data.layouts import LAYOUTS
from models.data.survey import SCENES, Overview, Survey, spread
from models.data.views import File

_SCALE = 5000  # stored units per meter, the layout's
_VOID = 255
_FOLDERS = ("rgb", "masks", "depth")


def prepare_nyudv2(
    out: Path | str,
    archive: Path | str,
    splits: Path | str | None = None,
    classes: Path | str | None = None,
) -> Path:
    """Write ``rgb/ masks/ depth/ train.txt val.txt`` for the 40 classes; resumable, and idempotent once done.

    Args:
        out: folder to make.
        archive: ``nyu_depth_v2_labeled.mat``: ``images`` [N, 3, W, H], ``depths`` [N, W, H] in meters and
            ``labels`` [N, W, H] of 894 classes, 0 void, as HDF5 turns MATLAB's axes round.
        splits: ``splits.mat``, with ``trainNdxs`` and ``testNdxs`` counted from 1; None: beside the archive.
        classes: ``classMapping40.mat`` (Gupta et al.), whose ``mapClass`` gives the class, 1 to 40, of
            each of the 894; None: beside the archive.

    Returns:
        ``out`` as a Path.

    Raises:
        DataError: a file is missing, broken or holds something else; ``out`` does.
    """
    out, archive = Path(out), existing_file(Path(archive), "nyu_depth_v2_labeled.mat")
    splits = existing_file(Path(splits or archive.with_name("splits.mat")), "the split of NYUDv2")
    classes = existing_file(
        Path(classes or archive.with_name("classMapping40.mat")), "the mapping of 894 classes to 40"
    )
    numbers = {
        name: [int(number) for number in np.atleast_1d(found)]
        for name, found in zip(("train", "val"), load_mat(splits, "trainNdxs", "testNdxs"), strict=True)
    }
    becomes = _mapping(classes)
    with open_hdf5(archive) as file:
        for name in ("images", "depths", "labels"):
            if name not in file:
                raise DataError(f"{archive}: expected the variable {name}; it holds {', '.join(file)}")
        images, depths, labels = (file[name] for name in ("images", "depths", "labels"))
        count, _, width, height = images.shape
        for name, found in (("depths", depths), ("labels", labels)):
            if found.shape != (count, width, height):
                raise DataError(
                    f"{archive}: {name} is {found.shape}, expected {(count, width, height)} as images is"
                )
        for name, chosen in numbers.items():
            if not chosen or not 1 <= min(chosen) <= max(chosen) <= count:
                raise DataError(f"{splits}: the {name} indices are not among the {count} images of {archive}")

        def read(number: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
            try:
                rgb, depth, label = (found[number - 1] for found in (images, depths, labels))
            except OSError as error:
                raise DataError(f"{archive}: image {number} is broken or truncated ({error})") from error
            if label.max() >= len(becomes):
                raise DataError(
                    f"{archive}: image {number} has label {label.max()}, above {len(becomes) - 1}"
                )
            return rgb.transpose(2, 1, 0), depth.T, label.T

        def write(number: int) -> None:
            rgb, depth, label = read(number)
            write_image(out / _path("rgb", number), rgb)
            write_image(out / _path("masks", number), becomes[label])
            write_image(out / _path("depth", number), _stored(depth))

        _overview(numbers, read, becomes).show()

        lists = {
            f"{name}.txt": "".join("\t".join(_path(f, n) for f in _FOLDERS) + "\n" for n in chosen)
            for name, chosen in numbers.items()
        }
        return prepare(
            out,
            {"dataset": "nyudv2", "images": count, "depth_scale": _SCALE, "classes": len(NYU40)},
            _FOLDERS,
            sorted(number for chosen in numbers.values() for number in chosen),
            lambda number: [_path(folder, number) for folder in _FOLDERS],
            write,
            lists,
        )


def _overview(
    numbers: Mapping[str, Sequence[int]],
    read: Callable[[int], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]],
    becomes: NDArray[np.uint8],
) -> Overview:
    """Describe some images of each split of the archive."""
    lines: list[str] = []
    warnings: list[str] = []
    for split, chosen in numbers.items():
        looked = spread(len(chosen), SCENES)
        found = Survey(split, "the archive", len(chosen), NYU40, looked=len(looked))
        for index in looked:
            rgb, depth, label = read(chosen[index])
            meters = depth_image(Frame(f"image {chosen[index]}", depth), depth, _SCALE)
            found.add_file("rgb", File(rgb, rgb.astype(np.float32)))
            found.add_file("depth", File(depth, meters, metric=True), is_depth=True, has_holes=True)
            found.add_labels(label, becomes[label], _VOID)
        lines += found.lines()
        warnings += contradictions(found, LAYOUTS["nyu_cen"])
    if both := set(numbers["train"]) & set(numbers["val"]):
        warnings.append(f"{len(both)} images are in both splits, such as {min(both)}")
    return Overview(lines, warnings)


def _mapping(path: Path) -> NDArray[np.uint8]:
    """The stored value of each of the labels 0 ... 894."""
    (mapped,) = load_mat(path, "mapClass")
    mapped = np.atleast_1d(mapped).astype(int)
    if mapped.min() < 1 or mapped.max() > len(NYU40):
        raise DataError(
            f"{path}: mapClass has values from {mapped.min()} to {mapped.max()}, expected 1 to 40"
        )
    return np.concatenate([[_VOID], mapped - 1]).astype(np.uint8)


def _stored(depth: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Meters as they are stored; what is no distance, or beyond the 13 m that can be stored, is missing.

    The largest value is never written: it is read as missing.
    """
    units = np.rint(np.nan_to_num(depth.astype(np.float64), posinf=0.0) * _SCALE)
    return np.where((units > 0) & (units < 2**16 - 1), units, 0).astype(np.uint16)


def _path(folder: str, number: int) -> str:
    return f"{folder}/{number:06d}.png"
