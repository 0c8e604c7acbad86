"""Recipes of one's own: found by ``package.module:function``, kept findable by every later command."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
import models.recipes
from models.__main__ import main
from models.networks.released.segmentation import released_names
from models.segmentation.build import build_network
from models.training import checkpoint, config, registry
from models.training.run_folder import default_output
from tests.helpers.golden_numbers import released_form
from tests.helpers.own_recipes import SHORT, cen, train_two_steps, write_package
from tests.helpers.paths import ROOT
from tests.helpers.training_runs import prepare_rooms
from tests.helpers.translation_runs import prepare_views

RECIPES = {"segmentation": "own_package.recipes:segmenting", "translation": "translating_short"}
INPUTS = {"segmentation": ("rgb", "depth"), "translation": ("normal", "edge_texture")}


@pytest.fixture(scope="module", params=RECIPES)
def system(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside of the repository, with a package of recipes."""
    return write_package(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def data(system: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepare = prepare_rooms if system == "segmentation" else prepare_views
    return prepare(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def run(system: str, home: Path, data: Path) -> Path:
    """Two steps by the reference, or by the short name in a program that has imported the module."""
    output = home / "runs" / system
    imports = "" if ":" in RECIPES[system] else "own_package.recipes"
    train_two_steps(RECIPES[system], data, output, system=system, folder=home, imports=imports)
    return output


def files(system: str, data: Path) -> list[str]:
    folders = {name: sorted((data / name).rglob("*.png")) for name in INPUTS[system]}
    if system == "translation":  # Taskonomy's layout: a domain is part of a file's name
        folders = {name: sorted(data.rglob(f"*domain_{name}.png")) for name in INPUTS[system]}
    return [part for name, found in folders.items() for part in ("--input", f"{name}={found[-1]}")]


def test_a_run_of_ones_own_recipe_serves_every_command(
    system: str, home: Path, data: Path, run: Path, tmp_path: Path
) -> None:
    contents = checkpoint.load(run)[1]
    assert contents["config"]["loss"]["sparsity"] == 0.125
    assert (contents["recipe"], contents["recipe_module"]) == (RECIPES[system], "own_package.recipes")
    assert json.loads((run / "config.json").read_text())["recipe_module"] == "own_package.recipes"
    on = tmp_path / "on"
    shutil.copytree(run, on)
    cen(home, ["train", RECIPES[system], "--resume", on, "run.steps=3"])
    cen(home, ["train", RECIPES[system], f"run.output={on}", "--resume", "run.steps=4"])
    assert checkpoint.load(on)[1]["loop"]["step"] == 4
    net, out = tmp_path / "net.safetensors", tmp_path / "out"
    cen(
        home,
        ["evaluate", on],
        ["predict", on, *files(system, data), "--output", out],
        ["export", on, "--output", net],
    )
    assert (on / "evaluation_best.json").is_file()
    assert list(out.rglob("*.png"))
    code = f"import models; trained = models.load({str(net)!r}); print(trained.recipe.loss.sparsity)"
    done = fresh([sys.executable, "-c", code], home)
    assert (done.stdout, done.stderr) == ("0.125\n", "")


def test_an_exported_network_serves_where_its_recipe_is_missing(
    system: str, home: Path, run: Path, tmp_path: Path
) -> None:
    """The file's record suffices, as far as the recipe's module has registered nothing."""
    cen(home, ["export", run, "--output", tmp_path / "net.pt"])
    code = "import models; trained = models.load('net.pt'); print(trained.recipe.loss.sparsity)"
    done = fresh([sys.executable, "-c", code], tmp_path)
    assert done.stdout == "0.125\n"
    assert done.stderr.startswith(
        f"warning: recipe '{RECIPES[system]}': there is no module 'own_package' in "
    )
    assert done.stderr.endswith("going on without what it registers\n")
    assert done.stderr.count("\n") == 1


def test_either_name_resumes_and_no_other(
    system: str, home: Path, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    on = tmp_path / "on"
    shutil.copytree(run, on)
    name = RECIPES[system].rpartition(":")[2]
    cen(home, ["train", f"own_package.recipes:{name}", "--resume", on, "run.steps=2"])
    assert main(["train", f"other.recipes:{name}", "--resume", str(on)]) == 2
    message = f"is of the recipe 'own_package.recipes:{name}', not of 'other.recipes:{name}'"
    assert message in capsys.readouterr().err


def test_own_recipes_in_other_commands(home: Path, tmp_path: Path, data: Path, system: str) -> None:
    name = RECIPES[system].rpartition(":")[2]
    recipe = f"own_package.recipes:{name}"
    sheet = tmp_path / "sheet.png"
    cen(home, ["data", recipe, *SHORT[system], f"data.root={data}", "--output", sheet], ["recipes", recipe])
    assert sheet.is_file()


def test_a_released_network_is_imported_by_ones_own_recipe(home: Path, tmp_path: Path) -> None:
    small = ["model.encoder=resnet18", "model.width=8", "model.region=all"]
    net = build_network(config.override(registry.find("synthetic_demo"), small))
    entries = released_form(released_names(net), net.state_dict())
    state = {f"module.{name}": value.clone() for name, value in entries.items()}
    torch.save({"segmenter": state}, tmp_path / "released.pth.tar")
    output = tmp_path / "net.safetensors"
    own = ["--recipe", RECIPES["segmentation"], "--output", output]
    cen(home, ["import", tmp_path / "released.pth.tar", *small, *own])
    contents = checkpoint.load(output)[1]
    assert contents["recipe"] == "own_package.recipes:segmenting"
    assert contents["config"]["loss"]["sparsity"] == 0.125


def fresh(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A program that has imported nothing yet."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_console_script(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As installed: not in the current folder, which is no part of its import path by itself."""
    project = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\ncen = "models.cli:main"\n' in project
    script = tmp_path / "bin" / "cen"
    script.parent.mkdir()
    script.write_text("import sys\nfrom models.cli import main\nsys.exit(main())\n")
    listed = fresh([sys.executable, str(script), "recipes", "own_package.recipes:segmenting"], home)
    assert "loss.sparsity=0.125 " in listed.stdout, listed.stderr
    for called, usage in (
        (lambda: runpy.run_path(str(script), run_name="__main__"), "cen"),
        (lambda: runpy.run_module("models", run_name="__main__", alter_sys=True), "python -m models"),
    ):
        monkeypatch.setattr(sys, "argv", [str(script), "tran"])
        with pytest.raises(SystemExit, match=r"^2$"):
            called()
        assert capsys.readouterr().err.startswith(f"usage: {usage} ")


def test_torchrun_trains_ones_own_recipe(home: Path, tmp_path: Path) -> None:
    rooms = prepare_rooms(tmp_path / "rooms")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    places = [f"data.root={rooms}", f"run.output={tmp_path / 'run'}", "run.steps=2"]
    command = ["-m", "models", "train", RECIPES["segmentation"], *SHORT["segmentation"], *places]
    done = fresh([*launcher, *command], home)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2


WRONG = """
from models.segmentation.recipes import synthetic_demo
from models.segmentation.settings import LossSettings, SegmentationRecipe

here = SegmentationRecipe()

def gives_a_dict():
    return {}

def gives_nothing():
    pass

def gives_a_class():
    return SegmentationRecipe

def fails():
    return SegmentationRecipe(loss=LossSettings(sparsity=-1))

def asks(depth):
    return SegmentationRecipe()
"""


@pytest.fixture
def wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a package of wrong recipes that is imported anew in each test."""
    write_package(tmp_path, "wrong_package", WRONG)
    (tmp_path / "wrong_package" / "broken.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("wrong_package")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("wrong_packag.recipes:fails", "there is no module 'wrong_packag' in {tmp}, "),
        ("wrong_packag.recipes:fails", "; did you mean 'wrong_package'?"),
        (
            "wrong_package.recipe:fails",
            "there is no module 'wrong_package.recipe' in {tmp}/wrong_package; did you mean 'recipes'?",
        ),
        (
            "wrong_package.recipes.all:fails",
            "wrong_package.recipes ({tmp}/wrong_package/recipes.py) is no package",
        ),
        (
            "wrong_package.recipes:fail",
            "({tmp}/wrong_package/recipes.py) has no function 'fail'; did you mean 'fails'?",
        ),
        ("sys:no_such_function", "sys (no file) has no function 'no_such_function'"),
        ("wrong_package.recipes:here", "holds 'here', but it is no function"),
        (
            "wrong_package.recipes:gives_a_dict",
            "must return a SegmentationRecipe or TranslationRecipe, got a dict",
        ),
        ("wrong_package.recipes:gives_nothing", "got a NoneType"),
        ("wrong_package.recipes:gives_a_class", "got the class SegmentationRecipe"),
        (
            "wrong_package/recipes.py:fails",
            "expected package.module:function; did you mean 'wrong_package.recipes:fails'?",
        ),
        ("wrong_package.recipes:", "expected package.module:function\n"),
        (":fails", "expected package.module:function\n"),
        (
            "fails",
            "(python -m models recipes lists them; one of your own is package.module:function)",
        ),
    ],
)
@pytest.mark.parametrize(
    "command", [["train"], ["recipes"], ["data"], ["import", "x", "--output", "x.pt", "--recipe"]]
)
def test_errors_say_what_is_wrong_with_the_name(
    wrong: Path, recipe: str, message: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, recipe]) == 2
    captured = capsys.readouterr()
    assert message.format(tmp=wrong) in captured.err
    assert captured.err.startswith("error: ")
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert not (wrong / "runs").exists()


@pytest.mark.parametrize(
    ("recipe", "message", "line"),
    [
        (
            "wrong_package.recipes:fails",
            "its function fails with ValueError: sparsity must be",
            "return SegmentationRecipe(loss=LossSettings(sparsity=-1))",
        ),
        (
            "wrong_package.recipes:asks",
            "fails with TypeError: asks() missing 1 required",
            "TypeError: asks()",
        ),
        (
            "wrong_package.broken:fails",
            "fails with ModuleNotFoundError: No module named 'no_such_dependency'",
            "import no_such_dependency",
        ),
    ],
)
def test_a_recipe_that_fails_shows_its_author_where(
    wrong: Path, recipe: str, message: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe]) == 2
    *traceback, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"error: recipe '{recipe}': ")
    assert message in last
    assert traceback[0] == "Traceback (most recent call last):"
    assert any(line in shown for shown in traceback)


def test_a_recipe_of_one_that_is_registered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "RECIPES", dict(registry.RECIPES))

    def mine() -> object:
        return registry.find("synthetic_demo")

    assert models.register_recipe(mine) is mine
    assert registry.find("mine") == registry.find("synthetic_demo")
    assert main(["recipes"]) == 0
    assert "mine" in capsys.readouterr().out.splitlines()  # it has no docstring
    with pytest.raises(ValueError, match=f"two recipes named 'mine', of {__name__} and {__name__}"):
        models.register_recipe(mine)


def test_a_notebooks_recipe_may_be_defined_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "RECIPES", dict(registry.RECIPES))
    for name in ("synthetic_demo", "synthetic_translation_demo"):

        def mine(name: str = name) -> object:
            return registry.find(name)

        mine.__module__ = "__main__"
        models.register_recipe(mine)
        assert registry.find("mine") == registry.find(name)


def test_what_a_file_records_needs_no_call_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "RECIPES", dict(registry.RECIPES))

    @models.register_recipe
    def mine() -> object:
        return registry.find("synthetic_demo")

    recorded = registry.record("mine", mine())
    assert recorded == {"recipe": "mine", "recipe_module": __name__, "recipe_kind": "SegmentationRecipe"}
    registry.RECIPES["mine"] = lambda: 1 / 0
    assert type(registry.recall(recorded)) is type(registry.find("synthetic_demo"))
    old = {"recipe": "synthetic_demo"}  # of a file from before
    assert registry.recall(old) == registry.find("synthetic_demo")


def test_names_of_run_folders() -> None:
    assert default_output("synthetic_demo").parent == Path("runs/synthetic_demo")
    assert default_output("my_package.recipes:mine").parent == Path("runs/my_package.recipes.mine")
