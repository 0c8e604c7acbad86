"""The runs that are compared, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.comparison.costs import Costs, costs
from models.comparison.groups import Group, Value, grouped, repeated_seeds
from models.comparison.runs import read_all, warnings
from models.training import registry


@dataclass(frozen=True)
class Comparison:
    """Groups of runs of one kind.

    Attributes:
        groups, costs: side by side.
        warnings: what makes their metrics hard to compare.
    """

    groups: Sequence[Group]
    costs: Sequence[Costs]
    warnings: Sequence[str]

    @property
    def per_cent(self) -> bool:
        """Whether the metrics are fractions."""
        return registry.system_of(self.groups[0].runs[0].recipe).per_cent

    @property
    def scores(self) -> list[str]:
        """The names of all groups' scores."""
        names = (key.partition("/")[2] for group in self.groups for run in group.runs for key in run.metrics)
        return list(dict.fromkeys(names))

    def shown(self, name: str, group: Group) -> Value | None:
        """A metric as tables and pictures show it."""
        found = group.metric(name)
        if found is None or not self.per_cent:
            return found
        return Value(100 * found.mean, None if found.spread is None else 100 * found.spread)


def compare(paths: Sequence[Path], *, measure: bool = False) -> Comparison:
    """Read runs and count what their networks cost.

    Args:
        paths: the runs' folders.
        measure: time the trained networks as well.

    Raises:
        UsageError: as ``read_all`` and ``costs``.
    """
    runs = read_all(paths)
    groups = grouped(runs)
    found = [*warnings(runs), *repeated_seeds(groups)]
    return Comparison(groups, [costs(group, measure=measure) for group in groups], found)
