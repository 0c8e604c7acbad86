"""The loop with a toy task: order of events, exact resumption, interruption, divergence."""

import csv
import logging
import math
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cen_ext import ExchangeBatchNorm2d
from models.data import DataError
from models.networks.fusion.base import mark
from models.training import checkpoint
from models.training.devices import peak_memory
from models.training.errors import UsageError
from models.training.interrupt import Interrupt
from models.training.loop import Diverged, Loop
from models.training.rng import preserved_rng, rng_state, seed_all, set_rng_state
from models.training.run_folder import RunFolder
from models.training.settings import RunSettings, Stage
from tests.helpers.same import assert_same
from tests.helpers.training_runs import column

CPU = torch.device("cpu")
STEPS_PER_EPOCH = 4


@dataclass
class Toy:
    """A parameter that follows noise; every generator takes part, and ``events`` tells what was called."""

    stages: tuple[Stage, ...] = (Stage(steps=6), Stage(epochs=2))
    steps_per_epoch: int = STEPS_PER_EPOCH
    images_per_step: int = 2
    stop_at: int | None = None  # raise a signal in this step
    diverge_at: int | None = None
    broken_at: int | None = None  # the image that cannot be read
    broken_evaluation: bool = False
    shown: tuple[str, ...] = ("loss", "half")
    best_metric: str = "norm"
    device: torch.device = CPU
    events: list[Any] = field(default_factory=list)
    value: Tensor = field(default_factory=lambda: torch.zeros(3, requires_grad=True))

    @property
    def network(self) -> nn.Module:
        point = mark(ExchangeBatchNorm2d(3, 1))
        point.weight.data.copy_(self.value.detach()[None])
        return nn.ModuleDict({"point": point})

    def start_stage(self, index: int, begin: int) -> None:
        self.events.append(f"stage {index}")
        self.optimizer = torch.optim.SGD([self.value], lr=0.1 / (index + 1), momentum=0.9)

    def batches(self, epoch: int, start_step: int) -> Iterator[int]:
        for step in range(epoch * STEPS_PER_EPOCH + start_step, (epoch + 1) * STEPS_PER_EPOCH):
            if step == self.broken_at:
                raise DataError("broken.png")
            yield step

    def step(self, batch: int, step: int) -> dict[str, Tensor]:
        assert step == batch
        self.events.append(batch)
        noise = torch.randn(3) + float(np.random.normal()) * batch  # noqa: NPY002
        loss = (self.value - noise).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if batch == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        factor = float("nan") if batch == self.diverge_at else 1.0
        return {"loss": loss.detach() * factor, "half": loss.detach() / 2}

    def status(self) -> dict[str, Tensor]:
        return {"share": torch.tensor(0.5)}

    def learning_rates(self) -> dict[str, float]:
        return {"all": self.optimizer.param_groups[0]["lr"]}

    def evaluate(self, stop: Callable[[], bool]) -> dict[str, float] | None:
        self.events.append("evaluate")
        torch.randn(5)  # must not change what training draws
        if self.broken_evaluation:
            raise DataError("broken.png")
        return None if stop() else {"norm": float(self.value.detach().norm())}

    def score(self, metrics: dict[str, float]) -> float:
        return -metrics["norm"]

    def record(self, board: object, folder: Path, step: int) -> None:
        self.events.append(f"record {step}")

    def networks(self) -> dict[str, Any]:
        return {"value": self.value.detach().clone()}

    def state_dict(self) -> dict[str, Any]:
        return {**self.networks(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.value.copy_(state["value"])
        self.optimizer.load_state_dict(state["optimizer"])


RUN = RunSettings(log_steps=3, checkpoint_steps=5, evaluate_steps=5)
HEADER = {"recipe": "toy", "config": {}}


def run(folder: Path, task: Toy, settings: RunSettings = RUN, *, resume: bool = False) -> Loop:
    seed_all(1)
    run_folder = RunFolder(folder, resume=resume)
    with Interrupt() as interrupt:
        loop = Loop(task, settings, run_folder, HEADER, interrupt)
        if resume:
            loop.restore(checkpoint.load(folder)[1])
        loop.run()
    return loop


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def everything(folder: Path) -> tuple[Any, ...]:
    """The final state, and the tables' text."""
    contents = checkpoint.load(folder)[1]
    return contents, (folder / "losses.csv").read_text(), (folder / "metrics.csv").read_text()


def test_order_of_stages_epochs_and_evaluations(tmp_path: Path) -> None:
    task = Toy()
    loop = run(tmp_path, task)
    assert task.events == [
        *["stage 0", 0, 1, 2, 3, 4, "evaluate", "record 5", 5],
        *["stage 1", 6, 7, 8, 9, "evaluate", "record 10", 10, 11, 12, 13, "evaluate", "record 14"],
    ]
    assert loop.progress.step == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *["best.pt", "config.json", "environment.json", "last.pt", "losses.csv", "metrics.csv"],
        *["scales", "speed.csv", "tensorboard"],
    ]


@pytest.mark.parametrize("place", range(3))
def test_an_empty_stage_is_left_out(tmp_path: Path, place: int) -> None:
    stages = list(Toy().stages)
    stages.insert(place, Stage(epochs=0))
    task, expected = Toy(stages=tuple(stages)), [index for index in range(3) if index != place]
    assert run(tmp_path, task).progress.step == 14
    assert [event for event in task.events if str(event).startswith("stage")] == [
        f"stage {index}" for index in expected
    ]
    with pytest.raises(UsageError, match=r"optim\.stages must have steps"):
        run(tmp_path / "none", Toy(stages=(Stage(steps=0),)))


@pytest.mark.parametrize("stop_at", range(14))
def test_resumed_equals_uninterrupted(tmp_path: Path, stop_at: int) -> None:
    run(tmp_path / "a", Toy())
    stopped = run(tmp_path / "b", Toy(stop_at=stop_at))
    assert stopped.progress.step == stop_at + 1
    assert stopped.interrupt.received == signal.SIGTERM
    run(tmp_path / "b", Toy(), resume=True)
    assert_same(everything(tmp_path / "a"), everything(tmp_path / "b"))
    assert_same(
        checkpoint.load(tmp_path / "a" / "best.pt")[1], checkpoint.load(tmp_path / "b" / "best.pt")[1]
    )


@pytest.mark.parametrize("broken_at", range(14))
def test_a_broken_training_image_costs_no_steps(tmp_path: Path, broken_at: int) -> None:
    run(tmp_path / "a", Toy())
    with pytest.raises(DataError):
        run(tmp_path / "b", Toy(broken_at=broken_at))
    if broken_at:
        assert checkpoint.load(tmp_path / "b")[1]["loop"]["step"] == broken_at
    run(tmp_path / "b", Toy(), resume=broken_at > 0)
    assert_same(everything(tmp_path / "a"), everything(tmp_path / "b"))


def test_a_broken_validation_image_costs_no_steps(tmp_path: Path) -> None:
    """A resumed run evaluates first, once, and the table has every row once."""
    rarely = RunSettings(log_steps=3, checkpoint_steps=100, evaluate_steps=5)
    run(tmp_path / "a", Toy(), rarely)
    for resume in (False, True):
        with pytest.raises(DataError):
            run(tmp_path / "b", Toy(broken_evaluation=True), rarely, resume=resume)
        progress = checkpoint.load(tmp_path / "b")[1]["loop"]
        assert (progress["step"], progress["evaluated"]) == (5, 0)
    task = Toy()
    run(tmp_path / "b", task, rarely, resume=True)
    assert task.events[:4] == ["stage 0", "evaluate", "record 5", 5]
    assert_same(everything(tmp_path / "a"), everything(tmp_path / "b"))


def test_run_steps_can_be_raised_later(tmp_path: Path) -> None:
    run(tmp_path / "a", Toy())
    run(tmp_path / "b", Toy(), RunSettings(steps=10, log_steps=3, checkpoint_steps=5, evaluate_steps=5))
    run(tmp_path / "b", Toy(), resume=True)
    assert_same(everything(tmp_path / "a"), everything(tmp_path / "b"))


def test_losses_are_means_since_the_last_look(tmp_path: Path) -> None:
    run(tmp_path, Toy(), RunSettings(log_steps=7, evaluate_epochs=100))
    run_each = tmp_path / "each"
    run(run_each, Toy(), RunSettings(log_steps=1, evaluate_epochs=100))
    rows = np.genfromtxt(run_each / "losses.csv", delimiter=",", skip_header=1)
    means = np.genfromtxt(tmp_path / "losses.csv", delimiter=",", names=True)
    assert means["step"].tolist() == [7, 14]
    np.testing.assert_allclose(means["lossloss"], [rows[:7, 1].mean(), rows[7:, 1].mean()], rtol=1e-6)
    np.testing.assert_allclose(means["losshalf"], means["lossloss"] / 2, rtol=1e-6)


def test_speed_and_memory_are_logged_beside_the_losses(tmp_path: Path) -> None:
    run(tmp_path, Toy(stop_at=7))
    before = rows_of(tmp_path / "speed.csv")
    assert [row["step"] for row in before] == ["3", "6"]
    run(tmp_path, Toy(), resume=True)
    rows = rows_of(tmp_path / "speed.csv")
    assert rows[:2] == before
    assert [row["step"] for row in rows] == [row["step"] for row in rows_of(tmp_path / "losses.csv")]
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    peaks = [float(row["peak_memory_mib"]) for row in rows]
    assert peaks == sorted(peaks)
    assert 0 < peaks[-1] <= peak_memory(CPU) / 2**20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_peak_memory_is_the_systems() -> None:
    peak = peak_memory(CPU)
    (told,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak == pytest.approx(1024 * int(told), abs=2**20)


def test_what_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "models"):
        run(tmp_path, Toy(), RunSettings(log_steps=7, evaluate_epochs=100))
    losses = column(tmp_path, "losses.csv", "loss/loss")
    shown = [f"loss {loss:.4g}, half {loss / 2:.4g}, images/s " for loss in losses]
    (norm,) = column(tmp_path, "metrics.csv", "norm")
    first, to_go, second, evaluation = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"step 7: {shown[0]}")
    assert re.fullmatch(r"step 10: \S+ s a step, about 1 s to go, evaluations aside", to_go)
    assert second.startswith(f"step 14: {shown[1]}")
    assert second.endswith(", share 50.00%")
    assert evaluation == f"step 14, epoch 3.50: norm {norm:.4f} (best)"  # its own value, not what is compared


