"""Geometry from depth: normals, gravity, height above ground, and HHA of them.

Camera axes: x to the right, y down, z forward; meters. Missing depth is 0, and so is all that follows from
it.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

# The radius of the windows that planes are fitted in, as a share of the width: 10 pixels of 640. Floors in
# NYUDv2 come out at 172 degrees with gravity in the median, with 4 pixels at 161: the steps of a Kinect.
_RADIUS = 1 / 64
_BLURS = (1 / 48, 1 / 96, 1 / 192, 1 / 384)  # one after another, sigmas as shares of the width
_COARSEST = 0.1  # meters; values that differ by more are different surfaces, not steps of storage
_LEAST = 0.3  # share of a window's pixels that must be known
_GAIN = 0.5  # a window off the center is taken where its error is less than so much of the centerd one's
_LOWEST = -0.9  # the ground is at least so far below the camera,
_ASSUMED = -1.3  # or else not in view and taken to be here (both Gupta et al.'s)


class Camera(NamedTuple):
    """A pinhole camera: focal lengths and principal point in pixels, the first pixel's center at 0."""

    fx: float
    fy: float
    cx: float
    cy: float
    size: tuple[int, int] | None = None  # width and height of its images; None: whatever they have
    baseline: float | None = None  # distance in meters to the second camera of a stereo pair

    def scaled(self, height: int, width: int) -> Camera:
        """The camera of images of another size that show the same.

        Raises:
            ValueError: the sides are not in the same proportion to within one per cent: cropped, not resized.
        """
        if self.size is None or (width, height) == self.size:
            return self
        x, y = width / self.size[0], height / self.size[1]
        if abs(x / y - 1) > 0.01:
            raise ValueError(
                f"the camera of {self.size[0]}x{self.size[1]} does not tell that of {width}x{height}"
            )
        center = ((self.cx + 0.5) * x - 0.5, (self.cy + 0.5) * y - 0.5)
        return Camera(self.fx * x, self.fy * y, *center, (width, height), self.baseline)

    def cropped(self, top: int, left: int, height: int, width: int) -> Camera:
        """The camera of a part of its images."""
        return self._replace(cx=self.cx - left, cy=self.cy - top, size=(width, height))

    def directions(self, height: int, width: int) -> tuple[Array, Array]:
        """x/z of the columns ``[1, W]`` and y/z of the rows ``[H, 1]``."""
        x = (np.arange(width, dtype=np.float32) - np.float32(self.cx)) / np.float32(self.fx)
        y = (np.arange(height, dtype=np.float32) - np.float32(self.cy)) / np.float32(self.fy)
        return x[None], y[:, None]


def points(depth: Array, camera: Camera) -> Array:
    """The point of every pixel, ``[H, W, 3]`` in meters, of depth ``[H, W]``."""
    x, y = camera.directions(*depth.shape)
    return np.stack([depth * x, depth * y, depth], axis=-1)


def without_steps(depth: Array) -> Array:
    """Depth ``[H, W]`` in meters that was stored in coarse steps, the steps smoothed away.

    Inverse depth, which is affine on planes, is blurred less and less, and held within half a step of what
    was stored each time: slopes lose their stairs, and depth stored finely is hardly changed. Where the blur
    is more than a step off, an edge is near, and what was stored stays. The step is the smallest difference
    of two values, at most 10 cm.

    With steps of 4 cm at 384x288 the normals of known rooms are 2.9, 1.6 or 1.1 degrees off in the median,
    where they were 4.6, 2.7 or 1.3: with much, little or no noise before the depth was stored.
    """
    known = depth > 0
    values = np.unique(depth[known])
    if len(values) < 2:
        return depth
    half = min(np.diff(values).min(), np.float32(_COARSEST)) / 2

    def inverted(meters: Array) -> Array:
        return np.divide(1, np.maximum(meters, depth / 2), out=np.zeros_like(depth), where=known)

    stored, weight = inverted(depth), known.astype(np.float32)
    smooth = stored
    for share in _BLURS:
        sigma = share * depth.shape[1]
        blurred, weights = (cv2.GaussianBlur(image, (0, 0), sigma) for image in (smooth, weight))
        blurred = np.divide(blurred, weights, out=blurred, where=known)
        inside = (blurred > inverted(depth + 2 * half)) & (blurred < inverted(depth - 2 * half))
        smooth = np.where(inside, blurred.clip(inverted(depth + half), inverted(depth - half)), stored)
    return np.divide(1, smooth, out=np.zeros_like(smooth), where=known)


