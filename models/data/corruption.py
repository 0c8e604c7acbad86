"""One modality of a data set's samples corrupted: left out, blanked, noisy, with holes, or misregistered.

Noise is measured, and holes are what the modality's sensor leaves: both apply to the values before they are
normalized, in the unit of ``InputSpec``. A modality that is computed from depth is corrupted as computed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from models.data.dataset import Sample, SegmentationSet
from models.data.images import DataError, Image, size_of
from models.data.inputs import InputSpec, input_specs
from models.data.kinds import has_holes
from models.data.modalities import Reader
from models.networks.messages import suggest

KINDS = ("missing", "blank", "noise", "holes", "shift")
ALL = "all"
_WITHOUT_LEVEL = ("missing", "blank")
_HOLES, _SHIFTS = (0.1, 0.3, 0.5), (4.0, 8.0, 16.0)
# Of inverse depth, and of depth of which the largest value is 1, whole rooms lie within some tenths.
_NOISE, _FINE_NOISE = (0.05, 0.1, 0.2), (0.01, 0.02, 0.05)
_FINE_UNITS = ("1/metre", "64 pixels", "largest stored value")
_EXPECTED = {
    "noise": "a standard deviation above 0",
    "holes": "a share of the pixels above 0, at most 1",
    "shift": "a whole number of pixels, not 0",
}
_BLOB = 1 / 32  # sigma of the blur whose valleys are holes, as a share of the shorter side
_UNBOUNDED = ("depth", "disparity")  # the kinds whose values have no upper limit


@dataclass(frozen=True)
class Corruption:
    """What happens to a modality.

    - ``missing``: it is absent, as with ``eval.without``: its branch does not run;
    - ``blank``: its image is 0 everywhere, once normalized: the mean color, no measurement of depth;
    - ``noise``: Gaussian, independent for every pixel and channel, is added where there is a measurement;
      cut off at 0 and, but of depth and disparity, at 1; normals become unit vectors again, and points
      are not cut off;
    - ``holes``: in blobs, pixels lose their measurement; modalities that have none such become black there;
    - ``shift``: the image moves to the right and down; what comes in at the left and the top has no
      measurement or, of modalities that have none such, repeats the outermost pixels.

    Args:
        modality: its name.
        kind: of ``KINDS``.
        level: of noise its standard deviation in the modality's ``InputSpec.unit`` (colors from 0 to 1,
            meters); of holes their share of the image's pixels, measured before or not; of a shift as many
            pixels to the right and as many down, less than 0 to the left and up; None of the other kinds.

    Raises:
        ValueError: unknown kind; a level that is missing, superfluous or out of range.
    """

    modality: str
    kind: str
    level: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"{self.modality}={self.kind}: unknown kind {self.kind!r}: expected one of "
                f"{', '.join(KINDS)}{suggest(self.kind, KINDS)}"
            )
        level = self.level
        if self.kind in _WITHOUT_LEVEL:
            if level is not None:
                raise ValueError(f"{self}: {self.kind} has no level; leave out the number")
            return
        if level is None or not _in_range(self.kind, level):
            raise ValueError(f"{self}: the level of {self.kind} must be {_EXPECTED[self.kind]}")

    def __str__(self) -> str:
        level = "" if self.level is None else f":{self.level:.12g}"
        return f"{self.modality}={self.kind}{level}"


def _in_range(kind: str, level: float) -> bool:
    if kind == "shift":
        return level != 0 and float(level).is_integer()
    return 0 < level < math.inf if kind == "noise" else 0 < level <= 1


def standard(reader: Reader, modality: str, kinds: Sequence[str] = KINDS) -> list[Corruption]:
    """The standard corruptions of a modality, of those of the kinds that its values can have."""
    categorical = reader.kinds()[reader.modalities.index(modality)] == "categorical"
    return [
        corruption
        for kind in kinds
        if not (categorical and kind == "noise")
        for corruption in _of_kind(reader, modality, kind)
    ]


def _of_kind(reader: Reader, modality: str, kind: str) -> list[Corruption]:
    """One kind at its standard levels."""
    unit = input_specs(reader)[reader.modalities.index(modality)].unit
    noise = _FINE_NOISE if unit in _FINE_UNITS else _NOISE
    levels: dict[str, tuple[float, ...]] = {"noise": noise, "holes": _HOLES, "shift": _SHIFTS}
    return [Corruption(modality, kind, level) for level in levels.get(kind, (None,))]


def parse(text: str, reader: Reader, kinds: Sequence[str] = KINDS) -> list[Corruption]:
    """The corruptions that a text names.

    Args:
        text: ``depth=noise:0.1``; several of one modality as ``depth=missing,holes:0.3``, of several as
            ``depth=missing,rgb=noise:0.1``. A kind without its level has its standard levels, a modality
            without kinds (``depth``) all of ``standard``; ``all`` is each modality.
        reader: of the modalities; those that it leaves out cannot be corrupted.
        kinds: of ``standard``.

    Raises:
        ValueError: an unknown modality or kind, or as ``Corruption``.
    """
    known = tuple(name for name in reader.modalities if name not in reader.without)
    found: list[Corruption] = []
    chosen: tuple[str, ...] = ()
    for part in text.split(","):
        name, equals, item = part.partition("=")
        is_modality = name in (*known, ALL)
        if equals or is_modality:
            chosen = known if name == ALL else (name,)
        else:
            item = part
        if not chosen or not set(chosen) <= set(known):
            raise ValueError(
                f"{text}: expected MODALITY=KIND:LEVEL with the modality {', '.join(known)} or {ALL}, got"
                f" {part!r}{suggest(name, known)}"
            )
        for modality in chosen:
            whole = is_modality and not equals
            found += standard(reader, modality, kinds) if whole else _named(reader, modality, item)
    return found


def _named(reader: Reader, modality: str, item: str) -> list[Corruption]:
    """``noise:0.1``, or ``noise`` for its standard levels."""
    kind, colon, level = item.partition(":")
    if not colon:
        return _of_kind(reader, modality, kind)
    try:
        value = float(level)
    except ValueError:
        raise ValueError(f"{modality}={item}: expected a number after the colon, got {level!r}") from None
    return [Corruption(modality, kind, value)]


class CorruptedSet:
    """The samples of a data set with one modality corrupted; those that lack it stay as they are.

    What is drawn follows from the sample's name, the modality and the kind alone: it is the same in any
    order, with any number of workers and for every network, and all levels of a kind share it, so that the
    holes of a lower level are among those of a higher one.

    Args:
        dataset: the samples.
        corruption: of one of its modalities.

    Raises:
        ValueError: an unknown modality; noise on categorical values.
        DataError: from ``corrupted[i]``: as ``dataset[i]``; a shift that is as large as the image.
    """

    def __init__(self, dataset: SegmentationSet, corruption: Corruption) -> None:
        reader = dataset.reader
        if corruption.modality not in reader.modalities:
            raise ValueError(
                f"{corruption}: unknown modality {corruption.modality!r}: expected one of "
                f"{', '.join(reader.modalities)}{suggest(corruption.modality, reader.modalities)}"
            )
        self.dataset, self.corruption = dataset, corruption
        self.number = reader.modalities.index(corruption.modality)
        self.spec, self.kind = input_specs(reader)[self.number], reader.kinds()[self.number]
        if corruption.kind == "noise" and self.kind == "categorical":
            raise ValueError(
                f"{corruption}: the values of {corruption.modality} are categories, to which noise cannot be "
                "added; take holes, shift, blank or missing"
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.corrupted(self.dataset[index])

    def corrupted(self, sample: Sample) -> Sample:
        """A sample of the data set, corrupted."""
        m, kind, level = self.number, self.corruption.kind, self.corruption.level
        if m in sample.absent:
            return sample
        images, image = list(sample.images), sample.images[m]
        if kind == "missing":
            images[m] = np.zeros((*image.shape[:2], 1), np.float32)
            return sample._replace(images=tuple(images), absent=tuple(sorted((*sample.absent, m))))
        if level is None:
            images[m] = np.zeros_like(image)
        elif kind == "shift":
            if abs(level) >= min(image.shape[:2]):
                raise DataError(
                    f"{self.corruption}: {sample.name} is {size_of(image)}; a shift must be of fewer pixels"
                    " than either side has"
                )
            images[m] = shifted(image, int(level), has_holes(self.kind))
        else:
            key = f"{sample.name}\n{self.corruption.modality}\n{kind}"
            rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest(), "big"))
            corrupt = noisy if kind == "noise" else with_holes
            images[m] = corrupt(image, level, self.spec, self.kind, rng)
        return sample._replace(images=tuple(images))


def noisy(image: Image, sigma: float, spec: InputSpec, kind: str | None, rng: np.random.Generator) -> Image:
    """A normalized ``[H, W, C]`` image with noise of standard deviation ``sigma``, see ``Corruption``.

    Args:
        spec: how it was normalized.
        kind: of ``Reader.kinds``.
    """
    mean, std = _normalization(spec)
    values = image * std + mean + sigma * rng.standard_normal(image.shape)
    if kind == "normals":
        values /= np.linalg.norm(values, axis=-1, keepdims=True)
    elif kind != "points":
        values = values.clip(0, None if kind in _UNBOUNDED else 1)
    known = image.any(axis=-1, keepdims=True) | (not has_holes(kind))
    return np.asarray(np.where(known, (values - mean) / std, 0), np.float32)


def with_holes(
    image: Image, share: float, spec: InputSpec, kind: str | None, rng: np.random.Generator
) -> Image:
    """A normalized ``[H, W, C]`` image, ``share`` of whose pixels are holes, see ``Corruption``; exactly, but
    for rounding to whole pixels.

    Args:
        spec, kind: as for ``noisy``.
    """
    mean, std = _normalization(spec)
    found: Image = image.copy()
    found[blobs(image.shape[:2], share, rng)] = 0 if has_holes(kind) else (-mean / std).astype(np.float32)
    return found


def blobs(size: Sequence[int], share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """A mask, ``[H, W]``, of blobs that take ``share`` of it: the lowest values of blurred white noise."""
    field = cv2.GaussianBlur(rng.standard_normal(tuple(size)), (0, 0), max(1.0, _BLOB * min(size)))
    mask = np.zeros(field.size, bool)
    mask[np.argsort(field, axis=None, kind="stable")[: round(share * field.size)]] = True
    return mask.reshape(size[0], size[1])


def shifted(image: Image, pixels: int, holes: bool) -> Image:
    """An ``[H, W, C]`` image moved ``pixels`` to the right and down.

    Args:
        holes: what comes in is 0; otherwise, the outermost row or column again.
    """
    rows, columns = (np.arange(length) - pixels for length in image.shape[:2])
    top, left = rows.clip(0, len(rows) - 1), columns.clip(0, len(columns) - 1)
    inside = (rows == top)[:, None] & (columns == left)
    found = image[top[:, None], left]
    return np.asarray(np.where(inside[:, :, None] | (not holes), found, 0), np.float32)


def _normalization(spec: InputSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel, or of all."""
    return np.array(spec.mean or 0.0), np.array(spec.std or 1.0)
