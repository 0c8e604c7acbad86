"""Which checkpoints a run has: by the clock as by steps, those kept by their steps, the best one for use."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import models
from models.__main__ import main
from models.training import checkpoint, config, loop, registry
from models.training.errors import UsageError
from models.training.run_folder import RunFolder
from models.training.scale_records import read_scales
from models.training.settings import RunSettings
from tests.helpers.same import assert_same
from tests.helpers.training_runs import Clock, assert_same_runs, command, prepare_rooms
from tests.training.test_checkpoint import files_of_at_most
from tests.training.test_loop import Toy, run

OFTEN = ["run.keep=9", "run.evaluate_steps=2", "run.log_steps=1"]  # saves after steps 2, 4, 6 and 7


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_rooms(tmp_path_factory.mktemp("data") / "rooms")


@pytest.fixture(scope="module")
def whole(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted, in one thread, on which bits depend."""
    output, threads = tmp_path_factory.mktemp("runs") / "whole", torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(command(rooms, output, *OFTEN)) == 0
    torch.set_num_threads(threads)
    assert kept(output) == [2, 4, 6, 7]
    return output


def kept(folder: Path) -> list[int]:
    return list(checkpoint.numbered(folder))


def step_in(path: Path) -> int:
    step: int = checkpoint.load(path)[1]["loop"]["step"]
    return step


# ---- by the clock


class Slow(Toy):
    """A step takes 25 seconds."""

    def step(self, batch: int, step: int) -> dict[str, Tensor]:
        self.clock.now += 25
        return super().step(batch, step)


