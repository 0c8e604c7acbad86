"""``python -m models`` end to end on a few procedural rooms."""

import csv
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from models.__main__ import main
from models.data import SYNTHETIC_CLASSES, palette
from models.segmentation.metrics import SCORES
from models.segmentation.task import SegmentationTask
from models.training import checkpoint
from models.visualize import CELL
from tests.helpers.paths import ROOT
from tests.helpers.same import assert_same
from tests.helpers.training_runs import start

SIZE = (64, 80)
# 12 images: 3 steps an epoch, 12 in all; stages, epochs, evaluations, looks and checkpoints all cross.
TINY = [
    *["data.batch_size=4", "data.crop=64", "data.shorter_side=64", "model.width=8"],
    # Small, and trained so fast that outputs, checkpoints and images differ in what they predict.
    "model.encoder=plain_net",
    *[f"optim.stages.{stage}.{part}_lr=0.01" for stage in range(3) for part in ("encoder", "decoder")],
    *["model.initial_scale=none", "eval.pictures=2"],
    *["optim.stages.0.steps=5", "optim.stages.1.steps=4", "optim.stages.2.steps=3"],
    *["run.log_steps=5", "run.checkpoint_steps=3", "run.evaluate_steps=4", "run.workers=0"],
]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "rooms"
    command = ["prepare", "synthetic", str(root), "--train", "12", "--val", "3"]
    assert main([*command, "--height", str(SIZE[0]), "--width", str(SIZE[1])]) == 0
    return root


