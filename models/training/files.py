"""Files that are whole or not there at all."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.training.errors import UsageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path of the same suffix, renamed to ``path`` once the block has written it."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    # One that was killed may have had the same number; what it left may be a link to a file that is whole.
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what processes killed while they wrote ``path`` have left of it."""
    for temporary in path.parent.glob(f".[0-9]*-{path.name}"):
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as indented JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


class Table:
    """A CSV file whose first column is the step; it grows by rows and is rewritten whole.

    One version of this project may write other columns than another: each row has its own, and its cells of
    the others are empty.

    Args:
        path: the file; rows of it up to ``last_step`` are kept, later ones are those of a run that did not
            get to save them and comes by there again.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= last_step]
        self.columns = dict.fromkeys(self.rows[0] if self.rows else ())

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; columns that are new come last.

        Raises:
            UsageError: the file cannot be written; the one before it is as it was.
        """
        self.rows.append(row)
        self.columns |= dict.fromkeys(row)
        try:
            with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(self.columns))
                writer.writeheader()
                writer.writerows(self.rows)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written ({error.strerror})") from None
