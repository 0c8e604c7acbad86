"""timm's networks from the command line: train, evaluate, resume, export, and what is said where it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cen_ext
import models
from models.__main__ import main
from models.segmentation.build import build_network, open_split, with_normalization
from models.segmentation.visualize import show_input
from models.training import checkpoint, config, registry
from tests.helpers import vision
from tests.helpers.training_runs import TINY, command, prepare_rooms

# Its colors are normalized by 0.5 and 0.5.
RECIPE = "nyudv2_cen_layer_norm_pvtv2_b2"
LITE = "model.encoder=timm:tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_rooms(tmp_path_factory.mktemp("rooms") / "rooms")


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def recipe_of(*overrides: str) -> Any:
    return with_normalization(config.override(registry.find("synthetic_demo"), [*TINY, *overrides]))


def test_exchange_on_layer_norms_trains(rooms: Path, tmp_path: Path) -> None:
    """TokenFusion's appendix, with the smallest of the encoder's family."""
    vision.timm()
    run = tmp_path / "run"
    small = ["model.encoder=timm:pvt_v2_b0", "model.width=8", "data.crop=32", "data.shorter_side=48"]
    small += ["data.num_classes=11", "data.batch_size=2", "model.initial_scale=0.015", "run.workers=0"]
    assert main(["train", RECIPE, f"data.root={rooms}", f"run.output={run}", "run.steps=3", *small]) == 0
    points = cen_ext.exchanging_layers(models.load(run, [f"data.root={rooms}"]).net)
    assert len(points) == 2 * sum((2, 2, 2, 2))
    assert all(isinstance(point, cen_ext.ExchangeLayerNorm) for point in points.values())
    shares = {int(point.replaced().sum()) / point.replaced().numel() for point in points.values()}
    assert shares == {0.5}  # each modality's own half, whose scales begin below the threshold


def test_a_network_of_timm_trains_is_evaluated_resumed_and_exported(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timm, run, file = vision.timm(), tmp_path / "run", tmp_path / "net.safetensors"
    weights = tmp_path / "lite0.pth"
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    torch.save({**whole.state_dict(), "strange": torch.zeros(1)}, weights)
    started = command(rooms, run, LITE, f"model.weights={weights}", "optim.ema=0.9", "run.steps=2")
    assert main(started) == 0
    log = capsys.readouterr().out + (run / "log.txt").read_text()
    assert "mean 0.5,0.5,0.5, std 0.5,0.5,0.5" in log
    assert "lite0.pth holds entries that the encoder has not: network.strange" in log
    contents = checkpoint.load(run)[1]
    assert contents["config"]["data"]["mean"] == []  # none was given
    (rgb, depth) = contents["inputs"]
    assert (rgb["mean"], rgb["std"]) == ([0.5] * 3, [0.5] * 3)
    assert depth["mean"] == []

    assert main(["evaluate", str(run)]) == 0
    assert "mean 0.5,0.5,0.5" in capsys.readouterr().err
    resumed = ["train", "synthetic_demo", "--resume", str(run), "run.steps=3"]
    assert "which cannot change: data.mean:" in error_of([*resumed, "data.mean=0.4,0.5,0.6"], capsys)
    assert main(resumed) == 0
    assert checkpoint.load(run)[1]["loop"]["step"] == 3

    assert main(["export", str(run), "--output", str(file)]) == 0
    trained = models.load(file, [f"data.root={rooms}"])
    dataset = open_split(trained.recipe.data, "val")
    image = dataset.sample(0).images[0]
    picture = show_input(image.transpose(2, 0, 1), "rgb", trained.recipe.data)
    rooms_set = open_split(
        config.override(registry.find("synthetic_demo"), [f"data.root={rooms}"]).data, "val"
    )
    stored = rooms_set.sample(0).images[0]
    assert abs(stored * (0.229, 0.224, 0.225) + (0.485, 0.456, 0.406) - picture / 255).max() < 0.01
    files = {name: dataset.scenes[0][name] for name in ("rgb", "depth")}
    assert trained.predict(**files)["ensemble"].shape == (40, 48)
    torch.testing.assert_close(trained.read(**files)[0], torch.from_numpy(image).permute(2, 0, 1))


def test_a_given_normalization_goes_before_the_encoders(rooms: Path) -> None:
    vision.timm()
    root = f"data.root={rooms}"
    image, own, given = (
        open_split(recipe_of(root, *overrides).data, "val").sample(0).images[0]
        for overrides in ([], [LITE], [LITE, "data.mean=0.1,0.2,0.3", "data.std=1,0.5,0.25"])
    )
    colors = image * (0.229, 0.224, 0.225) + (0.485, 0.456, 0.406)
    assert abs(own - (colors - 0.5) / 0.5).max() < 1e-5
    assert abs(given - (colors - (0.1, 0.2, 0.3)) / (1, 0.5, 0.25)).max() < 1e-5


def test_networks_are_built_with_what_the_settings_say() -> None:
    vision.timm()
    net = build_network(recipe_of("model.network=pspnet", LITE, "fusion=fixed_portion"))
    assert net.encoder.strides == (4, 8, 8, 8)
    with torch.device("meta"):
        assert net.encoder.normalization.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["model.encoder=timm:mobilenetv2_10"], "'mobilenetv2_10'; did you mean 'mobilenetv2_1"),
        (["model.encoder=timm:levit_128s"], "model.encoder: timm's levit_128s has no features of strides"),
        (
            ["model.encoder=timm:densenet121", "model.network=pspnet"],
            "model.encoder: timm's densenet121 has no dilated features, which PSPNet takes",
        ),
        ([LITE, "fusion=none", "fusion.convolutions=private"], "lite0 has layers without a private form"),
    ],
)
def test_what_timm_cannot_give_is_one_line(
    overrides: list[str], problem: str, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vision.timm()
    assert problem in error_of(command(rooms, tmp_path / "run", *overrides), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["data.mean=0.5"], ["data.std=0.1,0.2"], ["data.std=0.1,0.2,0"]])
def test_normalizations_are_three_numbers(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(["train", "synthetic_demo", *words], capsys)
    assert "must be three numbers" in error or "std must be positive" in error


def test_a_missing_timm_is_one_line(
    rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    error = error_of(command(rooms, tmp_path / "run", LITE), capsys)
    assert error == "error: model.encoder: timm is not installed: pip install 'cen_ext[timm]'\n"
    assert not (tmp_path / "run").exists()


def test_a_run_without_timm_says_what_it_lacks(
    rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that was written where it was installed; the settings are read before any weights."""
    plain = config.to_plain(config.override(registry.find("synthetic_demo"), [f"data.root={rooms}", LITE]))
    header = {"recipe": "synthetic_demo", "config": plain, "inputs": [], "layout": {}, "classes": []}
    checkpoint.save_network(
        tmp_path / "net.safetensors", {**json.loads(json.dumps(header)), "task": {"net": {}}}
    )
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm is not installed" in error_of(["evaluate", str(tmp_path / "net.safetensors")], capsys)
