"""Tables of papers as data: what a row prints, and the settings that train it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# Where a figure is read: in the paper itself, in its slides, or in another paper that quotes it.
Origin = Literal["paper", "slides", "quoted"]


@dataclass(frozen=True)
class Figure:
    """A printed figure.

    Attributes:
        text: its digits as printed.
        note: key of the table's note on it; empty for none.
        origin: where it is read, if not where the other figures of its row are.
    """

    text: str
    note: str = ""
    origin: Origin | None = None

    @classmethod
    def of(cls, text: str, origin: Origin | None = None) -> Figure:
        """A figure from its digits and, behind them, the letter of its note: ``"203.2b"``."""
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
        return cls(digits, text.removeprefix(digits), origin)

    @property
    def value(self) -> float:
        return float(self.text)

    @property
    def decimals(self) -> int:
        return len(self.text.partition(".")[2])


@dataclass(frozen=True)
class Row:
    """A method in one of its settings.

    Attributes:
        method, setting: in the table's words; a table may have no settings.
        recipe: the name of the recipe that trains it; empty where it cannot be built.
        overrides: ``field=value`` assignments that go with it.
        scores: by the table's columns, those that the row has.
        parameters: millions of parameters, where they are printed.
        for_fusion: the millions among them that serve the fusion.
        origin: of its figures, if it is not the table's.
        reason: why it cannot be built; empty where there is a recipe.

    Raises:
        ValueError: neither recipe nor reason, or both.
    """

    method: str
    recipe: str = ""
    overrides: tuple[str, ...] = ()
    setting: str = ""
    scores: Mapping[str, Figure] = field(default_factory=dict)
    parameters: Figure | None = None
    for_fusion: Figure | None = None
    origin: Origin | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if bool(self.recipe) == bool(self.reason):
            raise ValueError(
                f"recipe of {self.method}: expected the name of one, or a reason why there is none"
            )


@dataclass(frozen=True)
class Table:
    """A table, or the part of it that can be trained here.

    Attributes:
        title: paper, number and subject.
        origin: of its figures, but those of rows with one of their own.
        columns: names of the scores.
        rows: in the paper's order.
        notes: on figures, by their letters.
        remarks: what a reader of the commands has to know: choices that are not the paper's.
    """

    title: str
    origin: Origin
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def scores(columns: tuple[str, ...], *texts: str) -> dict[str, Figure]:
    """Figures by column; ``""`` where a row has none."""
    return {name: Figure.of(text) for name, text in zip(columns, texts, strict=True) if text}
