"""Scores by branch, by class, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.comparison.groups import Group, Value
from models.comparison.runs import outputs
from models.report.blocks import NOTHING, Block, Cell, Matrix, Section, Table
from models.report.gathered import Gathered, less_is_better, over_seeds, score_name
from models.report.subject import Subject
from models.segmentation.metrics import SHARE

_MOST_CONFUSED = 8


def scores(gathered: Gathered) -> Section:
    """Tables of branches and classes, and confusion matrices."""
    blocks: list[Block] = [_by_output(gathered)]
    if any(subject.examined and subject.examined.classes for subject in gathered.subjects.values()):
        blocks.append(_by_class(gathered))
        for group in gathered.groups:
            blocks += _confusion(gathered, group)
    per_cent = " All numbers are per cent." if gathered.comparison.per_cent else ""
    lead = f"Every branch alone, and the ensemble of all, at the last evaluation.{per_cent}"
    return Section("scores", "Scores", lead, blocks)


def _by_output(gathered: Gathered) -> Table:
    names = gathered.comparison.scores
    rows: list[Sequence[Cell | str]] = []
    for group in gathered.groups:
        found = outputs(group.runs[0])
        columns = [
            gathered.cells(
                [gathered.comparison.shown(f"{output}/{score}", group) for output in found],
                less=less_is_better(score),
            )
            for score in names
        ]
        rows += [
            [f"{group.name}: {output}", *(column[i] for column in columns)] for i, output in enumerate(found)
        ]
    return Table(
        "By branch. The best output of each group of runs is marked.",
        ["", *(score_name(score) for score in names)],
        rows,
    )


def _by_class(gathered: Gathered) -> Table:
    """IoU of every class, of the ensemble of each group, and of each branch."""
    shown = [group for group in gathered.groups if any(_classes(each) for each in gathered.of(group))]
    columns = [(group, output) for group in shown for output in reversed(outputs(group.runs[0]))]
    first = next(each for group in shown for each in gathered.of(group) if _classes(each))
    known = _classes(first)
    ensembles = [i for i, (_, output) in enumerate(columns) if output == "ensemble"]
    rows: list[list[Cell | str]] = []
    for label in sorted(known, key=lambda label: -(known[label][SHARE] or 0)):
        values = [_class_value(gathered, group, output, label) for group, output in columns]
        cells = gathered.cells(values, less=None)
        for i, marked in zip(ensembles, gathered.cells([values[i] for i in ensembles]), strict=True):
            cells[i] = marked
        share = known[label][SHARE]
        rows.append([label, NOTHING if share is None else f"{100 * share:.2f}", *cells])
    head = ["class", "share of pixels", *(f"{group.name}: {output}" for group, output in columns)]
    return Table(
        f"IoU by class, the most frequent class first, of the checkpoint on {_count(first)}. The best "
        f"ensemble for each class is marked; {NOTHING} is a class that neither occurs nor is predicted.",
        head,
        rows,
    )


def _classes(subject: Subject) -> dict[str, dict[str, float | None]]:
    return (subject.examined.classes or {}) if subject.examined else {}


def _count(subject: Subject) -> str:
    assert subject.examined is not None  # it has classes
    count, total = subject.examined.count, subject.examined.total
    return f"{count} of {total} validation images" if count < total else f"all {total} validation images"


def _class_value(gathered: Gathered, group: Group, output: str, label: str) -> Value | None:
    def of(subject: Subject) -> float | None:
        value = _classes(subject).get(label, {}).get(output)
        return None if value is None else 100 * value

    return over_seeds(gathered.of(group), of)


def _confusion(gathered: Gathered, group: Group) -> list[Block]:
    """The ensemble's confusions, of all runs of the group together."""
    found = [each.examined for each in gathered.of(group) if each.examined and each.examined.classes]
    tables = [each.confusion for each in found if each.confusion is not None]
    if not tables or not found[0].classes:
        return []
    names = list(found[0].classes)
    counts = np.sum(tables, axis=0)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    rows = [
        list(map(float, row)) if total else [None] * len(row)
        for row, total in zip(shares, totals[:, 0], strict=True)
    ]
    matrix = Matrix(
        f"{group.name}: what the ensemble takes the pixels of each class for, in per cent of the class's "
        "pixels. Rows are the truth and add up to 100; right answers lie on the diagonal. Shares below 1 % "
        "are not printed.",
        names,
        rows,
    )
    return [matrix, _most_confused(group, names, shares, counts)]


def _most_confused(
    group: Group, names: Sequence[str], shares: NDArray[np.float64], counts: NDArray[np.int64]
) -> Table:
    """The confusions that cost most pixels."""
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    total = max(int(wrong.sum()), 1)
    rows: list[Sequence[Cell | str]] = []
    for place in np.argsort(-wrong, axis=None)[:_MOST_CONFUSED]:
        true, taken = divmod(int(place), len(counts))
        if wrong[true, taken]:
            share = wrong[true, taken] / total
            rows.append(
                [
                    f"{names[true]} taken for {names[taken]}",
                    f"{100 * shares[true, taken]:.1f} %",
                    Cell(f"{100 * share:.1f} %", bar=float(share)),
                ]
            )
    return Table(
        f"{group.name}: the confusions that cost most pixels.",
        ["", "of the class's pixels", "of all wrong pixels"],
        rows,
        beside=True,
    )
