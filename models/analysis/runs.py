"""Runs to analyze: their settings and records, and their networks as they were in training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.networks.fusion import named_exchange_points
from models.networks.fusion.thresholds import ruled_layers
from models.networks.messages import first_line
from models.training import checkpoint, importable, registry, thresholds
from models.training.errors import UsageError, existing
from models.training.loop import Task
from models.training.scales import penalty_slopes

COMMAND = "analyse"


@dataclass(frozen=True)
class Run:
    """A run by its folder, without its checkpoints.

    Attributes:
        path: what the caller gave: the folder, or a checkpoint in it.
        folder: it.
        header: ``config.json``.
        recipe: the settings, overrides included.
    """

    path: Path
    folder: Path
    header: dict[str, Any]
    recipe: Any

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.path.name if self.path == self.folder else f"{self.folder.name}/{self.path.stem}"

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modalities, or domains."""
        data = self.recipe.data
        names: tuple[str, ...] = data.modalities if hasattr(data, "modalities") else data.domains
        return names


def read_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run's settings.

    Args:
        path: its folder, or a checkpoint in it.
        overrides: ``field=value`` assignments.

    Raises:
        UsageError: it is none; a setting is refused.
    """
    existing(path, COMMAND)
    folder = path if path.is_dir() else path.parent
    if not checkpoint.is_of_run(folder):
        raise UsageError(
            f"{COMMAND}: {path} is no run: {folder} holds no {checkpoint.CONFIG}, which training writes"
        )
    header = json.loads((folder / checkpoint.CONFIG).read_text())
    recipe, _ = checkpoint.settings_here(header, overrides)
    return Run(path, folder, header, recipe)


def network_of(run: Run) -> nn.Module:
    """The run's network with random weights, and the thresholds that its training had."""
    with importable.naming_missing(run.header):
        net: nn.Module = registry.system_of(run.recipe).network(run.recipe)
    thresholds.restore(net, str(run.folder / checkpoint.CONFIG), run.header)
    return net


def contents_of(run: Run) -> tuple[Path, dict[str, Any]]:
    """The path and contents of a run's checkpoint, the last one of a folder.

    Raises:
        UsageError: it holds no training, or cannot be read; scenes of the data lack modalities.
    """
    path, contents = checkpoint.load(run.path, checkpoint.LAST)
    if "loop" not in contents:
        raise UsageError(f"{COMMAND}: {path} holds a network alone; give a run's folder or checkpoint")
    if getattr(run.recipe.data, "missing", None) == "fill":
        raise UsageError("data.missing must not be fill here: every scene needs all modalities")
    return path, contents


def task_of(recipe: Any, path: Path, contents: dict[str, Any]) -> Task:
    """A task, uncompiled, with the weights of a checkpoint; no stage has been started.

    Args:
        recipe: its settings.
        path, contents: the checkpoint.

    Raises:
        UsageError: the checkpoint does not fit the settings.
        DataError: the data set is not whole.
    """
    recipe = replace(recipe, run=replace(recipe.run, compile=False, cuda_graphs=False))
    with importable.naming_missing(contents):
        task: Task = registry.system_of(recipe).task(recipe)
    checkpoint.check_inputs(path, contents, task.describe(), COMMAND)
    try:
        task.load_state_dict(contents["task"])
    except (RuntimeError, KeyError) as error:
        raise UsageError(f"{path} does not fit these settings: {first_line(error)}") from None
    thresholds.restore(task.network, str(path), contents)
    return task


def load_task(run: Run) -> tuple[Task, int]:
    """The run's task with the weights of a checkpoint, in float32, whole batches at once.

    Returns:
        The task, in which no stage has been started, and the checkpoint's step.

    Raises:
        UsageError, DataError: as ``contents_of`` and ``task_of``.
    """
    path, contents = contents_of(run)
    recipe = replace(run.recipe, run=replace(run.recipe.run, precision="fp32", recompute=False))
    return task_of(recipe, path, contents), contents["loop"]["step"]


def thresholds_of(net: nn.Module) -> dict[str, float]:
    """The thresholds of the exchange points that exchange by one, by the points' names."""
    ruled = ruled_layers(net)
    return {name: float(ruled[name].holder.threshold) for name in named_exchange_points(net) if name in ruled}


def penalized_channels(net: nn.Module) -> dict[str, Tensor]:
    """By exchange point ``[M, C]`` bool: whether the fusion's penalty is on the scale."""
    points = named_exchange_points(net)
    with _scales_of_ones(net):  # at 0 the derivative of |γ| is taken to be 0
        return {name: slopes > 0 for name, slopes in penalty_slopes(net, points).items()}


@contextmanager
def _scales_of_ones(net: nn.Module) -> Iterator[None]:
    points = named_exchange_points(net).values()
    before = [point.weight.detach().clone() for point in points]
    try:
        for point in points:
            nn.init.ones_(point.weight.parameter)
        yield
    finally:
        with torch.no_grad():
            for point, scales in zip(points, before, strict=True):
                point.weight.copy_(scales)
