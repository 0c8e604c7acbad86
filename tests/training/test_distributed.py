"""Several processes train as one would with the same batches; they stop, save and resume together."""

from __future__ import annotations

import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.__main__ import main
from models.segmentation.task import SegmentationTask
from models.training import checkpoint, distributed
from models.training.errors import UsageError
from tests.helpers.training_runs import STEPS as STEPS_OF_A_RUN
from tests.helpers.training_runs import (
    Clock,
    assert_same_runs,
    column,
    command,
    prepare_rooms,
    tiny_task,
    together,
)

STEPS = 3
EXACT = ["model.dropout=0", "optim.stages.0.steps=3", "optim.stages.0.encoder_lr=0.01"]
CASES = {
    "batch statistics": [],
    "frozen statistics": ["model.frozen_statistics=true"],
    "parts": ["model.frozen_statistics=true", "optim.accumulate=2"],
    "the rest": ["optim.clip=0.1", "optim.ema=0.9", "optim.schedule=polynomial", "optim.warmup_steps=2"],
    "losses": [
        *["loss.kind=ohem", "loss.ohem_threshold=0.1", "loss.ohem_min_kept=0.3", "loss.dice=0.5"],
        *["loss.class_weights=median_frequency", "loss.label_smoothing=0.1"],
    ],
    "modalities dropped": ["data.drop_modality=0.9"],
    "pspnet": ["model.network=pspnet", "model.encoder=resnet18"],
}


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_rooms(tmp_path_factory.mktemp("data") / "rooms")


def trained(rooms: Path, overrides: list[str]) -> dict[str, Any]:
    """Losses, weights, statistics and evaluation after a few steps in float64."""
    torch.set_default_dtype(torch.float64)
    task = tiny_task(rooms, *EXACT, *overrides)
    if task.class_weights is not None:
        task.initialize()  # counts them, each process in its share of the labels
    losses = []
    for step, batch in enumerate(task.batches(0, 0)):
        if distributed.rank() == 0:  # pixels that count are spread unevenly
            batch.target[0] = 255
            batch.target[1, 5:] = 255
        values = task.step(replace(batch, images=batch.images.double()), step)
        losses.append(distributed.mean(torch.stack(list(values.values()))))
    assert len(losses) == STEPS
    state = task.state_dict()
    return {"losses": losses, "net": sample(state["net"]), "ema": sample(state.get("ema", {}))}


