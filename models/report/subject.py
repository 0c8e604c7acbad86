"""A run as the page shows it: what its folder, its checkpoint and its validation images tell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from models.comparison.runs import Numbers, Run, rows
from models.data import DataError
from models.networks.messages import first_line
from models.report.blocks import Note, Picture
from models.report.examined import Examined, examine
from models.report.feature_maps import feature_picture
from models.report.layers import Layer, layers_of
from models.training import checkpoint, registry, thresholds
from models.training.errors import UsageError
from models.training.importable import naming_missing
from models.training.run_folder import ENVIRONMENT, LOSSES, METRICS
from models.training.scale_records import read_scales

_LOG, _TIME = "log.txt", "%Y-%m-%d %H:%M:%S"


@dataclass(frozen=True)
class Subject:
    """A run, read.

    Attributes:
        run: its settings and last metrics.
        recipe_name: of its recipe.
        losses, metrics: the rows of its tables.
        environment: what it ran on, as ``run_folder.environment`` has it; empty where not recorded.
        started, ended: the first and the last line of its log; None where there is none.
        layers: of its checkpoint, or else of its last record, in the network's order.
        scales_of: where the layers are from, in words.
        history: by step, the layers at every record.
        alpha: the ensemble's weights by branch.
        checkpoint_step: that of the checkpoint that is shown.
        changed: settings that are not those of the training.
        examined: what the checkpoint makes of validation images.
        corrupted: ``cen evaluate --corrupt``'s results, as the file has them.
        features: feature maps.
        notes: what is missing.
    """

    run: Run
    recipe_name: str
    losses: Sequence[Numbers]
    metrics: Sequence[Numbers]
    environment: Mapping[str, Any]
    started: datetime | None
    ended: datetime | None
    layers: Sequence[Layer] = ()
    scales_of: str = ""
    history: Sequence[tuple[int, Sequence[Layer]]] = ()
    alpha: Mapping[str, float] = field(default_factory=dict)
    checkpoint_step: int | None = None
    changed: Sequence[str] = ()
    examined: Examined | None = None
    corrupted: Mapping[str, Any] | None = None
    features: Picture | None = None
    notes: Sequence[Note] = ()

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of the network's input, in its order."""
        data = self.run.recipe.data
        found: tuple[str, ...] = getattr(data, "modalities", None) or data.domains
        return found


def read_subject(
    run: Run, overrides: Sequence[str], *, images: int | None, evaluation: bool, draw: bool
) -> Subject:
    """Read all that there is of a run, and note what is not.

    Args:
        run: from ``models.comparison.runs.read``.
        overrides: ``field=value`` assignments to evaluate its checkpoint with.
        images: the number of validation images to look at; None: ``eval.limit``, or all.
        evaluation: whether to look at any.
        draw: whether pictures of some are wanted.
    """
    environment = run.path / ENVIRONMENT
    started, ended = _times(run.path / _LOG)
    subject = Subject(
        run,
        json.loads((run.path / checkpoint.CONFIG).read_text())["recipe"],
        rows(run.path / LOSSES),
        rows(run.path / METRICS),
        json.loads(environment.read_text()) if environment.is_file() else {},
        started,
        ended,
        corrupted=_corrupted(run.path),
    )
    notes = list(_of_progress(subject))
    try:
        trained = registry.system_of(run.recipe).load(run.path, overrides)
    except (UsageError, DataError) as error:
        trained = None
        notes.append(
            Note(
                f"The checkpoint of {run.path} cannot be shown: {first_line(error)}",
                "Train on, or bring best.pt back into the folder, then make the page again.",
            )
        )
    records = read_scales(run.path)
    if not records:
        notes.append(
            Note(
                f"{run.path} holds no records of γ over time"
                + (", so the page shows those of its checkpoint alone." if trained else "."),
                "Runs of this version record them in the folder scales.",
            )
        )
    subject = _with_scales(subject, trained, records)
    if trained is not None and evaluation:
        subject, note = _examined(subject, trained, images, draw)
        notes += note
        if draw and subject.examined is not None:
            subject = replace(subject, features=feature_picture(trained))
    return replace(subject, notes=notes)


def _of_progress(subject: Subject) -> list[Note]:
    run = subject.run
    if run.finished:
        return []
    at = f"step {run.step}" + (f" of {run.total}" if run.total else "")
    missing = f"{run.path} is unfinished ({at})" + ("." if run.metrics else " and has no evaluation yet.")
    return [Note(missing, f"Continue it: cen train RECIPE --resume {run.path}")]


def _with_scales(subject: Subject, trained: Any, records: Sequence[tuple[int, dict[str, Tensor]]]) -> Subject:
    if trained is None:
        net = _structure(subject.run) if records else None
        if net is None:
            return subject
        history = [(step, layers_of(net, scales)) for step, scales in records]
        return replace(
            subject, layers=history[-1][1], history=history, scales_of=f"the record of step {records[-1][0]}"
        )
    names = registry.system_of(trained.recipe).output_names(trained.recipe)
    step = checkpoint.step_of(trained.path)
    return replace(
        subject,
        layers=layers_of(trained.net),
        history=[(at, layers_of(trained.net, scales)) for at, scales in records],
        scales_of=trained.path.name + (f", step {step}" if step is not None else ""),
        alpha=dict(zip(names, trained.net.branch_weights(), strict=False)),
        checkpoint_step=step,
        changed=trained.changed,
    )


def _structure(run: Run) -> Any:
    """The run's network with random weights, its thresholds set; None where it cannot be built here."""
    header = json.loads((run.path / checkpoint.CONFIG).read_text())
    try:
        with naming_missing(header):
            net = registry.system_of(run.recipe).network(run.recipe)
        thresholds.restore(net, str(run.path), header)
    except UsageError:
        return None
    return net


def _examined(subject: Subject, trained: Any, images: int | None, draw: bool) -> tuple[Subject, list[Note]]:
    path = subject.run.path
    try:
        found = examine(trained, images, draw=draw)
    except (UsageError, DataError) as error:
        return subject, [
            Note(
                f"The validation images of {path} could not be looked at: {first_line(error)}",
                "Where the data set has moved, say where it is now: "
                f"cen report {path} --output FILE data.root=FOLDER",
            )
        ]
    notes = []
    if found.count < found.total:
        notes.append(
            Note(
                f"{found.count} of {found.total} validation images of {path} were looked at, spread evenly.",
                "Without --images, eval.limit=none takes all of them.",
            )
        )
    return replace(subject, examined=found), notes


def _corrupted(path: Path) -> dict[str, Any] | None:
    """The results on corrupted inputs: of the best checkpoint, or else the latest."""
    best = path / f"corrupted_{Path(checkpoint.BEST).stem}.json"
    files = sorted(path.glob("corrupted_*.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        return None
    found: dict[str, Any] = json.loads((best if best in files else files[-1]).read_text())
    return found


def _times(path: Path) -> tuple[datetime | None, datetime | None]:
    """When a log's first and last lines were written."""
    times = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            times.append(datetime.strptime(line[:19], _TIME))
        except ValueError:  # a line of a message that has several
            continue
    return (times[0], times[-1]) if times else (None, None)
