"""README's figure: what it reads from results, and that it draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import summary


def test_it_draws_what_results_say(tmp_path: Path) -> None:
    steps = {name: {"steps": [4.0, place + 1.0, 0.5]} for place, name in enumerate(summary.TRAINING)}
    training = {"settings": {"batch": 2}, "results": steps}
    (tmp_path / "training_refinenet_resnet50.json").write_text(json.dumps(training))
    speeds = summary.training_speeds(tmp_path)
    assert list(speeds) == list(summary.TRAINING.values())
    assert list(speeds.values()) == [2.0, 1.0, 2 / 3, 0.5, 0.5, 0.5]

    table = tmp_path / "fusion" / "cpu" / "table"
    table.mkdir(parents=True)
    given = {"rgb_seed0": 0.3, "rgb_seed1": 0.1, "cen_code_seed2": 0.15, "other_seed0": 1.0}
    for name, score in given.items():
        (table / f"{name}.json").write_text(json.dumps({"metrics": {"ensemble/mean_iou": score}}))
    found = summary.scores(tmp_path)
    assert list(found) == ["CEN, the code's λ", "RGB alone"]
    assert found["RGB alone"] == pytest.approx([30, 10])
    assert summary.draw(speeds, found).startswith(b"\x89PNG")