def sample(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norm and first elements of every entry."""
    return {
        name: torch.cat([value.double().norm()[None], value.double().flatten()[:9]])
        for name, value in state.items()
    }


def train_and_save(rooms: Path, folder: Path) -> None:
    results = {name: trained(rooms, overrides) for name, overrides in CASES.items()}
    torch.save(results, folder / f"{distributed.rank()}.pt")


@pytest.fixture(scope="module")
def results(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """The results of one process, and of each of two."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("results")
        assert together(train_and_save, rooms, folder, processes=processes) == [0] * processes
        found[processes] = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_the_same_batches(
    results: dict[int, list[dict[str, Any]]], case: str
) -> None:
    whole = results[1][0][case]
    for part in results[2]:
        torch.testing.assert_close(part[case], whole, rtol=1e-8, atol=1e-10)
    first, second = (part[case]["net"] for part in results[2])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert bool(whole["ema"]) == (case == "the rest")


def test_a_batch_in_parts_is_the_batch(results: dict[int, list[dict[str, Any]]]) -> None:
    for runs in results.values():
        torch.testing.assert_close(runs[0]["parts"], runs[0]["frozen statistics"], rtol=1e-8, atol=1e-10)


def test_batches_that_do_not_divide_are_refused(rooms: Path, tmp_path: Path) -> None:
    assert together(divides_not, rooms, tmp_path) == [0, 0]


def divides_not(rooms: Path, output: Path) -> None:
    with pytest.raises(UsageError, match=r"data.batch_size must be divisible by .*accumulate=3 times 2 proc"):
        trained(rooms, ["optim.accumulate=3"])
    with pytest.raises(UsageError, match=r"run.device=cuda:0: each process gets a GPU of its own"):
        trained(rooms, ["run.device=cuda:0"])
    with pytest.raises(UsageError, match="a mistake of the first"):
        distributed.from_first(mistake)
    assert distributed.from_first(lambda: distributed.rank() + 7) == 7
    assert distributed.largest(distributed.rank()) == 1
    assert distributed.gathered(distributed.rank()) == ([0, 1] if distributed.rank() == 0 else [])


def mistake() -> None:
    raise UsageError("a mistake of the first")


def train(arguments: list[str], stop_at: int | None = None) -> int:
    """The command line, in which the second process receives SIGTERM in a step or an evaluation."""
    step, evaluate, calls = SegmentationTask.step, SegmentationTask.evaluate, []

    def counted() -> None:
        calls.append(0)
        if len(calls) == stop_at and distributed.rank() == 1:
            signal.raise_signal(signal.SIGTERM)

    def stepping(self: SegmentationTask, *rest: Any) -> dict[str, Tensor]:
        counted()
        return step(self, *rest)

    def evaluating(self: SegmentationTask, *rest: Any) -> dict[str, float] | None:
        counted()
        return evaluate(self, *rest)

    SegmentationTask.step, SegmentationTask.evaluate = stepping, evaluating  # type: ignore[method-assign]
    os.chdir("/")
    return main(arguments)


@pytest.fixture(scope="module")
def undisturbed(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two processes' run."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    assert together(train, command(rooms, folder)) == [0, 0]
    return folder


def test_a_run_of_two_processes(undisturbed: Path, rooms: Path, tmp_path: Path) -> None:
    assert column(undisturbed, "losses.csv", "step") == [3, 6]
    contents = checkpoint.load(undisturbed)[1]
    first, second = contents["processes"]
    assert not torch.equal(first["rng"]["torch"], second["rng"]["torch"])
    assert '"processes": 2' in (undisturbed / "environment.json").read_text()
    # Evaluated in two halves, it is what one process finds.
    assert main(["evaluate", str(undisturbed / "last.pt"), "--output", str(tmp_path)]) == 0
    text = next(tmp_path.rglob("*.json")).read_text()
    assert str(column(undisturbed, "metrics.csv", "ensemble/mean_iou")[-1]) in text


# The 3rd call is a step, the 8th the evaluation after all steps.
@pytest.mark.parametrize(("stop_at", "step"), [(3, 3), (8, 7)])
def test_a_signal_to_one_stops_all_and_the_run_resumes_exactly(
    undisturbed: Path, rooms: Path, tmp_path: Path, stop_at: int, step: int
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    assert together(train, command(rooms, two), stop_at) == [128 + signal.SIGTERM] * 2
    assert checkpoint.load(two)[1]["loop"]["step"] == step
    shutil.copytree(two, one)
    assert together(train, [*command(rooms, two), "--resume"]) == [0, 0]
    assert_same_runs(undisturbed, two)
    if step < STEPS_OF_A_RUN:  # else nothing is left to train
        assert_resumes_in_one_process(rooms, one)


def assert_resumes_in_one_process(rooms: Path, folder: Path) -> None:
    assert main([*command(rooms, folder), "--resume"]) == 0
    contents = checkpoint.load(folder)[1]
    assert (contents["loop"]["step"], len(contents["processes"])) == (STEPS_OF_A_RUN, 1)
    assert all(map(math.isfinite, column(folder, "losses.csv", "loss/loss")))
    assert "had 2 processes and has 1 now" in (folder / "log.txt").read_text()


def train_by_clock(rank_seconds: list[float], arguments: list[str]) -> int:
    """The command line, in processes whose clocks differ."""
    clock, stepping = Clock(), SegmentationTask.step
    clock.install()

    def step(self: SegmentationTask, *rest: Any) -> dict[str, Tensor]:
        clock.now += rank_seconds[int(os.environ["RANK"])]
        return stepping(self, *rest)

    SegmentationTask.step = step  # type: ignore[method-assign]
    return main(arguments)


def test_the_first_process_decides_when_it_is_time(rooms: Path, tmp_path: Path) -> None:
    rarely = ["run.checkpoint_steps=99", "run.checkpoint_minutes=1.5", "run.keep=9", "run.evaluate_epochs=9"]
    arguments = command(rooms, tmp_path / "run", *rarely)
    # By the second one's clock it is always time.
    assert together(train_by_clock, [60.0, 1000.0], arguments) == [0, 0]
    assert [*checkpoint.numbered(tmp_path / "run")] == [2, 4, 6, 7]
