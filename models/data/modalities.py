"""The files of one scene to a network's inputs: read, or computed from depth."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.data.geometry import Camera, hha, surface_normals
from models.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataError,
    Frame,
    read_depth,
    read_disparity,
    read_normals,
    read_picture,
    read_rgb,
    size_of,
)
from models.data.layouts import CAMERA, LABELS, Layout
from models.messages import suggest

MODALITIES = ("rgb", "depth", "disparity", "hha", "normals")
FROM_DEPTH = ("depth", "disparity", "hha", "normals")
# Nothing lies between an object and the wall behind it, and 0 (missing) is no distance: never mixed.
UNMIXED = frozenset({*FROM_DEPTH, "depth_raw"})

# Disparity in pixels that counts as 1 where a stereo camera measured it, so that inputs are of that order.
_PIXELS = 64.0

Image = NDArray[np.float32]  # [H, W, C]


@dataclass(frozen=True)
class Reader:
    """Makes the images of ``modalities`` from a scene's files.

    - ``rgb``: normalised by ImageNet's mean and standard deviation; 3 channels
    - ``depth``: metres, or 0 ... 1 where the layout knows no scale; 1 channel
    - ``disparity``: 1 / metres, or pixels / 64 where a file holds disparity; 1 channel
    - ``hha``: ``geometry.hha``, or a file of it, normalised as RGB is; 3 channels
    - ``normals``: ``geometry.surface_normals``; 3 channels
    - any other name: a file of the layout, colour as RGB, one channel scaled by the layout's ``ranges``

    Missing values are 0 in all of them. Of a file of its own a modality is read, else computed.

    Args:
        layout: what the files hold.
        modalities: names, in the order of the images.

    Raises:
        ValueError: a modality that the layout has no files for.
    """

    layout: Layout
    modalities: tuple[str, ...]

    def __post_init__(self) -> None:
        known = self.available()
        for modality in self.modalities:
            if modality not in known:
                raise ValueError(
                    f"unknown modality {modality!r}: expected {', '.join(known)} of the layout"
                    f" {self.layout.name}{suggest(modality, known)}"
                )
        if not self.modalities:
            raise ValueError(f"modalities is empty: expected some of {', '.join(known)}")

    def available(self) -> list[str]:
        """The modalities that the layout's files give."""
        files = [kind for kind in self.layout.files if kind not in (LABELS, CAMERA)]
        computed = FROM_DEPTH if {"depth", "disparity"} & set(files) else ()
        return [*files, *(name for name in computed if name not in files)]

    def kinds(self) -> tuple[str, ...]:
        """The kinds of files that are read."""
        kinds = dict.fromkeys(self._source(modality) for modality in self.modalities)
        computed = [modality for modality in self.modalities if self._source(modality) != modality]
        beside = CAMERA in self.layout.files and self.layout.camera is None
        return (*kinds, CAMERA) if beside and set(computed) - {"disparity"} else tuple(kinds)

    def _source(self, modality: str) -> str:
        files = self.layout.files
        return modality if modality in files else "depth" if "depth" in files else "disparity"

    def read(self, paths: Mapping[str, Path | Frame]) -> tuple[Image, ...]:
        """The images, all of one size.

        Args:
            paths: by kind of file, as ``kinds`` names them.

        Raises:
            DataError: a file is broken, not what the layout says, or of another size than the first; what is
                to be computed needs a camera or a scale that is not known.
        """
        files = {kind: self._read(kind, path) for kind, path in paths.items() if kind != CAMERA}
        (first, image), *others = files.items()
        for kind, other in others:
            if other.shape[:2] != image.shape[:2]:
                raise DataError(f"{paths[kind]} is {size_of(other)}, but {paths[first]} is {size_of(image)}")
        return tuple(
            files[modality] if modality in files else self._compute(modality, files, paths)
            for modality in self.modalities
        )

    def _read(self, kind: str, path: Path | Frame) -> Image:
        layout = self.layout
        if kind in ("rgb", "hha"):
            return read_rgb(path)
        if kind in ("depth", "depth_raw"):
            return read_depth(path, layout.depth_scale, layout.bit_shift)
        if kind == "disparity":
            return read_disparity(path) / np.float32(_PIXELS)
        if kind == "normals":
            return read_normals(path)
        return read_picture(path, layout.ranges.get(kind))

    def _compute(self, modality: str, files: Mapping[str, Image], paths: Mapping[str, Path | Frame]) -> Image:
        source = self._source(modality)
        depth, path = files[source][:, :, 0], paths[source]
        if source == "depth" and self.layout.depth_scale is None:
            raise DataError(
                f"{path}: {modality} needs depth in metres, and the layout {self.layout.name} has no scale;"
                " give one with data.depth_scale"
            )
        if modality == "disparity":
            return _inverse(depth)[:, :, None]
        camera = self.camera(paths, depth.shape)
        if source == "disparity":
            depth = _from_disparity(depth * np.float32(_PIXELS), camera, path)
        if modality == "depth":
            return depth[:, :, None]
        return surface_normals(depth, camera) if modality == "normals" else _as_picture(hha(depth, camera))

    def camera(self, paths: Mapping[str, Path | Frame], size: Sequence[int]) -> Camera:
        """The camera of a scene's pictures of ``size``, height and width.

        Raises:
            DataError: it is not known, or that of another format.
        """
        path = paths["depth" if "depth" in paths else "disparity"]
        camera = self.layout.camera
        if CAMERA in paths:
            camera = read_camera(paths[CAMERA])
        if camera is None:
            raise DataError(
                f"{path}: its camera is not known to the layout {self.layout.name}; give"
                " camera=fx,fy,cx,cy in pixels"
            )
        try:
            return camera.scaled(*size)
        except ValueError as error:
            raise DataError(f"{path}: {error}; give camera=fx,fy,cx,cy in pixels") from None


