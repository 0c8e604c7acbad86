"""SUN RGB-D (Song et al., CVPR 2015) from its official release to the ``sun_handa`` layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from models.data.archives import existing_file, load_mat, open_hdf5, prepare, write_bytes, write_image
from models.data.classes import SUN37
from models.data.contradictions import contradictions
from models.data.images import DataError, depth_image
from models.data.layout_file import LAYOUT_FILE
from models.data.layouts import LAYOUTS
from models.data.stored import decode
from models.data.survey import SCENES, Overview, Survey, spread
from models.data.views import File

_LAYOUT = LAYOUTS["sun_handa"]
_SCALE, _BIT_SHIFT = 1000.0, 3  # the release's depth
_VOID = 255
_INTRINSICS = "intrinsics/{split}/{number:06d}.txt"


class _Scene(NamedTuple):
    """One image of the release."""

    split: str
    number: int  # counted from 1 within the split
    label: int  # the number of its label map: test images come first
    place: int  # its index in the tables of meta data and labels
    image: str  # paths in the release
    depth: str
    camera: str


def prepare_sunrgbd(out: Path | str, archive: Path | str, toolbox: Path | str) -> Path:
    """Write images, depth, cameras and labels of the 37 classes; resumable, and idempotent once done.

    Images and depth are copied as they are, so that depth stays rotated by three bits; a ``layout.json``
    says so, and where every image's camera lies.

    Args:
        out: folder to make.
        archive: ``SUNRGBD.zip``, or the folder that holds ``SUNRGBD/`` of it.
        toolbox: the folder ``SUNRGBDtoolbox`` with ``Metadata/SUNRGBDMeta.mat`` (a structure of ``rgbpath``,
            ``rgbname`` and ``depthname`` for every image), ``Metadata/SUNRGBD2Dseg.mat`` (HDF5, whose
            ``SUNRGBD2Dseg/seglabel`` refers to a label map [W, H] of 0 ... 37 for each) and
            ``traintestSUNRGBD/allsplit.mat`` (``alltrain`` and ``alltest``, folders of images).

    Returns:
        ``out`` as a Path.

    Raises:
        DataError: a file is missing, broken or holds something else; ``out`` does.
    """
    out, archive, toolbox = Path(out), Path(archive), Path(toolbox)
    segmentations = existing_file(toolbox / "Metadata" / "SUNRGBD2Dseg.mat", "the labels of SUN RGB-D")
    scenes = _scenes(toolbox)
    with _Release(archive) as release, open_hdf5(segmentations) as file:
        labels = _labels(file, segmentations, len(scenes))

        def label_map(scene: _Scene) -> NDArray[Any]:
            found: NDArray[Any] = np.asarray(file[labels[scene.place]]).T
            if found.max() > len(SUN37):
                raise DataError(f"{segmentations}: image {scene.place + 1} has label {found.max()}, above 37")
            return found

        def write(scene: _Scene) -> None:
            image, depth, camera, label = (out / name for name in _files(scene))
            found = label_map(scene)
            write_bytes(image, release.read(scene.image))
            write_bytes(depth, release.read(scene.depth))
            write_bytes(camera, release.read(scene.camera))
            write_image(label, found.astype(np.uint8))

        layout = {
            "base": _LAYOUT.name,
            "files": {**_LAYOUT.files, "camera": _INTRINSICS},
            "label_shift": {"train": sum(scene.split == "test" for scene in scenes)},
            "depth_scale": _SCALE,
            "bit_shift": _BIT_SHIFT,
        }
        _overview(scenes, release, label_map).show()
        return prepare(
            out,
            {"dataset": "sunrgbd", "images": len(scenes), "classes": len(SUN37)},
            sorted({str(Path(name).parent) for scene in scenes for name in _files(scene)}),
            scenes,
            _files,
            write,
            {LAYOUT_FILE: json.dumps(layout, indent=2) + "\n"},
        )


def _overview(
    scenes: Sequence[_Scene], release: _Release, label_map: Callable[[_Scene], NDArray[Any]]
) -> Overview:
    """Describe some images of each split of the release."""
    lines: list[str] = []
    warnings: list[str] = []
    for split in ("train", "test"):
        chosen = [scene for scene in scenes if scene.split == split]
        looked = spread(len(chosen), SCENES)
        found = Survey(split, "the release", len(chosen), SUN37, looked=len(looked))
        for scene in (chosen[index] for index in looked):
            rgb, stored = (decode(Path(name), release.read(name)) for name in (scene.image, scene.depth))
            depth = depth_image(Path(scene.depth), stored, _SCALE, _BIT_SHIFT)
            found.add_file("rgb", File(rgb, rgb.astype(np.float32).reshape(*rgb.shape[:2], -1)))
            found.add_file("depth", File(stored, depth, metric=True), is_depth=True, has_holes=True)
            labels = label_map(scene).astype(np.uint8)
            found.add_labels(labels, np.where(labels == 0, _VOID, labels - 1).astype(np.uint8), _VOID)
        lines += found.lines()
        layout = replace(_LAYOUT, depth_scale=_SCALE, bit_shift=_BIT_SHIFT)
        warnings += contradictions(found, layout)
    return Overview(lines, warnings)


def _files(scene: _Scene) -> tuple[str, str, str, str]:
    """The paths of image, depth, camera and labels in the data set."""
    files = {**_LAYOUT.files, "camera": _INTRINSICS}

    def path(kind: str, suffix: str, number: int) -> str:
        return files[kind].removesuffix(".*").format(split=scene.split, number=number) + suffix

    return (
        path("rgb", Path(scene.image).suffix, scene.number),
        path("depth", ".png", scene.number),
        path("camera", "", scene.number),
        path("labels", ".png", scene.label),
    )


def _scenes(toolbox: Path) -> list[_Scene]:
    """The images in the order of the split's lists, the test images before those for training."""
    path = existing_file(toolbox / "Metadata" / "SUNRGBDMeta.mat", "the meta data of SUN RGB-D")
    split_path = existing_file(toolbox / "traintestSUNRGBD" / "allsplit.mat", "the split of SUN RGB-D")
    (meta,) = load_mat(path, "SUNRGBDMeta")
    entries = {}
    for index, entry in enumerate(np.atleast_1d(meta)):
        image = _folder(_field(path, entry, "rgbpath"))
        entries[str(PurePosixPath(image).parents[1])] = index, entry
    scenes: list[_Scene] = []
    for split, names in zip(("test", "train"), load_mat(split_path, "alltest", "alltrain"), strict=True):
        for number, name in enumerate(np.atleast_1d(names), 1):
            folder = _folder(str(name))
            if folder not in entries:
                raise DataError(f"{path}: nothing about {folder}, which {split_path} names")
            index, entry = entries[folder]
            image = f"{folder}/image/{_field(path, entry, 'rgbname')}"
            depth = f"{folder}/depth_bfx/{_field(path, entry, 'depthname')}"
            camera = f"{folder}/intrinsics.txt"
            scenes.append(_Scene(split, number, len(scenes) + 1, index, image, depth, camera))
    return scenes


