"""The fenced blocks of Markdown pages, and the command lines in them."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.helpers.paths import ROOT

SHELLS = ("", "sh", "bash", "shell", "console")
_FENCE = re.compile(r"^( *)(`{3,})(\w*)[^\n]*\n(.*?)^\1\2 *$", re.M | re.S)
_SPAN = re.compile(r"`((?:cen|make|python -m bench)[ .][^`]*)`")


class Block(NamedTuple):
    """A fenced block: the language that its fence names, its text, and the line of the page it begins at."""

    language: str
    text: str
    line: int


def pages() -> list[str]:
    """Every page that people read, relative to the checkout."""
    found = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        indent, _, language, inside = fence.groups()
        lines = [line.removeprefix(indent) for line in inside.splitlines()]
        found.append(Block(language, "\n".join(lines) + "\n", text.count("\n", 0, fence.start()) + 1))
    return found


def command_lines(block: Block) -> Iterator[str]:
    """The command lines of a block, without comments, each with the lines that continue it.

    Where some have a prompt, ``$``, all others are output.
    """
    lines = [line.strip() for line in block.text.replace("\\\n", " ").splitlines()]
    prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    yield from prompted or (line for line in lines if line and not line.startswith("#"))


def words_of(line: str) -> list[str]:
    """The words of a command line, without what it sets in the environment."""
    words = shlex.split(re.sub(r"\$\(.*\)", "OUTPUT", line), comments=True)
    return list(itertools.dropwhile(re.compile(r"[A-Z][A-Z_0-9]*=").match, words))


def spans(page: str) -> list[str]:
    """Commands of this project in a page's running text."""
    text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in _SPAN.findall(text)]


def own_package(folder: Path) -> None:
    """Write the package that docs/adding_a_recipe.md has as an example, its recipe registered."""
    package = folder / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    program = next(b.text for b in blocks("docs/adding_a_recipe.md") if b.language == "python")
    program = program.replace("def small_crops", "@models.register_recipe\ndef small_crops")
    (package / "recipes.py").write_text(f"import models\n{program}\n\nmy_recipe = small_crops\n")
