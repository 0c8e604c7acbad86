"""Losses and scores over the steps of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.comparison.groups import Group
from models.comparison.runs import Numbers, outputs
from models.report.blocks import Block, Chart, Charts, Section
from models.report.charts import Series, line_chart
from models.report.gathered import Gathered, less_is_better, score_name
from models.report.subject import Subject

_ALL = "loss/loss"
_SEEDS = " Thin lines are single runs, the bold one is their mean."


def curves(gathered: Gathered) -> Section:
    """Charts of every logged loss, and of the scores at every evaluation."""
    several = any(len(group.runs) > 1 for group in gathered.groups)
    losses, scores = _loss_charts(gathered), _score_charts(gathered)
    keys = colors(gathered)
    blocks: list[Block] = []
    if scores:
        caption = "Scores on the validation images at every evaluation" + (
            ", in per cent." if gathered.comparison.per_cent else "."
        )
        blocks.append(Charts(caption + _SEEDS * several, scores, keys))
    if losses:
        caption = "Losses of the training images, the mean since the line of the log before."
        blocks.append(Charts(caption + _SEEDS * several, losses, keys))
    lead = "How the training went. Curves that are still moving at the end ask for more steps."
    return Section("curves", "Learning curves", lead if blocks else "Nothing has been logged yet.", blocks)


def colors(gathered: Gathered) -> dict[str, int]:
    """The color of each group."""
    return {group.name: number for number, group in enumerate(gathered.groups)}


def group_lines(
    gathered: Gathered,
    rows: Callable[[Subject], Sequence[Numbers]],
    column: str,
    factor: float = 1,
    groups: Sequence[Group] | None = None,
) -> list[Series]:
    """A line for each run that has the column, and for runs of several seeds their mean."""
    lines = []
    for group in gathered.groups if groups is None else groups:
        color = colors(gathered)[group.name]
        runs = [
            {row["step"]: factor * row[column] for row in rows(subject) if column in row}
            for subject in gathered.of(group)
        ]
        runs = [points for points in runs if points]
        alone = len(runs) == 1
        lines += [Series([*points], [*points.values()], color, thin=not alone) for points in runs]
        if runs and not alone:
            steps = [step for step in runs[0] if all(step in points for points in runs)]
            means = [sum(points[step] for points in runs) / len(runs) for step in steps]
            lines.append(Series(steps, means, color))
    return lines


def _loss_charts(gathered: Gathered) -> list[Chart]:
    found = {
        name: None
        for subject in gathered.subjects.values()
        for row in subject.losses
        for name in row
        if name.startswith("loss/")
    }
    charts = []
    for name in sorted(found, key=lambda name: name != _ALL):
        title = "total loss" if name == _ALL else name.removeprefix("loss/").replace("_", " ")
        lines = group_lines(gathered, lambda subject: subject.losses, name)
        charts.append(line_chart(title, _alt(f"Loss {title}", lines, gathered), lines))
    return charts


def _score_charts(gathered: Gathered) -> list[Chart]:
    lead, factor = gathered.lead, 100 if gathered.comparison.per_cent else 1
    branches = dict.fromkeys(name for group in gathered.groups for name in outputs(group.runs[0])[:-1])
    wanted = [f"ensemble/{lead}", *(f"{name}/{lead}" for name in branches)]
    wanted += [f"ensemble/{score}" for score in gathered.comparison.scores if score != lead]
    charts = []
    for column in wanted:
        lines = group_lines(gathered, lambda subject: subject.metrics, column, factor)
        output, _, score = column.partition("/")
        title = f"{score_name(score)}, {output}"
        if lines:
            better = "smaller is better" if less_is_better(score) else "larger is better"
            alt = f"{_alt(title, lines, gathered)} {better.capitalize()}."
            charts.append(line_chart(title, alt, lines, logarithmic=False))
    return charts


def _alt(title: str, lines: Sequence[Series], gathered: Gathered) -> str:
    """The ends of the lines in words."""
    names = {number: name for name, number in colors(gathered).items()}
    bold = [line for line in lines if not line.thin and line.y]
    ends = "; ".join(
        f"{names[line.color]} from {line.y[0]:.4g} at step {line.x[0]:.0f} to {line.y[-1]:.4g} at step "
        f"{line.x[-1]:.0f}"
        for line in bold
    )
    return f"{title} over steps: {ends}."
