"""Theorem 1 on a network: channels that are sampled, shares of batches, criteria that hold or do not."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cen_ext import ExchangeBatchNorm2d
from models.__main__ import main
from models.analysis import attraction
from models.analysis.attraction import Channel, sample_channels
from models.analysis.attraction_report import Attraction
from models.analysis.observation import ObservedNorm, Seen
from models.analysis.runs import load_task, penalized_channels, read_run
from models.analysis.theorem import attraction_probability
from models.networks.fusion.base import mark
from models.training.loop import Task
from models.training.scale_records import scales_of
from tests.helpers import translation_runs
from tests.helpers.same import assert_same
from tests.helpers.training_runs import command, prepare_rooms
from tests.helpers.translation_runs import prepare_views

BATCHES = 400
SLOW = ["optim.stages.0.steps=2", "optim.stages.1.steps=0", "optim.stages.2.steps=0"]


def channel(
    gradients: Tensor, *, scale: float = 1.0, penalized: bool = True, deviation: float = 1.0
) -> Channel:
    """One whose d in each batch is given, whose shuffled d is normal."""
    found = Channel("layer", 0, 0, scale, 0.02, penalized, normalized=True)
    for d in gradients:
        shuffled = deviation * torch.randn((), dtype=torch.float64)
        row = {"gradient": d, "norm": 3.0, "centered": deviation, "shuffled": shuffled, "mean": 0.0}
        row["deviation"] = deviation
        found.seen.append(torch.tensor([float(row[name]) for name in Seen._fields], dtype=torch.float64))
    return found


def result_of(channels: list[Channel], penalty: float = 0.5) -> Attraction:
    return Attraction("run", 3, penalty, False, ["rgb", "depth"], channels, [], BATCHES)


def test_shares_of_uninformative_channels() -> None:
    channels = [channel(torch.randn(BATCHES), scale=scale) for scale in (0.001, 0.5, -0.01, 0.3)]
    result = result_of(channels)
    predicted = float(attraction_probability(0.5, torch.ones((), dtype=torch.float64)))
    error = math.sqrt(predicted * (1 - predicted) / BATCHES)
    for shares in result.shares:
        assert shares.predicted == shares.of_shuffle == pytest.approx(predicted)
        assert shares.observed == pytest.approx(predicted, abs=4 * error)
        assert shares.shuffled == pytest.approx(predicted, abs=4 * error)
        assert shares.observed_half == pytest.approx(0.5, abs=2 / math.sqrt(BATCHES))
        assert shares.minimum == 1
    assert [verdict.name for verdict in result.verdicts() if not verdict.passed] == []
    total, shares = result.bins(result.chosen(lambda each: each.below))[3]
    assert total == 2 * BATCHES
    assert shares.observed == pytest.approx(predicted, abs=4 * error)
    assert "pass: shuffled as predicted" in result.text()


def test_informative_channels_are_observed_less() -> None:
    result = result_of([channel(torch.randn(BATCHES) + 2) for _ in range(3)])
    assert all(shares.observed < 0.2 < shares.predicted for shares in result.shares)
    assert [shares.minimum for shares in result.shares] == [0, 0, 0]
    assert all(verdict.passed for verdict in result.verdicts())


def test_criteria_that_do_not_hold() -> None:
    too_often = result_of([channel(0.1 * torch.randn(BATCHES)) for _ in range(3)])
    failed = [verdict.name for verdict in too_often.verdicts() if not verdict.passed]
    assert failed == [
        "observed at most as predicted, penalized, above θ",
        "observed at most 1/2 there, penalized, above θ",
    ]
    assert "FAIL: observed at most as predicted" in too_often.text()
    wrong = [channel(torch.randn(BATCHES)) for _ in range(3)]
    for each in wrong:
        for seen in each.seen:
            seen[Seen._fields.index("shuffled")] *= 2
    failed = [verdict.name for verdict in result_of(wrong).verdicts() if not verdict.passed]
    assert failed == ["shuffled as predicted", "shuffled 1/2 at the λ for 1/2"]


def test_silent_channels() -> None:
    dead = [channel(torch.zeros(BATCHES), deviation=0.0, scale=0.0) for _ in range(2)]
    for each in dead:
        for seen in each.seen:
            seen[Seen._fields.index("norm")] = 0
    result = result_of([*dead, *(channel(torch.randn(BATCHES)) for _ in range(2))])
    assert result.shares[0][:4] == (1, 1, 1, 1)
    assert math.isnan(result.shares[0].observed_half)
    assert all(verdict.passed for verdict in result.verdicts())
    assert any(note.startswith("in 50.0% of all channels' batches") for note in result.notes())
    assert result.plain()["kinds"]["penalized, below θ"]["observed_half"] is None


def test_channels_are_drawn_of_every_kind() -> None:
    layer = mark(ExchangeBatchNorm2d(40, 2))
    with torch.no_grad():
        layer.weight[0, 3], layer.weight[0, 30] = 0.0, 0.01
    own = torch.zeros(2, 40, dtype=torch.bool)
    own[0, :20] = own[1, 20:] = True
    observed = {"layer": ObservedNorm(layer)}
    arguments = (observed, {"layer": 0.02}, {"layer": own})
    drawn = sample_channels(*arguments, 4)
    assert len(drawn) == 8
    first = [each for each in drawn if each.modality == 0]
    kinds = {(each.penalized, each.below): each.index for each in first}
    assert len(kinds) == 4
    assert (kinds[True, True], kinds[False, True]) == (3, 30)
    assert [vars(each) for each in drawn] == [vars(each) for each in sample_channels(*arguments, 4)]
    every = sample_channels(*arguments, 99)
    assert sorted((each.modality, each.index) for each in every) == [
        (m, c) for m in range(2) for c in range(40)
    ]


# ---- of a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps without exchange, of a small encoder."""
    folder = tmp_path_factory.mktemp("theorem")
    rooms = prepare_rooms(folder / "rooms")
    settings = ["fusion=none", "fusion.penalty=own", "run.scales_steps=1", "loss.per_output=true", *SLOW]
    settings.append("loss.sparsity=5e-3")
    assert main(command(rooms, folder / "run", *settings)) == 0
    return folder / "run"


