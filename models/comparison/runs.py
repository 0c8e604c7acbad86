"""Runs as their folders tell them, without their checkpoints."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from models.training import checkpoint, registry
from models.training.config import flatten, show
from models.training.errors import UsageError, existing
from models.training.run_folder import ENVIRONMENT, LOSSES, METRICS, SPEED
from models.training.settings import stage_ends

Numbers = dict[str, float]

# Where a run was carried out and what it showed on the way.
_NOT_OF_THE_TRAINING = (
    *("run.output", "run.device", "run.workers", "run.log_steps", "run.checkpoint_steps"),
    *("run.checkpoint_minutes", "run.keep"),
    *("eval.pictures", "eval.sheet", "eval.frames"),
)
# Other data, or other ways to look at them, give metrics that do not compare.
_OF_THE_METRICS = (
    *("data.root", "data.lists", "data.num_classes", "data.ignore_index", "data.label_offset", "data.merge"),
    *("data.target", "eval.scales", "eval.flip", "eval.window", "eval.overlap", "eval.interpolation"),
    *("eval.limit", "eval.dropout", "eval.value_range", "eval.fid.preparation"),
    *("eval.without", "data.missing"),
)


@dataclass(frozen=True)
class Run:
    """A run's settings and results.

    Attributes:
        path: its folder.
        recipe: its settings.
        classes: their names, in segmentation.
        step: of the last evaluation; before the first one, of the last line of the log.
        total: steps that the settings ask for; None before an evaluation tells how long an epoch is.
        metrics: ``<output>/<score>`` of the last evaluation.
        images_per_second: in training, the median over the log; None where none was logged.
        peak_memory: in training, MiB; None likewise.
        machine: what it trained on, in words.
        imports: the modules that ``--import`` named for it.
    """

    path: Path
    recipe: Any
    classes: tuple[str, ...]
    step: int
    total: int | None
    metrics: Numbers
    images_per_second: float | None
    peak_memory: float | None
    machine: str
    imports: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return bool(self.metrics) and self.total is not None and self.step >= self.total

    @property
    def settings(self) -> dict[str, Any]:
        """By path, the settings that a training depends on, the seed aside."""
        known = flatten(self.recipe)
        return {
            path: value for path, value in known.items() if path not in (*_NOT_OF_THE_TRAINING, "run.seed")
        }


def read_all(paths: Sequence[Path], command: str = "compare", *, evaluated: bool = True) -> list[Run]:
    """Read runs of one kind.

    Args:
        paths: their folders.
        command, evaluated: as in ``read``.

    Raises:
        UsageError: as ``read``; a folder is given twice; one run segments, another translates.
    """
    whole = [path.resolve() for path in paths]
    for i, path in enumerate(whole):
        if path in whole[:i]:
            raise UsageError(f"{command}: {paths[i]} is given twice")
    runs = [read(path, command, evaluated=evaluated) for path in paths]
    _check_kinds(runs, command)
    return runs


def read(path: Path, command: str = "compare", *, evaluated: bool = True) -> Run:
    """Read a run's folder.

    Args:
        path: the folder.
        command: which errors name.
        evaluated: refuse a run that has not evaluated its network yet; otherwise it has no metrics.

    Raises:
        UsageError: it is none; it is refused; a file of it is broken.
    """
    existing(path, command)
    if not checkpoint.is_of_run(path):
        raise UsageError(
            f"{command}: {path} is no run's folder: it holds no {checkpoint.CONFIG}, which training writes"
        )
    try:
        run = _read(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{command}: {path} is broken ({type(error).__name__}: {error})") from None
    if evaluated and not run.metrics:
        logged = f"its log ends at step {run.step}" if run.step else "its log is empty"
        raise UsageError(f"{command}: {path} is unfinished: it has no evaluation yet, {logged}")
    return run


def _read(path: Path) -> Run:
    header = json.loads((path / checkpoint.CONFIG).read_text())
    recipe = checkpoint.settings(header)
    evaluations, logs = rows(path / METRICS), rows(path / LOSSES)
    last = evaluations[-1] if evaluations else {}
    logged = int(logs[-1]["step"]) if logs else 0
    step, epoch = int(last.pop("step", logged)), last.pop("epoch", None)
    stages, total = recipe.optim.stages, None
    if epoch is not None or all(stage.steps is not None for stage in stages):
        end = stage_ends(stages, round(step / epoch) if epoch else 0)[-1]
        total = min(end, recipe.run.steps or end)
    speed = rows(path / SPEED)
    memory = [row["peak_memory_mib"] for row in speed if "peak_memory_mib" in row]
    return Run(
        path,
        recipe,
        tuple(header.get("classes", ())),
        step,
        total,
        last,
        # The first rows have the start of loaders and of kernels in them.
        median(row["images_per_second"] for row in speed) if speed else None,
        max(memory, default=None),
        _machine(path / ENVIRONMENT, recipe.run.device),
        tuple(header.get("imports", ())),
    )


def rows(path: Path) -> list[Numbers]:
    """The rows of a run's table; none where it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def _machine(path: Path, device: str) -> str:
    known = json.loads(path.read_text()) if path.is_file() else {}
    if device.startswith("cuda") or (device == "auto" and known.get("devices")):
        return ", ".join(dict.fromkeys(known.get("devices", ()))) or device
    return on_cpu(known["threads"]) if "threads" in known else "CPU"


def on_cpu(threads: int) -> str:
    """A CPU as a machine, in words."""
    return f"CPU, {threads} thread{'s' * (threads != 1)}"


def _check_kinds(runs: Sequence[Run], command: str) -> None:
    """Refuse runs whose metrics have nothing in common.

    Raises:
        UsageError: one segments, another translates.
    """
    kinds: dict[type, Run] = {}
    for run in runs:
        kinds.setdefault(type(run.recipe), run)
    if len(kinds) > 1:
        each = "; ".join(f"{run.path} is of a {kind.__name__}" for kind, run in kinds.items())
        raise UsageError(f"{command}: runs must be of one kind: {each}")


def warnings(runs: Sequence[Run]) -> list[str]:
    """What makes the runs' metrics hard to compare, in words."""
    found = [
        f"{run.path} is unfinished: step {run.step} of {run.total or 'an unknown number'}"
        for run in runs
        if not run.finished
    ]
    flat = {run.path: flatten(run.recipe) for run in runs}
    for name in _OF_THE_METRICS:
        found += _differing(name, {path: show(values.get(name)) for path, values in flat.items()})
    found += _differing("the names of classes", {run.path: ", ".join(run.classes) for run in runs})
    scores = {run.path: dict.fromkeys(key.partition("/")[2] for key in run.metrics) for run in runs}
    every = dict.fromkeys(score for names in scores.values() for score in names)
    for score in every:
        if without := [str(path) for path, names in scores.items() if score not in names]:
            found.append(f"{score} is missing in {', '.join(without)}, which did not compute it")
    return found


def _differing(what: str, values: Mapping[Path, str]) -> list[str]:
    by_value: dict[str, list[Path]] = {}
    for path, value in values.items():
        by_value.setdefault(value, []).append(path)
    if len(by_value) == 1:
        return []
    each = "; ".join(f"{value} in {', '.join(map(str, paths))}" for value, paths in by_value.items())
    return [f"the metrics may not compare, {what} differ: {each}"]


def outputs(run: Run) -> list[str]:
    """The names of the run's branches, and last the ensemble's."""
    return list(registry.system_of(run.recipe).output_names(run.recipe))
