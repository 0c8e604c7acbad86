"""Trained networks in use: on which device, of files or arrays, and what was otherwise in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import models
from models.__main__ import main
from models.data import LAYOUTS, DataError, Reader
from models.data.images import Frame
from models.segmentation.build import build_network
from models.segmentation.load import describe
from models.training import checkpoint, config, registry
from models.training.errors import UsageError
from tests.helpers import training_runs, translation_runs

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
    # Even after a step, a ResNet predicts several classes.
    options = {"segmentation": "model.encoder=resnet18", "translation": "data.domains=normal,depth_zbuffer"}
    for system in SYSTEMS:
        assert main(COMMANDS[system](data[system], folders / system, "run.steps=1", options[system])) == 0
        for name in ("last.pt", "best.pt"):
            _, contents = checkpoint.load(folders / system / name)
            contents["config"]["run"]["device"] = "cuda:1"
            checkpoint.save(folders / system / name, contents)
    return {system: folders / system for system in SYSTEMS}


def files_of(system: str, data: Folders) -> dict[str, Path]:
    root = data[system]
    if system == "segmentation":
        return {name: root / name / "000002.png" for name in ("rgb", "depth")}
    return {name: root / name / f"point_3_view_0_domain_{name}.png" for name in ("normal", "depth_zbuffer")}


def arrays_of(files: dict[str, Path]) -> dict[str, np.ndarray]:
    """Colors red first, as nobody's files are read without the library."""
    pixels = {name: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for name, path in files.items()}
    return {name: each[:, :, ::-1] if each.ndim == 3 else each for name, each in pixels.items()}


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


# ---- files and arrays


@pytest.mark.parametrize("system", SYSTEMS)
def test_arrays_are_what_files_are(runs: Folders, data: Folders, system: str) -> None:
    trained, files = models.load(runs[system], ["run.device=cpu"]), files_of(system, data)
    arrays = arrays_of(files)
    images = trained.read(**files)
    assert not images.requires_grad
    for mixed in (arrays, {**files, **dict(list(arrays.items())[:1])}, {k: str(v) for k, v in files.items()}):
        assert torch.equal(trained.read(**mixed), images)
    (depth,) = (name for name in files if name.startswith("depth"))
    unit = 5000 if system == "segmentation" else 512
    metres = trained.read(**{**arrays, depth: (arrays[depth] / unit).astype(np.float32)})
    torch.testing.assert_close(metres, images, rtol=1e-5, atol=1e-5)


def test_label_maps(runs: Folders, data: Folders) -> None:
    trained, files = models.load(runs["segmentation"], ["run.device=cpu"]), files_of("segmentation", data)
    found = trained.predict(**files)
    logits = trained.net(trained.read(**files))
    size = next(iter(arrays_of(files).values())).shape[:2]
    expected = nn.functional.interpolate(logits.ensemble, size, mode="bicubic", align_corners=False)
    assert list(found) == ["rgb", "depth", "ensemble"]
    np.testing.assert_array_equal(found["ensemble"], expected[0].argmax(0).numpy())
    assert {(each.dtype, each.shape) for each in found.values()} == {(np.dtype(np.uint8), size)}
    assert not any(labels.requires_grad for labels in trained.label(trained.read(**files)).values())


def test_translated_pictures(runs: Folders, data: Folders) -> None:
    trained, files = models.load(runs["translation"], ["run.device=cpu"]), files_of("translation", data)
    found = trained.predict(**files)
    pictures = trained.translate(trained.read(**files))
    assert list(found) == list(pictures) == ["normal", "depth_zbuffer", "ensemble"]
    for name, picture in pictures.items():
        assert not picture.requires_grad
        assert (found[name].dtype, found[name].shape) == (np.uint8, (32, 32, 3))
        expected = (127.5 * (picture.permute(1, 2, 0).double().numpy() + 1)).round()
        np.testing.assert_array_equal(found[name], expected)


def test_missing_metres_are_missing_depth(runs: Folders, data: Folders) -> None:
    trained, arrays = models.load(runs["translation"]), arrays_of(files_of("translation", data))
    stored = np.full_like(arrays["depth_zbuffer"], 2**16 - 1)
    expected = trained.read(**{**arrays, "depth_zbuffer": stored})
    for missing in (0, -1, np.nan, np.inf, 200):
        metres = np.full(stored.shape, missing, np.float64)
        assert torch.equal(trained.read(**{**arrays, "depth_zbuffer": metres}), expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((40, 48), np.int16),
            "^depth_zbuffer: expected depth_zbuffer of 16 bits and 1 channel, found ",
        ),
        (
            np.zeros((40, 48), np.uint8),
            "^depth_zbuffer: expected depth_zbuffer of 16 bits and 1 channel, found 8",
        ),
        (
            np.zeros((40, 48, 3)),
            "^depth_zbuffer: expected depth_zbuffer of 16 bits and 1 channel, found 16 bits",
        ),
        (np.ones((40, 40), np.uint16), "^normal is 48x40, but depth_zbuffer is 40x40$"),
    ],
)
def test_arrays_that_no_file_of_a_domain_holds(
    runs: Folders, data: Folders, array: np.ndarray, message: str
) -> None:
    trained, arrays = models.load(runs["translation"]), arrays_of(files_of("translation", data))
    with pytest.raises(DataError, match=message):
        trained.read(**{**arrays, "depth_zbuffer": array})
    with pytest.raises(
        DataError, match=r"^normal: expected normal of 8 bits and 1 or 3 channels, found floating"
    ):
        trained.read(**{**arrays, "normal": arrays["normal"] / 255})


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_is_neither_path_nor_array_is_refused(runs: Folders, data: Folders, system: str) -> None:
    trained, files = models.load(runs[system]), files_of(system, data)
    name = next(iter(files))
    with pytest.raises(UsageError, match=f"^{name}: expected a path or a NumPy array, got Tensor$"):
        trained.predict(**{**files, name: torch.zeros(40, 48, 3)})


def test_a_camera_is_no_array(data: Folders, tmp_path: Path) -> None:
    options = ["model.width=4", "data.layout=sun_original", "data.modalities=rgb,hha"]
    recipe: Any = config.override(registry.find("synthetic_demo"), options)
    contents = {
        "recipe": "synthetic_demo",
        "config": config.to_plain(recipe),
        "task": {"net": build_network(recipe).state_dict()},
        **describe(Reader(LAYOUTS["sun_original"], recipe.data.modalities), ["room"] * 11),
    }
    checkpoint.save_network(tmp_path / "net.pt", contents)
    files: dict[str, Any] = {**files_of("segmentation", data), "camera": np.eye(3)}
    trained = models.load(tmp_path / "net.pt")
    for camera in (files["camera"], Frame("camera", files["camera"])):
        with pytest.raises(UsageError, match=r"^camera: expected the path of a camera's file, got"):
            trained.read(**{**files, "camera": camera})
