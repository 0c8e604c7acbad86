"""The tables of the papers, each row with the recipe that trains it."""

from __future__ import annotations

from models.networks.messages import suggest
from models.tables import asymfusion, cen, table3, tokenfusion
from models.tables.rows import Figure, Row, Table
from models.training.errors import UsageError

__all__ = ["TABLES", "Figure", "Row", "Table", "find"]

TABLES = dict(sorted({**cen.TABLES, **table3.TABLES, **asymfusion.TABLES, **tokenfusion.TABLES}.items()))


def find(name: str) -> Table:
    """The table of that name.

    Raises:
        UsageError: there is none; the nearest is suggested.
    """
    if name not in TABLES:
        raise UsageError(f"--table must be one of {', '.join(TABLES)}, got {name!r}{suggest(name, TABLES)}")
    return TABLES[name]
