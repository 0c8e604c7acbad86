"""All runs of a page, in their groups, with what sections ask of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.comparison.compare import Comparison
from models.comparison.costs import Costs
from models.comparison.groups import Group, Value
from models.report.blocks import NOTHING, Cell, Note
from models.report.subject import Subject

_LESS_IS_BETTER = ("l1", "l2", "mae", "mse", "rmse", "fid", "kid")
SCORE_NAMES = {
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "mean_iou": "mean IoU",
    "weighted_iou": "weighted IoU",
    "image_mean_iou": "mean IoU by image",
    **{name: name.upper() for name in ("l1", "l2", "mae", "mse", "rmse", "psnr", "ssim", "fid", "kid")},
}


@dataclass(frozen=True)
class Gathered:
    """What the page is of.

    Attributes:
        comparison: the groups of runs; its costs are those of the groups whose network can be built here.
        subjects: the runs, read, by folder.
        costs: by group; None where they cannot be had.
        notes: what is missing.
    """

    comparison: Comparison
    subjects: dict[Path, Subject]
    costs: Sequence[Costs | None]
    notes: Sequence[Note]

    @property
    def groups(self) -> Sequence[Group]:
        return self.comparison.groups

    def of(self, group: Group) -> list[Subject]:
        """The group's runs."""
        return [self.subjects[run.path] for run in group.runs]

    def first(self, group: Group) -> Subject:
        """The run that stands for its group where one has to."""
        return self.subjects[group.runs[0].path]

    @property
    def unit(self) -> str:
        return " %" if self.comparison.per_cent else ""

    @property
    def decimals(self) -> int:
        return 2 if self.comparison.per_cent else 4

    @property
    def lead(self) -> str:
        """The score by which runs are compared first."""
        if self.comparison.per_cent:
            return "mean_iou"
        best: str = self.groups[0].runs[0].recipe.eval.best
        return best if best in self.comparison.scores else "l1"

    def text(self, value: Value | None, decimals: int | None = None) -> str:
        """A value with its spread, as tables show it."""
        if value is None:
            return NOTHING
        digits = self.decimals if decimals is None else decimals
        spread = "" if value.spread is None else f" ± {value.spread:.{digits}f}"
        return f"{value.mean:.{digits}f}{spread}"

    def cells(self, values: Sequence[Value | None], *, less: bool | None = False) -> list[Cell]:
        """Cells of values that compete, the best ones marked; none of equals, or with ``less=None``."""
        texts = [self.text(value) for value in values]
        known = [value.mean for value in values if value is not None]
        if less is None or len({f"{value:.{self.decimals}f}" for value in known}) < 2:
            return [Cell(text) for text in texts]
        best = f"{(min if less else max)(known):.{self.decimals}f}"
        return [
            Cell(text, value is not None and f"{value.mean:.{self.decimals}f}" == best)
            for text, value in zip(texts, values, strict=True)
        ]


def less_is_better(score: str) -> bool:
    return score in _LESS_IS_BETTER


def score_name(score: str) -> str:
    return SCORE_NAMES.get(score, score.replace("_", " "))


def over_seeds(subjects: Sequence[Subject], of: Callable[[Subject], float | None]) -> Value | None:
    """A result over the runs that have it; None where none does."""
    values = [value for subject in subjects if (value := of(subject)) is not None]
    return Value.of(values) if values else None
