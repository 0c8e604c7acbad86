"""The parts that sections of a page are made of; ``page.html`` knows how each looks.

All texts are plain: the page escapes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

NOTHING = "–"  # in a table, where there is no value


@dataclass(frozen=True)
class Cell:
    """A table's cell.

    Attributes:
        text: what it shows.
        best: whether it is marked as the best of its row or column.
        bar: a share from 0 to 1, drawn as a bar below the text; None for none.
        hint: shown in more words where a pointer rests on it.
    """

    text: str
    best: bool = False
    bar: float | None = None
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a head; the first cell of each row is the row's head.

    Attributes:
        wordy: cells hold words, which may break, instead of numbers.
        folded: the table opens on request.
        beside: it stands beside the block before where there is room.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    wordy: bool = False
    folded: bool = False
    beside: bool = False


@dataclass(frozen=True)
class Matrix:
    """A square table of shares from 0 to 1, colored by them.

    Attributes:
        names: of rows and columns.
        shares: by row; None in rows without any count.
    """

    kind: ClassVar[str] = "matrix"
    caption: str
    names: Sequence[str]
    shares: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Chart:
    """A drawing: SVG that may stand in the page as it is.

    Attributes:
        alt: what it shows, for those who do not see it.
    """

    title: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Charts:
    """Drawings side by side, as many as there is room for.

    Attributes:
        keys: names of the colors, by their numbers.
    """

    kind: ClassVar[str] = "charts"
    caption: str
    charts: Sequence[Chart]
    keys: Mapping[str, int]


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, with what stands below it; ``alt`` says what it shows."""

    uri: str
    label: str
    alt: str


@dataclass(frozen=True)
class Scene:
    """The pictures of one image."""

    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Gallery:
    """Scenes below each other; with ``wide`` their pictures are as wide as the page."""

    kind: ClassVar[str] = "gallery"
    caption: str
    scenes: Sequence[Scene]
    wide: bool = False


@dataclass(frozen=True)
class Swatches:
    """Names beside their colors, as ``#rrggbb``."""

    kind: ClassVar[str] = "swatches"
    caption: str
    colors: Mapping[str, str]


@dataclass(frozen=True)
class Terms:
    """Words with their meanings."""

    kind: ClassVar[str] = "terms"
    meanings: Mapping[str, str]


@dataclass(frozen=True)
class Text:
    """A paragraph that may begin with a name."""

    kind: ClassVar[str] = "text"
    text: str
    name: str = ""


Block = Table | Matrix | Charts | Gallery | Swatches | Terms | Text


@dataclass(frozen=True)
class Section:
    """A part of the page with a title of its own.

    Attributes:
        name: what links call it.
        lead: what there is to see, in a sentence or two.
    """

    name: str
    title: str
    lead: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Note:
    """What is missing on the page, and how to get it."""

    missing: str
    remedy: str
