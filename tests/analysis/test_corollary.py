"""Corollary 1 on a run: two trainings that differ in the exchange of channels whose scales stay 0."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.__main__ import main
from models.analysis import corollary
from models.analysis.corollary import Corollary
from models.networks.fusion import named_exchange_points
from models.networks.private import PrivateConv2d
from models.training.loop import Task
from tests.helpers.training_runs import command, prepare_rooms

SHORT = ["optim.stages.0.steps=2", "optim.stages.1.steps=0", "optim.stages.2.steps=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corollary")
    rooms = prepare_rooms(folder / "rooms")
    assert main(command(rooms, folder / "run", *SHORT, "fusion.threshold=0.9*median")) == 0
    return folder / "run"


def test_two_arms(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[tuple[Task, dict[str, Tensor]]] = []
    train = corollary._train

    def noted(task: Task, zeroed: dict[str, Tensor], *rest: object) -> list[float]:
        tasks.append((task, zeroed))
        return train(task, zeroed, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(corollary, "_train", noted)
    options = [
        "--corollary",
        "--steps",
        "2",
        "--seeds",
        "4",
        "--threshold",
        "0.05",
        "--output",
        str(tmp_path),
    ]
    assert main(["analyse", str(trained), *options]) == 0
    without, exchanging = tasks
    for task, zeroed in tasks:
        assert any(isinstance(module, PrivateConv2d) for module in task.network.modules())
        exchanged = 0
        for name, point in named_exchange_points(task.network).items():
            assert zeroed[name].any()
            assert (point.weight[zeroed[name]] == 0).all(), "the scales stay 0"
            assert (point.weight[~zeroed[name]] != 0).all()
            exchanged += int(point.replaced().sum())
        expected = sum(int(mask.sum()) for mask in zeroed.values())
        assert exchanged == (expected if task is exchanging[0] else 0)
    assert without[1].keys() == exchanging[1].keys()
    told = json.loads((tmp_path / "corollary.json").read_text())
    assert told["seeds"] == [4]
    assert told["replaced"] == expected
    assert {arm: [len(each) for each in losses] for arm, losses in told["losses"].items()} == {
        "without": [2],
        "with": [2],
    }
    assert told["losses"]["with"] != told["losses"]["without"]
    assert (tmp_path / "corollary.png").is_file()


def test_verdicts() -> None:
    def of(*finals: float) -> Corollary:
        losses = {"without": [[3.0, 2.0]] * len(finals), "with": [[4.0, 2.0 + each] for each in finals]}
        return Corollary("run", 7, range(len(finals)), 5, 20, losses)

    assert of(-0.1, -0.2).differences == pytest.approx([-0.1, -0.2])
    assert of(-0.1, -0.2).verdict() == (
        "pass: -0.1500 with exchange, standard error 0.0500; at most 0 is expected"
    )
    assert of(0.1, 0.2).verdict().startswith("FAIL: +0.1500")
    assert of(-0.1, 0.2).verdict().startswith("pass: +0.0500")
    assert math.isnan(of(0.1).error)
    assert "one seed" in of(0.1).verdict()
    assert of(0.1, 0.2).text().splitlines()[-1] == of(0.1, 0.2).verdict()
    assert re.search("^   0 +3.0000 +2.0000 +4.0000 +2.1000 +.0.1000$", of(0.1, 0.2).text(), re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "1e-9"], "is below θ: nothing to compare"),
        (["--threshold", "0.05", "fusion=gated_sum"], "takes runs with fusion=exchange, or fusion=none"),
    ],
)
def test_mistakes(
    trained: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyse", str(trained), "--corollary", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_frozen_mask_is_part_of_its_layer() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    layer = corollary.FrozenMask(mask)
    assert layer(torch.zeros(2, 2)) is mask
    assert layer.state_dict() == {}
