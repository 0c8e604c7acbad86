"""The page as HTML: one file that needs no other, in a light and a dark scheme, for screens and for print.

jinja2 fills the template, because it escapes every value unless told otherwise, which string.Template cannot;
torch brings it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from models.report.blocks import Note, Section
from models.report.charts import PREFIX

_STYLE = Path(__file__).with_name("style.css")


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: of it.
        subtitle: what it is of, in a line.
        notes: what is missing.
        warnings: what makes the runs hard to compare.
        sections: the first is the answer, which stands above the notes.
        made: when, and by which command.
    """

    title: str
    subtitle: str
    notes: Sequence[Note]
    warnings: Sequence[str]
    sections: Sequence[Section]
    made: str


def html(page: Page) -> str:
    """The page as text; drawings and the style are put in as they are, all else is escaped."""
    environment = Environment(
        loader=PackageLoader("models.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = count(1)
    environment.filters["drawn"] = lambda svg: Markup(svg.replace(PREFIX, f"{PREFIX}{next(numbers)}-"))
    environment.filters["heat"] = _heat
    return environment.get_template("page.html").render(page=page, style=Markup(_STYLE.read_text())).strip()


def _heat(share: float | None) -> int:
    """A share as the number of a color, from 0 for nothing to 10; the root makes small shares visible."""
    return 0 if share is None else round(10 * share**0.5)


def now() -> str:
    """The time as the page shows it."""
    return f"{datetime.now():%Y-%m-%d %H:%M}"
