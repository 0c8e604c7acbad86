"""Errors that the person at the command line can mend, and the checks of paths that raise them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from models.networks.messages import suggest


class UsageError(ValueError):
    """A wrong name, value or path. The command line prints the message alone and exits with 2."""


class RecipeError(UsageError):
    """A recipe's own code fails; the error that this one is chained to is printed as well, for its author."""


def program() -> str:
    """The command that was called, as a message tells to call it again: ``cen`` or ``python -m models``."""
    return "cen" if Path(sys.argv[0]).stem == "cen" else "python -m models"


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


def data_root(root: Path | None) -> Path:
    """The folder that ``data.root`` names.

    Raises:
        UsageError: it is not set, or does not exist.
    """
    if root is None:
        raise UsageError("data.root must be set to the folder of the data set: data.root=FOLDER")
    return existing(root, "data.root")


def writable(path: Path, what: str) -> Path:
    """The path of a file that is to be written, its folder made; to be asked for before work starts.

    Raises:
        UsageError: it is a folder, or no file can be written there.
    """
    if path.is_dir():
        raise UsageError(f"{what}: {path} is a folder; expected a file's path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise UsageError(f"{what}: cannot write {path}: {error.strerror}") from None
