"""Commands with scenes that lack modalities; those of the page docs/data.md are run."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import examples.own_encoder  # noqa: F401 - registers plain_net
import models
from models.__main__ import main
from models.networks.branches import running_with
from models.segmentation.build import open_split
from models.segmentation.load import load
from models.training.errors import UsageError
from models.visualize import CELL
from tests.helpers.paths import ROOT
from tests.helpers.training_runs import prepare_rooms

PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Missing modalities")[1].split("\n## ")[0]
SMALL = ["data.num_classes=11", "data.batch_size=4", "data.crop=40", "data.shorter_side=32", "model.width=4"]
SMALL += ["model.encoder=plain_net", "model.frozen_statistics=false", "run.steps=2", "run.workers=0"]
SMALL += ["eval.pictures=1", "run.log_steps=1"]


def commands() -> list[list[str]]:
    """The section's, word by word, without ``python -m models``."""
    lines = [line for line in SECTION.splitlines() if line.startswith("python -m models ")]
    return [shlex.split(line, comments=True)[3:] for line in lines]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training rooms and one of three validation rooms have no depth, one training room no colors."""
    root = prepare_rooms(tmp_path_factory.mktemp("data") / "rooms")
    for file in ("depth/000002", "depth/000005", "rgb/000003", "depth/000014"):
        (root / f"{file}.png").unlink()
    return root


@pytest.fixture(scope="module")
def run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the page's first command."""
    words, *_ = commands()
    assert words[:2] == ["train", "nyudv2_cen_refinenet101"]
    output = tmp_path_factory.mktemp("runs") / "run"
    changed = {"data.root=/data/nyudv2": f"data.root={rooms}", "run.output=RUN": f"run.output={output}"}
    kept = [changed.get(word, word) for word in words if not word.startswith("model.weights=")]
    assert {"data.missing=fill", "data.drop_modality=0.3"} < set(kept)
    assert main([*kept, *SMALL]) == 0
    return output


def words_of(number: int, **places: object) -> list[str]:
    return [str(places.get(word, word)) for word in commands()[number]]


