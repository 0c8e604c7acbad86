"""Translation of pairs that a layout.json describes, end to end: color and thermal images of 300×400."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import models
from models.__main__ import main
from models.training import checkpoint
from models.training.errors import UsageError
from models.translation.task import TranslationTask
from tests.helpers.pair_sets import RANGE, SIZE, prepare_pairs, thermal_kelvin
from tests.helpers.paths import ROOT
from tests.helpers.translation_runs import TINY, tiny_recipe

BACK, FORTH = ("thermal", "visible"), ("visible", "thermal")
STEPS = ["data.batch_size=2", "optim.stages.0.steps=4", "run.log_steps=2", "eval.window=160"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_pairs(tmp_path_factory.mktemp("pairs") / "set")


def train(pairs: Path, output: Path, domain: str, target: str, *options: str) -> list[str]:
    named = [f"data.root={pairs}", f"data.domains={domain}", f"data.target={target}", f"run.output={output}"]
    return ["train", "synthetic_translation_demo", *TINY, *STEPS, *named, *options]


@pytest.fixture(scope="module", params=[BACK, FORTH], ids="->".join)
def run(
    pairs: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, str, str]:
    """A run's folder, its domain and its target."""
    domain, target = request.param
    output = tmp_path_factory.mktemp(target) / "run"
    assert (
        main(train(pairs, output, domain, target, "eval.size=full", "eval.best=rmse", "eval.pictures=1")) == 0
    )
    return output, domain, target


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_predicted_at_full_size_and_scored(
    pairs: Path, run: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, domain, target = run
    options = [f"--input={domain}={pairs / domain / 'val'}", "--output", str(tmp_path / "out")]
    assert main(["predict", str(output), *options]) == 0
    for name in (domain, "ensemble"):
        files = sorted((tmp_path / "out" / name).iterdir())
        assert [file.name for file in files] == ["0.png", "1.png"]
        for file in files:
            image = read(file)
            assert image.shape == (SIZE if target == "thermal" else (*SIZE, 3))
            assert image.dtype == (np.uint16 if target == "thermal" else np.uint8)
            assert image.std() > 1
            if target == "thermal":
                assert RANGE[0] <= image.min() < image.max() <= RANGE[1]
    assert read(tmp_path / "out" / "sheet.png") is not None
    capsys.readouterr()
    assert main(["evaluate", str(output)]) == 0
    assert "mean image: left out, as images of any size have none" in capsys.readouterr().out
    found = json.loads((output / "evaluation_best.json").read_text())
    metrics = found["metrics"]
    assert found["inference"]["size"] == "full"
    if target == "visible":
        return
    # The thermal errors are of the files' values, where they were measured.
    errors = [
        read(tmp_path / "out/ensemble" / f"{name}.png")
        - thermal_kelvin(pairs / "thermal/val" / f"{name}_ir.png")
        for name in "01"
    ]
    assert metrics["ensemble/mae"] == pytest.approx(
        np.mean([np.nanmean(np.abs(e)) for e in errors]), rel=1e-3
    )
    mse = np.mean([np.nanmean(e**2) for e in errors])
    assert metrics["ensemble/mse"] == pytest.approx(mse, rel=1e-3)
    assert metrics["ensemble/rmse"] == pytest.approx(np.sqrt(mse), rel=1e-3)
    (row,) = (output / "metrics.csv").read_text().splitlines()[1:]
    assert str(metrics["ensemble/rmse"]) in row
    assert checkpoint.load(output)[1]["loop"]["best"] == -metrics["ensemble/rmse"]


def test_one_view_in_python(pairs: Path, run: tuple[Path, str, str]) -> None:
    output, domain, target = run
    trained = models.load(output, ["eval.size=square"])
    file = next((pairs / domain / "val").iterdir())
    images = trained.read(**{domain: file})
    assert images.shape == (1, 3, 32, 32)
    assert trained.net.decoder.image.out_channels == (1 if target == "thermal" else 3)
    stored = trained.predict(**{domain: str(file)})
    assert stored["ensemble"].shape[:2] == (32, 32)
    # An array in memory, of a size that needs no padding: in one window it is the network's own.
    whole = models.load(output, ["eval.size=full", "eval.dropout=false", "eval.window=96"])
    given = read(file)[:64, 200:296]
    given = given[:, :, ::-1] if given.ndim == 3 else given
    images = whole.read(**{domain: given})
    assert images.shape == (1, 3, 64, 96)
    square = models.load(output, ["eval.dropout=false", "eval.size=square"])
    expected, found = square.translate(images), whole.translate(images)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # By default windows are as large as the squares of training: of such a square there is one.
    whole = models.load(output, ["eval.size=full", "eval.window=none"])
    found, expected = (each.predict(**{domain: given[:32, :32]}) for each in (whole, trained))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_exported_started_from_and_resumed(pairs: Path, run: tuple[Path, str, str], tmp_path: Path) -> None:
    output, domain, target = run
    net = tmp_path / "net.safetensors"
    assert main(["export", str(output), "--output", str(net)]) == 0
    assert models.load(net).reader.domains == models.load(output).reader.domains
    assert main(["evaluate", str(net), f"data.root={pairs}", "eval.size=square", "eval.sheet=0"]) == 0
    options = ["run.steps=5", f"model.start={net}"]
    assert main(train(pairs, tmp_path / "again", domain, target, *options)) == 0
    assert main([*train(pairs, tmp_path / "again", domain, target, "run.steps=6"), f"model.start={net}"]) != 0
    resumed = [*train(pairs, tmp_path / "again", domain, target, "run.steps=6", options[1]), "--resume"]
    assert main(resumed) == 0


def test_other_ranges_than_in_training_are_refused(
    pairs: Path, run: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, domain, target = run
    other = shutil.copytree(pairs, tmp_path / "other")
    told = json.loads((other / "layout.json").read_text())
    told["modalities"]["thermal"]["range"] = [0, 65535]
    (other / "layout.json").write_text(json.dumps(told))
    message = (
        "thermal: unit 'one channel from 27000 to 31000' in training, 'one channel from 0 to 65535' here"
    )
    for command in (
        ["evaluate", str(output), f"data.root={other}", "--output", str(tmp_path)],
        [
            *train(other, shutil.copytree(output, tmp_path / "run"), domain, target, "eval.best=rmse"),
            "--resume",
        ],
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_what_is_said_of_the_files(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The data command: what is stored, what is missing and what is cut off; and a sheet of them."""
    root = prepare_pairs(tmp_path / "set", (40, 48))
    told = json.loads((root / "layout.json").read_text())
    told["modalities"]["thermal"]["range"] = [28000, 31000]
    del told["modalities"]["visible"]
    (root / "layout.json").write_text(json.dumps(told))
    options = [*TINY, *STEPS, f"data.root={root}", "data.domains=visible", "data.target=thermal"]
    sheet = tmp_path / "sheet.png"
    assert main(["data", "synthetic_translation_demo", *options, "--output", str(sheet)]) == 0
    captured = capsys.readouterr()
    assert "thermal: 16 bits and 1 channel, 48x40" in captured.out
    assert "1.6% missing" in captured.out
    assert "train: thermal: stored 27800 to " in captured.err
    assert "reach beyond its range, and are cut off at 28000 and 31000" in captured.err
    assert "visible: nobody says what it is; its files look like color" in captured.err
    assert read(sheet).shape[2] == 3
    # Whose kind nobody tells must look alike in both splits.
    for path in (root / "visible/val").iterdir():
        gray = cv2.cvtColor(read(path), cv2.COLOR_BGR2GRAY)
        assert cv2.imwrite(str(path), gray)
    with pytest.raises(UsageError, match=r"validation looks unlike training: visible: .*give the kind"):
        TranslationTask(tiny_recipe(root, *STEPS, "data.domains=visible", "data.target=thermal"))


def test_two_inputs_at_full_size_of_different_images(tmp_path: Path) -> None:
    """Images of several sizes, smaller and larger than a window; one batch cannot hold two sizes."""
    root = prepare_pairs(tmp_path / "set", (60, 70))
    for path in (root / "visible/val/1.jpg", root / "thermal/val/1_ir.png"):
        assert cv2.imwrite(str(path), cv2.resize(read(path), (45, 120), interpolation=cv2.INTER_NEAREST))
    told = json.loads((root / "layout.json").read_text())
    told["files"]["sketch"] = "visible/{split}/{name}.jpg"
    told["modalities"]["sketch"] = {"kind": "color"}
    (root / "layout.json").write_text(json.dumps(told))
    options = ["data.domains=sketch,thermal", "data.target=visible", "eval.size=full", "eval.window=48"]
    task = TranslationTask(tiny_recipe(root, *STEPS, *options))
    found = task.evaluate(lambda: False)
    assert found is not None
    assert all(np.isfinite(list(found.values())))
    task = TranslationTask(tiny_recipe(root, *STEPS, *options, "eval.batch_size=2"))
    with pytest.raises(models.data.DataError, match="must be of one size; any go with a batch of one"):
        task.evaluate(lambda: False)


def test_the_pages_commands(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the section on pairs in docs/data.md, with its layout.json, but small."""
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    section = page.split("### Any aligned pairs")[1].split("\n## ")[0].split("\n### ")[0]
    (description,) = re.findall(r"```json\n(.*?)```", section, re.S)
    shutil.copytree(pairs, tmp_path / "FOLDER")
    (tmp_path / "FOLDER/layout.json").write_text(description)
    shutil.copytree(pairs / "thermal/val", tmp_path / "ir")
    monkeypatch.chdir(tmp_path)
    lines = [line for line in section.splitlines() if line.startswith("python -m models")]
    commands = [shlex.split(line, comments=True)[3:] for line in lines]
    assert [words[0] for words in commands] == ["data", "train", "train", "predict", "evaluate"]
    for words in commands:
        small = [*TINY, *STEPS, "optim.stages.0.steps=1"] if words[0] in ("data", "train") else []
        assert main([*words, *small]) == 0
    assert read(tmp_path / "out/ensemble/0.png").shape == (*SIZE, 3)
