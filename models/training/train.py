"""The train command: settings, task, folder and loop put together, from the start or from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.data.survey import Overview
from models.training import checkpoint, config, distributed, importable, registry
from models.training.errors import UsageError, program
from models.training.interrupt import Interrupt
from models.training.loop import Loop
from models.training.precision import set_tf32
from models.training.rng import process_seed, seed_all
from models.training.run_folder import RunFolder, default_output, logging_to

log = logging.getLogger(__name__)


def train(name: str, overrides: Sequence[str], resume: Path | bool = False) -> int:
    """Run a recipe, in every process that torchrun has started.

    Args:
        name: the recipe's.
        overrides: ``field=value`` assignments.
        resume: True continues the run in ``run.output``, a path that run or checkpoint. The settings are the
            run's own; overrides may change those that are marked resumable.

    Returns:
        The exit code: 0, or 128 + the signal's number when interrupted.

    Raises:
        UsageError: a wrong name, field, value or path; settings that differ from the run's; a loss that is
            not finite; a folder that holds another run, or cannot be made; a checkpoint that cannot
            be written.
        DataError: the data set is not whole; as ``Loop.run`` where an image turns out to be broken.
    """
    with distributed.processes():
        return _train(name, overrides, resume)


def _train(name: str, overrides: Sequence[str], resume: Path | bool) -> int:
    recipe, resumed = _settings(name, overrides, resume)
    # The time in its name differs between processes.
    output = distributed.from_first(lambda: recipe.run.output or default_output(name))
    set_tf32(recipe.run.tf32)
    seed_all(recipe.run.seed)
    recorded = resumed[1] if resumed else {}
    with importable.naming_missing(recorded):
        task = registry.system_of(recipe).task(recipe)
    if resumed:
        checkpoint.check_inputs(*resumed, task.describe())
        task.recall(*resumed)
    notes = [] if resumed else task.initialize()
    header = {**checkpoint.header(name, recipe, recorded.get("imports", ())), **task.describe()}
    if distributed.rank() > 0:  # the weights are the same in all processes; dropout is not
        seed_all(process_seed(recipe.run.seed, distributed.rank()))
    own = resumed is not None and resumed[0].parent.resolve() == output.resolve()
    folder, interrupt = RunFolder(output, resume=own), Interrupt()
    loop = Loop(task, recipe.run, folder, header, interrupt)
    folder.make()  # only now: mistakes in the settings leave no folder behind
    with logging_to(output / "log.txt"), interrupt:
        log.info("%s in %s", name, output)
        _log(task.overview)
        for note in notes:
            log.warning(note)
        log.info(task.summary(loop.total))
        if resumed:
            path, contents = resumed
            loop.restore(contents)
            header |= task.describe()  # the task may have restored a part of it
            step = loop.progress.step
            log.info("resumed at step %d", step)
            if own and distributed.from_first(lambda: folder.go_back(path, step, recipe.run.keep)):
                loop.progress.best = -float("inf")
        else:
            _log(task.scales(loop.total))
        loop.run()
        if not loop.signal:
            log.info("done: %s", folder.path)
            return 0
        again = f"{program()} {importable.flags(header['imports'])}train {name} --resume {folder.path}"
        log.info("interrupted at step %d and saved; continue with: %s", loop.progress.step, again)
        return 128 + loop.signal


def _log(overview: Overview) -> None:
    for line in overview.lines:
        log.info(line)
    for warning in overview.warnings:
        log.warning("warning: %s", warning)


def _settings(
    name: str, overrides: Sequence[str], resume: Path | bool
) -> tuple[registry.Recipe, tuple[Path, dict[str, Any]] | None]:
    """The settings to run with, and the path and contents of the checkpoint to continue from."""
    if resume is False:
        return config.override(registry.find(name), overrides), None
    source = _output(name, overrides) if resume is True else resume
    if source is None:
        raise UsageError("--resume needs a run: give its folder, --resume FOLDER, or set run.output=FOLDER")
    path, contents = checkpoint.load(source)
    if "loop" not in contents:
        raise UsageError(f"--resume: {path} holds a network alone; start from it with model.start={path}")
    if "processes" not in contents:
        last = path.with_name(checkpoint.LAST)
        remedy = f"--resume {last}" if last.is_file() else f"which is gone; model.start={path} starts from it"
        raise UsageError(
            f"--resume: {path} holds the best networks, but not the state of their training, which "
            f"{checkpoint.LAST} holds: {remedy}"
        )
    if not registry.is_recorded(name, contents):
        raise UsageError(f"--resume: {path} is of the recipe {contents['recipe']!r}, not of {name!r}")
    saved = checkpoint.settings(contents)
    recipe = config.override(saved, overrides)
    changed = config.differing(saved, recipe)
    if changed:
        raise UsageError(
            f"--resume: {path} was trained with other settings, which cannot change: {'; '.join(changed)}"
        )
    if not any(assignment.startswith("run.output=") for assignment in overrides):
        recipe = replace(recipe, run=replace(recipe.run, output=path.parent))
    return recipe, (path, contents)


def _output(name: str, overrides: Sequence[str]) -> Path | None:
    """The recipe's ``run.output``; a run that lies there tells its recipe even where the name does not."""
    typed = [assignment.partition("=")[2] for assignment in overrides if assignment.startswith("run.output=")]
    if typed and typed[-1] and checkpoint.is_of_run(Path(typed[-1])):
        return Path(typed[-1])
    output: Path | None = config.override(registry.find(name), overrides).run.output
    return output
