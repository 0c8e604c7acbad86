"""Errors that the person at the command line can mend, and the suggestions that go with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UsageError(ValueError):
    """A wrong name, value or path. The command line prints the message alone and exits with 2."""


def suggest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the nearest of the names, or nothing where none is near."""
    known = {known.lower(): known for known in names}
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {known[nearest[0]]!r}?" if nearest else ""


def existing(path: Path, what: str) -> Path:
    """The path, if it exists.

    Raises:
        UsageError: it does not; the message names the nearest folder that does, and an entry in it that
            is like the missing one.
    """
    if path.exists():
        return path
    missing = path.absolute()
    while not missing.parent.exists():
        missing = missing.parent
    entries = sorted(entry.name for entry in missing.parent.iterdir()) if missing.parent.is_dir() else []
    hint = suggest(missing.name, entries)
    raise UsageError(f"{what}: {path} does not exist; {missing.parent} does, without {missing.name!r}{hint}")
