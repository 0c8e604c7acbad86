"""A table as text and as plain data: printed figures, counted parameters, commands."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.networks.counting import count_fusion_parameters, count_parameters
from models.tables.rows import Figure, Origin, Row, Table
from models.training import config, registry
from models.training.errors import program

_ORIGINS = {
    "paper": "as the paper prints it",
    "slides": "as the authors' slides print it",
    "quoted": "as another paper has it",
}
_COUNTED = (
    "[counted]: trainable numbers of the network that the command builds, without alpha; "
    "running statistics are none"
)
_REQUIRED = (
    "Every command needs data.root=FOLDER, and those of segmentation model.weights=FILE, the encoder's "
    "ImageNet weights: given to this command, they stand in all of them."
)
_MILLION = 1e6


@dataclass(frozen=True)
class Entry:
    """A row with what its network has.

    Attributes:
        row: as the paper prints it.
        settings: the row's recipe and overrides, and those given for all rows; none of what is not built.
        parameters: of the network that the settings build, if they build one.
        for_fusion: those among them that serve the fusion.
    """

    row: Row
    settings: tuple[str, ...] = ()
    parameters: int | None = None
    for_fusion: int | None = None

    @property
    def command(self) -> str | None:
        return shlex.join([*program().split(), "train", *self.settings]) if self.settings else None


def entries(table: Table, overrides: Sequence[str] = ()) -> list[Entry]:
    """Build the network of every row that has a recipe, without weights, and count.

    Args:
        table: the table.
        overrides: ``field=value`` assignments for all rows, such as ``data.root``.

    Raises:
        UsageError: an override is wrong.
    """
    found = []
    for row in table.rows:
        if not row.recipe:
            found.append(Entry(row))
            continue
        recipe = config.override(registry.find(row.recipe), [*row.overrides, *overrides])
        with torch.device("meta"):
            net = registry.system_of(recipe).network(recipe)
        settings = (row.recipe, *row.overrides, *overrides)
        found.append(Entry(row, settings, count_parameters(net), count_fusion_parameters(net)))
    return found


def lines(table: Table, found: Sequence[Entry], overrides: Sequence[str] = ()) -> list[str]:
    """The table as text; below each row its command, or why it has none.

    Args:
        table, found: the table and its ``entries``.
        overrides: those that ``entries`` was given.
    """
    origin = f"[{table.origin}]"
    columns = [
        ("", "", [entry.row.method for entry in found]),
        ("", "", [entry.row.setting for entry in found]),
        ("", "", [f"[{entry.row.origin}]" if entry.row.origin else "" for entry in found]),
        *((name, origin, [_shown(entry.row.scores.get(name)) for entry in found]) for name in table.columns),
        ("parameters", origin, [_shown(entry.row.parameters) for entry in found]),
        ("counted", "[counted]", [_number(entry.parameters) for entry in found]),
        ("for fusion", origin, [_shown(entry.row.for_fusion) for entry in found]),
        ("counted", "[counted]", [_number(entry.for_fusion) for entry in found]),
    ]
    if not any(entry.row.for_fusion for entry in found):
        columns = columns[:-2]
    columns = [column for column in columns if any(text.strip() not in ("", "-") for text in column[2])]
    head, marks, *rows = zip(*(_aligned([name, mark, *texts]) for name, mark, texts in columns), strict=True)
    body = [
        text
        for row, entry in zip(rows, found, strict=True)
        for text in ("  ".join(row).rstrip(), f"    {entry.command or f'not built: {entry.row.reason}'}")
    ]
    origins = dict.fromkeys([table.origin, *(entry.row.origin or table.origin for entry in found)])
    notes = [f"[{name}]: {_ORIGINS[name]}, parameters in millions" for name in origins]
    notes.append(_COUNTED)
    notes += [f"{key}: {text}" for key, text in table.notes.items()]
    notes += table.remarks
    if not any(assignment.startswith("data.root=") for assignment in overrides):
        notes.append(_REQUIRED)
    wrapped = [line for note in notes for line in textwrap.wrap(note, 110, subsequent_indent="    ")]
    return [table.title, "", "  ".join(head), "  ".join(marks), *body, "", *wrapped]


def plain(table: Table, found: Sequence[Entry]) -> dict[str, Any]:
    """The table for JSON; parameters, printed and counted, are numbers, not millions.

    Of what is not built ``command`` and ``counted`` are null, and ``reason`` says why.
    """
    return {
        "title": table.title,
        "rows": [
            {
                "method": entry.row.method,
                "setting": entry.row.setting,
                "scores": {
                    name: {"value": figure.value, "origin": _origin(table, entry.row, figure)}
                    for name, figure in entry.row.scores.items()
                },
                "parameters": _counted(table, entry.row, entry.row.parameters, entry.parameters),
                "fusion_parameters": _counted(table, entry.row, entry.row.for_fusion, entry.for_fusion),
                "settings": list(entry.settings),
                "command": entry.command,
                "reason": entry.row.reason or None,
            }
            for entry in found
        ],
        "notes": dict(table.notes),
        "remarks": list(table.remarks),
    }


def _aligned(texts: Sequence[str]) -> list[str]:
    """A column's cells, padded to one width: words, which have no head, flush left, numbers flush right."""
    width = max(map(len, texts))
    return [f"{text:>{width}}" if texts[0] else f"{text:<{width}}" for text in texts]


def _shown(figure: Figure | None) -> str:
    # Digits stay aligned where some figures have a note.
    return "- " if figure is None else f"{figure.text}{figure.note or ' '}"


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def _origin(table: Table, row: Row, figure: Figure) -> Origin:
    return figure.origin or row.origin or table.origin


def _counted(table: Table, row: Row, printed: Figure | None, counted: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {"counted": counted}
    if printed is not None:
        found["printed"] = {
            "value": round(printed.value * _MILLION),
            "origin": _origin(table, row, printed),
            "note": table.notes.get(printed.note),
        }
    return found