def surface_normals(depth: Array, camera: Camera) -> Array:
    """Unit normals ``[H, W, 3]`` that face the camera, of depth ``[H, W]`` in meters."""
    return plane_normals(surface_planes(depth, camera))


def plane_normals(planes: Array) -> Array:
    """Unit normals ``[H, W, 3]`` that face the camera, of planes as ``surface_planes`` has them."""
    length = np.sqrt(np.einsum("ihw,ihw->hw", planes, planes))
    scale = np.divide(-1, length, out=np.zeros_like(length), where=length > 0)
    return np.stack(list(planes * scale), axis=-1)


def surface_planes(depth: Array, camera: Camera) -> Array:
    """The plane n·P = 1 that every pixel lies on: n in 1/meters, ``[3, H, W]``, of depth ``[H, W]``.

    On a plane n·P = 1 the inverse depth is n·(x/z, y/z, 1): an affine function of the pixel. It is fitted by
    least squares in every window (of 21x21 pixels at 640x480) at once, from filtered moments. A pixel takes
    the fit of the window around it or, where that straddles an edge, of one of the eight that have it on
    their rim: the one with the smallest error, in the window and at the pixel itself.
    """
    known = depth > 0
    inverse = np.divide(1, depth, out=np.zeros_like(depth), where=known)
    radius = max(2, round(_RADIUS * depth.shape[1]))
    plane, error = _fit_planes(inverse, known, radius)
    x, y = camera.directions(*depth.shape)
    plane[2] += plane[0] * (camera.fx * -x) + plane[1] * (camera.fy * -y)
    plane[0] *= np.float32(camera.fx)
    plane[1] *= np.float32(camera.fy)
    best = _best_windows(plane, error, inverse, x, y, radius)
    return best * known


def _fit_planes(inverse: Array, known: NDArray[np.bool_], radius: int) -> tuple[Array, Array]:
    """Slopes along columns and rows and the value in the middle, ``[3, H, W]``; mean squared error.

    The error, ``[H, W]``, is infinite where too little is known.
    """
    ramp = np.arange(-radius, radius + 1, dtype=np.float32)
    one = np.ones_like(ramp)

    def moment(image: Array, along_x: Array, along_y: Array) -> Array:
        sums = cv2.sepFilter2D(image, cv2.CV_32F, along_x, along_y, borderType=cv2.BORDER_CONSTANT)
        return np.asarray(sums, np.float32)

    weight = known.astype(np.float32)
    count = moment(weight, one, one)
    part = np.divide(1, count, out=np.zeros_like(count), where=count >= _LEAST * len(ramp) ** 2)
    u, v = moment(weight, ramp, one) * part, moment(weight, one, ramp) * part
    uu = moment(weight, ramp * ramp, one) * part - u * u
    vv = moment(weight, one, ramp * ramp) * part - v * v
    uv = moment(weight, ramp, ramp) * part - u * v
    q = moment(inverse, one, one) * part
    qu = moment(inverse, ramp, one) * part - q * u
    qv = moment(inverse, one, ramp) * part - q * v
    qq = moment(inverse * inverse, one, one) * part - q * q
    determinant = uu * vv - uv * uv
    fits = (part > 0) & (determinant > 1e-2)  # pixels on a line tell no plane
    over = np.divide(1, determinant, out=np.zeros_like(part), where=fits)
    a, b = (vv * qu - uv * qv) * over, (uu * qv - uv * qu) * over
    error = np.where(fits, np.maximum(qq - a * qu - b * qv, 0), np.float32(np.inf))
    return np.stack([a, b, q - a * u - b * v]), error


