"""Runs that differ in the seed alone, and the spread of their results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from models.comparison.runs import Run
from models.training.config import show


@dataclass(frozen=True)
class Value:
    """A result of one or more runs.

    Attributes:
        mean: over the runs.
        spread: their standard deviation (of n - 1); None for a single run.
    """

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Value:
        return cls(mean(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Group:
    """Runs of the same settings, the seed aside.

    Attributes:
        name: of the first run's folder, as short as it can be among all that are compared.
    """

    name: str
    runs: tuple[Run, ...]

    def value(self, of: Callable[[Run], float | None]) -> Value | None:
        """A result over the runs; None where one of them lacks it."""
        values = [of(run) for run in self.runs]
        known = [value for value in values if value is not None]
        return Value.of(known) if len(known) == len(values) else None

    def metric(self, name: str) -> Value | None:
        """A metric, ``<output>/<score>``, over the runs."""
        return self.value(lambda run: run.metrics.get(name))

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs by settings, in the order given."""
    found: list[list[Run]] = []
    for run in runs:
        for group in found:
            if group[0].settings == run.settings and group[0].classes == run.classes:
                group.append(run)
                break
        else:
            found.append([run])
    names = _names([group[0].path for group in found])
    return [Group(name, tuple(group)) for name, group in zip(names, found, strict=True)]


def repeated_seeds(groups: Sequence[Group]) -> list[str]:
    """The runs whose spread tells nothing about seeds, in words."""
    found = []
    for group in groups:
        by_seed: dict[int, list[str]] = {}
        for run in group.runs:
            by_seed.setdefault(run.recipe.run.seed, []).append(str(run.path))
        for seed, paths in by_seed.items():
            if len(paths) > 1:
                found.append(f"{', '.join(paths)} have the same settings and the same seed, {seed}")
    return found


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """By path of a setting that differs between groups, its value in each; ``-`` where a group has none."""
    settings = [group.runs[0].settings for group in groups]
    paths = dict.fromkeys(path for each in settings for path in each)
    shown = {path: [show(each[path]) if path in each else "-" for each in settings] for path in paths}
    return {path: values for path, values in shown.items() if len(set(values)) > 1}


def _names(paths: Sequence[Path]) -> list[str]:
    """Each folder's path below the folder that all are in."""
    whole = [path.resolve() for path in paths]
    if len(set(whole)) == 1:
        return [whole[0].name] * len(paths)
    common = Path(os.path.commonpath(whole))
    return [path.relative_to(common).as_posix() if path != common else path.name for path in whole]
