"""``cen --import MODULE``: what a module registers, in every command and in every process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from models.__main__ import main
from models.training import checkpoint, importable
from tests.helpers.own_recipes import SHORT, attempt, cen, write_package
from tests.helpers.training_runs import prepare_rooms, together

FUSION = """
from dataclasses import dataclass
from pathlib import Path

import models
from models.fusion import Fusion


@models.register_fusion
@dataclass(frozen=True)
class Apart(Fusion):
    '''The modalities do not meet.'''


Path("imported").touch()
"""
ENCODER = """
import models
from examples.own_encoder import PlainNet


@models.register_encoder
class PlainerNet(PlainNet):
    name = "plainer_net"
"""
RECIPES = """
from dataclasses import replace

import models
from models.segmentation.recipes import synthetic_demo


@models.register_recipe
def mine():
    '''The demo with a weaker penalty.'''
    demo = synthetic_demo()
    return replace(demo, loss=replace(demo.loss, sparsity=0.125))
"""
BROKEN = "value = 1\nraise RuntimeError('out of order')\n"
IMPORTS = ["--import", "own.fusions", "--import", "own.encoders", "--import", "own.recipes"]
NAMES = ["own.fusions", "own.encoders", "own.recipes"]
OWN = ["fusion=apart", "model.encoder=plainer_net"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside of the repository with a package, and with rooms to train on."""
    folder = write_package(tmp_path_factory.mktemp("home"), "own", RECIPES)
    for name, text in (
        ("fusions", FUSION),
        ("encoders", ENCODER),
        ("broken", BROKEN),
        ("needy", "import nowhere"),
    ):
        (folder / "own" / f"{name}.py").write_text(text)
    prepare_rooms(folder / "rooms")
    return folder


def train(output: str, *options: str) -> list[str]:
    short = [*SHORT["segmentation"], "data.root=rooms", f"run.output={output}", "run.steps=1"]
    return ["train", "mine", *short, *options]


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """A step with an encoder, a fusion and a recipe of one's own."""
    cen(home, [*IMPORTS, *train("run", *OWN)])
    return home / "run"


def test_files_name_the_modules(home: Path, run: Path) -> None:
    for contents in (json.loads((run / "config.json").read_text()), torch.load(run / "last.pt")):
        assert contents["imports"] == NAMES
        assert contents["recipe_module"] == "own.recipes"
    cen(home, [*IMPORTS, "export", run, "--output", "net.safetensors"])
    cen(home, [*IMPORTS[2:], *IMPORTS[:2], "export", "net.safetensors", "--output", "net.pt"])
    for name in ("net.safetensors", "net.pt"):
        assert checkpoint.load(home / name)[1]["imports"] == NAMES


def test_every_command_that_reads_them_takes_the_option(home: Path, run: Path) -> None:
    files = [part for name in ("rgb", "depth") for part in (f"--{name}", f"rooms/{name}/000002.png")]
    cen(
        home,
        [*IMPORTS, "train", "mine", "--resume", run, "run.steps=2"],
        [*IMPORTS, "evaluate", run],
        [*IMPORTS, "predict", run, *files, "--output", "out"],
        [*IMPORTS, "compare", run],
    )
    assert checkpoint.load(run)[1]["imports"] == NAMES
    assert list((home / "out").rglob("*.png"))


def test_without_it_the_error_names_it(home: Path, run: Path) -> None:
    """The recipe's module is imported by its record, as ever; no other."""
    everything = "--import own.fusions --import own.encoders "
    for command in (["compare", run], ["export", run, "--output", "x.pt"]):
        code, error = attempt(home, *command)
        assert code == 2
        assert "fusion must be one of " in error
        assert (
            f"got 'apart'; import the module that registers it; the training had {everything}and this"
            in error
        )
        assert error.count("\n") == 1
    for command in (["evaluate", run], ["train", "mine", "--resume", run], ["compare", run]):
        code, error = attempt(home, "--import", "own.fusions", *command)
        assert code == 2
        assert "got 'plainer_net'" in error
        assert (
            "; the training had --import own.encoders and this has not, where what is unknown may be" in error
        )


def test_what_a_file_names_is_imported_only_where_it_is_needed(home: Path, tmp_path: Path) -> None:
    """A network that needs nothing of the module is read without, and resumed without losing its name."""
    cen(home, [*IMPORTS, *train("plain", "model.encoder=plain_net")])
    (tmp_path / "rooms").symlink_to(home / "rooms")
    cen(tmp_path, ["export", home / "plain", "--output", "net.pt"])
    (home / "imported").unlink()
    code, error = attempt(home, "train", "mine", "--resume", "plain", "run.steps=2")
    assert (code, error) == (0, "")
    assert not (home / "imported").exists()
    assert checkpoint.load(home / "plain")[1]["imports"] == NAMES


def test_torchruns_processes_import_it(home: Path, run: Path) -> None:
    assert together(main_in, home, [*IMPORTS, *train("two", *OWN, "model.frozen_statistics=false")]) == [0, 0]
    contents = checkpoint.load(home / "two")[1]
    assert (contents["imports"], len(contents["processes"])) == (NAMES, 2)


def main_in(folder: Path, command: list[str]) -> int:
    os.chdir(folder)
    return main(command)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("nowhere", "--import nowhere: there is no module 'nowhere' in "),
        ("own.fusion", "there is no module 'own.fusion' in {home}/own; did you mean 'fusions'?"),
        ("own/fusions.py", "--import own/fusions.py: expected package.module; did you mean 'own.fusions'?"),
        ("own.recipes:mine", "--import own.recipes:mine: expected package.module\n"),
        ("", "--import : expected package.module\n"),
    ],
)
def test_modules_that_are_none(
    home: Path,
    module: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home)
    assert main(["--import", module, "recipes"]) == 2
    captured = capsys.readouterr()
    assert message.format(home=home) in captured.err
    assert captured.err.startswith("error: --import ")
    assert (captured.out, captured.err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("module", "message", "line"),
    [
        ("own.broken", "fails with RuntimeError: out of order", "raise RuntimeError('out of order')"),
        ("own.needy", "fails with ModuleNotFoundError: No module named 'nowhere'", "import nowhere"),
    ],
)
def test_an_error_inside_of_the_module_shows_where(home: Path, module: str, message: str, line: str) -> None:
    code, error = attempt(home, "--import", module, "recipes")
    *traceback, last = error.splitlines()
    assert (code, last) == (2, f"error: --import {module}: importing {module} {message}")
    assert traceback[0] == "Traceback (most recent call last):"
    assert any(line in shown for shown in traceback)


def test_after_the_command_it_is_told_where_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--import", "own"], ["--import=own"]):
        with pytest.raises(SystemExit, match=r"^2$"):
            main(["recipes", *given])
        assert "; --import MODULE goes before the command\n" in capsys.readouterr().err


def test_each_program_records_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in (["json"], ["json", "csv", "json"], []):
        importable.import_modules(names)
        assert importable.imported() == list(dict.fromkeys(names))
        assert importable.imported(before=["csv", "os"])[:2] == ["csv", "os"]
