"""Textures of the surfaces of the procedural rooms: grids of colors."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float32]
Generator = np.random.Generator


class Texture(NamedTuple):
    """A grid of colors, its middle in the middle of a surface, repeated all over it."""

    colors: Array  # [rows, columns, 3] in 0..1
    cell: tuple[float, float]  # width and height of a grid cell in meters
    glow: float = 0.0  # how much darker than the middle it is one meter off

    def __call__(self, u: Array, v: Array) -> Array:
        rows, columns = self.colors.shape[:2]
        column, row = np.floor(u / self.cell[0]).astype(int), np.floor(v / self.cell[1]).astype(int)
        colors = self.colors[(row + rows // 2) % rows, (column + columns // 2) % columns]
        return np.asarray(colors * (1 - self.glow * np.hypot(u, v))[:, None]) if self.glow else colors


def shade(texture: Texture, factor: float) -> Texture:
    """The same, lighter or darker."""
    return texture._replace(colors=texture.colors * np.float32(factor))


def mottled(color: ArrayLike, contrast: float, rng: Generator) -> Texture:
    """One color, lighter and darker in soft spots."""
    uneven = 1 + contrast * cv2.resize(rng.uniform(-1, 1, (16, 16)), (64, 64), interpolation=cv2.INTER_CUBIC)
    return Texture((np.broadcast_to(color, 3) * uneven[:, :, None]).astype(np.float32), (0.03, 0.03))


def planks(rng: Generator) -> Texture:
    """Floor: boards of brown wood."""
    color = np.array([0.55, 0.42, 0.3]) * rng.uniform(0.7, 1.2)
    return Texture((color * rng.uniform(0.88, 1.1, (4, 32, 1))).astype(np.float32), (0.14, 1.3))


def weave(rng: Generator) -> Texture:
    """Rug: stripes of two strong colors."""
    return Texture(_vivid(rng, 2)[None], (rng.uniform(0.08, 0.2), 1.0))


def picture(rng: Generator) -> Texture:
    """Poster: a coarse mosaic of strong colors."""
    return Texture(_vivid(rng, 16).reshape(4, 4, 3), (rng.uniform(0.12, 0.3), rng.uniform(0.12, 0.3)))


def tiles(rng: Generator) -> Texture:
    """Niche and panel: dull green or blue, unevenly."""
    return mottled((rng.uniform(0.3, 0.5), rng.uniform(0.5, 0.7), rng.uniform(0.5, 0.7)), 0.12, rng)


def slats(rng: Generator) -> Texture:
    """Crate: horizontal slats of yellow wood."""
    color = np.array([0.8, 0.6, 0.3]) * rng.uniform(0.8, 1.1)
    return Texture((color * np.array([[[1.0]], [[0.55]]])).astype(np.float32), (1.0, rng.uniform(0.05, 0.09)))


def checks(rng: Generator) -> Texture:
    """Chest: a chequerboard of dark red and gray."""
    pair = np.array([[0.5, 0.15, 0.15], [0.45, 0.42, 0.42]]) * rng.uniform(0.8, 1.2)
    side = rng.uniform(0.08, 0.14)
    return Texture(pair[[[0, 1], [1, 0]]].astype(np.float32), (side, side))


def blotches(rng: Generator) -> Texture:
    """Ball and bowl: purple blotches, brighter in the middle as if round."""
    return mottled((0.65, 0.35, 0.75), 0.4, rng)._replace(glow=rng.uniform(0, 1.2))


def _vivid(rng: Generator, count: int) -> Array:
    """Saturated colors, [count, 3]."""
    hsv = np.stack([rng.uniform(0, 360, count), rng.uniform(0.6, 1, count), rng.uniform(0.5, 1, count)], -1)
    return np.asarray(cv2.cvtColor(hsv[None].astype(np.float32), cv2.COLOR_HSV2RGB)[0])