@pytest.mark.parametrize(
    ("begun", "total", "told"), [(0, 9, 0), (0, 10, 0), (0, 11, 1), (0, 14, 1), (4, 14, 0)]
)
def test_the_time_to_go_is_told_once_if_ten_steps_leave_some(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, begun: int, total: int, told: int
) -> None:
    if begun:
        run(tmp_path, Toy(), RunSettings(steps=begun))
    with caplog.at_level(logging.INFO, "models"):
        run(tmp_path, Toy(), replace(RUN, steps=total), resume=begun > 0)
    assert sum("to go" in record.getMessage() for record in caplog.records) == told


def test_a_run_begun_with_other_losses_is_resumed(tmp_path: Path) -> None:
    """Those of another version: rows stay as they are, and means are of steps that had every loss."""

    class Older(Toy):
        def step(self, batch: int, step: int) -> dict[str, Tensor]:
            return {"loss": super().step(batch, step)["loss"], "gone": torch.ones(())}

    rarely = RunSettings(log_steps=3, checkpoint_steps=100, evaluate_epochs=100)
    run(tmp_path, Older(shown=("loss",), stop_at=4), rarely)  # two steps after a look
    (before,) = rows_of(tmp_path / "losses.csv")
    assert list(before) == ["step", "loss/loss", "loss/gone", "share"]
    run(tmp_path, Toy(), rarely, resume=True)
    first, second, *rest = rows_of(tmp_path / "losses.csv")
    assert first == {**before, "loss/half": ""}
    assert (second["step"], second["loss/gone"]) == ("6", "")
    for row in (second, *rest):
        assert float(row["loss/half"]) == pytest.approx(float(row["loss/loss"]) / 2)


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the loss of step 8 is not a finite number.*last\.pt"):
        run(tmp_path, Toy(diverge_at=7), RunSettings(log_steps=10, checkpoint_steps=5, evaluate_epochs=100))
    assert checkpoint.load(tmp_path)[1]["loop"]["step"] == 5


