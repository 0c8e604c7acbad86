"""examples/thermal_translation.py on the views that it makes, with small networks."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.helpers.scripts import command, run

RUN = "runs/thermal_translation_run"
SMALL = [
    *["model.size=32", "model.base_width=8", "model.discriminator_width=8", "data.resize=36", "data.crop=32"],
    # Fewer steps have to be larger ones for scales to come below the threshold.
    *["optim.stages.0.steps=100", "optim.stages.0.generator_lr=2e-3", "run.evaluate_steps=100"],
    *["run.device=cpu", "run.workers=0"],
]


def test_it_trains_scores_and_translates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, [*command("thermal_translation.py"), *SMALL]) is None
    folder = tmp_path / RUN
    scores = json.loads((folder / "evaluation_best.json").read_text())["metrics"]
    assert scores["ensemble/l1"] < 0.9 * scores["mean image/l1"]
    assert cv2.imread(str(folder / "evaluation_best.png")) is not None
    assert "thermal_translation_run/predicted" in capsys.readouterr().out
    losses = np.genfromtxt(folder / "losses.csv", delimiter=",", names=True, deletechars="")
    assert losses["exchanged"][-1] > 0
    made = {which: read(folder / "predicted" / which / "0.png") for which in ("visible", "depth", "ensemble")}
    for image in made.values():
        assert image.dtype == np.uint16
        assert 28800 <= image.min() < image.max() <= 31200


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
