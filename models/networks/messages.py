"""Parts of error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the nearest of the names, or nothing where none is near."""
    known = {known.lower(): known for known in names}
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {known[nearest[0]]!r}?" if nearest else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type's name where there is no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
