"""Parts of the tests of training at scale: a tiny run, and processes to run it in.

Processes come from a server that has imported everything, so that each costs milliseconds instead of seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.multiprocessing import start_processes

import examples.own_encoder  # noqa: F401 - registers plain_net
from models.__main__ import main
from models.segmentation.task import SegmentationTask
from models.training import checkpoint, config, distributed, loop, registry
from models.training.rng import seed_all
from tests.helpers.networks import randomise_norms
from tests.helpers.same import assert_same

# 12 images in batches of 4: 3 steps an epoch, 7 in all; stages, epochs, looks and saves cross. The encoder is
# small: a ResNet-18 has 150 times as many weights, whose saves take longer than its steps.
STEPS = 7
TINY = [
    *["data.batch_size=4", "data.crop=32", "data.shorter_side=32", "model.width=4"],
    *[
        "model.encoder=plain_net",
        "eval.pictures=0",
        "optim.method=sgd",
        "optim.stages.0.steps=2",
        "optim.stages.1.steps=3",
        "optim.stages.2.steps=2",
    ],
    *[
        "run.device=cpu",
        "run.log_steps=3",
        "run.checkpoint_steps=4",
        "run.evaluate_epochs=9",
        "run.workers=0",
    ],
]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "tests.helpers.vision",
        "models.segmentation.task",
        "models.training.train",
        "torch._dynamo",
        "examples.own_encoder",
    ]
)


class Clock:
    """A clock that stands still but for the seconds it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def install(self) -> None:
        """Let the training loop look at it, in this process."""
        loop.time = SimpleNamespace(monotonic=lambda: self.now, perf_counter=time.perf_counter)  # type: ignore[assignment]


def prepare_rooms(folder: Path) -> Path:
    """12 images to train on, 3 to evaluate on."""
    command = ["prepare", "synthetic", str(folder), "--train", "12", "--val", "3"]
    assert main([*command, "--height", "40", "--width", "48"]) == 0
    return folder


def command(rooms: Path, output: Path, *overrides: str) -> list[str]:
    """The tiny run's command line."""
    return ["train", "synthetic_demo", *TINY, f"data.root={rooms}", f"run.output={output}", *overrides]


def tiny_task(rooms: Path, *overrides: str) -> SegmentationTask:
    """The tiny run's task at its first step; the same weights in every call."""
    seed_all(3)
    settings = [*TINY, f"data.root={rooms}", *overrides]
    task = SegmentationTask(config.override(registry.find("synthetic_demo"), settings))
    randomise_norms(task.net)
    if task.ema is not None:
        task.ema.restart(task.net)
    task.start_stage(0, 0)
    return task


def start(function: Callable[..., int | None], *arguments: Any) -> ForkServerProcess:
    """Begin to call a function of a module in a process of its own, whose exit code is what it returns."""
    process = _CONTEXT.Process(target=_call, args=(function, arguments))
    process.start()
    return process


def together(function: Callable[..., int | None], *arguments: Any, processes: int = 2) -> list[int | None]:
    """Call a function in processes with torchrun's environment; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        start(_call_in, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, function, arguments)
        for rank in range(processes)
    ]
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def spawn_two(function: Callable[[int, Path], None], folder: Path) -> None:
    """``torch.multiprocessing.spawn`` of two processes, which are given their rank and the folder."""
    start_processes(function, (folder,), nprocs=2, start_method=_CONTEXT.get_start_method())


def whole_state(folder: Path) -> tuple[Any, ...]:
    """All that a run leaves which another one must leave as well."""
    states = []
    for name, parts in (
        (checkpoint.LAST, ("loop", "task", "processes")),
        (checkpoint.BEST, ("loop", "task")),
    ):
        contents = checkpoint.load(folder / name)[1]
        states.append([contents[part] for part in parts])
    return states, (folder / "losses.csv").read_text(), (folder / "metrics.csv").read_text()


def assert_same_runs(a: Path, b: Path) -> None:
    assert_same(whole_state(a), whole_state(b))


def column(folder: Path, table: str, name: str) -> list[float]:
    """A column of a run's table."""
    rows = np.genfromtxt(folder / table, delimiter=",", names=True, deletechars="")
    return np.atleast_1d(rows[name]).tolist()


def _call(function: Callable[..., int | None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    raise SystemExit(function(*arguments))


def _call_in(environment: dict[str, str], function: Callable[..., int | None], arguments: Any) -> int | None:
    os.environ.update(environment)
    with distributed.processes():
        return function(*arguments)