def by_hand(
    run: Path, rooms: Path, numbers: list[int], present: list[int], output: int = -1
) -> tuple[torch.Tensor, np.ndarray]:
    """Labels of some validation rooms by some modalities, those of one output of theirs, and the truth."""
    trained = load(run, [f"data.root={rooms}"])
    dataset = open_split(trained.recipe.data, "val")
    found = []
    for n in numbers:
        sample = dataset[n]
        images = [np.tile(image, (1, 1, 3 // image.shape[2])).transpose(2, 0, 1) for image in sample.images]
        x = torch.from_numpy(np.stack(images))[present]
        with torch.no_grad(), running_with(trained.net, present):
            out = trained.net(x.contiguous(memory_format=torch.channels_last))
        logits = [*out.branches, out.ensemble][output]
        large = torch.nn.functional.interpolate(logits, sample.target.shape, mode="bicubic")
        found.append(large.argmax(1)[0])
    return torch.stack(found), np.stack([dataset[n].target for n in numbers])


def accuracy(labels: torch.Tensor, target: np.ndarray) -> float:
    return float((labels.numpy() == target).mean())


def test_evaluate_with_scenes_that_lack_a_modality(
    run: Path, rooms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words_of(1, RUN=run), "eval.batch_size=3"]) == 0
    out = capsys.readouterr().out
    found = json.loads((run / "evaluation_best.json").read_text())
    assert found["missing"] == {"depth": 1}
    assert (
        f"note: val: of 3 scenes some lack files, and take part without (missing=fill): 1 lack depth (the "
        f"first {rooms}/depth/000014.png)\nnote: a branch's scores are those of the scenes that have its"
    ) in out
    whole, truth = by_hand(run, rooms, [0, 2], [0, 1])
    alone, other = by_hand(run, rooms, [1], [0])
    labels, target = torch.cat([whole, alone]), np.concatenate([truth, other])
    assert found["metrics"]["ensemble/pixel_accuracy"] == pytest.approx(accuracy(labels, target), abs=2e-3)
    depth, _ = by_hand(run, rooms, [0, 2], [0, 1], 1)
    assert found["metrics"]["depth/pixel_accuracy"] == pytest.approx(accuracy(depth, truth), abs=2e-3)
    counts = np.bincount(target.ravel(), minlength=11)
    assert found["metrics"]["constant/pixel_accuracy"] == pytest.approx(counts.max() / counts.sum())
    # The sheet has black places for the input and the branch that there are none of.
    sheet = cv2.imread(str(run / "evaluation_best.png"))
    assert sheet.shape[1] == 6 * CELL + 5 * 4
    high = CELL * 40 // 48
    second = sheet[20 + high + 4 + 20 : 2 * (20 + high) + 4]
    black = [not second[:, column * (CELL + 4) :][:, :CELL].any() for column in range(6)]
    assert black == [False, True, False, False, True, False]


def test_evaluate_without_a_modality(
    run: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files are not even looked for, or read: these hold nothing that could be."""
    blind = tmp_path / "blind"
    shutil.copytree(rooms, blind)
    for path in (blind / "depth").iterdir():
        path.write_bytes(b"no image")
    command = words_of(2, RUN=run)
    assert main([*command, f"data.root={blind}", "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out/evaluation_best.json").read_text())
    assert {key.partition("/")[0] for key in found["metrics"]} == {"rgb", "ensemble", "constant"}
    assert found["without"] == ["depth"]
    assert found["alpha"] == {"rgb": 1.0}
    assert "note: val: without depth" in out
    assert "other than in training: eval.without:  -> depth" in out
    assert "ensemble of 1.00 rgb" in out
    rows = [
        line.split()[0] for line in out.splitlines() if line.startswith(("rgb", "depth", "ensemble", "const"))
    ]
    assert rows == ["rgb", "ensemble", "constant", "ensemble"]
    labels, truth = by_hand(run, rooms, [0, 1, 2], [0])
    assert found["metrics"]["rgb/pixel_accuracy"] == pytest.approx(accuracy(labels, truth), abs=2e-3)
    assert found["metrics"]["rgb/mean_iou"] == found["metrics"]["ensemble/mean_iou"]
    assert cv2.imread(str(tmp_path / "out/evaluation_best.png")).shape[1] == 4 * CELL + 3 * 4
    with pytest.raises(
        UsageError, match=r"^eval\.without must be some of rgb,depth, not all, got depth,sonar"
    ):
        models.segmentation.evaluate.evaluate_checkpoint(run, ["eval.without=depth,sonar"], None)


def labels_in(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (folder / "labels").iterdir()}


def test_predict_without_an_input(
    run: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words_of(3, RUN=run, OUT=tmp_path / "out", **{"scene.png": rooms / "rgb/000001.png"})
    assert main(command) == 0
    assert "note: without depth: the outputs are those of rgb, ensemble" in capsys.readouterr().err
    found = labels_in(tmp_path / "out")["000001"]
    trained = models.load(run, ["data.missing=fill"])
    expected = trained.predict(rgb=rooms / "rgb/000001.png")
    assert list(expected) == ["rgb", "ensemble"]
    np.testing.assert_array_equal(found, expected["ensemble"])
    np.testing.assert_array_equal(expected["rgb"], expected["ensemble"])  # alone, whatever its weight
    assert cv2.imread(str(tmp_path / "out/sheet.png")).shape[1] == 3 * CELL + 2 * 4
    # Depth alone is laid over depth, as there are no colors.
    depth = ["predict", str(run), "--depth", str(rooms / "depth/000001.png"), "--output", str(tmp_path / "d")]
    assert main([*depth, "--which", "depth"]) == 0
    assert main([*depth, "--which", "rgb"]) == 2
    assert "--which must be one of depth, ensemble, got 'rgb'" in capsys.readouterr().err
    assert main(["predict", str(run), "--output", str(tmp_path / "none")]) == 2
    assert "--rgb is required" in capsys.readouterr().err
    for files in ({}, {"rgb": "x", "sonar": "y"}):
        with pytest.raises(UsageError, match=r"^expected "):
            trained.predict(**files)
    with pytest.raises(UsageError, match="expected a file of each of rgb, depth, got rgb"):
        models.load(run, ["data.missing=refuse"]).predict(rgb=rooms / "rgb/000001.png")


def test_predict_folders_that_lack_files(
    run: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"FOLDER": rooms / "rgb", "OTHER": rooms / "depth"}
    assert main(words_of(4, RUN=run, OUT=tmp_path / "out", **folders)) == 0
    told = "4 of 15 scenes lack files, the first, 000002, one of depth"
    assert (
        f"note: {told}: there the outputs are those of the branches that are left" in capsys.readouterr().err
    )
    found = labels_in(tmp_path / "out")
    assert len(found) == 15
    trained = models.load(run, ["data.missing=fill"])
    for number, kinds in (("000001", ("rgb", "depth")), ("000002", ("rgb",)), ("000003", ("depth",))):
        files = {kind: rooms / kind / f"{number}.png" for kind in kinds}
        np.testing.assert_array_equal(found[number], trained.predict(**files)["ensemble"])
    command = [*words_of(4, RUN=run, OUT=tmp_path / "skip", **folders)[:-1], "data.missing=skip"]
    assert main(command) == 0
    assert f"note: {told}: these are left out" in capsys.readouterr().err
    assert len(labels_in(tmp_path / "skip")) == 11
    assert main([*command[:-1], "data.missing=refuse"]) == 2
    refused = capsys.readouterr().err
    assert f"has no counterpart in {rooms}/depth" in refused
    assert "; data.missing=skip leaves such scenes out, data.missing=fill does without the file" in refused
    assert main([*command[:-1], "data.missing=fill", "--which", "depth"]) == 2
    assert "scene 000002 has no file of depth; data.missing=skip leaves" in capsys.readouterr().err


def test_fusions_that_need_all_modalities(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joined = [
        "fusion=late_concat",
        "data.missing=skip",
        f"data.root={rooms}",
        f"run.output={tmp_path / 'run'}",
    ]
    assert main(["train", "nyudv2_cen_refinenet101", *joined, *SMALL]) == 0
    capsys.readouterr()

    def error(*command: str) -> str:
        assert main([command[0], str(tmp_path / "run"), *command[1:]]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    why = "fusion=late_concat joins all modalities and cannot do without one"
    one = ["--rgb", str(rooms / "rgb/000001.png"), "--output", str(tmp_path / "out")]
    assert f"--depth is required: the network's modalities are rgb, depth; {why}" in error("predict", *one)
    both = ["--rgb", str(rooms / "rgb"), "--depth", str(rooms / "depth"), "--output", str(tmp_path / "out")]
    message = error("predict", *both, "data.missing=fill")
    assert why in message
    assert message.endswith("data.missing=skip leaves such scenes out")
    assert f"error: eval.without: {why}" in error("evaluate", "eval.without=depth")
    assert f"error: data.missing=fill: {why}" in error("evaluate", "data.missing=fill")
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "note: val: 1 of 3 scenes are left out" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
