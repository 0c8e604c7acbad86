"""Depth of one camera as another one sees it.

Camera axes: x to the right, y down, z forward; meters. A pose maps points of the depth camera to the
reference camera: ``X_ref = R X_depth + t``. Cameras are pinholes: images with lens distortion are to be
undistorted before.

Every measured pixel is a small patch of the plane through it and its neighbors. Its footprint in the other
view is filled, of patches that meet the one nearest to the camera is seen, and its depth there is where the
pixel's ray meets the patch: no value is averaged, and planes stay planes at any resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.data.geometry import Array, Camera

Indices = NDArray[np.signedinteger]

_UNSEEN = np.iinfo(np.int64).max
_ROWS = 32  # of an image at a time, so that what is computed of them stays in the cache
_STEEPEST = 0.1  # change of inverse depth from a pixel to the next: more is a step to another surface
_SAME_SURFACE = 0.05  # difference of two depths, as a share, across a gap of a pixel: 8-bit depth has 3 %
_ORTHONORMAL = 1e-3  # what R^T R may differ from the identity by


class Registered(NamedTuple):
    """Depth in the reference camera's view.

    Attributes:
        depth: ``[H, W]`` meters along the reference camera's axis; 0 where nothing measured is seen.
        source: ``[H, W]`` which pixel of the depth image is seen there, counted row by row; -1: none.
    """

    depth: Array
    source: Indices

    def carried(self, image: Array) -> Array:
        """An image ``[h, w, C]`` of the same pixels in that view, ``[H, W, C]``; 0 where none is seen."""
        flat = image.reshape(-1, image.shape[2])
        return np.asarray(flat[self.source] * (self.source >= 0)[:, :, None])


def is_rigid(pose: Sequence[float]) -> bool:
    """Whether a pose, 3x4 row by row, begins with a rotation: orthonormal to 0.001, of determinant 1."""
    rotation = np.array(pose, np.float64).reshape(3, 4)[:, :3]
    off = np.abs(rotation.T @ rotation - np.eye(3)).max()
    return bool(off <= _ORTHONORMAL and np.linalg.det(rotation) > 0)


def register(
    depth: Array, camera: Camera, pose: Sequence[float], reference: Camera, size: tuple[int, int]
) -> Registered:
    """Depth ``[h, w]`` in meters, 0 where missing, as another camera sees it.

    Args:
        depth: along the axis of its own camera.
        camera: that one, in pixels of ``depth``.
        pose: of it in the reference camera's axes: R and t, 3x4 row by row, t in meters.
        reference: the camera whose view is wanted.
        size: height and width of its images.
    """
    rotation, shift = _rotation_and_shift(pose)
    known = depth > 0
    inverse = np.divide(1, depth, out=np.zeros_like(depth), where=known)
    slopes = _slope(inverse, known), _slope(inverse.T, known.T).T
    boxes, distance = _footprints(inverse, slopes, camera, (rotation, shift), reference, size)
    source = _nearest(boxes, distance, known.ravel(), size)
    _close_gaps(source, distance, depth.shape[1])
    planes = _planes(inverse, slopes, camera, (rotation, shift))
    return Registered(_depth_of(planes, source, reference), source)


def _rotation_and_shift(pose: Sequence[float]) -> tuple[Array, Array]:
    """R, the rotation nearest to the one given, and t."""
    matrix = np.array(pose, np.float64).reshape(3, 4)
    left, _, right = np.linalg.svd(matrix[:, :3])
    return (left @ right).astype(np.float32), matrix[:, 3].astype(np.float32)


def _slope(inverse: Array, known: NDArray[np.bool_]) -> Array:
    """The change of inverse depth per column on the pixel's own surface, ``[h, w]``.

    Of the steps to both neighbors the smaller one, so that what lies behind an edge says nothing of the
    surface before it; 0 where one goes up and the other down, or where the smaller one is an edge as well.
    """
    steps = np.full((inverse.shape[0], inverse.shape[1] + 1), np.inf, np.float32)
    np.subtract(inverse[:, 1:], inverse[:, :-1], out=steps[:, 1:-1], where=known[:, 1:] & known[:, :-1])
    before, after = steps[:, :-1], steps[:, 1:]
    before, after = (
        np.where(np.isinf(before), after, before),
        np.where(np.isinf(after), before, after),
    )
    smaller = np.where(np.abs(before) < np.abs(after), before, after)
    usable = (np.abs(smaller) <= _STEEPEST * inverse) & ((before < 0) == (after < 0))
    return np.where(usable, smaller, np.float32(0))


def _footprints(
    inverse: Array,
    slopes: tuple[Array, Array],
    camera: Camera,
    pose: tuple[Array, Array],
    reference: Camera,
    size: tuple[int, int],
) -> tuple[list[Indices], Array]:
    """The part of the view that each patch covers, and its distance.

    Returns:
        ``[h*w]`` each: the first column, the one after the last, and the same of rows; and the distance along
        the reference camera's axis, infinite where any of the patch is behind it.
    """
    rotation, shift = pose
    height, width = inverse.shape
    corners = camera._replace(cx=camera.cx + 0.5, cy=camera.cy + 0.5).directions(height + 1, width + 1)
    turned = [row[0] * corners[0] + row[1] * corners[1] + row[2] for row in rotation]
    columns, rows, in_front = [], [], np.ones(inverse.shape, bool)
    with np.errstate(divide="ignore", invalid="ignore"):
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            here = inverse + (right - np.float32(0.5)) * slopes[0] + (down - np.float32(0.5)) * slopes[1]
            # The corner's point times its inverse depth, so that what is far away is no special case.
            x, y, z = (
                part[down : down + height, right : right + width] + offset * here
                for part, offset in zip(turned, shift, strict=True)
            )
            in_front &= z > 0
            columns.append(x / z * np.float32(reference.fx) + np.float32(reference.cx))
            rows.append(y / z * np.float32(reference.fy) + np.float32(reference.cy))
        x, y = camera.directions(height, width)
        distance = (rotation[2, 0] * x + rotation[2, 1] * y + rotation[2, 2]) / inverse + shift[2]
    distance[~(in_front & (distance > 0))] = np.inf
    boxes = [
        *_limits(columns, size[1], reference.fx / camera.fx),
        *_limits(rows, size[0], reference.fy / camera.fy),
    ]
    return boxes, distance.ravel()


def _limits(corners: Sequence[Array], length: int, magnification: float) -> tuple[Indices, Indices]:
    """The first pixel of a side whose center the patches cover, and the one after the last."""
    first, end = (np.ceil(reduce(extreme, corners)) for extreme in (np.minimum, np.maximum))
    # Only patches that almost touch the camera cover more, as those of depth in a wrong unit do.
    most = np.float32(2 * math.ceil(magnification) + 2)
    with np.errstate(invalid="ignore"):  # of what is behind the camera, and left out
        first += np.floor(np.maximum(end - first - most, 0) / 2)
        np.minimum(end, first + most, out=end)
        return first.clip(0, length).astype(np.int32).ravel(), end.clip(0, length).astype(np.int32).ravel()


def _nearest(
    boxes: Sequence[Indices], distance: Array, known: NDArray[np.bool_], size: tuple[int, int]
) -> Indices:
    """The nearest of the patches that cover each pixel, ``[H, W]``; -1 where none does."""
    left, right, top, bottom = boxes
    patches = np.flatnonzero(known & np.isfinite(distance) & (right > left) & (bottom > top))
    first = top[patches].astype(np.int64) * size[1] + left[patches]
    down, across = (bottom - top)[patches], (right - left)[patches]
    widest = int(across.max(initial=0)) + 1
    shapes = down * widest + across
    # Positive floating point is ordered as its bits are: one minimum of both finds the nearest and its name.
    keys = distance[patches].view(np.int32).astype(np.int64) << 32 | patches
    seen = np.full(size[0] * size[1], _UNSEEN)
    for shape in np.flatnonzero(np.bincount(shapes)):  # a handful: neighbors are magnified alike
        members = np.flatnonzero(shapes == shape)
        pixels = np.arange(shape // widest)[:, None] * size[1] + np.arange(shape % widest)
        covered = (first[members, None] + pixels.ravel()).ravel()
        np.minimum.at(seen, covered, np.repeat(keys[members], pixels.size))
    # The lower half with its sign, which is -1 of what was not seen.
    seen <<= 32
    seen >>= 32
    return seen.reshape(size)


def _close_gaps(source: Indices, distance: Array, width: int) -> None:
    """Let the farther of two patches of one surface cover the single pixel between them, in place.

    Noise of depth moves neighboring patches apart. What lies between surfaces, or between pixels that are no
    neighbors in the depth image, stays unseen.
    """
    flat = source.reshape(-1)
    for rows, columns in ((0, 1), (1, 0)):
        seen = source >= 0
        height, length = source.shape[0] - 2 * rows, source.shape[1] - 2 * columns
        before, here, after = (
            seen[rows * step : rows * step + height, columns * step : columns * step + length]
            for step in range(3)
        )
        y, x = np.divmod(np.flatnonzero(before & after & ~here), max(length, 1))
        gaps, step = (y + rows) * source.shape[1] + x + columns, rows * source.shape[1] + columns
        one, other = flat[gaps - step], flat[gaps + step]
        apart = np.maximum(np.abs(one // width - other // width), np.abs(one % width - other % width))
        near, far = np.minimum(distance[one], distance[other]), np.maximum(distance[one], distance[other])
        same = (apart <= 1) & (far - near <= _SAME_SURFACE * near)
        flat[gaps[same]] = np.where(distance[one] < distance[other], other, one)[same]


def _planes(
    inverse: Array, slopes: tuple[Array, Array], camera: Camera, pose: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """The components of n, ``[h*w]`` each, of every patch's plane n·P = 1 in the reference camera's axes."""
    rotation, shift = pose
    x, y = camera.directions(*inverse.shape)
    along_x, along_y = slopes[0] * np.float32(camera.fx), slopes[1] * np.float32(camera.fy)
    normal = (along_x, along_y, inverse - along_x * x - along_y * y)
    turned = [sum(part * each for part, each in zip(row, normal, strict=True)) for row in rotation]
    scale = 1 + sum(offset * each for offset, each in zip(shift, turned, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        return tuple((each / scale).ravel() for each in turned)


def _depth_of(planes: tuple[Array, Array, Array], source: Indices, reference: Camera) -> Array:
    """Depth of the patches where rays of the reference camera meet them, 0 where none is seen."""
    x, y = reference.directions(*source.shape)
    depth = np.zeros(source.shape, np.float32)
    for start in range(0, len(source), _ROWS):
        rows = slice(start, start + _ROWS)
        some = source[rows]
        inverse = planes[0].take(some, mode="clip") * x
        inverse += planes[1].take(some, mode="clip") * y[rows]
        inverse += planes[2].take(some, mode="clip")
        np.divide(1, inverse, out=depth[rows], where=(some >= 0) & (inverse > 0))
    return depth
