"""Normals, gravity, height and HHA against rooms whose geometry is known in closed form."""

from typing import NamedTuple

import numpy as np
import pytest

from models.data.geometry import Camera, gravity, height_above_ground, hha, points, surface_normals
from models.data.scenes import Patch, Room, Texture, X, Y, Z, _box, cast

CAMERA = Camera(260.0, 262.0, 161.0, 118.5)
SIZE = (240, 320)
PLAIN = Texture(np.ones((1, 1, 3), np.float32), (1.0, 1.0))
# Degrees: how the camera looks down and is tilted to the side; metres above the floor.
POSES = {"level": (0, 0, 1.3), "down": (22, -4, 1.6), "tilted": (12, 9, 1.2), "up": (-8, 3, 1.1)}


class View(NamedTuple):
    """The depths that a camera in a room must measure; in camera axes."""

    depth: np.ndarray
    normals: np.ndarray
    height: np.ndarray
    down: np.ndarray


def rotation(pitch: float, roll: float, yaw: float) -> np.ndarray:
    """Rows: the camera's right, down and forward in world axes (y up)."""
    p, r, w = np.radians([pitch, roll, yaw])
    forward = np.array([np.sin(w) * np.cos(p), -np.sin(p), np.cos(w) * np.cos(p)])
    right = np.array([np.cos(w), 0, -np.sin(w)])
    below = np.cross(right, forward)
    below *= -np.sign(below[1])
    turned = np.cos(r) * right + np.sin(r) * below
    return np.stack([turned, np.cos(r) * below - np.sin(r) * right, forward]).astype(np.float32)


def view(pitch: float, roll: float, height: float, size: tuple[int, int] = SIZE) -> View:
    """A room of 5 by 2.6 by 6 metres with two boxes in it."""
    half = (2.5, 1.3, 3.0)
    middle = np.array([2.5, 1.3, 3.0], np.float32)
    surfaces = []
    for axis, (out, right, up, reach) in enumerate(
        ((X, Z, Y, (half[2], half[1])), (Y, X, Z, (half[0], half[2])), (Z, X, Y, half[:2]))
    ):
        surfaces += [Patch(0, PLAIN, middle + s * half[axis] * out, right, up, reach) for s in (-1, 1)]
    turned = (np.cos(0.4) * X + np.sin(0.4) * Z).astype(np.float32)
    for centre, sides, half_box in (
        ((1.9, 0.3, 3.2), (turned, Y, np.cross(turned, Y)), (0.5, 0.3, 0.4)),
        ((3.4, 0.5, 4.4), (X, Y, Z), (0.4, 0.5, 0.6)),
    ):
        surfaces += _box(0, PLAIN, np.array(centre, np.float32), sides, half_box)
    axes = rotation(pitch, roll, 8)
    origin = np.array([2.2, height, 0.3], np.float32)
    x, y = CAMERA.directions(*size)
    rays = np.stack(np.broadcast_arrays(x, y, np.float32(1)), -1).reshape(-1, 3)
    depth, owner, *_ = cast(Room(surfaces, origin, axes), rays @ axes)
    normals = np.stack([np.cross(one.right, one.up) for one in surfaces])[owner] @ axes.T
    normals *= -np.sign(np.einsum("pi,pi->p", normals, rays))[:, None]
    where = origin + depth[:, None] * (rays @ axes)
    return View(
        depth.reshape(size),
        normals.reshape(*size, 3),
        where[:, 1].reshape(size),
        axes @ np.float32([0, -1, 0]),
    )


def degrees(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.einsum("...i,...i->...", a, b).clip(-1, 1)))


def quantised(depth: np.ndarray) -> np.ndarray:
    """As NYUDv2's files hold it."""
    return (np.rint(5000 * depth) / 5000).astype(np.float32)


def test_points() -> None:
    camera = Camera(2.0, 4.0, 1.0, 0.5)
    found = points(np.full((2, 3), 2.0, np.float32), camera)
    np.testing.assert_allclose(found[:, :, 0], [[-1, 0, 1]] * 2)
    np.testing.assert_allclose(found[:, :, 1], [[-0.25] * 3, [0.25] * 3])
    np.testing.assert_allclose(found[:, :, 2], 2)


@pytest.mark.parametrize("normal", [(0.0, -1.0, 0.0), (0.3, -0.5, -0.8), (-0.6, 0.1, -0.3), (0.0, 0.0, -1.0)])
def test_normals_of_a_plane(normal: tuple[float, ...]) -> None:
    """To the image's very corners; pixels that look past the plane are missing."""
    unit = np.float32(normal) / np.linalg.norm(normal)
    x, y = CAMERA.directions(*SIZE)
    slope = -(unit[0] * x + unit[1] * y + unit[2])
    depth = np.where(slope > 0.1, 1.5 / np.maximum(slope, 0.1), 0).astype(np.float32)
    found = surface_normals(depth, CAMERA)
    known = depth > 0
    assert degrees(found, unit)[known].max() < 0.2
    assert not found[~known].any()


