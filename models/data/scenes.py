"""Procedural rooms seen by an RGB-D camera, made so that neither modality alone tells all classes.

| classes | geometry | colors |
|---|---|---|
| floor, rug | the same | differ |
| wall, poster | the same | differ |
| crate, chest | the same | differ |
| niche, panel | into the wall, out of it | the same |
| ball, bowl | towards the camera, away from it; the same outline | the same |

Surfaces are met by rays in closed form; the camera adds the errors of a structured-light sensor.
World axes: x to the right, y up, z into the room; meters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from models.data import textures
from models.data.geometry import Camera
from models.data.textures import Texture

Array = NDArray[np.float32]
Generator = np.random.Generator

CLASSES = ("floor", "wall", "ceiling", "rug", "poster", "niche", "panel", "crate", "chest", "ball", "bowl")
FLOOR, WALL, CEILING, RUG, POSTER, NICHE, PANEL, CRATE, CHEST, BALL, BOWL = range(len(CLASSES))

X, Y, Z = np.eye(3, dtype=np.float32)
DEPTH_SCALE = 5000  # stored units per meter
FIELD_OF_VIEW = 65.0  # degrees, horizontal
DISPARITY = (
    8 * 580 * 0.075
)  # Kinect: steps of 1/8 pixel at a focal length of 580 pixels and a baseline of 7.5 cm


class Hit(NamedTuple):
    """Intersections of rays with a surface: distance (infinite for a miss) and the surface's coordinates."""

    t: Array
    u: Array
    v: Array


@dataclass(frozen=True)
class Patch:
    """A flat rectangle; smaller ones may be cut out."""

    label: int
    texture: Texture
    center: Array
    right: Array
    up: Array
    half: tuple[float, float]  # half width and height
    holes: tuple[tuple[float, float, float, float], ...] = ()  # middle u, v and half width, height

    def meet(self, origin: Array, rays: Array) -> Hit:
        offset = self.center - origin
        normal = np.cross(self.right, self.up)
        with np.errstate(divide="ignore", invalid="ignore"):  # parallel rays: inf or nan, which hit nothing
            t = (offset @ normal) / (rays @ normal)
            u = t * (rays @ self.right) - offset @ self.right
            v = t * (rays @ self.up) - offset @ self.up
            hit = (np.abs(u) <= self.half[0]) & (np.abs(v) <= self.half[1])
            for middle_u, middle_v, half_u, half_v in self.holes:
                hit &= (np.abs(u - middle_u) > half_u) | (np.abs(v - middle_v) > half_v)
        return Hit(np.where(hit & (t > 0), t, np.inf), u, v)

    def normals(self, points: Array) -> Array:
        return np.broadcast_to(np.cross(self.right, self.up), points.shape)


@dataclass(frozen=True)
class Sphere:
    """The near side of a sphere, or the far one; u and v are those of the plane through its center."""

    label: int
    texture: Texture
    center: Array
    right: Array
    up: Array
    radius: float
    hollow: bool

    def meet(self, origin: Array, rays: Array) -> Hit:
        offset = self.center - origin
        square, half = np.einsum("pi,pi->p", rays, rays), rays @ offset
        root = half**2 - square * (offset @ offset - self.radius**2)
        with np.errstate(invalid="ignore"):
            t = (half + (1 if self.hollow else -1) * np.sqrt(root)) / square
        point = np.nan_to_num(t)[:, None] * rays - offset
        return Hit(np.where((root >= 0) & (t > 0), t, np.inf), point @ self.right, point @ self.up)

    def normals(self, points: Array) -> Array:
        return points - self.center


Surface = Patch | Sphere


class Room(NamedTuple):
    """A scene and the camera in it."""

    surfaces: list[Surface]
    origin: Array
    axes: Array  # [3, 3], rows: the camera's right, down and forward


class View(NamedTuple):
    """The image of a room that a perfect camera takes."""

    rgb: NDArray[np.uint8]  # [H, W, 3], red first
    depth: Array  # [H, W] in meters
    planes: Array  # [3, H, W], of the surfaces, tangent to round ones, as geometry.surface_planes has them
    labels: NDArray[np.uint8]  # [H, W], indices into CLASSES


