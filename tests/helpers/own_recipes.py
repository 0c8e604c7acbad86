"""Recipes outside of this package: a package that holds some, and commands in processes that know none.

``train_two_steps("examples.own_encoder:recipe", rooms, output)`` trains one on ``prepare_rooms``'s scenes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from models.__main__ import main
from tests.helpers.paths import ROOT
from tests.helpers.training_runs import start

_RUN = ["run.device=cpu", "run.workers=0", "run.log_steps=1", "eval.pictures=0", "eval.sheet=1"]
SHORT = {
    "segmentation": [*_RUN, "data.batch_size=4", "data.crop=32", "data.shorter_side=32", "model.width=4"],
    "translation": [
        *[*_RUN, "data.batch_size=4", "data.crop=32", "data.resize=36"],
        *["model.size=32", "model.base_width=4", "model.discriminator_width=4"],
    ],
}
PACKAGE = """
from dataclasses import replace

import models
from models.segmentation.recipes import synthetic_demo
from models.translation.recipes import synthetic_translation_demo

def segmenting():
    '''The demo with a weaker penalty.'''
    demo = synthetic_demo()
    return replace(demo, loss=replace(demo.loss, sparsity=0.125))

@models.register_recipe
def translating_short():
    '''The demo with a weaker penalty.'''
    demo = synthetic_translation_demo()
    return replace(demo, loss=replace(demo.loss, sparsity=0.125))
"""


def write_package(folder: Path, name: str = "own_package", text: str = PACKAGE) -> Path:
    """Write a package whose module ``recipes`` is the text; the folder that has to be on the import path."""
    package = folder / name
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "recipes.py").write_text(text)
    return folder


def cen(folder: Path, *commands: Sequence[str | Path], imports: str = "") -> None:
    """Run ``cen`` commands one after the other in a new process, in a folder.

    Args:
        folder: the current one of that process.
        commands: each without ``cen``.
        imports: a module that a program which calls the commands imports before.
    """
    process = start(_call, folder, [list(map(str, command)) for command in commands], imports)
    process.join(300)
    assert process.exitcode == 0, f"{commands} in {folder} ended with {process.exitcode}"


def attempt(folder: Path, *command: str | Path) -> tuple[int | None, str]:
    """Run one command as ``cen`` does; its exit code, and what it wrote to stderr."""
    with tempfile.NamedTemporaryFile("r+") as errors:
        process = start(_attempt, folder, list(map(str, command)), errors.name)
        process.join(300)
        return process.exitcode, errors.read()


def train_two_steps(
    recipe: str,
    data: Path,
    output: Path,
    *overrides: str,
    system: str = "segmentation",
    folder: Path = ROOT,
    imports: str = "",
) -> None:
    """Train a recipe, by ``package.module:function`` or a name that ``imports`` registers, for two steps.

    Args:
        recipe: one with the settings of a ``system``.
        data: of ``prepare_rooms``, or of ``prepare_views`` for translation.
        output: the run's folder.
        overrides: go before those that make the training short.
        system: segmentation or translation.
        folder, imports: as ``cen``.
    """
    places = [f"data.root={data}", f"run.output={output}", "run.steps=2"]
    cen(folder, ["train", recipe, *SHORT[system], *places, *overrides], imports=imports)


def _attempt(folder: Path, command: Sequence[str], errors: str) -> int:
    os.dup2(os.open(errors, os.O_WRONLY), sys.stderr.fileno())
    return _call(folder, [command], "")


def _call(folder: Path, commands: Sequence[Sequence[str]], imports: str) -> int:
    os.chdir(folder)
    sys.argv = ["cen"]
    if imports:
        sys.path.insert(0, str(folder))
        __import__(imports)
    return max(main(command) for command in commands)
