"""examples/README.md has a row for every example, with the command that the example itself tells."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.scripts import README

EXAMPLES = ROOT / "examples"
ROWS = dict(re.findall(r"^\| \[([\w.]+)\]\(\1\) (\|.*\|)$", README.read_text(), re.M))


def test_every_example_has_a_row() -> None:
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb") or path.is_dir()}
    assert there - {"__init__.py", "__pycache__", ".ipynb_checkpoints"} == ROWS.keys()


@pytest.mark.parametrize("name", sorted(name for name in ROWS if name.endswith(".py")))
def test_commands_are_the_examples_own(name: str) -> None:
    (command,) = re.findall(r"\| `((?:python|cen) .*?)` \|", ROWS[name])
    told = ast.get_docstring(ast.parse((EXAMPLES / name).read_text())) or ""
    start = re.match(r"python (-m )?\S+|cen train \S+", command)
    assert start is not None
    assert start[0] in told


def test_the_demo_compares_three_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its users run it, but for two steps of each training and a few rooms."""
    demo = importlib.import_module("examples.demo")
    prepare = demo.prepare_synthetic
    small = ["model.width=8", "data.crop=32", "data.shorter_side=32", "run.workers=0", "run.steps=2"]
    monkeypatch.setattr(demo, "prepare_synthetic", lambda root: prepare(root, train=4, val=2, size=(48, 64)))
    assert demo.main(tmp_path, small) == 0
    printed = capsys.readouterr().out
    for run in ("exchanging", "rgb_alone", "depth_alone"):
        assert re.search(rf"^{run} +1  \w+ +\d", printed, re.M), run
        assert f"{run}  done: " in printed
    page = (tmp_path / "report.html").read_text()
    assert all(title in page for title in ("Exchange", "Scores", "Pictures", "rgb_alone"))
