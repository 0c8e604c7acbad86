"""The examples, run in this process as their users run them: the commands that examples/README.md gives."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

README = ROOT / "examples" / "README.md"


def command(name: str) -> list[str]:
    """The words of the command that examples/README.md has for an example, less ``python``."""
    rows = [line for line in README.read_text().splitlines() if line.startswith(f"| [{name}]")]
    (found,) = (re.search(r"`(python .*?)`", row) for row in rows)
    assert found is not None
    return shlex.split(found[1])[1:]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, words: list[str]) -> str | int | None:
    """Run an example in a folder by its words after ``python``; what it exits with, None for success."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", words)
    try:
        if words[0] == "-m":
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_module(words[1], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as end:
        return end.code or None
    return None