def test_divergence_before_any_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step 2 is not .* had not written one"):
        run(tmp_path, Toy(diverge_at=1))
    assert not (tmp_path / "last.pt").exists()


def test_resuming_on_other_data_is_refused(tmp_path: Path) -> None:
    run(tmp_path, Toy(), RunSettings(steps=3))
    records = [tmp_path / "config.json", tmp_path / "environment.json"]
    for record in records:
        record.write_text("of the run so far")
    with pytest.raises(UsageError, match="the data makes 5 steps per epoch, but 4 when the run began"):
        run(tmp_path, Toy(steps_per_epoch=5), resume=True)
    assert [record.read_text() for record in records] == ["of the run so far"] * 2


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path, Toy(), RunSettings(steps=1))
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(UsageError, match="holds a run already; continue it with --resume"):
        run(tmp_path, Toy())
    assert (tmp_path / "last.pt").read_bytes() == before


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    half_written = [tmp_path / name for name in (".123-last.pt", ".123-best.pt", ".7-metrics.csv")]
    others = [tmp_path / name for name in ("123-last.pt", ".my-last.pt", ".123-notes")]
    for path in (*half_written, *others):
        path.write_bytes(b"half")
    run(tmp_path, Toy())
    assert not any(path.exists() for path in half_written)
    assert all(path.exists() for path in others)


