"""Kinds of modalities: what the numbers of one mean decides how it is read, resized, mirrored and filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from models.data.geometry import Camera

Array = NDArray[np.float32]

# The kinds of layout.json's modalities; disparity, HHA and points are further ones, known by their names.
KINDS = ("color", "intensity", "depth", "normals", "categorical")
SPELLINGS: Mapping[str, str] = MappingProxyType({"colour": "color"})
# The kind, for resizing, of modalities that may be averaged without their missing pixels.
SPARSE = "sparse"

_BY_NAME: Mapping[str, str] = MappingProxyType(
    {
        "rgb": "color",
        "depth": "depth",
        "depth_raw": "depth",
        "disparity": "disparity",
        "hha": "hha",
        "normals": "normals",
        "normal": "normals",  # Taskonomy's word
        "points": "points",
    }
)
# Nothing lies between an object and the wall behind it, nor between two classes, and 0 (missing) is no
# distance: neighbors are never averaged. What HHA, normals and points are computed of has the same edges.
_UNMIXED = frozenset({"depth", "disparity", "hha", "normals", "points", "categorical"})


@dataclass(frozen=True)
class Modality:
    """The entry of a modality in ``layout.json``, beside where its files are.

    Attributes:
        kind: one of ``KINDS``; None: told by the name, or by the files.
        missing: stored values that stand for no measurement, beside those that its kind has anyway.
        range: the two stored values that become 0 and 1, of intensity and categorical ones.
        channels: which of the file's to read, counted from 0; empty: all.
        size: ``any``: it is resized to its scene's reference, whatever size it has; ``same``: never; None:
            where it is a copy of other resolution, and no color image.
        camera: of depth that another camera measured than the layout's ``camera``, in its own pixels.
        pose: of that camera: R and t of ``X_ref = R X + t``, 3x4 row by row, t in meters; empty: none.
        registered_with: the modality of the depth that came with it from one sensor, pixel by pixel.
    """

    kind: str | None = None
    missing: tuple[float, ...] = ()
    range: tuple[float, float] | None = None
    channels: tuple[int, ...] = ()
    size: Literal["any", "same"] | None = None
    camera: Camera | None = None
    pose: tuple[float, ...] = ()
    registered_with: str | None = None


def kind_by_name(name: str) -> str | None:
    """The kind of a modality whose name is known; None of any other."""
    return _BY_NAME.get(name)


def is_mixed(kind: str | None) -> bool:
    """Whether neighboring pixels may be averaged when an image of the kind is resized."""
    return kind not in _UNMIXED


def has_holes(kind: str | None) -> bool:
    """Whether images of the kind may have missing pixels, which are 0; of others 0 is a value."""
    return kind == SPARSE or (not is_mixed(kind) and kind != "categorical")


def resized(image: Array, size: Sequence[int], kind: str | None, averaged: bool = False) -> Array:
    """An ``[H, W, C]`` image of another size, height and width; ``averaged`` over all pixels if it shrinks.

    Kinds that are never averaged take the nearest pixel. Of ``SPARSE`` ones, whose missing pixels are 0, only
    those that are known are averaged, and what was missing stays so. (So does a value that is 0 because it is
    the low end of its range: a mask would cost a channel all the way to the network.)
    """
    width_height = (size[1], size[0])
    shape = (size[0], size[1], image.shape[2])
    if not is_mixed(kind):
        nearest = cv2.resize(image, width_height, interpolation=cv2.INTER_NEAREST_EXACT)
        return np.asarray(nearest.reshape(shape))
    how = cv2.INTER_AREA if averaged and size[0] < image.shape[0] else cv2.INTER_LINEAR
    linear = cv2.resize(image, width_height, interpolation=how).reshape(shape)
    if kind != SPARSE:
        return np.asarray(linear)
    known = np.asarray(image.any(axis=-1))
    share = cv2.resize(known.astype(np.float32), width_height, interpolation=how)[:, :, None]
    there = cv2.resize(known.astype(np.uint8), width_height, interpolation=cv2.INTER_NEAREST_EXACT)[
        :, :, None
    ]
    return np.divide(linear, share, out=np.zeros_like(linear), where=(there > 0) & (share > 0))


def mirrored(image: Array, kind: str | None) -> Array:
    """An ``[H, W, C]`` image of the mirrored scene, whose normals point the other way along x.

    Points keep their sign, in the axes of the camera that measured them: what reads points reads distances
    between them, which are the mirrored scene's as well.
    """
    turned = np.ascontiguousarray(image[:, ::-1])
    if kind == "normals":
        turned[:, :, 0] *= -1
    return turned