@pytest.mark.parametrize(
    ("minutes", "every", "steps"),
    [
        (1.0, 100, [3, 6, 9, 12, 14]),
        (1.0, 2, [2, 4, 6, 8, 10, 12, 14]),  # never late
        (1.0, 5, [3, 5, 8, 10, 13, 14]),  # a save by steps starts the clock as well
        (None, 100, [14]),
    ],
)
def test_saves_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float | None, every: int, steps: list[int]
) -> None:
    monkeypatch.setattr(loop, "time", time)
    task = Slow()
    task.clock = Clock()
    task.clock.install()
    settings = RunSettings(
        log_steps=3, checkpoint_steps=every, checkpoint_minutes=minutes, evaluate_epochs=9, keep=20
    )
    run(tmp_path / "slow", task, settings)
    assert kept(tmp_path / "slow") == steps
    run(tmp_path / "fast", Toy(), RunSettings(log_steps=3, checkpoint_steps=100, evaluate_epochs=9))
    assert_same(*(checkpoint.load(tmp_path / name)[1] for name in ("slow", "fast")))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("run.checkpoint_minutes=0", "run.checkpoint_minutes must be positive, or none, got 0.0"),
        ("run.checkpoint_minutes=nan", "run.checkpoint_minutes must be positive, or none, got nan"),
        ("run.keep=-1", "run.keep must be at least 0, got -1"),
    ],
)
def test_settings_that_cannot_be(assignment: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        config.override(registry.find("synthetic_demo"), [assignment])


# ---- kept by their steps


def test_the_last_saves_are_kept_without_being_written_twice(tmp_path: Path) -> None:
    run(tmp_path, Toy(), RunSettings(log_steps=3, checkpoint_steps=2, evaluate_epochs=9, keep=3))
    assert kept(tmp_path) == [10, 12, 14]
    for step in kept(tmp_path):
        assert step_in(tmp_path / f"step_{step:06d}.pt") == step
    assert (tmp_path / "step_000014.pt").samefile(tmp_path / "last.pt")
    assert not list(tmp_path.glob(".*"))


def test_none_is_removed_before_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed between a checkpoint and its further name has that name once it is resumed."""
    settings = RunSettings(log_steps=3, checkpoint_steps=2, evaluate_epochs=9, keep=2)
    link = checkpoint.link

    def killed(source: Path, path: Path) -> None:
        if path.name == "step_000006.pt":
            raise KeyboardInterrupt
        link(source, path)

    monkeypatch.setattr(checkpoint, "link", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Toy(), settings)
    assert (kept(tmp_path), step_in(tmp_path)) == ([2, 4], 6)
    monkeypatch.undo()
    RunFolder(tmp_path, resume=True).go_back(tmp_path / "last.pt", 6, 2)
    assert kept(tmp_path) == [4, 6]


def no_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    run(tmp_path, Toy(), RunSettings(log_steps=3, checkpoint_steps=5, evaluate_epochs=9, keep=2))
    assert kept(tmp_path) == [10, 14]
    assert step_in(tmp_path / "step_000010.pt") == 10
    assert not (tmp_path / "step_000014.pt").samefile(tmp_path / "last.pt")


def test_a_disk_too_full_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "last.pt", {"value": torch.zeros(100_000), "loop": {"step": 7}})
    monkeypatch.setattr(os, "link", no_links)
    with (
        files_of_at_most(50_000),
        pytest.raises(UsageError, match=r"^cannot write .*step_000007\.pt: .*large"),
    ):
        RunFolder(tmp_path, resume=True).keep(7, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_link_left_by_a_process_of_the_same_number_is_not_written_to(tmp_path: Path) -> None:
    """It was killed before it renamed the link; the file is another name of one that is kept."""
    kept_one, last = tmp_path / "step_000005.pt", tmp_path / "last.pt"
    checkpoint.save(kept_one, {"loop": {"step": 5}})
    os.link(kept_one, tmp_path / f".{os.getpid()}-last.pt")
    checkpoint.save(last, {"loop": {"step": 6}})
    assert (step_in(kept_one), step_in(last)) == (5, 6)
    os.link(kept_one, tmp_path / f".{os.getpid()}-step_000006.pt")
    checkpoint.link(last, tmp_path / "step_000006.pt")
    assert [step_in(path) for path in checkpoint.numbered(tmp_path).values()] == [5, 6]
    assert not list(tmp_path.glob(".*"))


def test_files_of_other_names_are_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("step_1.pt", "step_000001.pth", "my_step_000001.pt", "step_x.pt")]
    for path in others:
        path.write_bytes(b"mine")
    (tmp_path / ".77-step_000003.pt").write_bytes(b"half written by a killed run")
    run(tmp_path, Toy(), RunSettings(log_steps=3, checkpoint_steps=5, evaluate_epochs=9, keep=1))
    assert all(path.read_bytes() == b"mine" for path in others)
    assert not list(tmp_path.glob(".*"))


def test_a_kept_checkpoint_that_cannot_be_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, resume=False)
    checkpoint.save(tmp_path / "last.pt", {"loop": {"step": 9}})
    (tmp_path / "step_000003.pt").mkdir()
    with pytest.raises(UsageError, match=r"^cannot remove .*step_000003\.pt: "):
        folder.keep(9, 1)
    assert kept(tmp_path) == [3, 9]


def test_the_latest_kept_one_stands_in_for_the_last(tmp_path: Path) -> None:
    for name, step in (("step_000004.pt", 4), ("step_000012.pt", 12), ("best.pt", 8)):
        checkpoint.save(tmp_path / name, {"loop": {"step": step}})
    assert step_in(tmp_path) == 12
    assert checkpoint.load(tmp_path, checkpoint.BEST)[1]["loop"]["step"] == 8
    with pytest.raises(UsageError, match="holds a run already"):
        RunFolder(tmp_path, resume=False)


def test_an_export_replaces_none(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = whole / "step_000004.pt"
    before = target.read_bytes()
    assert main(["export", str(whole), "--output", str(target)]) == 2
    assert "is a run's own checkpoint; choose another name" in capsys.readouterr().err
    assert target.read_bytes() == before


# ---- going back


@pytest.mark.usefixtures("one_thread")
def test_going_back_ends_as_if_never_interrupted(whole: Path, tmp_path: Path) -> None:
    back, short = (tmp_path / name for name in ("back", "short"))
    for copy in (back, short):
        shutil.copytree(whole, copy)
    resume = ["train", "synthetic_demo", "--resume"]
    assert main([*resume, str(back / "step_000002.pt")]) == 0
    assert_same_runs(whole, back)
    assert kept(back) == kept(whole)
    assert_same(read_scales(back), read_scales(whole))
    assert main([*resume, str(short / "step_000002.pt"), "run.steps=3"]) == 0
    assert (kept(short), step_in(short)) == ([2, 3], 3)
    assert step_in(short / "best.pt") <= 3
    losses = [(folder / "losses.csv").read_text().splitlines() for folder in (whole, short)]
    assert losses[1] == losses[0][:4]
    metrics = [line.split(",")[0] for line in (short / "metrics.csv").read_text().splitlines()]
    assert metrics == ["step", "2", "3"]
    assert_same(read_scales(short), read_scales(whole)[:2])
    dropped = "last.pt is of step 7: checkpoints and tables' rows after step 2 are dropped"
    assert dropped in (short / "log.txt").read_text()


def test_branching_off_leaves_the_run_as_it_is(whole: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    branch = tmp_path / "branch"
    resume = ["--resume", str(whole / "step_000004.pt"), f"run.output={branch}", "run.steps=5"]
    assert main(["train", "synthetic_demo", *resume]) == 0
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    assert (step_in(branch), kept(branch)) == (5, [5])


@pytest.mark.parametrize("of_best", [3, 8])
def test_what_going_back_drops(tmp_path: Path, of_best: int, caplog: pytest.LogCaptureFixture) -> None:
    for name, step in (("last.pt", 9), ("best.pt", of_best)):
        checkpoint.save(tmp_path / name, {"loop": {"step": step}})
    for step in (3, 6, 9):
        checkpoint.save(tmp_path / f"step_{step:06d}.pt", {"loop": {"step": step}})
    folder = RunFolder(tmp_path, resume=True)
    with caplog.at_level(logging.WARNING, "models"):
        for _ in range(2):  # killed and resumed once more, it has nothing left to drop
            assert folder.go_back(tmp_path / "step_000006.pt", 6, 2) == (of_best > 6)
            assert (step_in(tmp_path / "last.pt"), kept(tmp_path)) == (6, [3, 6])
            assert (tmp_path / "best.pt").exists() == (of_best <= 6)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 + (of_best > 6)
    assert warnings[0].startswith(f"{tmp_path / 'last.pt'} is of step 9: ")


def test_a_broken_last_one_is_gone_back_from(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"broken")
    checkpoint.save(tmp_path / "step_000006.pt", {"loop": {"step": 6}})
    assert RunFolder(tmp_path, resume=True).go_back(tmp_path / "step_000006.pt", 6, 0)
    assert step_in(tmp_path / "last.pt") == 6


# ---- the best one, for use


def test_the_best_holds_what_using_it_takes(whole: Path, tmp_path: Path) -> None:
    last, best = (checkpoint.load(whole / name)[1] for name in ("last.pt", "best.pt"))
    assert best.keys() == last.keys() - {"processes"}
    assert best["task"].keys() == {"net"}
    (of_step,) = {step for step in kept(whole) if step == best["loop"]["step"]}
    there = checkpoint.load(whole / f"step_{of_step:06d}.pt")[1]["task"]["net"]
    assert_same(best["task"]["net"], there)
    # SGD keeps a momentum for every weight.
    assert (whole / "best.pt").stat().st_size < 0.7 * (whole / "last.pt").stat().st_size
    assert models.load(whole / "best.pt", ["run.device=cpu"]).path == whole / "best.pt"


def test_the_best_is_not_resumed(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)

    def error(resumed: Path) -> str:
        assert main(["train", "synthetic_demo", "--resume", str(resumed)]) == 2
        return capsys.readouterr().err

    says = (
        f"error: --resume: {folder / 'best.pt'} holds the best networks, but not the state of their training"
    )
    assert error(folder / "best.pt") == f"{says}, which last.pt holds: --resume {folder / 'last.pt'}\n"
    for name in ("last.pt", *(path.name for path in checkpoint.numbered(folder).values())):
        (folder / name).unlink()
    for resumed in (folder, folder / "best.pt"):
        assert error(resumed).endswith(f"which is gone; model.start={folder / 'best.pt'} starts from it\n")


@pytest.mark.usefixtures("one_thread")
def test_the_best_of_an_earlier_version_is_resumed(whole: Path, tmp_path: Path) -> None:
    """It held all that a checkpoint holds."""
    old = tmp_path / "old"
    shutil.copytree(whole, old)
    for path in (old / "last.pt", *checkpoint.numbered(old).values()):
        if path.name != "step_000004.pt":
            path.unlink()
    (old / "step_000004.pt").replace(old / "best.pt")
    assert main(["train", "synthetic_demo", "--resume", str(old / "best.pt"), "run.keep=0"]) == 0
    contents = [checkpoint.load(folder / "last.pt")[1] for folder in (whole, old)]
    assert_same(*([each[part] for part in ("loop", "task", "processes")] for each in contents))
