"""Networks in files: released ones imported, trained ones exported, loaded, evaluated and started from."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import models
from models.__main__ import main
from models.data import NYU40, SYNTHETIC_CLASSES, prepare_synthetic
from models.fusion import AsymFusion
from models.networks.released.segmentation import released_names
from models.networks.segmentor import SegmentationNetwork
from models.segmentation.build import build_network, open_split
from models.segmentation.evaluate import evaluate
from models.segmentation.importing import released_settings
from models.segmentation.load import load
from models.segmentation.settings import SegmentationRecipe
from models.segmentation.task import SegmentationTask
from models.training import checkpoint, config, registry
from models.training.errors import UsageError
from models.training.train import train
from tests.helpers import paths
from tests.helpers.golden_numbers import assert_matches, draw, released_form
from tests.helpers.networks import randomise_norms

GOLDEN = json.loads((paths.GOLDEN / "refinenet50.json").read_text())
SMALL = ["model.encoder=resnet18", "model.width=8", "fusion.region=all", "run.device=cpu"]
TINY = [
    *["data.batch_size=4", "data.crop=64", "data.shorter_side=64", "model.width=8", "eval.pictures=1"],
    *["optim.stages.0.steps=2", "optim.stages.1.steps=1", "optim.stages.2.steps=1", "run.steps=2"],
    *["run.workers=0", "run.device=cpu", "optim.ema=0.9"],
]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_synthetic(tmp_path_factory.mktemp("data") / "rooms", train=8, val=3, size=(64, 80), seed=0)


@pytest.fixture(scope="module")
def run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that keeps the average of its weights."""
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "synthetic_demo", *TINY, f"data.root={rooms}", f"run.output={output}"]) == 0
    return output


def released(net: SegmentationNetwork) -> dict[str, Tensor]:
    """The network's entries as the authors' code saves them."""
    entries = released_form(released_names(net), net.state_dict())
    return {f"module.{name}": value.clone() for name, value in entries.items()}


def released_file(path: Path, state: dict[str, Tensor], **beside: Any) -> Path:
    """A file with what a training script saves beside the weights."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    contents = {"segmenter": state, "epoch_start": 174, "best_val": np.float64(51.1), "iou": np.eye(2)}
    torch.save({**contents, "optim_enc": optimizer.state_dict(), **beside}, path)
    return path


def small_recipe(*overrides: str) -> SegmentationRecipe:
    return config.override(registry.find("synthetic_demo"), [*SMALL, *overrides])


def small_network(*overrides: str) -> SegmentationNetwork:
    net = build_network(small_recipe(*overrides)).eval()
    randomise_norms(net)
    torch.nn.init.normal_(net.alpha)
    return net


def assert_same_state(net: torch.nn.Module, state: dict[str, Tensor]) -> None:
    own = net.state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(own[key], value), key


def error_of(command: list[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([str(part) for part in command]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_golden_network_survives_import_export_and_load(tmp_path: Path) -> None:
    """Every entry and every logit to the bit, and the logits are the released code's."""
    net = models.refinenet("resnet50", 40, 2, region="all").eval()
    shapes = released_form(released_names(net), net.state_dict())
    state = {name: draw(name, list(value.shape)) for name, value in shapes.items()}
    models.load_released(net, state)
    file = released_file(tmp_path / "model-best.pth.tar", {f"module.{k}": v for k, v in state.items()})
    command = ["import", file, "--recipe", "nyudv2_released_refinenet101", "model.encoder=resnet50"]
    assert main([*map(str, command), "--output", str(tmp_path / "net.pt")]) == 0
    assert main(["export", str(tmp_path / "net.pt"), "--output", str(tmp_path / "net.safetensors")]) == 0
    loaded = models.load(tmp_path / "net.safetensors", ["run.device=cpu"])
    assert_same_state(loaded.net, net.state_dict())
    assert not loaded.net.training
    assert loaded.class_names == NYU40
    inputs = [draw(f"input:{name}", [2, 3, 65, 97]) for name in ("rgb", "depth")]
    with torch.no_grad():
        found, expected = loaded.net(inputs), net(inputs)
    assert torch.equal(found.ensemble, expected.ensemble)
    for name, logits in zip(("rgb", "depth", "ensemble"), (*found.branches, found.ensemble), strict=True):
        assert_matches(logits, GOLDEN["logits"][name], 1e-5, common=2.0**-23)


