"""What the networks cost, and how they do on corrupted inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models.comparison.groups import Value
from models.comparison.runs import outputs
from models.report.blocks import NOTHING, Block, Cell, Section, Table
from models.report.gathered import Gathered, less_is_better, over_seeds, score_name
from models.report.subject import Subject

_CLEAN = "clean"


def costs(gathered: Gathered) -> Section:
    """Parameters, multiply-adds, images per second, memory."""
    found = gathered.costs
    head = [
        "",
        "parameters",
        "multiply-adds",
        "of inputs",
        "training images/s",
        "peak memory, MiB",
        "trained on",
    ]
    measured = any(cost is not None and cost.images_per_second is not None for cost in found)
    rows: list[list[Cell | str]] = []
    for group, cost in zip(gathered.groups, found, strict=True):
        modalities, _, height, width = cost.shape if cost else (0, 0, 0, 0)
        row: list[Cell | str] = [
            group.name,
            f"{cost.parameters:,}" if cost else NOTHING,
            f"{cost.multiply_adds / 1e9:.3g} G" if cost else NOTHING,
            f"{modalities} x {height} x {width}" if cost else NOTHING,
            gathered.text(group.value(lambda run: run.images_per_second), 2),
            gathered.text(group.value(lambda run: run.peak_memory), 0),
            "; ".join(dict.fromkeys(run.machine for run in group.runs)),
        ]
        if measured:
            speed = cost.images_per_second if cost else None
            row += [NOTHING if speed is None else f"{speed:.2f}", cost.measured_on if cost else NOTHING]
        rows.append(row)
    head += ["inference images/s", "measured on"] * measured
    caption = (
        "Multiply-adds are those of convolutions and matrix products for one scene of the inputs' size. "
        "Images per second are the median over the training's log, the peak of memory is the process's."
    )
    lead = "What a network takes to train and to run. Times of different machines do not compare."
    return Section("costs", "Costs", lead, [Table(caption, head, rows)])


def robustness(gathered: Gathered) -> Section | None:
    """Scores on corrupted inputs, as ``cen evaluate --corrupt`` has written them; None where it has not."""
    groups = [group for group in gathered.groups if any(each.corrupted for each in gathered.of(group))]
    if not groups:
        return None
    subjects = {group.name: gathered.of(group) for group in groups}
    names = [name for each in subjects.values() for subject in each for name in _table_of(subject)]
    lead = gathered.lead
    branches = dict.fromkeys(name for group in groups for name in outputs(group.runs[0])[:-1])
    blocks: list[Block] = []
    for output in ("ensemble", *branches):
        rows: list[Sequence[Cell | str]] = []
        for name in dict.fromkeys(names):
            values = [_value(gathered, each, name, f"{output}/{lead}") for each in subjects.values()]
            rows.append([name or _CLEAN, *gathered.cells(values, less=less_is_better(lead))])
        dropped = [f"{group.name} ({_drop(gathered.first(group))})" for group in groups]
        what = "the ensemble" if output == "ensemble" else f"the branch {output}"
        unit = ", in per cent" if gathered.comparison.per_cent else ""
        caption = (
            f"On clean and on corrupted inputs: {score_name(lead)} of {what}{unit}. The best run of each row "
            "is marked."
        )
        blocks.append(Table(caption, ["corruption", *dropped], rows))
    text = (
        "How much is lost when a modality is noisy or absent. A run that was trained with data.drop_modality "
        "has seen steps without one of its modalities; the head of each column says how often."
    )
    return Section("robustness", "Robustness", text, blocks)


def _table_of(subject: Subject) -> dict[str, dict[str, float]]:
    """Scores by corruption; "" is none."""
    rows: list[dict[str, Any]] = (subject.corrupted or {}).get("rows", [])
    return {row["corruption"]: row["metrics"] for row in rows}


def _value(gathered: Gathered, subjects: Sequence[Subject], corruption: str, key: str) -> Value | None:
    factor = 100 if gathered.comparison.per_cent else 1

    def of(subject: Subject) -> float | None:
        value = _table_of(subject).get(corruption, {}).get(key)
        return None if value is None else factor * value

    return over_seeds(subjects, of)


def _drop(subject: Subject) -> str:
    dropped = float((subject.corrupted or {}).get("drop_modality", subject.run.recipe.data.drop_modality))
    return (
        f"trained with {100 * dropped:g} % of steps without a modality"
        if dropped
        else "trained with all modalities"
    )
