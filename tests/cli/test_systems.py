"""A system, a network that fuses in its own way, through every command; the settings that serve systems."""

from __future__ import annotations

import csv
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import examples.own_system
import models
from models.__main__ import main
from models.data import InputSpec, to_plain
from models.networks.systems import System, register_system
from models.segmentation.build import branch_names, build_network, output_names
from models.segmentation.initial import load_weights
from models.segmentation.settings import OptimSettings, SegmentationStage
from models.segmentation.step import make_optimizer
from models.segmentation.task import SegmentationTask
from models.training import checkpoint, config, registry
from models.training.errors import UsageError
from models.training.schedules import check_schedule
from tests.helpers.paths import ROOT
from tests.helpers.training_runs import prepare_rooms

PAGE = (ROOT / "docs/adding_a_system.md").read_text(encoding="utf-8")
RECIPE = examples.own_system.recipe()
SMALL = ["data.batch_size=4", "data.crop=40", "data.shorter_side=32", "model.width=4", "run.workers=0"]
SMALL += ["run.device=cpu", "run.steps=4", "run.log_steps=1", "run.checkpoint_steps=2", "eval.pictures=0"]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_rooms(tmp_path_factory.mktemp("data") / "rooms")


@pytest.fixture(scope="module")
def run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the page's commands."""
    output = tmp_path_factory.mktemp("runs") / "own"
    places = {"data.root=/data/rooms": f"data.root={rooms}", "run.output=runs/own": f"run.output={output}"}
    lines = [line for line in PAGE.splitlines() if line.startswith("cen ")]
    train, evaluate = ([places.get(word, word) for word in shlex.split(line)[1:]] for line in lines)
    assert main([*train, *SMALL]) == 0
    assert main([str(output) if word == "runs/own" else word for word in evaluate]) == 0
    return output


def test_metrics_are_of_the_fused_branch(run: Path) -> None:
    metrics = json.loads((run / "evaluation_best.json").read_text())["metrics"]
    assert {key.split("/")[0] for key in metrics} >= {"fused", "ensemble"}
    assert metrics["fused/mean_iou"] == metrics["ensemble/mean_iou"]


def test_losses_hold_the_side_outputs(run: Path) -> None:
    with (run / "losses.csv").open() as file:
        row = next(csv.DictReader(file))
    loss, entropy, beside, penalty = (
        float(row[f"loss/{name}"]) for name in ("loss", "cross_entropy", "auxiliary", "penalty")
    )
    assert beside > 0
    assert loss == pytest.approx(entropy + beside + penalty, rel=1e-5)


def test_resuming_continues_to_the_same_bits(run: Path, rooms: Path, tmp_path: Path) -> None:
    places = [f"data.root={rooms}", f"run.output={tmp_path / 'own'}"]
    assert main(["train", "examples.own_system:recipe", *places, *SMALL, "run.steps=2"]) == 0
    places = [f"run.output={tmp_path / 'own'}", f"data.root={rooms}"]
    assert main(["train", "examples.own_system:recipe", *places, *SMALL, "--resume"]) == 0
    one, other = (checkpoint.load(path / "last.pt")[1] for path in (run, tmp_path / "own"))
    for key, value in one["task"]["net"].items():
        assert torch.equal(value, other["task"]["net"][key]), key