@pytest.fixture(scope="module")
def trained(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert main(train_command(rooms, output)) == 0
    return output


def train_command(rooms: Path, output: Path) -> list[str]:
    return ["train", "synthetic_demo", *TINY, f"data.root={rooms}", f"run.output={output}"]


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("losses.csv", "metrics.csv"):
        assert (a / name).read_text() == (b / name).read_text()
    for name in ("last.pt", "best.pt"):
        one, other = checkpoint.load(a / name)[1], checkpoint.load(b / name)[1]
        for part in ("loop", "task", *["processes"] * (name == "last.pt")):
            assert_same(one[part], other[part])


def signalled(command: list[str], at: int, action: Callable[[], None], errors: Path) -> int | None:
    """Run a command in a process of its own group that does ``action`` in its step ``at``; the exit code.

    What it writes to stderr goes to the file ``errors``.
    """
    process = start(_train_and_act, command, at, action, errors, torch.get_num_threads())
    process.join(120)
    assert "Traceback" not in errors.read_text(), errors.read_text()
    return process.exitcode


def _train_and_act(
    command: list[str], at: int, action: Callable[[], None], errors: Path, threads: int
) -> int:
    os.setsid()
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    torch.set_num_threads(threads)
    step, calls = SegmentationTask.step, []

    def stepping(self: SegmentationTask, *arguments: Any) -> dict[str, Tensor]:
        calls.append(0)
        losses = step(self, *arguments)
        if len(calls) == at:
            action()
        return losses

    SegmentationTask.step = stepping  # type: ignore[method-assign]
    return main(command)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_the_group() -> None:
    os.killpg(0, signal.SIGTERM)


def test_run_folder(trained: Path) -> None:
    losses = np.genfromtxt(trained / "losses.csv", delimiter=",", names=True)
    metrics = np.genfromtxt(trained / "metrics.csv", delimiter=",", names=True)
    assert losses["step"].tolist() == [5, 10]
    assert metrics["step"].tolist() == [4, 8, 12]
    np.testing.assert_allclose(metrics["epoch"], [4 / 3, 8 / 3, 4])
    best = checkpoint.load(trained / "best.pt")[1]["loop"]
    assert best["best"] == metrics["ensemblemean_iou"].max()
    assert best["step"] == metrics["step"][metrics["ensemblemean_iou"].argmax()]
    config = json.loads((trained / "config.json").read_text())
    assert (config["recipe"], config["config"]["data"]["batch_size"]) == ("synthetic_demo", 4)
    assert json.loads((trained / "environment.json").read_text())["torch"] == torch.__version__
    log = (trained / "log.txt").read_text()
    assert f"step 12, epoch 4.00: ensemble/mean_iou {metrics['ensemblemean_iou'][-1]:.4f}" in log
    shown = ", ".join(
        f"{name} {losses['loss' + name][0]:.4g}" for name in ("loss", "cross_entropy", "penalty")
    )
    assert f"step 5: {shown}, images/s" in log


def test_tensorboard(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(trained / "tensorboard"), size_guidance={"images": 0}).Reload()
    scalars = set(board.Tags()["scalars"])
    assert {
        "loss/loss",
        "loss/cross_entropy",
        "loss/penalty",
        "loss/rgb",
        "loss/depth",
        "loss/ensemble",
        "exchanged",
        "images_per_second",
    } <= scalars
    assert {"learning_rate/encoder", "alpha/rgb", "metrics/ensemble/mean_iou"} <= scalars
    assert {"exchanged/encoder.layers.0.norm", "exchanged/encoder.layers.3.norm"} <= scalars
    assert [event.step for event in board.Scalars("metrics/rgb/mean_iou")] == [4, 8, 12]
    assert {"gamma_rgb/encoder.layers.0.norm", "gamma_depth/encoder.layers.0.norm"} <= set(
        board.Tags()["histograms"]
    )
    image = board.Images(board.Tags()["images"][0])[0]
    assert (image.height, image.width) == (SIZE[0], 6 * SIZE[1] + 5 * 4)  # 2 inputs, target, 3 outputs


@pytest.mark.parametrize("at", [2, 7])
def test_killed_and_resumed_equals_uninterrupted(rooms: Path, trained: Path, tmp_path: Path, at: int) -> None:
    """Killed before the first checkpoint, and between two, after an evaluation and a change of stage."""
    command = train_command(rooms, tmp_path / "run")
    assert signalled(command, at, kill_itself, tmp_path / "errors") == -signal.SIGKILL
    saved = (tmp_path / "run" / "last.pt").exists()
    assert saved == (at > 2)
    assert main([*command, "--resume"] if saved else command) == 0
    assert_same_run(trained, tmp_path / "run")


def test_sigterm_to_the_group_saves_and_resumes_with_workers(
    rooms: Path, trained: Path, tmp_path: Path
) -> None:
    command = [*train_command(rooms, tmp_path / "run"), "run.workers=1"]
    assert signalled(command, 4, end_the_group, tmp_path / "errors") == 128 + signal.SIGTERM
    assert checkpoint.load(tmp_path / "run")[1]["loop"]["step"] == 4
    assert main(["train", "synthetic_demo", "--resume", str(tmp_path / "run"), "run.workers=0"]) == 0
    assert_same_run(trained, tmp_path / "run")


def test_ctrl_c_saves_and_says_how_to_go_on(
    rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = SegmentationTask.step

    def interrupted(self: SegmentationTask, *arguments: Any) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(SegmentationTask, "step", interrupted)
    output = tmp_path / "run"
    assert main(train_command(rooms, output)) == 130
    assert checkpoint.load(output)[1]["loop"]["step"] == 1
    assert f"python -m models train synthetic_demo --resume {output}" in capsys.readouterr().out


def test_resume_refuses_other_settings(
    rooms: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*train_command(rooms, trained), "--resume", "loss.sparsity=0.5", "run.log_steps=7"]
    assert main([*command, "optim.stages.1.encoder_lr=3"]) == 2
    message = capsys.readouterr().err
    assert "loss.sparsity: 1e-05" in message
    assert "-> 0.5; " in message or message.rstrip().endswith("-> 0.5")
    assert "optim.stages.1.encoder_lr" in message
    assert "log_steps" not in message
    assert main(["train", "nyudv2_cen_refinenet50", "--resume", str(trained)]) == 2
    assert "is of the recipe 'synthetic_demo'" in capsys.readouterr().err


def test_resuming_into_the_folder_of_another_run_is_refused(
    rooms: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert main([*train_command(rooms, other), "run.steps=1"]) == 0
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    command = ["train", "synthetic_demo", "--resume", str(trained), "run.steps=12"]
    assert "holds a run already" in error_of([*command, f"run.output={other}"], capsys)
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before
    assert main([*command, f"run.output={tmp_path / 'new'}"]) == 0
    assert checkpoint.load(tmp_path / "new")[1]["loop"]["step"] == 12


def test_a_run_whose_path_holds_an_equals_sign_is_resumed(rooms: Path, tmp_path: Path) -> None:
    output = tmp_path / "lr=1"
    assert main([*train_command(rooms, output), "run.steps=1"]) == 0
    assert main(["train", "synthetic_demo", "--resume", str(output), "run.steps=2"]) == 0
    assert checkpoint.load(output)[1]["loop"]["step"] == 2


def test_single_modality(rooms: Path, tmp_path: Path) -> None:
    command = [*train_command(rooms, tmp_path / "run"), "data.modalities=depth", "run.steps=2"]
    assert main(command) == 0
    metrics = np.genfromtxt(tmp_path / "run" / "metrics.csv", delimiter=",", names=True)
    assert metrics["depthmean_iou"] == metrics["ensemblemean_iou"]


def test_evaluate(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(trained / "last.pt")]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads((trained / "evaluation_last.json").read_text())
    assert (found["images"], found["checkpoint"]) == (3, str(trained / "last.pt"))
    trained_metrics = np.genfromtxt(trained / "metrics.csv", delimiter=",", names=True)[-1]
    for output in ("rgb", "depth", "ensemble", "constant"):
        row = next(line.split() for line in printed if line.startswith(output + " "))
        for cell, score in zip(row[1:], SCORES, strict=True):
            value = found["metrics"][f"{output}/{score}"]
            assert cell == f"{100 * value:.2f}"
            # Batches of another size: pixels may tie to the last bit, hardly any does.
            assert value == pytest.approx(trained_metrics[f"{output}{score}"], abs=2e-3)
    assert list(found["classes"]) == list(SYNTHETIC_CLASSES)
    with (trained / "evaluation_last.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == list(SYNTHETIC_CLASSES)
    assert [float(row["ensemble"] or "nan") for row in table] == pytest.approx(
        [np.nan if row["ensemble"] is None else row["ensemble"] for row in found["classes"].values()],
        nan_ok=True,
    )
    wall = found["classes"]["wall"]["depth"]
    assert any(line.split()[:1] == ["wall"] and f"  {100 * wall:.2f}" in line for line in printed)
    sheet = cv2.imread(str(trained / "evaluation_last.png"))
    rows = 3 * (20 + CELL * SIZE[0] // SIZE[1]) + 2 * 4  # captions, pictures, lines between
    assert sheet.shape[1] == 6 * CELL + 5 * 4  # 2 inputs, target, 3 outputs
    assert sheet.shape[0] == rows + 4 + 20 * -(-11 // (sheet.shape[1] // 160))
    for output in ("rgb", "depth", "ensemble"):
        ious = [row[output] for row in found["classes"].values() if row[output] is not None]
        assert np.mean(ious) == pytest.approx(found["metrics"][f"{output}/mean_iou"])
    other = tmp_path / "new"
    looks = ["eval.scales=0.75,1", "eval.flip=true", "eval.window=48", "eval.batch_size=3"]
    assert main(["evaluate", str(trained), "eval.limit=1", *looks, "--output", str(other)]) == 0
    limited = json.loads((other / "evaluation_best.json").read_text())
    how = [limited["inference"][name] for name in ("scales", "flip", "window")]
    assert (limited["images"], how) == (1, [[0.75, 1.0], True, 48])
    assert f"{trained / 'best.pt'}, 1 images spread over 3, scales 0.75,1.0" in capsys.readouterr().out
    assert sorted(path.suffix for path in other.iterdir()) == [".csv", ".json", ".png"]
    file = other / "evaluation_best.json"
    assert "cannot write" in error_of(["evaluate", str(trained), "--output", str(file)], capsys)


def test_predict_folders(rooms: Path, trained: Path, tmp_path: Path) -> None:
    """Scenes of different size and suffix; what is written agrees with what the network says."""
    for name, folder in (("rgb", "rgb"), ("depth", "depth")):
        (tmp_path / name).mkdir()
        for number, size in (("000001", SIZE), ("000002", (48, 70))):
            image = cv2.imread(str(rooms / folder / f"{number}.png"), cv2.IMREAD_UNCHANGED)
            suffix = ".webp" if name == "rgb" and number == "000002" else ".png"
            resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_NEAREST)
            cv2.imwrite(str(tmp_path / name / f"{number}{suffix}"), resized, [cv2.IMWRITE_WEBP_QUALITY, 101])
    inputs = ["--rgb", str(tmp_path / "rgb"), "--depth", str(tmp_path / "depth")]
    for which in ("ensemble", "depth"):
        assert (
            main(["predict", str(trained), *inputs, "--output", str(tmp_path / which), "--which", which]) == 0
        )
    for which in ("ensemble", "depth"):
        for number, size in (("000001", SIZE), ("000002", (48, 70))):
            labels = cv2.imread(str(tmp_path / which / "labels" / f"{number}.png"), cv2.IMREAD_UNCHANGED)
            coloured = cv2.imread(str(tmp_path / which / "coloured" / f"{number}.png"))
            laid = cv2.imread(str(tmp_path / which / "overlays" / f"{number}.png"))
            picture = cv2.imread(str(next((tmp_path / "rgb").glob(f"{number}.*"))))
            assert (labels.shape, labels.dtype) == (size, np.uint8)
            np.testing.assert_array_equal(coloured, palette(11)[labels][:, :, ::-1])
            assert np.abs(laid - (picture / 2 + coloured / 2)).max() <= 1.5
    assert cv2.imread(str(tmp_path / "depth/sheet.png")).shape[1] == 5 * CELL + 4 * 4
    first = [cv2.imread(str(tmp_path / w / "labels" / "000001.png"), 0) for w in ("ensemble", "depth")]
    assert (first[0] != first[1]).any()


def test_predict_single_files_with_the_networks_own_labels(
    rooms: Path, trained: Path, tmp_path: Path
) -> None:
    from models.data import Reader, configured, find_layout
    from models.segmentation.load import load

    paths = {"rgb": rooms / "rgb" / "000003.png", "depth": rooms / "depth" / "000003.png"}
    inputs = ["--rgb", str(paths["rgb"]), "--depth", str(paths["depth"]), "--output", str(tmp_path)]
    assert main(["predict", str(trained), *inputs, "data.depth_scale=2500"]) == 0
    written = cv2.imread(str(tmp_path / "labels" / "000003.png"), cv2.IMREAD_UNCHANGED)
    network = load(trained, ["data.depth_scale=2500"])
    assert network.reader == Reader(configured(find_layout(rooms), depth_scale=2500.0), ("rgb", "depth"))
    with torch.no_grad():
        logits = network.net(network.read(**paths)).ensemble
    resized = torch.nn.functional.interpolate(logits, SIZE, mode="bicubic", align_corners=False)
    np.testing.assert_array_equal(written, resized[0].argmax(0).numpy())


def error_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_predict_names_what_does_not_fit(
    rooms: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rgb, depth = rooms / "rgb", rooms / "depth"
    alone = tmp_path / "alone"
    alone.mkdir()
    small = cv2.resize(cv2.imread(str(depth / "000001.png"), cv2.IMREAD_UNCHANGED), (16, 16))
    cv2.imwrite(str(alone / "000001.png"), small)
    (tmp_path / "broken.png").write_bytes(b"none")
    start = ["predict", str(trained), "--output", str(tmp_path / "out")]

    def error(*arguments: str | Path) -> str:
        return error_of([*start, *map(str, arguments)], capsys)

    assert "--rgb is required" in error()
    assert "did you mean 'ensemble'" in error("--rgb", rgb, "--depth", depth, "--which", "ensembel")
    assert "has no counterpart" in error("--rgb", rgb, "--depth", alone)
    cv2.imwrite(str(alone / "000001.webp"), np.zeros((16, 16, 3), np.uint8))
    assert f"{alone}/000001.png and {alone}/000001.webp" in error("--rgb", alone, "--depth", depth)
    assert "is a file" in error("--rgb", rgb, "--depth", depth / "000001.png")
    assert "did you mean 'depth'" in error("--rgb", rgb, "--depth", rooms / "dept")
    assert "16x16" in error("--rgb", rgb / "000001.png", "--depth", alone / "000001.png")
    assert "broken.png" in error("--rgb", tmp_path / "broken.png", "--depth", depth / "000001.png")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "synthetic_dmo"], "did you mean 'synthetic_demo'"),
        (["recipes", "nyudv2_cen_refinenet11"], "did you mean 'nyudv2_cen_refinenet101'"),
        (["train", "synthetic_demo", "data.rot=x"], "did you mean 'data.root'"),
        (["train", "synthetic_demo"], "data.root must be set"),
        (["train", "synthetic_demo", "--resume"], "--resume needs a run"),
        (["train", "synthetic_demo", "--resume", "run.seed=x"], "run.seed=x: expected a whole number"),
        (["train", "synthetic_demo", "data.root={tmp}/roms"], "did you mean 'rooms'"),
        (
            ["train", "synthetic_demo", "data.root={rooms}", "data.modalities=rgb,dept"],
            "did you mean 'depth'",
        ),
        (["train", "synthetic_demo", "data.root={rooms}", "data.batch_size=50"], "data.batch_size=50"),
        (["train", "synthetic_demo", "data.root={rooms}", "data.num_classes=7"], "classes.txt"),
        (
            ["train", "synthetic_demo", "data.root={rooms}", "model.encoder=resnt18"],
            "did you mean 'resnet18'",
        ),
        (["train", "synthetic_demo", "data.root={rooms}", "run.device=cuda:77"], "run.device=cuda:77"),
        (
            ["train", "synthetic_demo", "data.root={rooms}", "model.weights=/none.pth"],
            "model.weights: /none.pth",
        ),
        (
            ["train", "synthetic_demo", "data.root={rooms}", "model.frozen_statistics=true"],
            "model.weights must be",
        ),
        (
            ["train", "synthetic_demo", "data.root={rooms}", "model.weights={tmp}"],
            "a folder; expected a .pth",
        ),
        (["evaluate", "{rooms}"], "holds neither last.pt nor best.pt"),
        (["evaluate", "{tmp}/nothing"], "does not exist"),
        (["prepare", "synthetic", "{tmp}/new", "--train", "0"], "--train must be at least 1"),
        (["prepare", "synthetic", "{tmp}"], "not empty"),
    ],
)
def test_errors_name_the_remedy(
    rooms: Path, command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [part.format(rooms=rooms, tmp=rooms.parent) for part in command]
    assert message in error_of(filled, capsys)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"optim.stages.{index}.steps=0" for index in range(3)], "optim.stages must have steps in all"),
        (["data.modalities=rgb,hha"], "000001.png: hha needs depth in meters"),
        (["data.modalities=rgb,normals", "data.depth_scale=5000"], "its camera is not known"),
        (["run.device=meta"], "run.device=meta: expected auto, cpu, cuda"),
        (["run.output="], "run.output=: expected a path"),
    ],
)
def test_mistakes_known_beforehand_leave_no_folder(
    rooms: Path, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rooms"
    shutil.copytree(rooms, data)
    layout = {"base": "nyu_cen", "depth_scale": None, "camera": None}
    (data / "layout.json").write_text(json.dumps(layout))
    command = [*train_command(data, tmp_path / "run"), "run.device=cpu", *overrides]
    assert message in error_of(command, capsys)
    assert list(tmp_path.iterdir()) == [data]


def test_demo_names_what_is_wrong_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").write_text("no folder")
    monkeypatch.setattr(sys, "argv", ["demo", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: .*data: not empty, and no synthetic data set"):
        runpy.run_path(str(ROOT / "examples" / "demo.py"), run_name="__main__")


def test_a_reader_that_has_had_enough() -> None:
    """As ``| head``: no traceback."""
    command = [sys.executable, "-m", "models", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize("system", ["segmentation", "translation"])
def test_recipes_come_with_their_system(system: str) -> None:
    """Also where nothing else has been imported."""
    code = f"import models.{system}.recipes as listed; from models.training import registry; "
    code += "assert all(registry.system_of(registry.find(name)) for name in registry.RECIPES)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert any(
        line.startswith("nyudv2_released_refinenet101  ") for line in capsys.readouterr().out.splitlines()
    )
    assert main(["recipes", "synthetic_demo", "data.crop=64"]) == 0
    assert any(line.startswith("data.crop=64 ") for line in capsys.readouterr().out.splitlines())


def test_unknown_flag_and_no_command() -> None:
    for command in (
        [],
        ["train", "synthetic_demo", "--epochs", "3"],
        ["tran"],
        ["prepare", "synthetic", "folder", "data.crop=3"],
        ["export", "run", "--output", "net.pt", "--format", "tflite"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 2


def test_commands_but_train_refuse_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["evaluate", "run"])
    assert "evaluate runs in one process: start it without torchrun" in capsys.readouterr().err