def render(
    size: tuple[int, int], rng: Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint8]]:
    """A random room.

    Args:
        size: height and width of the images.
        rng: decides everything.

    Returns:
        RGB ``[H, W, 3]`` uint8, red first; depth ``[H, W]`` uint16, ``DEPTH_SCALE`` units per meter, 0 where
        missing; labels ``[H, W]`` uint8, indices into ``CLASSES``.
    """
    seen = view(size, rng)
    return seen.rgb, _measure(seen.depth, rng), seen.labels


def view(size: tuple[int, int], rng: Generator) -> View:
    """A random room, its geometry exact; the same room and image as ``render`` makes of ``rng``."""
    room = random_room(rng)
    image = (2 * size[0], 2 * size[1])  # two by two rays a pixel smooth the colors
    rays = _rays(image)
    depth, owner, u, v = cast(room, rays @ room.axes)
    colors, planes = np.empty((2, len(depth), 3), np.float32)
    points = depth[:, None] * rays
    for index, surface in enumerate(room.surfaces):
        seen = owner == index
        colors[seen] = surface.texture(u[seen], v[seen])
        planes[seen] = surface.normals(room.origin + points[seen] @ room.axes) @ room.axes.T
    planes /= np.einsum("pi,pi->p", planes, points)[:, None]
    labels = np.array([surface.label for surface in room.surfaces], np.uint8)[owner]
    return View(
        _photograph(colors.reshape(*image, 3), rng),
        depth.reshape(image)[::2, ::2].copy(),
        planes.reshape(*image, 3)[::2, ::2].transpose(2, 0, 1).copy(),
        labels.reshape(image)[::2, ::2].copy(),
    )


def camera(size: tuple[int, int]) -> Camera:
    """The one that ``view`` and ``render`` see through: depth is that of the first of a pixel's four rays."""
    height, width = size
    focal = _focal(width)
    return Camera(focal, focal, width / 2 - 0.25, height / 2 - 0.25, (width, height))


def cast(room: Room, rays: Array) -> tuple[Array, NDArray[np.intp], Array, Array]:
    """Find the patch that each ray from the camera meets first.

    Args:
        room: a closed one.
        rays: ``[P, 3]`` directions in world axes.

    Returns:
        Distance in lengths of the ray, index of the surface, and u and v on it; ``[P]`` each.
    """
    owner = np.zeros(len(rays), np.intp)
    first = Hit(*np.full((3, len(rays)), np.inf, np.float32))
    for index, surface in enumerate(room.surfaces):
        hit = surface.meet(room.origin, rays)
        nearer = hit.t < first.t
        owner[nearer] = index
        for kept, its in zip(first, hit, strict=True):
            kept[nearer] = its[nearer]
    return first.t, owner, first.u, first.v


def _rays(size: tuple[int, int]) -> Array:
    """Directions through pixel centers in camera axes, of length 1 along the optical axis: t is depth."""
    height, width = size
    focal = _focal(width)
    rows, columns = np.mgrid[:height, :width] + 0.5
    rays = [(columns - width / 2) / focal, (rows - height / 2) / focal, np.ones(size)]
    return np.stack(rays, axis=-1).reshape(-1, 3).astype(np.float32)


def _focal(width: int) -> float:
    return float(width / 2 / np.tan(np.radians(FIELD_OF_VIEW / 2)))