def test_a_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--theorem", "--threshold", "0.9*median", "--batches", "4", "--channels", "1"]
    assert main(["analyse", str(trained), *arguments, "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "warning: --batches 4: shares of fewer than 64 batches are coarse" in told
    assert "the run was trained without exchange, as the theorem's condition says" in told
    (run,) = json.loads((tmp_path / "theorem.json").read_text())["runs"]
    assert (run["step"], run["batches"], run["penalty"]) == (2, 4, pytest.approx(3 * 5e-3))
    task, _ = load_task(read_run(trained))
    scales = scales_of(task.network)
    assert len(run["channels"]) == 2 * len(scales)
    for each in run["channels"]:
        assert each["scale"] == float(scales[each["layer"]][each["modality"], each["index"]])
        assert 0 <= each["predicted"] <= 1
    (moved,) = json.loads((tmp_path / "dynamics.json").read_text())["runs"]
    assert moved["steps"] == [0, 1, 2]
    assert (tmp_path / "theorem.png").is_file()
    assert (tmp_path / "dynamics.png").is_file()


def test_a_signal_ends_it_after_the_batch_at_hand(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = attraction._batches

    def interrupted(task: Task) -> Iterator[Any]:
        for number, batch in enumerate(batches(task)):
            if number == 1:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(attraction, "_batches", interrupted)
    arguments = ["--theorem", "--threshold", "0.1", "--channels", "1", "--output", str(tmp_path)]
    assert main(["analyse", str(trained), *arguments]) == 128 + signal.SIGTERM
    assert "interrupted: what is shown and written is what was done before that" in capsys.readouterr().out
    (run,) = json.loads((tmp_path / "theorem.json").read_text())["runs"]
    assert run["batches"] == 1


def test_a_translation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Instance norms: each image has statistics of its own."""
    run = tmp_path / "run"
    settings = ["run.steps=1", "fusion.threshold=0.97"]
    assert main(translation_runs.command(prepare_views(tmp_path / "views"), run, *settings)) == 0
    assert main(["analyse", str(run), "--theorem", "--batches", "3", "--channels", "1"]) == 0
    told = capsys.readouterr().out
    assert "the run was trained with exchange; it is switched off here" in told
    (found,) = json.loads((run / "theorem.json").read_text())["runs"]
    assert all(each["normalized"] for each in found["channels"])
    # The norm's eps leaves channels of little variance a smaller one.
    assert [each["predicted"] for each in found["channels"]] == pytest.approx(
        [each["of_shuffle"] for each in found["channels"]], abs=0.05
    )
    assert main(["analyse", str(run), "--corollary"]) == 2
    assert "--corollary needs a network whose convolutions can be private" in capsys.readouterr().err


def test_a_network_is_that_of_the_training(trained: Path) -> None:
    task, step = load_task(read_run(trained))
    assert step == 2
    assert task.network.training
    penalized = penalized_channels(task.network)
    before = scales_of(task.network)
    for name, table in before.items():
        half = table.shape[1] // 2
        assert penalized[name][0].tolist() == [True] * half + [False] * half
    assert_same(scales_of(task.network), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to analyze: --theorem"),
        (["--theorem"], "was trained without a threshold: give --threshold"),
        (["--theorem", "--threshold", "0.1", "loss.sparsity=0"], "and so the probability of Theorem 1"),
        (["--theorem", "--threshold", "0.1", "loss.sparity=0"], "loss.sparsity"),
        (["--theorem", "--threshold", "0.1", "data.root=nowhere"], "nowhere"),
    ],
)
def test_mistakes(
    trained: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", str(trained), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_other_mistakes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyse", str(tmp_path), "--theorem"]) == 2
    assert "is no run" in capsys.readouterr().err
    assert main(["analyse", str(trained), str(trained), "--theorem", "--threshold", "1"]) == 2
    assert "several runs need --output FOLDER" in capsys.readouterr().err
    for option, value in (("--channels", "0"), ("--batches", "-1"), ("--threshold", "0"), ("--seeds", "1,x")):
        with pytest.raises(SystemExit):
            main(["analyse", str(trained), "--theorem", option, value])
        assert f"argument {option}: expected a number" in capsys.readouterr().err