def test_other_commands_take_it(run: Path, rooms: Path, tmp_path: Path) -> None:
    inputs = [word for kind in ("rgb", "depth") for word in (f"--{kind}", str(rooms / kind / "000012.png"))]
    assert main(["predict", str(run), *inputs, "--output", str(tmp_path / "labels")]) == 0
    assert list((tmp_path / "labels").rglob("*.png"))
    assert main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 0
    assert main(["export", str(run), "--output", str(tmp_path / "net.safetensors")]) == 0
    images = {
        "rgb": np.zeros((48, 64, 3), np.uint8),
        "depth": np.full((48, 64), 2.0, np.float32),
    }
    expected = models.load(run).predict(**images)
    found = models.load(tmp_path / "net.safetensors", prune=True).predict(**images)
    assert torch.equal(torch.as_tensor(expected["ensemble"]), torch.as_tensor(found["ensemble"]))


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_it_is_exported(run: Path, tmp_path: Path, form: str) -> None:
    """The command itself compares the file with the network."""
    if form == "onnx":
        pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
        pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")
    output = tmp_path / ("net.onnx" if form == "onnx" else "net.pt2")
    assert main(["export", str(run), "--output", str(output)]) == 0
    assert output.stat().st_size > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.network=own_sistem"], "model.network.*did you mean 'own_system'"),
        (["model.encoder=resnet18"], "model.encoder must be convs with network=own_system, got 'resnet18'"),
        (["model.decoder_init=kaiming"], "model.decoder_init must be torch with model.network=own_system"),
        (["model.initial_scale=0.5"], "model.initial_scale must be none with model.network=own_system"),
        (["model.frozen_statistics=true"], "model.frozen_statistics must be false with model.network="),
        (["fusion=exchange"], "fusion must be none with model.network=own_system"),
        (["optim.decay=0.5"], "optim.decay=0.5 has no meaning with optim.schedule=constant: it goes with"),
        (["loss.auxiliary=1,2"], "loss.auxiliary must be one number for each of the 1 auxiliary heads"),
        (["data.drop_modality=0.5"], "data.drop_modality: network=own_system joins all modalities"),
        (["eval.without=depth"], "eval.without: network=own_system joins all modalities"),
        (["loss.reduction=sum", "loss.kind=ohem"], "loss.reduction must be mean with loss.kind=ohem"),
        (["model.experts=a.pt"], "model.experts must be one for each of rgb,depth, got 1 of them"),
        (["model.experts=a.pt,b.pt", "model.start=c.pt"], "must be none with model.experts"),
    ],
)
def test_refusals(
    rooms: Path, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [f"data.root={rooms}", f"run.output={tmp_path / 'run'}"]
    assert main(["train", "examples.own_system:recipe", *places, *SMALL, *overrides]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_systems_that_do_not_start_from_experts_say_so(
    run: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train", "examples.own_system:recipe", f"data.root={rooms}", *SMALL]
    alone = [tmp_path / modality for modality in ("rgb", "depth")]
    for path in alone:
        assert main([*settings, f"data.modalities={path.name}", f"run.output={path}", "run.steps=1"]) == 0
    given = f"model.experts={alone[0]},{alone[1]}"
    assert main([*settings, given, f"run.output={tmp_path / 'both'}"]) == 2
    assert "network=own_system does not start from experts" in capsys.readouterr().err
    given = f"model.experts={alone[1]},{alone[0]}"
    assert main([*settings, given, f"run.output={tmp_path / 'both'}"]) == 2
    assert "is of depth, expected one of rgb" in capsys.readouterr().err


def test_names_of_branches() -> None:
    assert branch_names(RECIPE) == ("fused",)
    assert output_names(RECIPE) == ("fused", "ensemble")
    alone = replace(RECIPE, data=replace(RECIPE.data, modalities=("depth",)))
    assert branch_names(alone) == ("depth",)
    assert build_network(alone).channels == (1,)


def test_settings_are_read_where_nobody_has_registered_the_system() -> None:
    """What needs no network, such as a comparison of runs, works without the module of one's own."""
    recipe = config.override(RECIPE, ["model.network=of_another_module"])
    assert output_names(recipe) == ("rgb", "depth", "ensemble")
    with pytest.raises(UsageError, match=r"model\.network must be one of .*, got 'of_another_module'"):
        build_network(recipe)


def test_rates_that_fall_in_steps_are_set_in_any_order() -> None:
    settings = ["optim.decay=0.5", "optim.schedule=step"]
    first, second = (config.override(RECIPE, order) for order in (settings, settings[::-1]))
    assert first == second
    check_schedule(first.optim)


def test_biases_have_a_rate_of_their_own() -> None:
    net = build_network(config.override(RECIPE, ["model.width=4"]))
    stage = SegmentationStage(encoder_lr=0.25, decoder_lr=0.5)
    plain = make_optimizer(net, OptimSettings(), stage, "fp32").param_groups
    assert [(group["name"], group["lr"]) for group in plain] == [("encoder", 0.25), ("decoder", 0.5)]
    optimizer = make_optimizer(net, OptimSettings(bias_factor=2.0), stage, "fp32")
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(net.parameters()))
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            rate = 0.25 if name.startswith("encoder.") else 0.5
            assert (rates[id(module.weight)], rates[id(module.bias)]) == (rate, 2 * rate)


def test_a_sum_is_the_mean_times_its_pixels(rooms: Path) -> None:
    settings = [f"data.root={rooms}", *SMALL, "model.dropout=0"]
    mean, total = (
        SegmentationTask(config.override(RECIPE, [*settings, f"loss.reduction={reduction}"]))
        for reduction in ("mean", "sum")
    )
    total.net.load_state_dict(mean.net.state_dict())
    batch = next(iter(mean.batches(0, 0)))
    pixels = (batch.target != 255).sum().item()
    assert total.loss(batch).item() == pytest.approx(pixels * mean.loss(batch).item(), rel=1e-4)


def test_settings_out_of_range() -> None:
    for given, message in (
        ("loss.auxiliary=-1", "auxiliary must be one or more numbers from 0 on"),
        ("optim.bias_factor=-1", "bias_factor must be at least 0"),
        ("data.depth_std=0", "depth_std must be positive"),
    ):
        with pytest.raises(UsageError, match=message):
            config.override(RECIPE, [given])


def test_experts_of_other_dilations_or_inputs_are_told(tmp_path: Path) -> None:
    """Shapes tell neither."""
    recipe = registry.find("nyudv2_ssma")
    net = build_network(recipe)
    here = {"inputs": [to_plain(InputSpec(name, "metre")) for name in ("rgb", "hha")]}

    def experts(*overrides: str, unit: str = "metre") -> tuple[Path, ...]:
        paths = []
        for modality in ("rgb", "hha"):
            alone = config.override(
                registry.find("nyudv2_adapnetpp"), [f"data.modalities={modality}", *overrides]
            )
            trained = {"task": {"net": build_network(alone).state_dict()}}
            inputs = {"inputs": [to_plain(InputSpec(modality, unit))], "classes": ["a"]}
            paths.append(tmp_path / f"{modality}.pt")
            header = checkpoint.header("nyudv2_adapnetpp", alone)
            checkpoint.save_network(paths[-1], {**header, **inputs, **trained})
        return tuple(paths)

    start, *others = load_weights(net, replace(recipe.model, experts=experts()), here)
    assert start.startswith("starts from ")
    assert not others
    _, *others = load_weights(net, replace(recipe.model, experts=experts(unit="mile")), here)
    assert len(others) == 2
    assert "unit 'mile' in training, 'metre' here" in others[0]
    with pytest.raises(UsageError, match=r"rgb.pt was trained with .*aspp_rates=6,12,18, expected 3,6,12"):
        load_weights(net, replace(recipe.model, experts=experts("model.aspp_rates=6,12,18")), here)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("nyudv2_gnn3d", ["data.modalities=points,rgb"], "data.modalities must be rgb,points with"),
        ("nyudv2_gnn3d", ["data.modalities=rgb,hha"], "data.modalities must be rgb,points with"),
        ("nyudv2_fusenet", ["data.modalities=depth,rgb"], "data.modalities must begin with one of colors"),
        (
            "nyudv2_fusenet",
            ["data.modalities=rgb,depth,hha"],
            "network=fusenet takes 2 modalities, got 3",
        ),
        ("synthetic_demo", ["loss.auxiliary_size=logits"], "loss.auxiliary_size must be labels with"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(recipe: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message), torch.device("meta"):
        build_network(config.override(registry.find(recipe), overrides))


def test_registered_systems_name_their_encoders() -> None:
    class Nameless(System):
        pass

    with pytest.raises(ValueError, match="encoders of Nameless must name what"):
        register_system(Nameless)