def _best_windows(plane: Array, error: Array, inverse: Array, x: Array, y: Array, radius: int) -> Array:
    """The plane of the best-fitting one of the windows that hold a pixel, ``[3, H, W]``."""
    height, width = error.shape
    rim = ((0, 0), (radius, radius), (radius, radius))
    planes = np.pad(plane, rim)
    errors = np.pad(error, rim[1:], constant_values=np.inf)
    best = np.zeros_like(plane)
    least = np.full_like(error, np.inf)
    for dy in (0, -radius, radius):  # the centerd window first
        for dx in (0, -radius, radius):
            rows = slice(radius + dy, radius + dy + height)
            columns = slice(radius + dx, radius + dx + width)
            there = planes[:, rows, columns]
            a, b, c = there
            off = a * x + b * y + c - inverse
            score = errors[rows, columns] + off * off
            better = score < np.float32(_GAIN) * least
            np.copyto(least, score, where=better)
            np.copyto(best, there, where=better)
    return best


def gravity(normals: Array) -> Array:
    """The direction of gravity in camera axes, a unit vector ``[3]``, from normals ``[H, W, 3]``.

    Starting from straight down the image, floors and the like are told from walls by their angle with the
    estimate, and the direction that is most parallel to the former's normals and most orthogonal to the
    latter's takes its place: five times with a tolerance of 45 degrees, five with 15 (Gupta et al.,
    "Learning Rich Features from RGB-D Images", ECCV 2014; the iteration is in their CVPR 2013 paper).
    """
    sampled = normals[::4, ::4].reshape(-1, 3).astype(np.float64)
    sampled = sampled[sampled.any(axis=1)]
    down = np.array([0.0, 1.0, 0.0])
    for tolerance in np.radians([45.0] * 5 + [15.0] * 5):
        cosine = np.abs(sampled @ down)
        aligned, orthogonal = sampled[cosine > np.cos(tolerance)], sampled[cosine < np.sin(tolerance)]
        if not len(aligned) and not len(orthogonal):
            break
        # The last term keeps the estimate where nothing else decides, such as before a single wall.
        scatter = orthogonal.T @ orthogonal - aligned.T @ aligned
        _, vectors = np.linalg.eigh(scatter - 1e-3 * len(sampled) * np.outer(down, down))
        down = vectors[:, 0] if vectors[:, 0] @ down >= 0 else -vectors[:, 0]
    return down.astype(np.float32)


def height_above_ground(depth: Array, camera: Camera, normals: Array, down: Array) -> Array:
    """Meters above the ground, ``[H, W]``, negative below it.

    The ground is the lowest surface of some extent that faces up. Where it is less than 0.9 m below the
    camera it is taken to be out of view and 1.3 m below, as Gupta et al. do.
    """
    x, y = camera.directions(*depth.shape)
    height = depth * -(x * down[0] + y * down[1] + down[2])
    ground = _ground(height[::2, ::2][normals[::2, ::2] @ down < -np.float32(np.cos(np.radians(15)))])
    return np.asarray(np.where(depth > 0, height - np.float32(ground), np.float32(0)))


def _ground(heights: Array) -> float:
    """The height of the ground among those of surfaces that face up, relative to the camera.

    Measured depth scatters: the lowest pixel says little, the lowest level that many share much.
    """
    if heights.size:
        steps = np.floor(heights / np.float32(0.05)).astype(int)
        counts = np.bincount(steps - steps.min())
        level = 0.05 * (steps.min() + np.argmax(counts > 0.2 * counts.max()) + 0.5)
        found = float(np.median(heights[np.abs(heights - level) < 0.05]))
        if found <= _LOWEST:
            return found
    return _ASSUMED


def hha(depth: Array, camera: Camera) -> Array:
    """Horizontal disparity, height above ground, angle with gravity, ``[H, W, 3]`` on the scale 0 to 255.

    Gupta et al.'s encoding (``saveHHA`` of their rgbdutils), not rounded: 310 / meters (from 1 m on);
    centimeters; the angle between gravity and the normal that points away from the camera, in degrees, + 38:
    a floor is 38, a wall 128, a ceiling 218. 0 where depth is missing.
    """
    normals = surface_normals(depth, camera)
    down = gravity(normals)
    height = height_above_ground(depth, camera, normals, down)
    angle = np.degrees(np.arccos((-normals @ down).clip(-1, 1)))
    encoded = np.stack([310 / np.maximum(depth, 1), 100 * height, angle + 38], axis=-1)
    encoded[~normals.any(axis=-1)] = 0
    return encoded.clip(0, 255)
