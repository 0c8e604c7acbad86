"""The files of one scene in one view and one size: whose, by which camera, and what is carried over."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from models.data.geometry import Camera
from models.data.images import DataError, Frame, Image, size_of
from models.data.layouts import CAMERA, LABELS, Layout
from models.data.registration import Registered, register
from models.data.sizes import Reference, Size, cropped, fitted, is_strict

Paths = Mapping[str, Path | Frame]


class File(NamedTuple):
    """The values of one file: as stored, and as a network is fed them."""

    stored: NDArray[Any]
    image: Image
    metric: bool = False  # whether it is depth in meters, or disparity


def reference(
    layout: Layout, names: Iterable[str], files: Mapping[str, File], paths: Paths, size: Sequence[int] | None
) -> Reference:
    """What tells the size of a scene's images: its labels of ``size`` or, without them, one of its files.

    Of those named the first that must be of its labels' size, as color images must, so that images are made
    without labels as they are with them. Where images are cropped, the smallest.
    """
    if size is not None:
        height, width = size
        return Reference(paths.get(LABELS, "labels"), (height, width), is_labels=True)
    names = list(names)
    names = [name for name in names if not layout.registered(name)] or names

    def key(name: str) -> tuple[int, ...]:
        told = layout.modality(name)
        height, width = files[name].image.shape[:2]
        pixels = height * width if layout.crop_to_labels and told.size != "any" else 0
        return told.size == "any", pixels, told.size != "same", not is_strict(told)

    first = min(names, key=key)
    height, width = files[first].image.shape[:2]
    return Reference(paths[first], (height, width))


def of_size(
    layout: Layout, source: str, image: Image, kind: str | None, path: Path | Frame, to: Reference
) -> Image:
    """An image made of the file ``source`` in the reference's size: resized, or cropped by such layouts.

    Raises:
        DataError: neither is allowed.
    """
    told = layout.modality(source)
    if layout.crop_to_labels and told.size != "any":
        return cropped(image, to.size, path, to.file, to.is_labels)
    made = fitted(image, kind, told, path, to)
    if not to.is_labels and told.size is None and made.shape != image.shape:
        # Not said at the start, as of a data set: a file is given by itself.
        warnings.warn(resizing(source, image, to), stacklevel=4)
    return made


def resizing(name: str, image: NDArray[Any], to: Reference) -> str:
    """``depth is 256x192 and is resized to 1920x1440``."""
    return f"{name} is {size_of(image)} and is resized to {to.size[1]}x{to.size[0]}"


def registered(
    layout: Layout, files: Mapping[str, File], paths: Paths, size: Sequence[int] | None
) -> dict[str, File]:
    """The files of a camera with a pose of its own, as the camera of the images beside it sees them.

    Raises:
        DataError: depth is not in meters or of another format than its camera; the other camera, or the size
            of its images, is not known; a file is of another size than the depth that it is registered with.
    """
    told = {name: layout.registered(name) for name in files}
    depths = {name: depth for name, depth in told.items() if depth is not None and depth in files}
    seen = {depth: _seen(layout, depth, files, paths, size) for depth in dict.fromkeys(depths.values())}
    found = {}
    for name, depth in depths.items():
        image = seen[depth].depth[:, :, None]
        if name != depth:
            own, whole = files[name].image, files[depth].image
            if own.shape[:2] != whole.shape[:2]:
                raise DataError(
                    f"{paths[name]} is {size_of(own)}, but {paths[depth]}, whose pixels are its own as"
                    f" registered_with says, is {size_of(whole)}"
                )
            image = seen[depth].carried(own)
        found[name] = files[name]._replace(image=image)
    return found


def _seen(
    layout: Layout, name: str, files: Mapping[str, File], paths: Paths, size: Sequence[int] | None
) -> Registered:
    """Depth in the view of the camera beside it."""
    told, file, path = layout.modality(name), files[name], paths[name]
    if not file.metric:
        raise DataError(
            f"{path}: {name} has a pose, which needs meters, and the layout {layout.name} has no scale; give"
            " one with data.depth_scale"
        )
    camera = known_camera(layout, paths, path)
    assert told.camera is not None  # read_layout refuses a pose without it
    height, width = file.image.shape[:2]
    try:
        own = told.camera.scaled(height, width)
    except ValueError as error:
        raise DataError(f"{path}: {error}; correct camera of {name} in layout.json") from None
    view = _view_of(layout, camera, files, paths, size)
    if view is None:
        raise DataError(
            f"{path}: the size of the images that {name} is registered to is not known; give one of them, or"
            " camera as fx, fy, cx, cy, width, height in layout.json"
        )
    return register(file.image[:, :, 0], own, told.pose, camera, view)


def _view_of(
    layout: Layout, camera: Camera, files: Mapping[str, File], paths: Paths, size: Sequence[int] | None
) -> Size | None:
    """Height and width of the images of the reference camera: told, or those of an image of it."""
    if camera.size is not None:
        return camera.size[1], camera.size[0]
    if beside := [name for name in files if not layout.registered(name)]:
        return reference(layout, beside, files, paths, None).size
    return None if size is None else (size[0], size[1])


def known_camera(layout: Layout, paths: Paths, path: Path | Frame) -> Camera:
    """The camera of a scene's images: of a file of its own, or the layout's.

    Raises:
        DataError: it is not known; ``path`` is named.
    """
    camera = layout.camera
    if CAMERA in paths:
        file = paths[CAMERA]
        if isinstance(file, Frame):
            raise DataError(f"{file}: expected the path of a camera's file, got an array")
        camera = read_camera(file)
    if camera is None:
        raise DataError(
            f"{path}: its camera is not known to the layout {layout.name}; give camera=fx,fy,cx,cy in pixels"
        )
    return camera


def read_camera(path: Path) -> Camera:
    """A camera from Cityscapes' JSON, or from a text file of the nine numbers of its matrix, row by row.

    Raises:
        DataError: there is no such file, or it is neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            found = json.loads(text)
            inner = found["intrinsic"]
            fx, fy, cx, cy = (float(inner[name]) for name in ("fx", "fy", "u0", "v0"))
            return Camera(fx, fy, cx, cy, baseline=float(found["extrinsic"]["baseline"]))
        fx, _, cx, _, fy, cy, *_ = map(float, text.split())
        return Camera(fx, fy, cx, cy)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected a camera's 3x3 matrix, or intrinsic and extrinsic as Cityscapes has them"
            f" ({error})"
        ) from error
