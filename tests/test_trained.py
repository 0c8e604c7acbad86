"""Trained networks in use: on which device, and what was otherwise in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import training_runs
import translation_runs

import models
from models.__main__ import main
from models.training import checkpoint
from models.training.errors import UsageError

Folders = dict[str, Path]
SYSTEMS = ("segmentation", "translation")
COMMANDS = {"segmentation": training_runs.command, "translation": translation_runs.command}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("data")
    return {
        "segmentation": training_runs.prepare_rooms(root / "rooms"),
        "translation": translation_runs.prepare_views(root / "views"),
    }


@pytest.fixture(scope="module")
def runs(data: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A step of each system, in whose checkpoints the device is one of the machine that it was left on."""
    folders = tmp_path_factory.mktemp("runs")
    for system in SYSTEMS:
        options = ["run.steps=1", "data.domains=normal,depth_zbuffer"][: 1 + (system == "translation")]
        assert main(COMMANDS[system](data[system], folders / system, *options)) == 0
        for name in ("last.pt", "best.pt"):
            _, contents = checkpoint.load(folders / system / name)
            contents["config"]["run"]["device"] = "cuda:1"
            checkpoint.save(folders / system / name, contents)
    return {system: folders / system for system in SYSTEMS}


def printed(command: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert main(command) == 0
    return capsys.readouterr().out.splitlines()


# ---- the device


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_machine_of_the_training_stays_behind(
    runs: Folders, tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded = models.load(runs[system])
    assert {parameter.device.type for parameter in loaded.net.parameters()} == {"cpu"}
    assert loaded.recipe.run.device == "auto"
    with pytest.raises(UsageError, match=r"^run\.device=cuda:77: not a device of this machine"):
        models.load(runs[system], ["run.device=cuda:77"])
    file = tmp_path / "net.safetensors"
    assert main(["export", str(runs[system]), "--output", str(file)]) == 0
    assert checkpoint.load(file)[1]["config"]["run"]["device"] == "auto"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_resumed_run_keeps_its_device(
    runs: Folders, data: Folders, system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("the device is there")
    recipe = checkpoint.load(runs[system])[1]["recipe"]
    resume = ["train", recipe, "--resume", str(runs[system] / "last.pt"), f"run.output={tmp_path / 'on'}"]
    assert main([*resume, "run.steps=2"]) == 2
    assert not (tmp_path / "on").exists()
    error = capsys.readouterr().err
    assert error.startswith("error: run.device=cuda:1: not a device of this machine (")
    assert error.endswith("); give run.device=auto, or run.device=cpu\n")
    assert main([*resume, "run.steps=2", "run.device=cpu"]) == 0
    assert checkpoint.load(tmp_path / "on")[1]["loop"]["step"] == 2


# ---- what was otherwise in training


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_evaluation_says_what_was_otherwise_in_training(
    runs: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], system: str
) -> None:
    command = ["evaluate", str(runs[system]), "--output", str(tmp_path), "eval.sheet=0"]
    sheet = "eval.sheet: 8 -> 0"
    expected = {
        ("run.device=cpu", f"run.output={tmp_path}", "eval.sheet=8"): [],
        ("eval.limit=2", "run.workers=1"): ["eval.limit: none -> 2", sheet, "run.workers: 0 -> 1"],
    }
    if system == "segmentation":
        scales = ["data.depth_scale: none -> 2500.0", sheet, "layout.depth_scale: 5000.0 -> 2500.0"]
        expected[("data.depth_scale=2500",)] = scales
    for overrides, changes in expected.items():
        lines = printed([*command, *overrides], capsys)
        start = "other than in training: "
        assert sorted(line.removeprefix(start) for line in lines if line.startswith(start)) == sorted(changes)
        found = json.loads((tmp_path / "evaluation_best.json").read_text())["changed"]
        assert sorted(found) == sorted(changes)
