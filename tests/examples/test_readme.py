"""examples/README.md has a row for every example, with the command that the example itself tells."""

import ast
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from models.visualize import Image
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
    prepare, train, save = demo.prepare_synthetic, demo.train, demo.save_image
    small = ["model.width=8", "data.crop=32", "data.shorter_side=32", "run.workers=0", "run.steps=2"]
    shown: dict[Path, Image] = {}
    monkeypatch.setattr(demo, "prepare_synthetic", lambda root: prepare(root, train=4, val=2, size=(48, 64)))
    monkeypatch.setattr(demo, "train", lambda name, words, resume: train(name, [*words, *small], resume))
    monkeypatch.setattr(demo, "save_image", lambda path, image: save(path, shown.setdefault(path, image)))
    assert demo.main(tmp_path) == 0
    printed = capsys.readouterr().out
    for row in ("rgb alone", "depth alone", "exchanging: rgb", "exchanging: depth", "exchanging: ensemble"):
        assert re.search(rf"^{row} .*\d", printed, re.M), row
    assert (tmp_path / "demo.png").is_file()
    assert np.ptp(shown[tmp_path / "demo.png"]) > 0
