"""The files of one scene to a network's inputs: read, or computed from depth."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.data.geometry import Camera, hha, points, surface_normals
from models.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataError,
    DepthScale,
    Frame,
    Image,
    color_image,
    depth_image,
    disparity_image,
    intensity_image,
    is_any_of,
    is_gray,
    is_metric,
    normals_image,
    points_image,
    read_label_values,
    read_stored,
)
from models.data.kinds import SPARSE, has_holes, is_mixed, kind_by_name
from models.data.layouts import CAMERA, LABELS, Layout
from models.data.sizes import Reference
from models.data.views import File, known_camera, of_size, reference, registered
from models.networks.messages import suggest

FROM_DEPTH = ("depth", "disparity", "hha", "normals", "points")
MODALITIES = ("rgb", *FROM_DEPTH)
FLOORS = (38, 218)  # HHA's third channel on floors: Gupta et al.'s, and that of older versions

# Disparity in pixels that counts as 1 where a stereo camera measured it, so that inputs are of that order.
_PIXELS = 64.0
_SCENES_FOR_KIND = 4


@dataclass(frozen=True)
class Reader:
    """Makes the images of ``modalities`` from a scene's files.

    - ``rgb``: normalized by ``mean`` and ``std``; 3 channels
    - ``depth``: meters, or 0 ... 1 where the layout knows no scale, less ``depth_mean`` and divided by
      ``depth_std``; 1 channel
    - ``disparity``: 1 / meters, or pixels / 64 where a file holds disparity; 1 channel
    - ``hha``: ``geometry.hha``, or a file of it, normalized as RGB is; 3 channels
    - ``normals``: ``geometry.surface_normals``; 3 channels
    - ``points``: ``geometry.points``, or a file of them, in meters; 3 channels. They stay in the axes of the
      camera that measured them when images are cropped, resized and mirrored, so that distances between
      them stay right
    - any other name: a file of the layout, read by its kind (``Layout.modality``); without one, three
      channels are color and one is intensity

    Missing values are 0 in all of them. Of a file of its own a modality is read, else computed. Files of a
    camera with a pose (``Modality``) are brought into the view of the others first; ``hha``, ``normals`` and
    ``points`` are computed of depth as large as it is stored, or as it is registered, and resized then.

    Args:
        layout: what the files hold.
        modalities: names, in the order of the images.
        mean, std: of red, green and blue from 0 to 1; ImageNet's unless given.
        without: modalities that are never read, as if there were no files of them.
        depth_mean, depth_std: of modalities of the kind depth, in their unit.

    Raises:
        ValueError: a modality that the layout has no files for; a pose to a camera that nobody tells.
    """

    layout: Layout
    modalities: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    without: tuple[str, ...] = ()
    depth_mean: float = 0.0
    depth_std: float = 1.0

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
        kinds = self.kinds()
        if (self.depth_mean, self.depth_std) != (0, 1) and "depth" not in kinds and None not in kinds:
            raise ValueError(
                f"depth_mean and depth_std are of depth, none of {','.join(self.modalities)}: leave them out"
            )
        depths = self._registered()
        if depths and self.layout.camera is None and CAMERA not in self.layout.files:
            raise ValueError(
                f"camera is not known, to whose images the pose of {depths[0]} leads: give camera=fx,fy,cx,cy"
                " in pixels of the color images"
            )

    def available(self) -> list[str]:
        """The modalities that the layout's files give."""
        files = [kind for kind in self.layout.files if kind not in (LABELS, CAMERA)]
        computed = FROM_DEPTH if {"depth", "disparity"} & set(files) else ()
        return [*files, *(name for name in computed if name not in files)]

    def files(self) -> tuple[str, ...]:
        """The files that are read, by what they hold: modalities, and ``camera``."""
        files = dict.fromkeys([*map(self._source, self._wanted()), *self._registered()])
        computed = [modality for modality in self._wanted() if self._source(modality) != modality]
        beside = CAMERA in self.layout.files and self.layout.camera is None
        needed = self._registered() or set(computed) - {"disparity"}
        return (*files, CAMERA) if beside and needed else tuple(files)

    def _registered(self) -> list[str]:
        """The depth by whose pose files are brought into the others' view."""
        depths = (self.layout.registered(self._source(modality)) for modality in self._wanted())
        return list(dict.fromkeys(depth for depth in depths if depth is not None))

    def absent(self, paths: Collection[str]) -> tuple[int, ...]:
        """The numbers of the modalities that files of these kinds do not give."""
        return tuple(m for m, name in enumerate(self.modalities) if not self._is_given(name, paths))

    def _is_given(self, name: str, paths: Collection[str]) -> bool:
        """Whether there is the file of a modality, and the depth by whose pose it is seen, if it is."""
        source = self._source(name)
        depth = self.layout.registered(source)
        return name not in self.without and source in paths and (depth is None or depth in paths)

    def _wanted(self) -> list[str]:
        return [modality for modality in self.modalities if modality not in self.without]

    def kinds(self) -> tuple[str | None, ...]:
        """The kinds by which ``models.data.kinds`` resizes and mirrors; None where only files tell."""
        return tuple(map(self._input_kind, self.modalities))

    def _input_kind(self, name: str) -> str | None:
        if self._computed(name):
            return kind_by_name(name)
        kind = self._kind(name)
        # What a camera beside it cannot see has no value.
        return SPARSE if is_mixed(kind) and self.layout.registered(name) else kind

    def has_holes(self, name: str) -> bool:
        """Whether a modality may have missing pixels, which are 0; of others 0 is a value."""
        return has_holes(self._kind(name))

    def _kind(self, name: str) -> str | None:
        modality = self.layout.modality(name)
        # Without a range 0 is measured, unless it is said to be missing.
        low, high = modality.range or (0, 0)
        is_sparse = bool(modality.missing) or not min(low, high) <= 0 <= max(low, high)
        return SPARSE if is_mixed(modality.kind) and is_sparse else modality.kind

    def _computed(self, modality: str) -> bool:
        return self._source(modality) != modality

    def _source(self, modality: str) -> str:
        files = self.layout.files
        return modality if modality in files else "depth" if "depth" in files else "disparity"

    def read(self, paths: Mapping[str, Path | Frame], size: Sequence[int] | None = None) -> tuple[Image, ...]:
        """The images, all of one size; one channel of zeros of each modality, but not all, without a file.

        Args:
            paths: by what they hold, as ``files`` names them; that of ``labels`` for messages.
            size: height and width of the scene's labels; None: there are none, and an image tells the size
                (``views.reference``). Only a layout that says so has images cropped to it.

        Raises:
            DataError: a file is broken, not what the layout says, or of a size that is not to be resized;
                what is to be computed or registered needs a camera or a scale that is not known.
        """
        files = {
            name: self.read_file(name, path) for name, path in paths.items() if name not in (CAMERA, LABELS)
        }
        files |= registered(self.layout, files, paths, size)
        absent = self.absent(paths)
        there = [modality for m, modality in enumerate(self.modalities) if m not in absent]
        images = [
            files[modality].image if modality in files else self._compute(modality, files, paths)
            for modality in there
        ]
        to, kinds = self.reference(files, paths, size), dict(zip(self.modalities, self.kinds(), strict=True))
        made = {
            name: self._normalized(
                of_size(self.layout, source := self._source(name), image, kinds[name], paths[source], to),
                kinds[name],
            )
            for name, image in zip(there, images, strict=True)
        }
        nothing = np.zeros((*to.size, 1), np.float32)
        return tuple(made.get(modality, nothing) for modality in self.modalities)

    def _normalized(self, image: Image, kind: str | None) -> Image:
        """Depth by its mean and deviation; what is missing stays 0, and other kinds are as they were read."""
        if kind != "depth" or (self.depth_mean, self.depth_std) == (0, 1):
            return image
        scaled = (image - np.float32(self.depth_mean)) / np.float32(self.depth_std)
        return np.asarray(np.where(image == 0, 0, scaled), np.float32)

    def reference(
        self, files: Mapping[str, File], paths: Mapping[str, Path | Frame], size: Sequence[int] | None = None
    ) -> Reference:
        """What the size of a scene's images is that of; see ``views.reference``."""
        absent = self.absent(paths)
        there = [self._source(name) for m, name in enumerate(self.modalities) if m not in absent]
        return reference(self.layout, dict.fromkeys(there), files, paths, size)

    def read_file(self, name: str, path: Path | Frame) -> File:
        """The file of one modality.

        Raises:
            DataError: it is broken, or not what the layout says.
        """
        layout, modality = self.layout, self.layout.modality(name)
        if modality.kind == "categorical":
            # Several channels have no palette whose indices could be lost.
            several = bool(modality.channels)
            stored = read_stored(path) if several else read_label_values(path).values
            stored = _picked(path, stored, modality.channels)
            return File(stored, intensity_image(path, stored, modality.range, modality.missing))
        stored = _picked(path, read_stored(path), modality.channels)
        if modality.kind == "disparity":
            return File(stored, disparity_image(path, stored) / np.float32(_PIXELS), metric=True)
        if modality.kind == "depth":
            image = depth_image(path, stored, layout.depth_scale, layout.bit_shift, modality.missing)
            return File(stored, image, is_metric(stored, layout.depth_scale))
        if modality.kind == "intensity" or (modality.kind is None and stored.ndim == 2):
            return File(stored, intensity_image(path, stored, modality.range, modality.missing))
        if modality.kind == "normals":
            image = normals_image(path, stored)
        elif modality.kind == "points":
            image = points_image(path, stored)
        else:
            image = color_image(path, stored, kind_by_name(name) is None, self.mean, self.std)
        if modality.missing:
            absent = is_any_of(stored, modality.missing)
            image[absent.reshape(*stored.shape[:2], -1).all(axis=-1)] = 0
        return File(stored, image)

    def _compute(self, modality: str, files: Mapping[str, File], paths: Mapping[str, Path | Frame]) -> Image:
        source = self._source(modality)
        (_, image, metric), path = files[source], paths[source]
        depth = image[:, :, 0]
        if not metric:
            kind = self.layout.modality(source).kind
            raise DataError(
                f"{path}: {modality} needs depth in meters, and the layout {self.layout.name} has no scale;"
                " give one with data.depth_scale"
                if kind == "depth"
                else f"{path}: {modality} needs depth in meters, but {source} is of the kind {kind}"
            )
        if modality == "disparity":
            return _inverse(depth)[:, :, None]
        camera = self.camera(paths, depth.shape)
        if source == "disparity":
            depth = _from_disparity(depth * np.float32(_PIXELS), camera, path)
        if modality == "depth":
            return depth[:, :, None]
        if modality == "normals":
            return surface_normals(depth, camera)
        if modality == "points":
            return points(depth, camera)
        return self._as_color(hha(depth, camera))

    def _as_color(self, encoded: Image) -> Image:
        """HHA from 0 to 255 normalized as colors are; missing values, all 0, become 0."""
        known = encoded.any(axis=-1, keepdims=True)
        if self.layout.hha_floor == FLOORS[1]:
            encoded[:, :, 2] = sum(FLOORS) - encoded[:, :, 2]
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return np.asarray((encoded / 255 - mean) / std * known, np.float32)

    def camera(self, paths: Mapping[str, Path | Frame], size: Sequence[int]) -> Camera:
        """The camera of a scene's images of ``size``, height and width.

        Raises:
            DataError: it is not known, or that of another format.
        """
        path = paths["depth" if "depth" in paths else "disparity"]
        camera = known_camera(self.layout, paths, path)
        try:
            return camera.scaled(*size)
        except ValueError as error:
            raise DataError(f"{path}: {error}; give camera=fx,fy,cx,cy in pixels") from None


