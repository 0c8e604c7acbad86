"""Scenes that lack files of some modality: refused, left out, or kept without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from models.data.images import DataError
from models.data.layouts import CAMERA, LABELS

Missing = Literal["refuse", "skip", "fill"]
CHOICES: tuple[Missing, ...] = ("refuse", "skip", "fill")
REMEDY = "; data.missing=skip leaves such scenes out, data.missing=fill does without the file"

Entry = dict[str, Path]  # keys: kinds of file: modalities, labels, camera


@dataclass(frozen=True)
class Absences:
    """What the scenes of a split lack.

    Attributes:
        split: its name.
        missing: what is done about it.
        scenes: how many there are with those that were left out.
        counts: by kind of file how many scenes lack it.
        first: by kind of file the first that is not there.
        left_out: how many scenes were left out.
        without: modalities that are left out of every scene, whether there are files of them or not.
    """

    split: str
    missing: Missing = "refuse"
    scenes: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    first: Mapping[str, Path] = field(default_factory=dict)
    left_out: int = 0
    without: tuple[str, ...] = ()

    @property
    def filled(self) -> bool:
        """Whether scenes are kept without one of their modalities."""
        return self.missing == "fill" and bool(self.counts)

    def notes(self) -> list[str]:
        """It in words, a line for each kind of file; none where every scene has all."""
        lines = []
        if self.without:
            lines.append(f"{self.split}: without {', '.join(self.without)}")
        if self.left_out:
            lines.append(
                f"{self.split}: {self.left_out} of {self.scenes} scenes are left out, as they lack files "
                f"(missing=skip): {', '.join(self._counted())}"
            )
        elif self.counts:
            lines.append(
                f"{self.split}: of {self.scenes} scenes some lack files, and take part without (missing="
                f"fill): {', '.join(self._counted())}"
            )
        return lines

    def _counted(self) -> list[str]:
        return [f"{count} lack {kind} (the first {self.first[kind]})" for kind, count in self.counts.items()]


def settle(
    entries: Sequence[Entry], split: str, missing: Missing, source: str, without: tuple[str, ...] = ()
) -> tuple[list[Entry], Absences]:
    """Leave out the scenes, or of scenes the files, that are not there.

    Args:
        entries: by kind the files of every scene, whether they are there or not; labels are.
        split: its name.
        missing: ``"skip"`` the scenes, or ``"fill"``: leave out the files. Those of cameras may be missing
            only where depth is, too.
        source: the list, or whatever names the scenes, for messages.
        without: for ``Absences``.

    Raises:
        DataError: a camera's file is missing; no scene is left; or a scene has no modality at all, with
            ``"fill"``.
    """
    kept: list[Entry] = []
    counts: Counter[str] = Counter()
    first: dict[str, Path] = {}
    for entry in entries:
        there = {kind: path for kind, path in entry.items() if path.is_file()}
        lacking = [kind for kind in entry if kind not in there and kind != CAMERA]
        if CAMERA in entry and CAMERA not in there and {"depth", "disparity"} & there.keys():
            raise DataError(f"{entry[CAMERA]}: listed in {source}, but there is no such file")
        for kind in lacking:
            counts[kind] += 1
            first.setdefault(kind, entry[kind])
        if missing == "fill" and not there.keys() - {LABELS, CAMERA}:
            raise DataError(
                f"{entry[lacking[0]]}: the scene has no file of any modality, only labels "
                f"({entry[LABELS]}); data.missing=skip leaves it out"
            )
        if missing == "fill" or not lacking:
            kept.append(there)
    absences = Absences(split, missing, len(entries), counts, first, len(entries) - len(kept), without)
    if not kept:
        raise DataError(
            f"no scene of {split} has all its files: {', '.join(absences._counted())}; data.missing=fill does"
            " without them, and data.modalities without a modality"
        )
    return kept, absences