def test_killed_between_the_row_of_an_evaluation_and_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "a", Toy())
    save, saves = checkpoint.save, []

    def killed(path: Path, contents: dict[str, Any]) -> None:
        saves.append(path.name)
        if len(saves) == 2:  # the first was of the step that is evaluated, the second is of its evaluation
            raise KeyboardInterrupt
        save(path, contents)

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", Toy())
    assert saves == ["last.pt", "best.pt"]
    assert len((tmp_path / "b" / "metrics.csv").read_text().splitlines()) == 2
    monkeypatch.undo()
    run(tmp_path / "b", Toy(), resume=True)
    assert_same(everything(tmp_path / "a"), everything(tmp_path / "b"))


@pytest.mark.parametrize(("scores", "step"), [((math.nan, 2, 1), 10), ((2, math.nan, 1), 5)])
def test_a_score_that_is_no_number_is_never_the_best(
    tmp_path: Path, scores: tuple[float, ...], step: int
) -> None:
    class Scored(Toy):
        def score(self, metrics: dict[str, float]) -> float:
            return scores[self.events.count("evaluate") - 1]

    assert run(tmp_path, Scored()).progress.best == 2
    assert checkpoint.load(tmp_path / "best.pt")[1]["loop"]["step"] == step


def test_a_second_ctrl_c_is_not_held_back() -> None:
    # A shell's background job starts with it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupt() as interrupt:
        assert not interrupt
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
            assert interrupt.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def draw() -> list[float]:
    import random

    return [random.random(), float(np.random.random()), float(torch.rand(()))]  # noqa: NPY002


def test_generators_are_restored() -> None:
    seed_all(3)
    state = rng_state()
    with preserved_rng():
        inside = draw()
    assert draw() == inside
    assert draw() != inside
    set_rng_state(state)
    assert draw() == inside
