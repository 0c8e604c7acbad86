"""``python -m models`` for translation, end to end on a few generated views."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models
from models.__main__ import main
from models.networks.released.translation import released_names, unused_names
from models.training import checkpoint
from models.training.errors import UsageError
from models.translation.build import build_generator
from models.translation.evaluate import MEAN_IMAGE, evaluate_checkpoint
from models.translation.initial import load_start
from models.translation.task import TranslationTask
from models.visualize import CELL
from tests.helpers.golden_numbers import released_form
from tests.helpers.same import assert_same
from tests.helpers.training_runs import assert_same_runs, start
from tests.helpers.translation_runs import DOMAINS, SIZE, STEPS, command, prepare_views, tiny_recipe

OUTPUTS = (*DOMAINS, "ensemble")


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_views(tmp_path_factory.mktemp("data") / "views")


@pytest.fixture(scope="module")
def trained(views: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert main(command(views, output, "eval.pictures=2")) == 0
    return output


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- training


def test_run_folder(trained: Path) -> None:
    losses, (metrics,) = rows_of(trained / "losses.csv"), rows_of(trained / "metrics.csv")
    assert [row["step"] for row in losses] == ["3", "6"]
    for row in losses:
        parts = sum(float(row[f"loss/l1/{name}"]) for name in OUTPUTS) * 100
        parts += sum(float(row[f"loss/adversarial/{name}"]) for name in DOMAINS)
        assert float(row["loss/penalty"]) > 0
        assert float(row["loss/loss"]) == pytest.approx(parts + float(row["loss/penalty"]), rel=1e-5)
        judged = sum(float(row[f"loss/{kind}/{name}"]) for kind in ("real", "fake") for name in DOMAINS)
        assert float(row["loss/discriminator"]) == pytest.approx(judged / 2, rel=1e-5)
    assert metrics["step"] == str(STEPS)
    best = checkpoint.load(trained / "best.pt")[1]["loop"]["best"]
    assert best == -float(metrics["ensemble/l1"])
    log = (trained / "log.txt").read_text()
    assert f"step 3: loss {float(losses[0]['loss/loss']):.4g}, penalty " in log
    assert f"epoch 2.33: ensemble/l1 {-best:.4f} (best)" in log
    sheet = cv2.imread(str(trained / "pictures" / f"{STEPS:08d}.png"))
    assert sheet.shape == (2 * (20 + CELL) + 4, 6 * CELL + 5 * 4, 3)  # 2 inputs, 3 outputs, target


def test_tensorboard(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(trained / "tensorboard"), size_guidance={"images": 0}).Reload()
    scalars, levels = set(board.Tags()["scalars"]), [f"encoder.levels.{i}.norm" for i in (1, 2, 3)]
    assert {f"exchanged/{level}" for level in levels} <= scalars
    assert {"learning_rate/generator", "learning_rate/discriminator", "alpha/normal"} <= scalars
    assert {"loss/discriminator", "loss/l1/ensemble", "metrics/ensemble/psnr"} <= scalars
    histograms = {f"gamma_{name}/{level}" for name in DOMAINS for level in levels}
    assert histograms == set(board.Tags()["histograms"])
    image = board.Images(board.Tags()["images"][0])[0]
    assert (image.height, image.width) == (32, 6 * 32 + 5 * 4)


def train_until(arguments: list[str], step: int) -> int:
    """The command line, killed in a step."""
    stepping, calls = TranslationTask.step, []

    def killed(self: TranslationTask, *rest: Any) -> dict[str, Tensor]:
        calls.append(0)
        if len(calls) == step:
            signal.raise_signal(signal.SIGKILL)
        return stepping(self, *rest)

    TranslationTask.step = killed  # type: ignore[method-assign]
    return main(arguments)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["optim.ema=0.9", "optim.passes=2", "run.precision=fp16", "optim.schedule=cosine", "optim.clip=1"],
    ],
)
def test_killed_and_resumed_equals_uninterrupted(views: Path, tmp_path: Path, options: list[str]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(views, whole, *options)) == 0
    process = start(train_until, command(views, killed, *options), 6)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.load(killed)[1]["loop"]["step"] == 4
    assert main([*command(views, killed, *options), "--resume"]) == 0
    assert_same_runs(whole, killed)
    assert ("ema" in checkpoint.load(whole)[1]["task"]) == ("optim.ema=0.9" in options)


def test_resume_refuses_other_settings(
    views: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of([*command(views, trained), "--resume", "loss.gan=hinge", "eval.dropout=false"], capsys)
    assert "loss.gan: bce -> hinge" in message
    assert "dropout" not in message


@pytest.mark.parametrize(
    "domains", ["normal", "rgb,normal,depth_zbuffer", "rgb,normal,edge_texture,edge_occlusion"]
)
def test_one_three_and_four_domains(views: Path, tmp_path: Path, domains: str) -> None:
    options = [f"data.domains={domains}", "optim.stages.0.steps=2", "fusion.threshold=1", "run.log_steps=1"]
    assert main(command(views, tmp_path / "run", *options)) == 0
    names = domains.split(",")
    row = rows_of(tmp_path / "run" / "losses.csv")[-1]
    assert all(float(row[f"loss/l1/{name}"]) > 0 for name in (*names, "ensemble"))
    # Scales start on either side of 1, and a domain gives up its own share of channels at most.
    share = float(row["exchanged"])
    assert share == 0 if len(names) == 1 else 0 < share <= 1 / len(names)
    trained = models.load(tmp_path / "run")
    images = trained.read(**{n: next((views / n).iterdir()) for n in names})
    assert images.shape == (len(names), 3, 32, 32)
    assert set(trained.translate(images)) == {*names, "ensemble"}


def test_starting_from_a_run_and_from_its_network_alone(views: Path, trained: Path, tmp_path: Path) -> None:
    first = checkpoint.load(trained)[1]["task"]
    assert main(["export", str(trained), "--output", str(tmp_path / "net.safetensors")]) == 0
    for name, path in (("run", trained), ("net", tmp_path / "net.safetensors")):
        rates = [f"optim.stages.0.{net}_lr=0" for net in ("generator", "discriminator")]
        options = [f"model.start={path}", "run.steps=1", "optim.ema=0.5", "model.initial_scale=3", *rates]
        assert main(command(views, tmp_path / name, *options)) == 0
        state = checkpoint.load(tmp_path / name)[1]["task"]
        for key, parameter in tiny_generator_parameters(views):
            assert torch.equal(state["net"][key], first["net"][key]), key
            assert torch.equal(state["ema"][key], first["net"][key]), key
            assert parameter.shape == first["net"][key].shape
        same = torch.equal(state["discriminator"]["decide.weight"], first["discriminator"]["decide.weight"])
        assert same == (name == "run")
        noted = "holds no discriminator" in (tmp_path / name / "log.txt").read_text()
        assert noted == (name == "net")


def test_another_target_than_the_starts_is_noted(views: Path, trained: Path) -> None:
    def notes(*options: str) -> list[str]:
        return TranslationTask(tiny_recipe(views, f"model.start={trained}", *options)).initialize()

    assert len(notes()) == 1
    _, note = notes("data.target=rgb")
    assert note.endswith("was trained to make another target: reshading in training, rgb here")
    task = TranslationTask(tiny_recipe(views))
    here = task.describe()
    here["target"]["unit"] = "1 as stored"
    _, note = load_start(task.nets, trained, here)
    encoding = "reshading: unit '255 as stored' in training, '1 as stored' here"
    assert note.endswith(f"was trained on another encoding of the target: {encoding}")


def tiny_generator_parameters(views: Path) -> list[tuple[str, nn.Parameter]]:
    return list(build_generator(tiny_recipe(views)).named_parameters())


# ---- evaluation


def test_evaluate(views: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(trained / "last.pt"), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "evaluation_last.json").read_text())
    assert (found["views"], found["checkpoint"]) == (3, str(trained / "last.pt"))
    (metrics,) = rows_of(trained / "metrics.csv")
    for name in OUTPUTS:
        for score in ("l1", "psnr", "ssim"):
            assert found["metrics"][f"{name}/{score}"] == pytest.approx(float(metrics[f"{name}/{score}"]))
    assert sum(found["alpha"].values()) == pytest.approx(1)
    rows = rows_of(tmp_path / "evaluation_last.csv")
    assert [row["output"] for row in rows] == [*OUTPUTS, MEAN_IMAGE]
    for row in rows:
        assert float(row["mae"]) == pytest.approx(float(row["l1"]) / 2)
        line = next(line for line in printed.splitlines() if line.startswith(f"{row['output']} "))
        assert f"{float(row['psnr']):.4f}" in line
    sheet = cv2.imread(str(tmp_path / "evaluation_last.png"))
    assert sheet.shape == (3 * (20 + CELL) + 2 * 4, 6 * CELL + 5 * 4, 3)

    # The baseline, computed anew from the files.
    def square(path: Path) -> np.ndarray:
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.float32) / 127.5 - 1
        image = cv2.resize(image, (round(SIZE[1] * 32 / SIZE[0]), 32), interpolation=cv2.INTER_AREA)
        left = (image.shape[1] - 32) // 2
        return image[:, left : left + 32]

    def split(name: str) -> list[np.ndarray]:
        lines = (views / f"{name}.txt").read_text().split()
        return [square(views / line.format(domain="reshading")) for line in lines]

    mean = np.mean(split("train"), 0)
    expected = np.mean([np.abs(mean - image).mean() for image in split("val")])
    assert float(rows[-1]["l1"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("absent", ["list", "file"])
def test_evaluating_without_training_views(
    views: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], absent: str
) -> None:
    root = tmp_path / "views"
    shutil.copytree(views, root)
    line = (root / "train.txt").read_text().split()[0]
    gone = root / ("train.txt" if absent == "list" else line.format(domain="reshading"))
    gone.unlink()
    options = ["eval.sheet=0", "--output", str(tmp_path)]
    assert main(["evaluate", str(trained / "last.pt"), f"data.root={root}", *options]) == 0
    (noted,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith(MEAN_IMAGE))
    assert noted.startswith(f"{MEAN_IMAGE}: left out, for want of training views ({gone}")
    found = json.loads((tmp_path / "evaluation_last.json").read_text())
    assert f"{MEAN_IMAGE}: {found['inference'][MEAN_IMAGE]}" == noted
    assert [row["output"] for row in rows_of(tmp_path / "evaluation_last.csv")] == [*OUTPUTS]
    (metrics,) = rows_of(trained / "metrics.csv")
    assert found["metrics"]["ensemble/l1"] == pytest.approx(float(metrics["ensemble/l1"]))


def test_evaluation_is_written_before_it_is_printed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody_reads(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("models.translation.evaluate.print", nobody_reads, raising=False)
    with pytest.raises(BrokenPipeError):
        evaluate_checkpoint(trained, ["eval.sheet=1"], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"evaluation_best.{s}" for s in ("json", "csv", "png")
    }


def test_evaluating_an_average_and_options(
    views: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(command(views, run, "optim.ema=0.5", "run.steps=2", "eval.best=ssim")) == 0
    state = checkpoint.load(run)[1]["task"]
    assert_same(dict(models.load(run).net.state_dict()), dict(state["ema"]))
    (metrics,) = rows_of(run / "metrics.csv")
    assert checkpoint.load(run)[1]["loop"]["best"] == float(metrics["ensemble/ssim"])
    for dropout in ("true", "false"):
        options = [
            f"eval.dropout={dropout}",
            "eval.sheet=0",
            "eval.limit=2",
            "--output",
            str(tmp_path / dropout),
        ]
        assert main(["evaluate", str(run), *options]) == 0
        assert not list((tmp_path / dropout).glob("*.png"))
    found = [json.loads((tmp_path / d / "evaluation_best.json").read_text()) for d in ("true", "false")]
    assert [each["views"] for each in found] == [2, 2]
    assert "2 views spread over 3, " in capsys.readouterr().out
    scores = [each["metrics"]["ensemble/l1"] for each in found]
    assert scores[0] != scores[1]
    assert found[0]["metrics"][f"{MEAN_IMAGE}/l1"] == found[1]["metrics"][f"{MEAN_IMAGE}/l1"]


def test_corrupted_inputs_are_segmentation_s(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(["evaluate", str(trained), "--corrupt", "all"], capsys)
    assert f"--corrupt measures segmentation networks, and {trained} translates images" in message
    assert "eval.without=DOMAIN evaluates it without one of its domains" in message


# ---- prediction


def test_predict(views: Path, trained: Path, tmp_path: Path) -> None:
    inputs = [f"--input={name}={views / name}" for name in DOMAINS]
    assert main(["predict", str(trained), *inputs, "--output", str(tmp_path), "eval.sheet=2"]) == 0
    names = sorted(path.stem for path in (tmp_path / "ensemble").iterdir())
    assert len(names) == 15
    assert names[0] == "point_0_view_0"
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (20 + CELL) + 4, 5 * CELL + 4 * 4, 3)
    loaded = models.load(trained)
    files = {name: views / name / f"point_3_view_0_domain_{name}.png" for name in DOMAINS}
    images = loaded.translate(loaded.read(**files), "point_3_view_0")
    for name in OUTPUTS:
        written = cv2.imread(str(tmp_path / name / "point_3_view_0.png"), cv2.IMREAD_UNCHANGED)
        assert (written.dtype, written.shape) == (np.uint8, (32, 32, 3))
        expected = (127.5 * (images[name].permute(1, 2, 0).numpy()[:, :, ::-1] + 1)).round()
        np.testing.assert_allclose(written, expected, atol=1)
        assert written.std() > 1


def test_predict_one_output_of_single_files(views: Path, trained: Path, tmp_path: Path) -> None:
    inputs = [f"--input={name}={views / name / f'point_1_view_0_domain_{name}.png'}" for name in DOMAINS]
    options = ["--which", "normal", "eval.sheet=0", "--output", str(tmp_path)]
    assert main(["predict", str(trained), *inputs, *options]) == 0
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")] == [
        "normal/point_1_view_0.png"
    ]


def test_predict_without_a_domain(
    views: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    normal = views / "normal/point_1_view_0_domain_normal.png"
    options = [f"--input=normal={normal}", "--output", str(tmp_path)]
    assert main(["predict", str(trained), *options]) == 0
    told = "note: without edge_texture: the outputs are those of normal, ensemble"
    assert told in capsys.readouterr().err
    paths = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert paths == {"normal/point_1_view_0.png", "ensemble/point_1_view_0.png", "sheet.png"}
    loaded = models.load(trained)
    image, present = loaded.read_some({"normal": normal})
    assert (image.shape, present) == ((1, 3, 32, 32), (0,))
    outputs = loaded.translate(image, "point_1_view_0", present)
    assert list(outputs) == ["normal", "ensemble"]
    assert torch.equal(outputs["normal"], outputs["ensemble"])
    written = cv2.imread(str(tmp_path / "normal/point_1_view_0.png"))[:, :, ::-1]
    expected = 127.5 * (outputs["normal"].permute(1, 2, 0).numpy() + 1)
    np.testing.assert_allclose(written, expected, atol=1)
    assert main(["predict", str(trained), *options, "--which", "edge_texture"]) == 2
    assert "--which must be one of normal, ensemble" in capsys.readouterr().err


def test_predict_depth_in_16_bits(views: Path, tmp_path: Path) -> None:
    options = ["data.target=depth_zbuffer", "data.domains=rgb", "optim.stages.0.steps=2"]
    assert main(command(views, tmp_path / "run", *options)) == 0
    rgb = views / "rgb" / "point_0_view_0_domain_rgb.png"
    assert main(["predict", str(tmp_path / "run"), "--rgb", str(rgb), "--output", str(tmp_path / "out")]) == 0
    written = cv2.imread(str(tmp_path / "out" / "rgb" / "point_0_view_0.png"), cv2.IMREAD_UNCHANGED)
    assert (written.dtype, written.shape) == (np.uint16, (32, 32))
    loaded = models.load(tmp_path / "run")
    image = loaded.translate(loaded.read(rgb=rgb), "point_0_view_0")["rgb"].mean(0).double()
    expected = np.expm1((image.numpy() + 1) * 11.1 / 2)
    np.testing.assert_allclose(written, expected, rtol=1e-4, atol=1)


def test_mistakes_in_what_is_predicted(
    views: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        return error_of(["predict", str(trained), "--output", str(tmp_path / "out"), *arguments], capsys)

    normal, texture = (f"--input={name}={views / name}" for name in DOMAINS)
    assert "--input normal is required: the network's modalities are normal, edge_texture" in error()
    assert "--rgb is no input" in error(normal, texture, "--rgb", str(views / "rgb"))
    assert "did you mean 'ensemble'" in error(normal, texture, "--which", "ensembel")
    assert "data.domains must stay normal,edge_texture" in error(normal, texture, "data.domains=normal")
    assert "data.target must stay reshading" in error(normal, texture, "data.target=rgb")
    assert "does not fit these settings" in error(normal, texture, "model.base_width=5")
    wrong = f"--input=edge_texture={views / 'rgb'}"
    assert "has no counterpart" in error(normal, wrong)
    shutil.copytree(views / "rgb", tmp_path / "rgb")
    for path in (tmp_path / "rgb").iterdir():
        path.rename(path.with_name(path.name.replace("domain_rgb", "domain_edge_texture")))
    assert "expected edge_texture of 16 bits" in error(normal, f"--input=edge_texture={tmp_path / 'rgb'}")
    (tmp_path / "clip.mp4").touch()
    assert "translation takes images" in error(normal, f"--input=edge_texture={tmp_path / 'clip.mp4'}")
    assert not list((tmp_path / "out").rglob("*.png"))
    with pytest.raises(UsageError, match="expected a file of each of normal, edge_texture, got normal"):
        models.load(trained).read(normal="normal.png")


# ---- files of networks


def test_exported(views: Path, trained: Path, tmp_path: Path) -> None:
    for suffix in ("safetensors", "pt"):
        path = tmp_path / f"net.{suffix}"
        assert main(["export", str(trained), "--output", str(path)]) == 0
        assert_same(models.load(path).net.state_dict(), models.load(trained).net.state_dict())
        assert set(checkpoint.load(path)[1]["task"]) == {"net"}
        assert main(["evaluate", str(path), f"data.root={views}"]) == 0
        found = json.loads((tmp_path / "evaluation_net.json").read_text())["metrics"]
        (metrics,) = rows_of(trained / "metrics.csv")
        assert found["ensemble/l1"] == pytest.approx(float(metrics["ensemble/l1"]))


RELEASED = "taskonomy_cen_shade_texture_rgb_released"
SMALL = ["model.base_width=3", "model.size=32", "data.crop=32", "data.resize=32"]


def test_import(views: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = models.unet(size=32, base_width=3, region="all", decoder_norms="private")
    nn.init.normal_(net.alpha)
    state = released_form(released_names(net), net.state_dict())
    state |= {name: torch.zeros(3) for name in unused_names(net)}
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "r.pth")
    whole = ["import", str(tmp_path / "r.pth"), "--output", str(tmp_path / "net.safetensors")]
    assert main([*whole, "--recipe", RELEASED, *SMALL]) == 0
    assert_same(dict(models.load(tmp_path / "net.safetensors").net.state_dict()), dict(net.state_dict()))
    assert "U-Net, reshading + edge_texture to rgb" in capsys.readouterr().out
    options = [f"data.root={views}", "eval.sheet=0"]
    assert main(["evaluate", str(tmp_path / "net.safetensors"), *options]) == 0

    message = error_of([*whole, "--recipe", RELEASED], capsys)
    assert "set model.base_width=3, model.size=32" in message
    message = error_of([*whole, "--recipe", "taskonomy_cen_depth_normal_texture_rgb", *SMALL], capsys)
    assert "fusion.region=all, model.decoder_norms=private, data.domains to the names of its 2" in message
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    whole[1] = str(tmp_path / "other.pth")
    assert "RELEASED: " in error_of([*whole, "--recipe", RELEASED, *SMALL], capsys)
