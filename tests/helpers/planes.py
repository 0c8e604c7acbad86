"""Flat scenes whose depth is known in closed form, as cameras anywhere see them, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from models.data.geometry import Camera
from tests.helpers.trees import write

NOWHERE = (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SIZE, LARGE = (48, 64), (192, 256)
CAMERA = Camera(58.0, 59.0, 31.2, 23.9)
COLOR = Camera(213.0, 217.0, 128.5, 93.9)


def pose_of(turn: tuple[float, ...], shift: tuple[float, ...]) -> tuple[float, ...]:
    """R of a rotation vector in radians, and t, 3x4 row by row."""
    rotation, _ = cv2.Rodrigues(np.array(turn, np.float64))
    return tuple(np.hstack([rotation, np.array(shift)[:, None]]).ravel().tolist())


def inverse_of(pose: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The origin of the reference camera in the depth camera's axes, and what turns its rays there."""
    matrix = np.array(pose).reshape(3, 4)
    return -matrix[:, :3].T @ matrix[:, 3], matrix[:, :3].T


def rays_of(camera: Camera, size: tuple[int, int]) -> np.ndarray:
    """``[H, W, 3]`` float64 of z = 1."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    return np.stack([(x - camera.cx) / camera.fx, (y - camera.cy) / camera.fy, np.ones_like(x)], -1)


class Rectangle:
    """A flat rectangle in the depth camera's axes: a corner and two orthogonal edges."""

    def __init__(self, corner: tuple, right: tuple, down: tuple) -> None:
        self.corner, self.right, self.down = (np.array(each, np.float64) for each in (corner, right, down))

    def meet(self, origin: np.ndarray, rays: np.ndarray, margin: float = 0.0) -> np.ndarray:
        """The z of z = 1 rays where they meet it or, with a margin in meters, its surroundings; else inf."""
        normal = np.cross(self.right, self.down)
        t = ((self.corner - origin) @ normal) / (rays @ normal)
        at = origin + t[..., None] * rays - self.corner
        inside = t > 0
        for edge in (self.right, self.down):
            length = np.linalg.norm(edge)
            along = at @ edge / length
            inside &= (along >= -margin) & (along <= length + margin)
        return np.where(inside, t, np.inf)


def seen(
    scene: list[Rectangle],
    camera: Camera,
    size: tuple[int, int],
    pose: tuple[float, ...] = NOWHERE,
    margin: float = 0.0,
) -> np.ndarray:
    """``[len(scene), H, W]`` the depth of each rectangle in a camera's view, inf where it is not."""
    origin, turn = inverse_of(pose)
    rays = rays_of(camera, size) @ turn.T
    return np.stack([each.meet(origin, rays, margin) for each in scene])


WALL = Rectangle((-9, -9, 3), (18, 0, 0), (0, 18, 0))
FLOOR = Rectangle((-9, 0.7, 0.1), (18, 0, 0), (0, 0, 30))
SLANTED = Rectangle((-8, -9, -1.2), (18, 0, 7.5), (0, 18, 0))
# Of a box.
FRONT = Rectangle((-0.7, -0.35, 1.4), (0.5, 0, 0), (0, 0.6, 0))
SIDE = Rectangle((-0.2, -0.35, 1.4), (0, 0, 0.5), (0, 0.6, 0))
RIG = pose_of((0.01, -0.03, 0.02), (0.06, -0.01, 0.02))


def measured(scene: list[Rectangle], camera: Camera = CAMERA, size: tuple[int, int] = SIZE) -> np.ndarray:
    depth = seen(scene, camera, size).min(axis=0)
    return np.where(np.isinf(depth), 0, depth).astype(np.float32)


POSE = [list(RIG[start : start + 4]) for start in (0, 4, 8)]
OWN: dict[str, Any] = {"camera": list(CAMERA[:4]), "pose": POSE}
NAMES = {"train": ("a", "b", "c", "f"), "val": ("d", "e")}


def phone(root: Path, **fields: Any) -> Path:
    """Color and labels of 256x192; depth and amplitude of 64x48 from a camera beside; a box before a wall.

    The label map is what the color camera sees: 0 wall, 1 box.
    """
    kinds = ("rgb", "depth", "amplitude", "labels")
    description = {
        "files": {kind: f"{kind}/{{name}}.png" for kind in kinds},
        "lists": "{split}.txt",
        "classes": ["wall", "box"],
        "depth_scale": 1000,
        "camera": list(COLOR[:4]),
        "modalities": {"depth": OWN, "amplitude": {"kind": "intensity", "registered_with": "depth"}},
    }
    description |= fields
    root.mkdir(exist_ok=True)
    (root / "layout.json").write_text(json.dumps(description))
    for split, names in NAMES.items():
        (root / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            rng = np.random.default_rng(ord(name))
            scene = [FRONT, WALL]
            classes = seen(scene, COLOR, LARGE, RIG).argmin(axis=0) == 0
            soft = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), LARGE[::-1])
            write(root / f"rgb/{name}.png", np.where(classes[:, :, None], 255 - soft // 4, soft))
            write(root / f"labels/{name}.png", classes.astype(np.uint8))
            write(root / f"depth/{name}.png", np.rint(1000 * measured(scene)).astype(np.uint16))
            write(root / f"amplitude/{name}.png", rng.integers(1, 256, SIZE, np.uint8))
    return root
