"""examples/three_modalities.py on the set that it makes, with a small encoder, and mistakes in a folder."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

import examples.own_encoder  # noqa: F401 - registers plain_net
from examples.three_modalities import make_set
from tests.helpers.scripts import command, run

SMALL = ["model.encoder=plain_net", "run.device=cpu", "run.workers=0", "run.log_steps=20"]


def test_it_trains_evaluates_and_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command("three_modalities.py"), *SMALL]
    assert run(monkeypatch, tmp_path, [*words, "run.steps=80"]) is None
    folder = tmp_path / "runs/three_modalities_run"
    found = json.loads((folder / "evaluation_best.json").read_text())
    metrics, classes = found["metrics"], found["classes"]
    assert list(classes) == ["wall", "poster", "box", "pipe"]
    assert metrics["ensemble/mean_iou"] > 2 * metrics["constant/mean_iou"]
    # Nothing of the pipe is in colors or depth, and no box in colors: that they find them is the exchange's.
    assert np.mean([classes["pipe"]["rgb"], classes["pipe"]["depth"], classes["box"]["rgb"]]) > 0.1
    losses = np.genfromtxt(folder / "losses.csv", delimiter=",", names=True, deletechars="")
    assert losses["exchanged"][-1] > 0.1
    assert cv2.imread(f"{folder}_samples.png") is not None
    labels, truth = (
        cv2.imread(str(tmp_path / "runs" / path / "labels/val_0.png"), cv2.IMREAD_UNCHANGED)
        for path in ("three_modalities_run/predicted", "three_modalities")
    )
    assert (labels == truth).mean() > (truth == 0).mean()
    capsys.readouterr()
    assert run(monkeypatch, tmp_path, [*words, "run.steps=81"]) is None
    assert "resumed at step 80" in capsys.readouterr().out


def test_mistakes_in_a_folder_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (script,) = command("three_modalities.py")

    def error(folder: Path, *settings: str) -> str:
        ended = run(monkeypatch, tmp_path, [script, str(folder), *SMALL, *settings])
        return capsys.readouterr().err if ended == 2 else str(ended)

    assert error(tmp_path / "nowhere").endswith("no such folder; expected a data set's root")
    own = tmp_path / "own"
    make_set(own, {"train": 4, "val": 1})
    capsys.readouterr()
    assert "unknown field 'run.stepz'" in error(own, "run.stepz=1")
    thermal = own / "thermal/train_0.tiff"
    image = cv2.imread(str(thermal), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(thermal), image[:, 8:])
    found = error(own, "run.steps=1")
    assert "train_0.tiff" in found
    assert "72x64" in found
    thermal.unlink()
    assert "train_0.tiff: listed in train.txt, but there is no such file" in error(own)
    layout = json.loads((own / "layout.json").read_text())
    (own / "layout.json").write_text(json.dumps(layout | {"depth_scale": "mm"}))
    assert "depth_scale is 'mm'; expected stored units per meter" in error(own)
    (own / "layout.json").write_text(json.dumps({**layout, "classes": []}))
    assert "expected the classes' names" in error(own)
    (own / "layout.json").unlink()
    assert "or describe the folder in layout.json" in error(own)
