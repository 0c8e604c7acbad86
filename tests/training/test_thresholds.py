"""Thresholds that are factors of medians, through trainings and files; the words at a training's start."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from models.__main__ import main
from models.networks.fusion.thresholds import ruled_layers
from models.training import checkpoint, config, registry
from models.training.errors import UsageError
from models.training.pace import Pace, duration
from tests.helpers import training_runs, translation_runs
from tests.helpers.training_runs import assert_same_runs

Folders = dict[str, Path]
SYSTEMS = ("segmentation", "translation")
COMMANDS = {"segmentation": training_runs.command, "translation": translation_runs.command}
RULE = "fusion.threshold=0.9*median"
OPTIONS = [RULE, "fusion.region=all", "optim.ema=0.5"]
MOVING = {  # rates at which a few steps move the scales
    "segmentation": [f"optim.stages.{stage}.encoder_lr=0.1" for stage in range(3)],
    "translation": ["optim.stages.0.generator_lr=0.1"],
}
both_systems = pytest.mark.parametrize("system", SYSTEMS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("data")
    return {
        "segmentation": training_runs.prepare_rooms(root / "rooms"),
        "translation": translation_runs.prepare_views(root / "views"),
    }


@pytest.fixture(scope="module")
def numbers(data: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Runs with a threshold that is a number, whose networks others start from."""
    folders = tmp_path_factory.mktemp("numbers")
    for system in SYSTEMS:
        command = COMMANDS[system](data[system], folders / system, *MOVING[system])
        assert main([*command, "fusion.threshold=0.1"]) == 0
    return {system: folders / system for system in SYSTEMS}


def begun(system: str, data: Folders, numbers: Folders, folder: Path, *rest: str) -> list[str]:
    """The command of a run with relative thresholds that starts from a network whose scales are not equal."""
    start = f"model.start={numbers[system]}"
    return COMMANDS[system](data[system], folder, *OPTIONS, *MOVING[system], start, *rest)


