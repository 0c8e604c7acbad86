"""Taskonomy's domains derived from RGB-D images, or from rooms whose geometry is exact.

- normal, reshading and edge_occlusion come of the planes that ``geometry.surface_planes`` fits to depth
  ``without_steps``, so that steps and noise are smoothed, but not edges;
- depth is copied: along the optical axis (depth_zbuffer) and along the ray (depth_euclidean);
- edge_texture comes of the colors.

principal_curvature and the segments are not derived.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from models.data.archives import prepare, write_image
from models.data.contradictions import contradictions, shared_scenes
from models.data.files import Entry, find_samples
from models.data.geometry import Array, Camera, plane_normals, surface_planes, without_steps
from models.data.images import DataError, kind_of, read_stored, size_of
from models.data.layout_file import find_layout
from models.data.layouts import CAMERA, SPLITS, Layout
from models.data.modalities import Reader, configured
from models.data.scenes import camera as room_camera
from models.data.scenes import view
from models.data.sizes import middle
from models.data.survey import SCENES, Overview, Survey, add_files, spread
from models.data.synthetic import check_parameters
from models.data.taskonomy import DEPTH_UNITS, MISSING_DEPTH, PLACEHOLDER, file_of

DERIVED = (
    *("rgb", "normal", "reshading", "depth_euclidean", "depth_zbuffer"),
    *("edge_occlusion", "edge_texture"),
)

# Raise these with every change of what the same images, or the same rooms, give.
_OF_IMAGES, _OF_ROOMS = 3, 1
_SOURCES = "sources.txt"
_HALF_LIFE = 8.0  # meters from the lamp at which its light has halved, Taskonomy's
_SIGMA = 3.0  # the blur before the search for texture edges, in pixels of Taskonomy's 512
_SIDE = 512
_FULL = 2**16 - 1
_FARTHEST = 128.0  # meters, what 16 bits can store
# The widest hole that is a sensor's shadow, as a share of the width: a Kinect's of a thing 0.8 m away.
_SHADOW = 1 / 16
# Pixels and those beside them, along rows and along columns.
_NEIGHBORS = ((np.s_[..., :-1], np.s_[..., 1:]), (np.s_[..., :-1, :], np.s_[..., 1:, :]))


def prepare_domains(
    out: Path | str,
    source: Path | str,
    *,
    layout: str | None = None,
    depth_scale: float | None = None,
    bit_shift: int | None = None,
    camera: Sequence[float] = (),
    processes: int | None = None,
) -> Path:
    """Derive the domains ``DERIVED`` from an RGB-D data set; resumable, and idempotent once done.

    Both splits are written in Taskonomy's layout, numbered from ``point_0_view_0`` on, with ``train.txt`` and
    ``val.txt``; ``sources.txt`` says which image each was.

    Args:
        out: folder to make.
        source: the data set, in any layout of ``models.data.layouts`` that has RGB and depth (or disparity).
        layout, depth_scale, bit_shift, camera: as in ``SegmentationSet``; labels are not looked at.
        processes: how many work at a time; None takes as many as there are processors.

    Returns:
        ``out`` as a Path.

    Raises:
        DataError: a file is missing or broken; depth has no metric scale, or its camera is not known; ``out``
            holds something else.
        ValueError: an argument is out of range, the layout unknown or without depth.
    """
    out, source = Path(out), Path(source)
    known = configured(
        find_layout(source, layout), depth_scale=depth_scale, bit_shift=bit_shift, camera=camera
    )
    reader = Reader(known, ("depth",))
    if "rgb" not in known.files:
        raise DataError(f"{source}: the layout {known.name} has no files of rgb")
    if "depth" in known.files and known.depth_scale is None:
        raise DataError(
            f"{source}: the layout {known.name} gives no scale of depth; give depth_scale (--depth-scale)"
        )
    beside = CAMERA in known.files and known.camera is None
    if known.camera is None and not beside:
        raise DataError(
            f"{source}: the layout {known.name} does not tell the camera; give camera=fx,fy,cx,cy (--camera)"
        )
    files = dict.fromkeys(("rgb", *reader.files(), *((CAMERA,) if beside else ())))
    scenes = {
        split: [(_below(source, entry["rgb"]), entry) for entry in find_samples(known, source, split, files)]
        for split in SPLITS
    }
    _overview(known, {split: [entry for _, entry in those] for split, those in scenes.items()}).show()
    return _prepare(
        out,
        {
            "generator": _OF_IMAGES,
            "source": source.resolve().name,
            "layout": known.name,
            "depth_scale": known.depth_scale,
            "bit_shift": known.bit_shift,
            "camera": None if known.camera is None else list(known.camera),
            **_registration(known),
        },
        scenes,
        partial(_derive_entry, reader),
        processes,
    )


def prepare_synthetic_domains(
    out: Path | str,
    *,
    train: int = 400,
    val: int = 100,
    size: tuple[int, int] = (256, 256),
    seed: int = 0,
    processes: int | None = None,
) -> Path:
    """The domains ``DERIVED`` of the rooms that ``prepare_synthetic`` renders, their geometry exact.

    Args:
        out: folder to make.
        train, val: views in each split.
        size: height and width.
        seed: not negative.
        processes: how many render at a time; None takes as many as there are processors.

    Returns:
        ``out`` as a Path.

    Raises:
        ValueError: an argument is out of range.
        DataError: ``out`` is there and holds something else, or cannot be made.
    """
    parameters = {"train": train, "val": val, "height": size[0], "width": size[1], "seed": seed}
    check_parameters(parameters)
    scenes = {
        split: [(f"room {index} of {split}", (seed, number, index)) for index in range(count)]
        for number, (split, count) in enumerate(zip(SPLITS, (train, val), strict=True))
    }
    record = {"generator": _OF_ROOMS, **parameters}
    return _prepare(Path(out), record, scenes, partial(_derive_room, size), processes)


def derive(rgb: NDArray[np.uint8], depth: Array, planes: Array, camera: Camera) -> dict[str, NDArray[Any]]:
    """A view's files by domain.

    Args:
        rgb: ``[H, W, 3]``, red first.
        depth: ``[H, W]`` in meters, 0 where missing.
        planes: ``[3, H, W]``, as ``surface_planes`` gives them; exact ones give exact domains.
        camera: of images of this size.
    """
    rays = _rays(camera, depth.shape)
    return {
        "rgb": rgb,
        "normal": normal_colors(planes),
        "reshading": reshading(planes, camera),
        "depth_euclidean": stored_depth(depth * _length(rays)),
        "depth_zbuffer": stored_depth(depth),
        "edge_occlusion": occlusion_edges(planes, camera),
        "edge_texture": texture_edges(rgb),
    }


def normal_colors(planes: Array) -> NDArray[np.uint8]:
    """Normals as Taskonomy stores them: red to the right, green down, blue towards the camera.

    Each is 127.5 + 127.5 times the component: a wall straight ahead is (128, 128, 255), a floor has little
    green. Missing ones are (128, 128, 128).
    """
    return np.asarray(np.rint(127.5 + 127.5 * plane_normals(planes) * (1, 1, -1)), np.uint8)


def reshading(planes: Array, camera: Camera) -> NDArray[np.uint8]:
    """The surfaces in one gray, lit by a lamp at the camera: 255 · max(0, n·v) / (1 + (r / 8 m)²).

    n is the normal, v the direction of the lamp, r its distance; Taskonomy's lamp falls off in this way too.
    0 where depth is missing.
    """
    rays = _rays(camera, planes.shape[1:])
    ray, length = _length(rays), _length(planes)
    inverse = _inverse_depth(planes, rays)
    cosine = np.divide(inverse, ray * length, out=np.zeros_like(inverse), where=length > 0)
    distance = np.divide(ray, inverse, out=np.full_like(inverse, np.inf), where=inverse > 0)
    return np.asarray(np.rint(255 * cosine.clip(0, 1) / (1 + (distance / _HALF_LIFE) ** 2)), np.uint8)


def stored_depth(meters: Array) -> NDArray[np.uint16]:
    """Depth as Taskonomy stores it: 512 units per meter; missing (0), and beyond 128 m, the largest value."""
    units = np.rint(meters.astype(np.float64) * DEPTH_UNITS)
    return np.where((meters > 0) & (units < MISSING_DEPTH), units, MISSING_DEPTH).astype(np.uint16)


def occlusion_edges(planes: Array, camera: Camera) -> NDArray[np.uint16]:
    """Edges where one surface hides another: jumps of √depth between neighbors, in Taskonomy's scale.

    Taskonomy applies Sobel's operator to √(stored depth / 65536), which answers to slanted floors as well.
    Here a jump is how far apart the planes of two neighbors are at either of them, whichever is less: on one
    plane, and where two cross between the neighbors, it is 0. Of a pixel's two neighbors along a row the
    larger jump counts, and so along a column; the root mean square of both, Sobel's magnitude, is stored
    times 65535. Both pixels beside a vertical or horizontal edge get its full height, others nothing.

    What a depth sensor's light does not reach lies beside such an edge: a narrow hole is taken to be of the
    farther of the planes beside it in its row, and the edge lies where the nearer one ends. Other holes have
    no edges. Of the edges of measured rooms 3 to 5 per cent are lost then, in place of 36 to 49.
    """
    rays = _rays(camera, planes.shape[1:])
    planes = _without_shadows(planes, rays)
    known = np.asarray(planes.any(axis=0))
    square = np.zeros(known.shape, np.float32)
    for here, there in _NEIGHBORS:
        own, other = _root_depth(planes[here], rays[here]), _root_depth(planes[there], rays[there])
        apart_here = _root_depth(planes[there], rays[here]) - own
        apart_there = other - _root_depth(planes[here], rays[there])
        jump = np.minimum(np.abs(apart_here), np.abs(apart_there))
        jump *= (apart_here * apart_there > 0) & known[here] & known[there]
        larger = np.zeros_like(square)
        larger[here] = jump
        larger[there] = np.maximum(larger[there], jump)
        square += larger * larger
    return np.asarray(np.rint(_FULL * np.sqrt(square / 2)), np.uint16)


def _without_shadows(planes: Array, rays: Array) -> Array:
    """Planes with the narrow holes of every row filled by the farther of the two beside them."""
    known = planes.any(axis=0)
    width = known.shape[1]
    columns = np.arange(width)
    # The nearest known columns; outside the image where there is none.
    left = np.maximum.accumulate(np.where(known, columns, -1), axis=1)
    right = np.minimum.accumulate(np.where(known, columns, width)[:, ::-1], axis=1)[:, ::-1]
    inverse = np.pad(_inverse_depth(planes, rays), ((0, 0), (1, 1)), constant_values=np.inf)
    at_left, at_right = (np.take_along_axis(inverse, side + 1, axis=1) for side in (left, right))
    farther = np.where(at_left < at_right, left, right)
    source = np.where(right - left - 1 <= _SHADOW * width, farther, columns)
    return np.take_along_axis(planes, source[None], axis=2)


def texture_edges(rgb: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """The gradient's magnitude of the blurred gray image, in Taskonomy's scale.

    That is Canny's detector without thinning and thresholds: a Gaussian of σ = 3 pixels, Sobel's operator
    (its weights summing to 1 on either side), the root mean square of both directions, times 65535; gray from
    0 to 1. Pixels are those of images whose shorter side is 512: smaller ones are blurred accordingly less
    and their gradients, a pixel being larger, count accordingly less. A straight edge from black to white
    peaks at 11992 in 512 pixels, at 11097 in 256.
    """
    scale = min(rgb.shape[:2]) / _SIDE
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    blurred = cv2.GaussianBlur(gray, (0, 0), _SIGMA * scale, borderType=cv2.BORDER_REPLICATE)
    along_x, along_y = (
        cv2.Sobel(blurred, cv2.CV_32F, *order, scale=scale / 4, borderType=cv2.BORDER_REPLICATE)
        for order in ((1, 0), (0, 1))
    )
    magnitude = np.sqrt((along_x**2 + along_y**2) / 2)
    return np.asarray(np.rint(_FULL * magnitude).clip(0, _FULL), np.uint16)


def _rays(camera: Camera, size: Sequence[int]) -> Array:
    """Directions (x, y, 1) through the pixels, ``[3, H, W]``."""
    return np.stack(np.broadcast_arrays(*camera.directions(*size), np.float32(1)))


def _length(vectors: Array) -> Array:
    return np.asarray(np.sqrt(np.einsum("ihw,ihw->hw", vectors, vectors)))


def _inverse_depth(planes: Array, rays: Array) -> Array:
    """1/z where rays (x, y, 1) meet planes, ``[3, H, W]`` each."""
    return np.asarray(np.einsum("ihw,ihw->hw", planes, rays))


def _root_depth(planes: Array, rays: Array) -> Array:
    """√(depth / 128 m), at most 1; also where a plane is not met at all."""
    return np.asarray(1 / np.sqrt(np.maximum(_FARTHEST * _inverse_depth(planes, rays), 1)))


def _overview(layout: Layout, scenes: Mapping[str, Sequence[Entry]]) -> Overview:
    """Describe the source; its labels are not looked at."""
    reader = Reader(layout, ("rgb", "depth"))
    lines: list[str] = []
    warnings: list[str] = []
    for split, entries in scenes.items():
        found = Survey(split, layout.list_file(split) or layout.folder("rgb", split), len(entries))
        add_files(found, reader, entries, spread(len(entries), SCENES))
        lines += found.lines()
        warnings += contradictions(found, layout)
    return Overview(
        lines, warnings + shared_scenes(*([each["rgb"] for each in those] for those in scenes.values()))
    )


def _registration(layout: Layout) -> dict[str, Any]:
    """What the record says of depth that another camera measured; nothing of any other."""
    told = layout.modality("depth")
    return {"depth_camera": list(told.camera), "pose": list(told.pose)} if told.camera else {}


def _below(folder: Path, path: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _derive_entry(reader: Reader, paths: Entry) -> dict[str, NDArray[Any]]:
    rgb = read_stored(paths["rgb"])
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise DataError(f"{paths['rgb']}: expected a color image of 8 bits, found {kind_of(rgb)}")
    registered = reader.layout.registered("depth") is not None
    size = rgb.shape[:2] if registered and not reader.layout.crop_to_labels else None
    (image,) = reader.read({name: path for name, path in paths.items() if name != "rgb"}, size)
    depth = image[:, :, 0]
    # The RGB of the paper's archive lacks the frame's white border, its depth does not.
    (height, width), whole = rgb.shape[:2], depth.shape
    larger = reader.layout.crop_to_labels and whole[0] >= height and whole[1] >= width
    if whole != (height, width) and not larger:
        raise DataError(f"{paths['rgb']} is {size_of(rgb)}, but its depth is {size_of(depth)}")
    camera = reader.camera(paths, depth.shape)
    if larger:
        camera = camera.cropped((whole[0] - height) // 2, (whole[1] - width) // 2, height, width)
        depth = middle(depth, height, width)
    return derive(rgb, depth, surface_planes(without_steps(depth), camera), camera)


def _derive_room(size: tuple[int, int], seed: tuple[int, int, int]) -> dict[str, NDArray[Any]]:
    seen = view(size, np.random.default_rng(seed))
    return derive(seen.rgb, seen.depth, seen.planes, room_camera(size))


def _prepare(
    out: Path,
    record: Mapping[str, Any],
    scenes: Mapping[str, Sequence[tuple[str, Any]]],
    make: Callable[[Any], dict[str, NDArray[Any]]],
    processes: int | None,
) -> Path:
    """Write what ``make`` makes of the scenes of every split; a scene is its name and what it is made of."""
    numbered: list[tuple[int, Any]] = []
    lists = {_SOURCES: ""}
    for split, those in scenes.items():
        lists[f"{split}.txt"] = ""
        for point, (name, made_of) in enumerate(those, len(numbered)):
            lists[f"{split}.txt"] += f"{file_of(PLACEHOLDER, point)}\n"
            lists[_SOURCES] += f"point_{point}_view_0\t{name}\n"
            numbered.append((point, made_of))
    return prepare(
        out,
        {"dataset": "domains", "views": len(numbered), **record},
        DERIVED,
        numbered,
        _files,
        partial(_write, out, make),
        lists,
        processes or os.cpu_count() or 1,
    )


def _files(numbered: tuple[int, Any]) -> list[str]:
    return [file_of(domain, numbered[0]) for domain in DERIVED]


def _write(out: Path, make: Callable[[Any], dict[str, NDArray[Any]]], numbered: tuple[int, Any]) -> None:
    point, scene = numbered
    for domain, image in make(scene).items():
        write_image(out / file_of(domain, point), image)