def _folder(path: str) -> str:
    """A path from ``SUNRGBD/`` on: the tables have those of the machine that they were made on."""
    return "SUNRGBD/" + path.rstrip("/").partition("SUNRGBD/")[2]


def _field(path: Path, entry: Any, name: str) -> str:
    if not hasattr(entry, name):
        raise DataError(f"{path}: expected a structure with the field {name}")
    return str(getattr(entry, name))


def _labels(file: Any, path: Path, count: int) -> list[Any]:
    """References to the label maps, one per image."""
    try:
        references = np.asarray(file["SUNRGBD2Dseg"]["seglabel"]).reshape(-1)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: expected SUNRGBD2Dseg/seglabel in it ({error})") from error
    if len(references) != count:
        raise DataError(f"{path}: {len(references)} label maps for the {count} images of the meta data")
    return list(references)


class _Release:
    """The files of the release, in its zip or unpacked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.zip: ZipFile | None = None
        if path.is_dir():
            if not (path / "SUNRGBD").is_dir():
                raise DataError(f"{path}: expected the folder SUNRGBD of the release in it")
        else:
            try:
                self.zip = ZipFile(existing_file(path, "SUNRGBD.zip, or the folder it was unpacked to"))
            except BadZipFile as error:
                raise DataError(f"{path}: broken or truncated, or no zip file ({error})") from error

    def __enter__(self) -> _Release:
        return self

    def __exit__(self, *_: object) -> None:
        if self.zip is not None:
            self.zip.close()

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes() if self.zip is None else self.zip.read(name)
        except (OSError, KeyError, BadZipFile) as error:
            raise DataError(f"{self.path}: cannot read {name} of it ({error})") from error
