"""The report command's work: from runs' folders to one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from models.comparison.compare import Comparison
from models.comparison.costs import Costs, costs
from models.comparison.groups import Group, grouped, repeated_seeds
from models.comparison.runs import Run, read_all, warnings
from models.networks.messages import first_line
from models.report import costs as cost_section
from models.report import curves, exchange, overview, pictures, scores
from models.report.blocks import Note, Section
from models.report.gathered import Gathered
from models.report.page import Page, html, now
from models.report.subject import Subject, read_subject
from models.training import checkpoint
from models.training.errors import UsageError, program, writable
from models.training.files import replacing

COMMAND = "report"


def write_report(
    paths: Sequence[Path],
    output: Path,
    overrides: Sequence[str] = (),
    *,
    images: int | None = None,
    evaluation: bool = True,
    measure: bool = False,
) -> Gathered:
    """Write the page of runs of one kind.

    Args:
        paths: the runs' folders.
        output: the file.
        overrides: ``field=value`` assignments to evaluate the checkpoints with, such as ``data.root=...``.
        images: the number of validation images that each checkpoint is run on, spread evenly; None:
            ``eval.limit``, or all.
        evaluation: whether to run them on any.
        measure: time the networks as well.

    Returns:
        What the page is of, what is missing on it included.

    Raises:
        UsageError: as ``read_all`` of runs that may be unfinished; an override is wrong; ``output`` cannot be
            written.
    """
    runs = read_all(paths, COMMAND, evaluated=False)
    for run in runs:  # a wrong override is no missing piece
        checkpoint.settings_here(json.loads((run.path / checkpoint.CONFIG).read_text()), overrides)
    writable(output, "--output")
    gathered = _gather(runs, overrides, images, evaluation, measure)
    with replacing(output) as temporary:
        temporary.write_text(html(_page(gathered, evaluation)), encoding="utf-8")
    return gathered


def _gather(
    runs: Sequence[Run], overrides: Sequence[str], images: int | None, evaluation: bool, measure: bool
) -> Gathered:
    groups = grouped(runs)
    subjects: dict[Path, Subject] = {}
    for group in groups:
        for place, run in enumerate(group.runs):
            subjects[run.path] = read_subject(
                run, overrides, images=images, evaluation=evaluation, draw=place == 0
            )
    notes = [note for subject in subjects.values() for note in subject.notes]
    found: list[Costs | None] = []
    for group in groups:
        cost, note = _costs(group, measure)
        found.append(cost)
        notes += note
    if not evaluation:
        missing = "No checkpoint was run: classes, confusions and pictures are left out."
        notes.append(Note(missing, "Leave --no-evaluation away for them."))
    known = [cost for cost in found if cost is not None]
    odd = [*warnings([run for run in runs if run.finished]), *repeated_seeds(groups)] if runs else []
    return Gathered(Comparison(groups, known, odd), subjects, found, notes)


def _costs(group: Group, measure: bool) -> tuple[Costs | None, list[Note]]:
    """The group's costs; without a time where its checkpoint cannot be timed."""
    try:
        return costs(group, measure=measure, command=COMMAND), []
    except UsageError as error:
        note = Note(
            f"What the network of {group.name} costs could not be found: {first_line(error)}",
            "It takes the network's code and, with --measure, the checkpoint.",
        )
    if measure:
        return _costs(group, False)[0], [note]
    return None, [note]


def _page(gathered: Gathered, evaluation: bool) -> Page:
    sections: list[Section | None] = [
        overview.summary(gathered),
        overview.glossary(gathered),
        overview.training(gathered),
        curves.curves(gathered),
        scores.scores(gathered),
        pictures.pictures(gathered),
        exchange.exchange(gathered),
        pictures.features(gathered),
        cost_section.robustness(gathered),
        cost_section.costs(gathered),
    ]
    names = [group.name for group in gathered.groups]
    count = len(gathered.subjects)
    looked = ", checkpoints run on validation images" if evaluation else ""
    return Page(
        " / ".join(names),
        f"{count} training run{'s' * (count != 1)} of {overview.kind(gathered)}",
        gathered.notes,
        gathered.comparison.warnings,
        [section for section in sections if section is not None],
        f"Made {now()} by `{program()} {COMMAND}`{looked}. Scores in tables are those of the last "
        "evaluation in training (metrics.csv) unless a caption says otherwise.",
    )