def test_the_recipe_tells_asymfusion_from_the_exchange(tmp_path: Path) -> None:
    """Their released networks have the same tensors."""
    overrides = ["model.encoder=resnet50", "model.width=4", "run.device=cpu"]
    recipe = config.override(registry.find("nyudv2_asymfusion_refinenet101"), overrides)
    net = build_network(recipe).eval()
    file = released_file(tmp_path / "net.pth.tar", released(net))
    command = ["import", file, "--recipe", "nyudv2_asymfusion_refinenet101", *overrides]
    assert main([*map(str, command), "--output", str(tmp_path / "net.pt")]) == 0
    loaded = models.load(tmp_path / "net.pt", ["run.device=cpu"])
    assert isinstance(loaded.recipe.fusion, AsymFusion)
    assert_same_state(loaded.net, net.state_dict())
    x = torch.randn(2, 3, 33, 33)
    assert torch.equal(loaded.net(x).ensemble, net(x).ensemble)


def test_imported_network_is_evaluated(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's metrics are those of the network that the file was made of."""
    net = small_network()
    file = released_file(tmp_path / "released.pth.tar", released(net))
    output = tmp_path / "new" / "net.safetensors"
    command = ["import", str(file), *SMALL, f"data.root={rooms}", "--recipe", "synthetic_demo"]
    assert main([*command, "--output", str(output)]) == 0
    assert "refinenet on resnet18, rgb + depth, 11 classes" in capsys.readouterr().out
    assert main(["evaluate", str(output)]) == 0
    found = json.loads((output.parent / "evaluation_net.json").read_text())
    recipe = small_recipe(f"data.root={rooms}")
    expected = evaluate(net, open_split(recipe.data, "val"), recipe)
    assert found["metrics"] == expected.compute()


@pytest.mark.parametrize("encoder", models.networks.encoders.RESNETS)
@pytest.mark.parametrize("modalities", [1, 3])
def test_released_settings_are_read_off_the_tensors(encoder: str, modalities: int) -> None:
    with torch.device("meta"):
        net = models.refinenet(encoder, 37, modalities, width=64)
    state = released_form(released_names(net), net.state_dict())
    expected = {"data.num_classes": 37, "data.modalities": modalities, "model.width": 64}
    assert released_settings(state) == {**expected, "model.encoder": encoder}


def test_import_names_the_fields_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = released_file(tmp_path / "net.pth", released(small_network("data.modalities=rgb,depth,hha")))
    start = ["import", file, "--output", tmp_path / "net.pt", "--recipe"]
    error = error_of([*start, "nyudv2_cen_pspnet101", "fusion.threshold=0.01"], capsys)
    for change in (
        "model.network=refinenet",
        "fusion.region=all",
        "model.encoder=resnet18",
        "data.num_classes=11",
        "model.width=8",
        "data.modalities to the names of its 3 inputs",
    ):
        assert change in error
    assert "criterion" not in error
    assert "did you mean 'nyudv2_released_refinenet101'" in error_of(
        [*start, "nyudv2_released_refinenet11"], capsys
    )
    assert "RELEASED: " in error_of(["import", tmp_path / "none.pth", *start[2:], "synthetic_demo"], capsys)
    wrong = ["import", file, "--recipe", "synthetic_demo", "--output", tmp_path / "net.bin"]
    assert "--output must end in .safetensors or .pt" in error_of(wrong, capsys)
    assert list(tmp_path.iterdir()) == [file]


def test_import_refuses_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = released(small_network())
    end = [*SMALL, "--recipe", "synthetic_demo", "--output", tmp_path / "net.pt"]
    unsafe = released_file(tmp_path / "unsafe.pth", state, args=argparse.Namespace(lr=1))
    error = error_of(["import", unsafe, *end], capsys)
    assert "argparse.Namespace" in error
    assert "weights_only=False" in error
    del state["module.layer1.0.bn1.bn_1.bias"]
    error = error_of(["import", released_file(tmp_path / "less.pth", state), *end], capsys)
    assert "missing: layer1.0.bn1.bn_1.bias" in error
    assert "`python -m models import` reads" in error_of(["evaluate", unsafe], capsys)


def test_export_holds_the_average_and_says_what_it_is(run: Path, rooms: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--output", str(tmp_path / "net.safetensors")]) == 0
    contents = checkpoint.load(run / "best.pt")[1]
    averages = contents["task"]["ema"]
    assert not torch.equal(averages["alpha"], contents["task"]["net"]["alpha"])
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        header = {name: json.loads(value) for name, value in file.metadata().items()}
        assert set(file.keys()) == set(averages)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in averages.items())
    assert (header["format"], header["recipe"]) == (checkpoint.FORMAT, "synthetic_demo")
    kept = contents["config"]
    paths = {"data": {**kept["data"], "root": None}, "run": {**kept["run"], "output": None, "device": "auto"}}
    assert header["config"] == {**kept, **paths}  # those of this machine are left out
    assert header["classes"] == list(SYNTHETIC_CLASSES)
    assert header["layout"]["depth_scale"] == 5000
    assert header["inputs"] == [
        {
            "name": "rgb",
            "unit": "full brightness",
            "channels": 3,
            "order": "rgb",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        {"name": "depth", "unit": "metre", "channels": 1, "order": None, "mean": [], "std": []},
    ]
    found = []
    for source in (run / "best.pt", tmp_path / "net.safetensors"):
        assert main(["evaluate", str(source), f"data.root={rooms}", "--output", str(tmp_path)]) == 0
        found.append(json.loads((tmp_path / f"evaluation_{source.stem}.json").read_text()))
    assert found[0]["metrics"] == found[1]["metrics"]


def test_a_runs_own_checkpoint_is_not_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: (run / name).read_bytes() for name in ("last.pt", "best.pt")}
    for name in before:
        assert "is a run's own checkpoint" in error_of(["export", run, "--output", run / name], capsys)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert main(["export", str(run), "--output", str(tmp_path / "best.pt")]) == 0


def test_a_network_knows_its_layout_where_the_data_is_gone(rooms: Path, run: Path, tmp_path: Path) -> None:
    """A folder described by its own layout.json: predict needs neither it nor any setting."""
    root = tmp_path / "rooms"
    shutil.copytree(rooms, root)
    layout = {"base": "nyu_cen", "depth_scale": 2500, "camera": [60, 60, 40, 32]}
    (root / "layout.json").write_text(json.dumps(layout))
    output = tmp_path / "run"
    command = ["train", "synthetic_demo", *TINY, f"data.root={root}", f"run.output={output}"]
    assert main([*command, "data.modalities=rgb,depth,normals"]) == 0
    network = load(output)
    shutil.rmtree(root)
    files = {"rgb": rooms / "rgb" / "000002.png", "depth": rooms / "depth" / "000002.png"}
    images = models.load(output).read(**files)
    assert torch.equal(images, network.read(**files))
    depth = cv2.imread(str(files["depth"]), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(images[1].cpu(), np.repeat(np.float32(depth / 2500)[None], 3, 0))
    inputs = ["--rgb", str(files["rgb"]), "--depth", str(files["depth"])]
    assert main(["predict", str(output), *inputs, "--output", str(tmp_path / "out")]) == 0
    with torch.no_grad():
        logits = network.net(images).ensemble
    resized = torch.nn.functional.interpolate(logits, (64, 80), mode="bicubic", align_corners=False)
    written = cv2.imread(str(tmp_path / "out" / "labels" / "000002.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(written, resized[0].argmax(0).cpu().numpy())


def test_other_inputs_are_refused(
    rooms: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = error_of(["evaluate", run, "data.modalities=depth,rgb"], capsys)
    assert "data.modalities must stay rgb,depth" in error
    shutil.copytree(rooms, tmp_path / "grey")
    layout = {"base": "nyu_cen", "depth_scale": None}
    (tmp_path / "grey" / "layout.json").write_text(json.dumps(layout))
    difference = "depth: unit 'metre' in training, 'largest stored value' here"
    grey = f"data.root={tmp_path / 'grey'}"
    assert difference in error_of(["evaluate", run, grey], capsys)
    assert main(["evaluate", str(run), grey, "data.depth_scale=2500", "--output", str(tmp_path)]) == 0
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    resume = ["train", "synthetic_demo", "--resume", resumed, "run.steps=3"]
    assert difference in error_of([*resume, grey], capsys)
    renamed = tmp_path / "renamed"
    shutil.copytree(rooms, renamed)
    (renamed / "classes.txt").write_text("\n".join(reversed(SYNTHETIC_CLASSES)))
    error = error_of([*resume, f"data.root={renamed}"], capsys)
    assert "was trained on classes of other names than data.root has" in error
    assert "rgb: mean (0.485, 0.456, 0.406) in training, (0.5, 0.5, 0.5) here" in error_of(
        ["evaluate", run, "data.mean=0.5,0.5,0.5"], capsys
    )


def saved_network(path: Path, net: SegmentationNetwork, rooms: Path, *overrides: str) -> Path:
    """A file of a network as if it had been trained on the rooms."""
    recipe = small_recipe(f"data.root={rooms}", *overrides)
    contents = SegmentationTask(small_recipe(f"data.root={rooms}", "data.batch_size=2")).describe()
    contents["classes"] = [f"class {label}" for label in range(recipe.data.num_classes)]
    header = {"recipe": "synthetic_demo", "config": config.to_plain(recipe)}
    checkpoint.save_network(path, {**header, **contents, "task": {"net": net.state_dict()}})
    return path


def test_data_that_has_changed_in_its_place_is_refused(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "rooms"
    shutil.copytree(rooms, root)
    file = saved_network(tmp_path / "net.safetensors", small_network(), root)
    assert main(["evaluate", str(file)]) == 0
    (root / "layout.json").write_text(json.dumps({"base": "nyu_cen", "depth_scale": None}))
    error = error_of(["evaluate", file], capsys)
    assert f"{file} was trained on other inputs than the layout nyu_cen gives: depth: unit 'metre'" in error


@pytest.mark.parametrize("network", ["refinenet", "pspnet"])
def test_training_starts_from_a_network_of_other_classes(rooms: Path, tmp_path: Path, network: str) -> None:
    """Everything is taken over but the classifiers, and that is said."""
    fields = [f"model.network={network}", "fusion=late_concat", "model.frozen_statistics=true"]
    other = build_network(small_recipe(*fields, "data.num_classes=5"))
    randomise_norms(other)
    file = saved_network(tmp_path / "net.safetensors", other, rooms, *fields, "data.num_classes=5")
    recipe = small_recipe(*fields, f"data.root={rooms}", f"model.start={file}", "data.batch_size=2")
    task = SegmentationTask(recipe)
    before = {key: value.clone() for key, value in task.net.state_dict().items()}
    notes = task.initialize()
    after, given = task.net.state_dict(), other.state_dict()
    renewed = {key for key in after if after[key].shape != given[key].shape}
    heads = ["decoder.classifier", "head.conv", *["auxiliary.classifier"] * (network == "pspnet")]
    assert renewed == {f"{head}.{leaf}" for head in heads for leaf in ("weight", "bias")}
    for key, value in after.items():
        assert torch.equal(value, before[key] if key in renewed else given[key]), key
    (note,) = (note for note in notes if "classes" in note)
    assert "5 classes apart, this network 11: " in note
    assert "decoder.classifier.weight" in note


def test_starts_that_do_not_fit(rooms: Path, run: Path, tmp_path: Path) -> None:
    file = saved_network(tmp_path / "net.pt", small_network("model.width=16"), rooms, "model.width=16")

    def initialize(*overrides: str) -> list[str]:
        recipe = small_recipe(f"data.root={rooms}", "data.batch_size=2", f"model.start={file}", *overrides)
        return SegmentationTask(recipe).initialize()

    with pytest.raises(UsageError, match=r"model\.start: .*of another shape: decoder\.cascades\.0\.reduce"):
        initialize()
    with pytest.raises(UsageError, match=r"model\.weights must be none with model\.start"):
        initialize("model.weights=resnet18.pth")
    with pytest.raises(UsageError, match=r"model\.start: .*did you mean 'net\.pt'"):
        initialize(f"model.start={tmp_path / 'nett.pt'}")
    notes = initialize("model.width=16", "data.modalities=rgb,normals")
    assert any("modalities rgb,depth in training, rgb,normals here" in note for note in notes)
    with pytest.raises(UsageError, match=r"model\.start=.*net\.pt"):
        train("synthetic_demo", [], file)


def test_a_start_is_said_in_the_log(rooms: Path, run: Path, tmp_path: Path) -> None:
    start = [f"data.root={rooms}", f"run.output={tmp_path / 'next'}", f"model.start={run}"]
    assert main(["train", "synthetic_demo", *TINY, *start, "run.steps=1"]) == 0
    log = (tmp_path / "next" / "log.txt").read_text()
    assert f"starts from {run / 'best.pt'}, of the recipe synthetic_demo" in log