@pytest.fixture(scope="module")
def runs(data: Folders, numbers: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folders = tmp_path_factory.mktemp("runs")
    for system in SYSTEMS:
        assert main(begun(system, data, numbers, folders / system)) == 0
    return {system: folders / system for system in SYSTEMS}


def thresholds(net: torch.nn.Module) -> dict[str, float]:
    return {name: holder.threshold for name, (_, holder) in ruled_layers(net).items()}


def recorded(path: Path) -> dict[str, Any]:
    return checkpoint.load(path)[1]["thresholds"]


def medians(state: dict[str, Any], names: list[str]) -> dict[str, float]:
    return {name: 0.9 * np.median(np.abs(state[f"{name}.weight"].double().numpy())) for name in names}


@both_systems
def test_thresholds_are_those_of_the_start_in_every_file(
    runs: Folders, numbers: Folders, tmp_path: Path, system: str
) -> None:
    record = recorded(runs[system] / "last.pt")
    layers = record["layers"]
    before = checkpoint.weights(checkpoint.load(numbers[system], checkpoint.BEST)[1])
    assert record["rule"] == "0.9*median"
    assert layers == pytest.approx(medians(before, list(layers)), rel=1e-15)
    contents = checkpoint.load(runs[system])[1]
    after = medians(contents["task"]["net"], list(layers))
    assert all(after[name] != layers[name] for name in layers)  # training has moved the medians since
    assert not any("threshold" in key for key in contents["task"]["net"])
    assert recorded(runs[system] / "best.pt") == record
    assert json.loads((runs[system] / "config.json").read_text())["thresholds"] == record
    files = [runs[system], runs[system] / "last.pt"]
    for suffix in (".safetensors", ".pt"):
        files.append(tmp_path / f"net{suffix}")
        assert main(["export", str(runs[system]), "--output", str(files[-1])]) == 0
        assert recorded(files[-1]) == record
    found = [models.load(file, ["run.device=cpu"]) for file in files]
    for each in found:
        assert thresholds(each.net) == layers
    best = [found[0].net, found[2].net, found[3].net]
    x = torch.randn(4, 3, 32, 32)
    outputs = [net(x).branches for net in best]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@both_systems
def test_a_number_has_no_record_and_takes_the_place_of_a_factor(
    runs: Folders, numbers: Folders, system: str
) -> None:
    assert "thresholds" not in checkpoint.load(numbers[system])[1]
    changed = models.load(runs[system], ["run.device=cpu", "fusion.threshold=0.25"])
    assert set(thresholds(changed.net).values()) == {0.25}
    assert "fusion.threshold: 0.9*median -> 0.25" in changed.changed


@both_systems
def test_a_resumed_run_has_the_same_thresholds_and_bits(
    data: Folders, numbers: Folders, runs: Folders, tmp_path: Path, system: str, one_thread: None
) -> None:
    often = ["run.evaluate_steps=1", "eval.limit=1"]
    whole, parts = (begun(system, data, numbers, tmp_path / name, *often) for name in ("whole", "parts"))
    assert main([*whole, "run.steps=3"]) == 0
    assert main([*parts, "run.steps=2"]) == 0
    assert main([*parts, "run.steps=3", "--resume"]) == 0
    assert recorded(tmp_path / "parts") == recorded(tmp_path / "whole") == recorded(runs[system])
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@both_systems
def test_evaluate_and_predict_use_the_recorded_ones(
    runs: Folders, data: Folders, tmp_path: Path, system: str
) -> None:
    """What the run's own last evaluation gave, to the digits of its table."""
    command = ["evaluate", str(runs[system] / "last.pt"), f"data.root={data[system]}", "run.device=cpu"]
    assert main([*command, "--output", str(tmp_path), "eval.sheet=0"]) == 0
    found = json.loads((tmp_path / "evaluation_last.json").read_text())["metrics"]
    table = np.genfromtxt(runs[system] / "metrics.csv", delimiter=",", names=True, deletechars="")
    name = "ensemble/mean_iou" if system == "segmentation" else "ensemble/l1"
    assert found[name] == pytest.approx(float(np.atleast_1d(table[name])[-1]), rel=1e-5)


def without_record(path: Path, to: Path) -> Path:
    contents = checkpoint.load(path)[1]
    del contents["thresholds"]
    checkpoint.save(to, contents)
    return to


def test_a_file_without_the_record_is_refused(runs: Folders, numbers: Folders, tmp_path: Path) -> None:
    file = without_record(runs["segmentation"] / "last.pt", tmp_path / "last.pt")
    message = r"holds no thresholds for fusion\.threshold=0\.9\*median, .*: set fusion\.threshold to a number"
    with pytest.raises(UsageError, match=rf"^{re.escape(str(file))} {message}"):
        models.load(file, ["run.device=cpu"])
    assert set(thresholds(models.load(file, ["run.device=cpu", "fusion.threshold=0.1"]).net).values()) == {
        0.1
    }
    with pytest.raises(UsageError, match=message):
        models.load(numbers["segmentation"], ["run.device=cpu", RULE])


def test_resuming_without_the_record_is_refused(
    runs: Folders, data: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = without_record(runs["segmentation"] / "last.pt", tmp_path / "last.pt")
    assert main(["train", "synthetic_demo", "--resume", str(file), f"data.root={data['segmentation']}"]) == 2
    assert f"error: --resume: {file} holds no thresholds for" in capsys.readouterr().err


def test_other_factors_and_other_layers_are_refused(runs: Folders) -> None:
    run = runs["segmentation"]
    with pytest.raises(
        UsageError, match=r"holds the thresholds of fusion\.threshold=0\.9\*median, got 0\.5\*median"
    ):
        models.load(run, ["run.device=cpu", "fusion.threshold=0.5*median"])
    path, contents = checkpoint.load(run)
    contents["thresholds"]["layers"].popitem()
    with pytest.raises(UsageError, match=r"holds no threshold for 1 of .*, the first encoder\.layers\.3"):
        checkpoint.fill(models.load(run, ["run.device=cpu"]).net, path, contents)


def test_initial_scales_count(data: Folders) -> None:
    """Where no weights are loaded, scales are the settings' own; a U-Net draws them near 1."""
    for helper, system in ((training_runs, "segmentation"), (translation_runs, "translation")):
        settings = [*helper.TINY, f"data.root={data[system]}", "fusion.threshold=0.5*median"]
        names = {"segmentation": "synthetic_demo", "translation": "synthetic_translation_demo"}
        recipe = config.override(registry.find(names[system]), [*settings, "model.initial_scale=0.25"])
        task = registry.system_of(recipe).task(recipe)
        task.initialize()
        values = task.describe()["thresholds"]["layers"].values()
        if system == "segmentation":
            assert set(values) == {0.125}
        else:
            assert list(values) == pytest.approx([0.125] * len(values), rel=0.03)


def test_scales_of_zero_are_refused_before_work_starts(
    data: Folders, numbers: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, contents = checkpoint.load(numbers["segmentation"])
    contents["task"]["net"]["encoder.layers.2.norm.weight"].zero_()
    checkpoint.save(tmp_path / "zero.pt", contents)
    start = [RULE, f"model.start={tmp_path / 'zero.pt'}"]
    assert main(training_runs.command(data["segmentation"], tmp_path / "run", *start)) == 2
    error = capsys.readouterr().err
    assert "fusion.threshold=0.9*median: encoder.layers.2.norm has scales whose median is 0" in error
    assert not (tmp_path / "run").exists()


def test_a_released_network_has_no_medians(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    released = tmp_path / "released.pth"
    torch.save({"conv1.module.weight": torch.zeros(1)}, released)
    for recipe in ("nyudv2_released_refinenet101", "taskonomy_cen_shade_texture_rgb"):
        command = ["import", str(released), "--recipe", recipe, "--output", str(tmp_path / "net.pt"), RULE]
        assert main(command) == 2
        assert "error: fusion.threshold must be a number, got 0.9*median: " in capsys.readouterr().err


# ---- the words at the start


def log_of(folder: Path) -> list[str]:
    """The messages of a run's log, without times."""
    return [line.split(" ", 2)[2] for line in (folder / "log.txt").read_text().splitlines()]


def test_a_start_line(runs: Folders) -> None:
    shared = "12 training and 3 validation"
    lines = log_of(runs["segmentation"])
    net = models.load(runs["segmentation"], ["run.device=cpu"]).net
    millions = sum(p.numel() for name, p in net.named_parameters() if name != "alpha") / 1e6
    expected = f"INFO {shared} images, 11 classes, rgb + depth, {millions:.2f} M parameters"
    assert f"{expected}, 7 steps of 4 images, 2.333 epochs" in lines
    (line,) = (line for line in log_of(runs["translation"]) if shared in line)
    assert line.startswith(f"INFO {shared} views, normal + edge_texture to ")
    assert re.search(
        r", \d\.\d\d M parameters and \d\.\d\d M of the discriminator, 7 steps of 4 images", line
    )


@both_systems
def test_the_scales_are_told_once(
    runs: Folders, data: Folders, numbers: Folders, tmp_path: Path, system: str
) -> None:
    command = begun(system, data, numbers, tmp_path / "run")
    assert main([*command, "run.steps=2"]) == 0
    assert main([*command, "run.steps=3", "--resume"]) == 0
    lines = log_of(tmp_path / "run")
    word = "stage 1" if system == "segmentation" else "level 2"
    assert sum(f"|γ| of {word}: " in line for line in lines) == 1
    assert sum("the penalty alone moves a scale by up to" in line for line in lines) == 1
    assert sum("12 training and 3 validation" in line for line in lines) == 2  # also of the part that follows


def test_a_threshold_out_of_reach_is_warned_of(data: Folders, tmp_path: Path) -> None:
    """Two steps cannot bring scales of 1 below 0.02; and the travel is that of the steps that are run."""
    settings = [
        "model.initial_scale=1",
        "fusion.threshold=0.02",
        "run.steps=2",
        "optim.stages.0.encoder_lr=0.5",
    ]
    settings += ["optim.momentum=0.8", "loss.sparsity=0.1"]
    for name, more, travel in (
        ("once", [], 0.1 * 0.5 * (1 + 1.8)),
        ("each", ["loss.per_output=true"], 3 * 0.1 * 0.5 * (1 + 1.8)),
    ):
        assert main(training_runs.command(data["segmentation"], tmp_path / name, *settings, *more)) == 0
        lines = log_of(tmp_path / name)
        (line,) = (line for line in lines if "the penalty alone moves" in line)
        assert f"by up to {travel:.3g} in 2 steps: λ {0.1 * (3 if more else 1):.3g}, momentum 0.8" in line
        (warning,) = (line for line in lines if "out of reach" in line)
        assert warning.startswith(
            "WARNING warning: the threshold is out of reach everywhere: the penalty alone"
        )


def test_nothing_is_warned_of_where_the_threshold_is_in_reach(data: Folders, tmp_path: Path) -> None:
    settings = [
        "model.initial_scale=0.05",
        "fusion.threshold=0.02",
        "run.steps=2",
        "optim.stages.0.encoder_lr=0.5",
    ]
    command = training_runs.command(data["segmentation"], tmp_path, *settings, "loss.sparsity=0.1")
    assert main(command) == 0
    assert not [line for line in log_of(tmp_path) if "out of reach" in line or "are below" in line]


def test_the_pace_leaves_out_the_first_step_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    pace, told = Pace(torch.device("cpu")), []
    pace.start()
    for step in range(12):
        now[0] += 50 if step == 0 else 2
        told.append(pace.count())
        if step == 5:
            now[0] += 1000  # an evaluation
            pace.start()
    assert told == [None] * 9 + [2.0] + [None] * 2


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *[(0.2, "1 s"), (59.4, "59 s"), (60, "1 min"), (125, "2 min 5 s"), (7500.4, "2 h 5 min")],
        *[(3600, "1 h"), (3659, "1 h"), (86400 * 3 + 3600 * 4 + 59, "3 d 4 h"), (86399.9, "1 d")],
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