def with_kinds(
    layout: Layout, scenes: Sequence[Mapping[str, Path]], modalities: Sequence[str]
) -> tuple[Layout, tuple[str, ...]]:
    """A layout whose modalities all have a kind: where none is given, the files of some scenes tell it.

    A modality without one is color if any of them is, and intensity else: gray means the same, in one channel
    as in three.

    Args:
        layout: of the scenes.
        scenes: by what they hold the files of each, which need not be of all modalities.
        modalities: that are to have a kind.

    Returns:
        The layout, and which of those modalities are gray but stored in three channels.

    Raises:
        DataError: a file is broken.
    """
    told, gray_in_color = dict(layout.modalities), []
    for name in modalities:
        modality = layout.modality(name)
        every = [scene[name] for scene in scenes if name in scene]
        if name in layout.files and modality.kind is None and every:
            files = every[:: max(1, len(every) // _SCENES_FOR_KIND)][:_SCENES_FOR_KIND]
            stored = [_picked(path, read_stored(path), modality.channels) for path in files]
            colored = any(image.ndim == 3 and image.shape[2] == 3 and not is_gray(image) for image in stored)
            told[name] = replace(modality, kind="color" if colored else "intensity")
            if not colored and any(image.ndim == 3 for image in stored):
                gray_in_color.append(name)
    return replace(layout, modalities=told), tuple(gray_in_color)


def configured(
    layout: Layout,
    *,
    depth_scale: DepthScale = None,
    bit_shift: int | None = None,
    camera: Sequence[float] = (),
    label_offset: int | None = None,
    hha_floor: int | None = None,
) -> Layout:
    """A layout with what the caller knows better; None and empty leave it as it is.

    Raises:
        ValueError: a value is out of range.
    """
    if depth_scale is not None and not (isinstance(depth_scale, int | float) and 0 < depth_scale < math.inf):
        raise ValueError(f"depth_scale must be positive and finite, got {depth_scale}")
    if bit_shift is not None and not 0 <= bit_shift < 16:
        raise ValueError(f"bit_shift must be 0 to 15, got {bit_shift}")
    if label_offset is not None and label_offset < 0:
        raise ValueError(f"label_offset must not be negative, got {label_offset}")
    if camera and (len(camera) != 4 or not all(map(math.isfinite, camera)) or min(camera[:2]) <= 0):
        raise ValueError(f"camera must be fx,fy,cx,cy in pixels, got {','.join(map(str, camera))}")
    if hha_floor is not None and hha_floor not in FLOORS:
        raise ValueError(f"hha_floor must be {FLOORS[0]} or {FLOORS[1]}, got {hha_floor}")
    known: dict[str, Any] = {
        "depth_scale": depth_scale,
        "bit_shift": bit_shift,
        "label_offset": label_offset,
        "hha_floor": hha_floor,
    }
    if camera:
        fx, fy, cx, cy = camera
        known["camera"] = Camera(fx, fy, cx, cy)
    return replace(layout, **{name: value for name, value in known.items() if value is not None})


def _from_disparity(disparity: Image, camera: Camera, path: Path | Frame) -> Image:
    """Meters, of pixels."""
    if camera.baseline is None:
        raise DataError(f"{path}: meters cannot be told from disparity without a camera file's baseline")
    return np.asarray(_inverse(disparity) * np.float32(camera.fx * camera.baseline))


def _inverse(image: Image) -> Image:
    return np.divide(1, image, out=np.zeros_like(image), where=image > 0)


def _picked(path: Path | Frame, stored: NDArray[Any], channels: Sequence[int]) -> NDArray[Any]:
    """Some channels of what a file holds; a single one as ``[H, W]``."""
    if not channels:
        return stored
    count = 1 if stored.ndim == 2 else stored.shape[2]
    if max(channels) >= count:
        raise DataError(
            f"{path}: layout.json reads its channels {', '.join(map(str, channels))}, counted from"
            f" 0, but it has {count}"
        )
    picked = stored.reshape(*stored.shape[:2], count)[:, :, list(channels)]
    return np.ascontiguousarray(picked[:, :, 0] if len(channels) == 1 else picked)