def _photograph(colors: Array, rng: Generator) -> NDArray[np.uint8]:
    """Average two by two rays; uneven light, white balance, noise."""
    image = cv2.resize(colors, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    light = cv2.resize(rng.uniform(0.7, 1.1, (3, 4)), image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    image = image * light[:, :, None] * rng.uniform(0.92, 1.08, 3) + rng.normal(0, 0.025, image.shape)
    return np.asarray(np.rint(255 * image.clip(0, 1)), np.uint8)


def _measure(depth: Array, rng: Generator) -> NDArray[np.uint16]:
    """Simulate a Kinect's depth: noisy disparity in whole steps, shadows beside near edges, blind spots."""
    disparity = np.rint(DISPARITY / depth + rng.normal(0, 0.4, depth.shape))
    measured = DISPARITY / np.maximum(disparity, 1)
    # The projector sits to the right of the camera: left of a near edge the far surface lies in its shadow.
    width = max(1, depth.shape[1] // 100)
    shadow = np.zeros(depth.shape, bool)
    shadow[:, :-width] = depth[:, :-width] > 1.08 * depth[:, width:]
    spots = cv2.resize(rng.random((9, 12)), depth.shape[::-1], interpolation=cv2.INTER_CUBIC) > 0.97
    missing = shadow | spots | (rng.random(depth.shape) < 0.003)
    return np.where(missing, 0, np.rint(DEPTH_SCALE * measured)).astype(np.uint16)


def random_room(rng: Generator) -> Room:
    """Floor, walls and ceiling, what hangs on the walls and stands on the floor, and where one looks from."""
    width, height, length = rng.uniform((3.5, 2.4, 4.5), (5.5, 3.0, 6.0))
    origin = _vector(width * rng.uniform(0.3, 0.7), rng.uniform(1.2, 1.7), 0.2)
    yaw, pitch = np.radians(rng.uniform((-20, 4), (20, 20)))
    forward = _vector(np.sin(yaw) * np.cos(pitch), -np.sin(pitch), np.cos(yaw) * np.cos(pitch))
    right = _vector(np.cos(yaw), 0, -np.sin(yaw))
    axes = np.stack([right, np.cross(right, forward), forward])
    middle, half = _vector(width, height, length) / 2, (width / 2, height / 2, length / 2)

    paint = textures.mottled(rng.uniform(0.55, 0.85, 3), 0.03, rng)
    surfaces: list[Surface] = [
        Patch(FLOOR, textures.planks(rng), middle - half[1] * Y, X, Z, (half[0], half[2])),
        Patch(
            CEILING,
            textures.mottled(rng.uniform(0.85, 0.95), 0.02, rng),
            middle + half[1] * Y,
            X,
            Z,
            (half[0], half[2]),
        ),
        Patch(WALL, textures.shade(paint, 0.8), middle - half[2] * Z, X, Y, half[:2]),
    ]
    walls = (
        Patch(WALL, paint, middle + half[2] * Z, X, Y, half[:2]),
        Patch(WALL, textures.shade(paint, 0.85), middle - half[0] * X, Z, Y, half[:0:-1]),
        Patch(WALL, textures.shade(paint, 0.92), middle + half[0] * X, -Z, Y, half[:0:-1]),
    )
    for wall in walls:
        surfaces += _furnish(wall, rng)
    surfaces += _rug(origin, forward, rng)
    surfaces += _objects(origin, forward, (width, length), rng)
    return Room(surfaces, origin, axes.astype(np.float32))


def _furnish(wall: Patch, rng: Generator) -> Iterator[Surface]:
    """The wall and, side by side on it, posters, niches and panels, all of like sizes."""
    places = 3
    step = 2 * wall.half[0] / places
    inward = np.cross(wall.up, wall.right)
    for place in range(places):
        kind = int(rng.choice([WALL, POSTER, NICHE, PANEL], p=[0.16, 0.28, 0.28, 0.28]))
        half = tuple(rng.uniform((0.28, 0.25), (0.46 * step, 0.6)))
        u = (place + 0.5) * step - wall.half[0] + rng.uniform(-1, 1) * (0.47 * step - half[0])
        v = rng.uniform(-0.4, 0.3)
        center = wall.center + u * wall.right + v * wall.up
        if kind == POSTER:
            yield Patch(POSTER, textures.picture(rng), center + 1e-4 * inward, wall.right, wall.up, half)
        elif kind != WALL:
            reach = rng.uniform(0.075, 0.175) * (1 if kind == PANEL else -1)
            axes, box = (wall.right, wall.up, inward), (*half, abs(reach))
            *sides, front = _box(kind, textures.tiles(rng), center + reach * inward, axes, box)
            yield from sides
            if kind == PANEL:
                yield front
            else:
                wall = replace(wall, holes=(*wall.holes, (u, v, *half)))
    yield wall


def _rug(origin: Array, forward: Array, rng: Generator) -> Iterator[Surface]:
    if rng.random() < 0.85:
        angle, half = rng.uniform(0, np.pi), rng.uniform((0.6, 0.5), (1.2, 0.9))
        center = _spot(origin, forward, rng, (1.6, 3.2))
        right = _vector(np.cos(angle), 0, np.sin(angle))
        yield Patch(RUG, textures.weave(rng), center + 1e-4 * Y, right, np.cross(Y, right), tuple(half))


def _objects(origin: Array, forward: Array, floor: tuple[float, float], rng: Generator) -> Iterator[Surface]:
    """Crates, chests, balls and bowls on the floor, clear of each other and of the walls."""
    taken: list[tuple[Array, float]] = []
    for _ in range(12):
        center, reach = _spot(origin, forward, rng, (1.8, 4.2)), rng.uniform(0.22, 0.42)
        margin = np.minimum(center[[0, 2]], np.array(floor) - center[[0, 2]]).min()
        if margin < reach + 0.1 or any(np.linalg.norm(center - c) < reach + r + 0.1 for c, r in taken):
            continue
        taken.append((center, reach))
        yield from _object(int(rng.choice([CRATE, CHEST, BALL, BOWL])), center, reach, origin, rng)
        if len(taken) == 4:
            return


def _object(kind: int, spot: Array, reach: float, origin: Array, rng: Generator) -> Iterator[Surface]:
    """One object that stands at ``spot`` and reaches ``reach`` to the sides."""
    if kind in (CRATE, CHEST):
        angle, height = rng.uniform(0, np.pi / 2), rng.uniform(0.3, 0.8)
        right = _vector(np.cos(angle), 0, np.sin(angle))
        half = (reach * rng.uniform(0.6, 0.8), height / 2, reach * rng.uniform(0.5, 0.6))
        cover = textures.slats(rng) if kind == CRATE else textures.checks(rng)
        yield from _box(kind, cover, spot + height / 2 * Y, (right, Y, np.cross(right, Y)), half)
        return
    center, cover = spot + reach * Y, textures.blotches(rng)
    facing = (origin - center) / np.linalg.norm(origin - center)
    right = np.cross(Y, facing) / np.linalg.norm(np.cross(Y, facing))
    up = np.cross(facing, right)
    yield Sphere(kind, cover, center, right, up, reach, hollow=kind == BOWL)


def _spot(origin: Array, forward: Array, rng: Generator, distance: tuple[float, float]) -> Array:
    """A point of the floor within sight."""
    bearing = np.arctan2(forward[0], forward[2]) + np.radians(FIELD_OF_VIEW) * rng.uniform(-0.42, 0.42)
    reach = rng.uniform(*distance)
    return _vector(origin[0] + reach * np.sin(bearing), 0, origin[2] + reach * np.cos(bearing))


def _box(
    label: int,
    texture: Texture,
    center: Array,
    axes: tuple[Array, Array, Array],
    half: tuple[float, float, float],
) -> Iterator[Patch]:
    """The six faces of a box, the one at +axes[2] last; sides a little darker than the front."""
    a, b, c = axes
    for (right, up, out), (i, j, k), shade in (
        ((a, c, b), (0, 2, 1), 1.06),
        ((c, b, a), (2, 1, 0), 0.94),
        ((a, b, c), (0, 1, 2), 1.0),
    ):
        for side in (-1, 1):
            face = center + side * half[k] * out
            yield Patch(label, textures.shade(texture, shade), face, right, up, (half[i], half[j]))


def _vector(x: float, y: float, z: float) -> Array:
    return np.array([x, y, z], np.float32)