def configured(
    layout: Layout,
    *,
    depth_scale: float | None = None,
    bit_shift: int | None = None,
    camera: Sequence[float] = (),
    label_offset: int | None = None,
) -> Layout:
    """A layout with what the caller knows better; None and empty leave it as it is.

    Raises:
        ValueError: a value is out of range.
    """
    if depth_scale is not None and not 0 < depth_scale < math.inf:
        raise ValueError(f"depth_scale must be positive and finite, got {depth_scale}")
    if bit_shift is not None and not 0 <= bit_shift < 16:
        raise ValueError(f"bit_shift must be 0 to 15, got {bit_shift}")
    if label_offset is not None and label_offset < 0:
        raise ValueError(f"label_offset must not be negative, got {label_offset}")
    if camera and (len(camera) != 4 or not all(map(math.isfinite, camera)) or min(camera[:2]) <= 0):
        raise ValueError(f"camera must be fx,fy,cx,cy in pixels, got {','.join(map(str, camera))}")
    known = {
        "depth_scale": depth_scale,
        "bit_shift": bit_shift,
        "camera": Camera(*camera) if camera else None,
        "label_offset": label_offset,
    }
    return replace(layout, **{name: value for name, value in known.items() if value is not None})


def read_camera(path: Path) -> Camera:
    """A camera from Cityscapes' JSON, or from a text file of the nine numbers of its matrix, row by row.

    Raises:
        DataError: there is no such file, or it is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
            inner = found["intrinsic"]
            numbers = [float(inner[name]) for name in ("fx", "fy", "u0", "v0")]
            return Camera(*numbers, baseline=float(found["extrinsic"]["baseline"]))
        fx, _, cx, _, fy, cy, *_ = map(float, text.split())
        return Camera(fx, fy, cx, cy)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected a camera's 3x3 matrix, or intrinsic and extrinsic as Cityscapes has them"
            f" ({error})"
        ) from error


def _from_disparity(disparity: Image, camera: Camera, path: Path | Frame) -> Image:
    """Metres, of pixels."""
    if camera.baseline is None:
        raise DataError(f"{path}: metres cannot be told from disparity without a camera file's baseline")
    return _inverse(disparity) * np.float32(camera.fx * camera.baseline)


def _inverse(image: Image) -> Image:
    return np.divide(1, image, out=np.zeros_like(image), where=image > 0)


def _as_picture(encoded: Image) -> Image:
    """Values from 0 to 255 normalised as those of a colour picture; missing ones, all 0, become 0."""
    known = encoded.any(axis=-1, keepdims=True)
    return ((encoded / 255 - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD) * known).astype(np.float32)