@pytest.mark.parametrize("measured", [np.float32, quantised])
@pytest.mark.parametrize("pose", POSES)
def test_room(pose: str, measured: type) -> None:
    """Floors, walls and boxes: normals and angles within a degree but for a few pixels where three faces meet
    or faces are narrower than a window; heights within millimetres."""
    true = view(*POSES[pose])
    depth = np.asarray(measured(true.depth), np.float32)
    normals = surface_normals(depth, CAMERA)
    off = degrees(normals, true.normals)
    assert (off < 1).mean() > 0.97
    assert np.percentile(off, 95) < 0.25
    down = gravity(normals)
    assert degrees(down, true.down) < 0.3
    height = height_above_ground(depth, CAMERA, normals, down)
    assert np.abs(height - true.height).max() < 0.03
    assert np.median(np.abs(height - true.height)) < 0.005
    encoded = hha(depth, CAMERA)
    angle = degrees(-true.normals, true.down) + 38
    assert (np.abs(encoded[:, :, 2] - angle) < 1).mean() > 0.97
    np.testing.assert_allclose(encoded[:, :, 0], (310 / np.maximum(depth, 1)).clip(0, 255), rtol=1e-6)
    np.testing.assert_allclose(encoded[:, :, 1], 100 * height.clip(0, 2.55), atol=1e-3)


def test_height_with_gravity_given() -> None:
    """Without gravity's error the height itself is exact."""
    true = view(*POSES["down"])
    height = height_above_ground(true.depth, CAMERA, true.normals, true.down)
    np.testing.assert_allclose(height, true.height, atol=1e-4)


@pytest.mark.parametrize("share", [0.05, 0.4])
def test_missing_depth(share: float) -> None:
    """Holes and specks: 0 there, and what is left is hardly the worse for it."""
    true = view(*POSES["down"])
    rng = np.random.default_rng(0)
    missing = rng.random(SIZE) < share
    missing[40:90, 100:180] = True
    depth = np.where(missing, 0, true.depth).astype(np.float32)
    normals, encoded = surface_normals(depth, CAMERA), hha(depth, CAMERA)
    assert not normals[missing].any()
    assert not encoded[missing].any()
    found = normals.any(axis=-1)
    assert found[~missing].mean() > 0.999
    np.testing.assert_allclose(np.linalg.norm(normals[found], axis=-1), 1, atol=1e-5)
    assert (degrees(normals, true.normals)[found] < 1).mean() > 0.97
    assert degrees(gravity(normals), true.down) < 0.3


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_nothing_to_go_by(value: float) -> None:
    """No depth at all, and a wall that is all one sees: finite, straight down, the assumed ground."""
    depth = np.full(SIZE, value, np.float32)
    normals = surface_normals(depth, CAMERA)
    np.testing.assert_allclose(gravity(normals), [0, 1, 0], atol=1e-3)
    height = height_above_ground(depth, CAMERA, normals, gravity(normals))
    rows = (np.arange(SIZE[0]) - CAMERA.cy) / CAMERA.fy
    expected = np.where(depth > 0, 1.3 - value * rows[:, None], 0)
    np.testing.assert_allclose(height, expected, atol=5e-3)
    assert np.isfinite(hha(depth, CAMERA)).all()


def test_a_table_is_no_ground() -> None:
    """The lowest surface in view is 0.5 m below the camera: taken to be 1.3 m above what is not in view."""
    x, y = CAMERA.directions(*SIZE)
    slope = y * np.cos(0.5) + np.sin(0.5) + 0 * x
    depth = np.where(slope > 0.05, 0.5 / np.maximum(slope, 0.05), 0).astype(np.float32)
    down = np.float32([0, np.cos(0.5), np.sin(0.5)])
    height = height_above_ground(depth, CAMERA, surface_normals(depth, CAMERA), down)
    np.testing.assert_allclose(height[depth > 0], 0.8, atol=1e-3)


def test_camera_of_another_size() -> None:
    camera = Camera(500.0, 510.0, 319.5, 239.5, (640, 480), 0.2)
    half = camera.scaled(240, 320)
    assert half == Camera(250.0, 255.0, 159.5, 119.5, (320, 240), 0.2)
    assert camera.scaled(480, 640) is camera
    with pytest.raises(ValueError, match="the camera of 640x480 does not tell that of 560x425"):
        camera.scaled(425, 560)
