"""The commands of the pages in docs, run as they stand but for folders, weights and the training's size."""

import json
import re
import shlex
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from safetensors.torch import save_file

import examples.own_encoder  # noqa: F401 - registers plain_net
from models.__main__ import main
from models.networks.encoders import make_encoder
from models.networks.fusion import NoFusion
from models.training import checkpoint
from tests.helpers.clips import depth_frames, rgb_frames, save_narrow, write_clip
from tests.helpers.networks import randomise_norms
from tests.helpers.own_recipes import SHORT, cen, write_package
from tests.helpers.paths import ROOT
from tests.helpers.planes import phone
from tests.helpers.signals import until
from tests.helpers.training_runs import prepare_rooms
from tests.helpers.trees import scene, void_255, write

SMALL = [*SHORT["segmentation"], "model.encoder=resnet18", "model.frozen_statistics=false", "eval.sheet=2"]
CAMERAS = (("rgb", "color", "clip"), ("depth", "depth", "depth"))
NUMBER = r"\d[\d.]*(?:e-\d+)?"


def blocks(page: str, language: str, section: str | None = None) -> list[str]:
    """The page's code in a language, block by block; of a section below its heading, "" what is above all."""
    text = (ROOT / "docs" / page).read_text()
    if section is not None:
        title, *sections = re.split(r"^## ", text, flags=re.M)
        text = next(part for part in sections if part.startswith(section)) if section else title
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [code for name, code in found if name == language]


def name_of(words: list[str]) -> str:
    """The command's name, in its words after ``cen``."""
    return words[2 * words.count("--import")]


def commands(
    page: str,
    changes: dict[str, str],
    section: str | None = None,
    *,
    start: str = "cen ",
    small: Sequence[str] = SMALL,
) -> list[list[str]]:
    """The words after ``cen`` of the page's commands that start so, some of them changed or, where empty,
    left out; and settings that make a training small.
    """
    lines = [
        line for block in blocks(page, "", section) for line in block.splitlines() if line.startswith(start)
    ]
    found = []
    for line in lines:
        words = [changes.get(word, word) for word in shlex.split(line, comments=True)[1:]]
        name = name_of(words)
        made_small = small if name in ("train", "data") and "--resume" not in words else []
        found.append([*filter(None, words), *made_small, *(["run.steps=2"] if name == "train" else [])])
    return found


def write_photo(rooms: Path, folder: Path) -> None:
    """The files that pages predict of."""
    for name, images in (("photo", "rgb"), ("depth", "depth")):
        shutil.copy(rooms / images / "000001.png", folder / f"{name}.png")


def test_adding_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = prepare_rooms(tmp_path / "rooms")
    recipe, short = blocks("adding_a_recipe.md", "python")
    listed = recipe.replace("def small", "@models.register_recipe\ndef small")
    write_package(tmp_path, "my_package", f"import models\n{listed}")
    write_photo(rooms, tmp_path)
    found = commands("adding_a_recipe.md", {"data.root=/data/nyudv2": f"data.root={rooms}"})
    names = list(map(name_of, found))
    long = ["recipes", "data", "train", "train", "evaluate", "predict", "export"]
    assert names == [*long, "recipes", "train"]
    cen(
        tmp_path,
        *(
            [*words, "data.num_classes=11"] if name_of(words) in ("data", "train") else words
            for words in found
        ),
    )
    listed = json.loads((tmp_path / "runs" / "listed" / "config.json").read_text())
    assert (listed["recipe"], listed["imports"]) == ("small_crops", ["my_package.recipes"])
    config = json.loads((tmp_path / "runs" / "small" / "config.json").read_text())
    assert config["config"]["loss"]["sparsity"] == 1e-3
    assert (tmp_path / "net.safetensors").is_file()
    assert list((tmp_path / "out").rglob("*.png"))
    # The program of the page, of which only the command's settings are longer.
    monkeypatch.chdir(tmp_path)
    program = short.replace("data.root=/data/nyudv2", f"data.root={rooms}").replace(
        "runs/small", "runs/short"
    )
    small = ", ".join(map(repr, [*SMALL, "data.num_classes=11", "run.steps=1"]))
    (tmp_path / "program.py").write_text(program.replace('runs/short"', f'runs/short", {small}'))
    cen(tmp_path, ["recipes"], imports="program")  # which trains as it is imported
    cen(tmp_path, ["train", "small_crops", "--resume", "runs/short", "run.steps=2"])


def test_adding_a_layout(tmp_path: Path) -> None:
    root = tmp_path / "own"
    (description,) = blocks("adding_a_layout.md", "json", "")
    for split, names in (("train", "abcdefgh"), ("val", "xyz")):
        for name in names:
            one = scene(ord(name), 4)
            write(root / "color" / f"{name}.jpg", one.rgb)
            write(root / "depth" / f"{name}.png", (1000 * one.depth).astype(np.uint16))
            write(root / "labels" / f"{name}.png", void_255(one.classes))
        (root / f"{split}.txt").write_text("\n".join(names))
    (root / "layout.json").write_text(description)
    changes = {"data.root=FOLDER": f"data.root={root}", "model.weights=resnet50.pth": ""}
    found = commands("adding_a_layout.md", changes, "")
    names = [words[0] for words in found]
    assert names == ["data", "train"]
    cen(tmp_path, *([*words, "run.output=run"] if words[0] == "train" else words for words in found))
    assert cv2.imread(str(tmp_path / "data_sheet.png")) is not None
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["classes"], config["layout"]["depth_scale"]) == (["soil", "crop", "weed", "stone"], 1000)


def test_depth_of_another_camera(tmp_path: Path) -> None:
    root, section = phone(tmp_path / "own"), "Depth of another camera"
    (description,) = blocks("adding_a_layout.md", "json", section)
    (root / "layout.json").write_text(description)
    for kind in ("rgb", "depth", "amplitude"):
        shutil.copy(root / kind / "d.png", tmp_path / f"{kind}.png")
    found = commands("adding_a_layout.md", {"data.root=FOLDER": f"data.root={root}"}, section)
    assert [words[0] for words in found] == ["data", "train", "predict"]
    cen(tmp_path, *found)
    assert cv2.imread(str(tmp_path / "data_sheet.png")) is not None
    record = json.loads((tmp_path / "run" / "config.json").read_text())["layout"]["modalities"]
    assert record["depth"]["pose"] == [1, 0, 0, 0.06, 0, 1, 0, -0.01, 0, 0, 1, 0.02]
    assert record["amplitude"]["registered_with"] == "depth"
    assert cv2.imread(str(tmp_path / "out" / "labels" / "rgb.png"), cv2.IMREAD_UNCHANGED).shape == (192, 256)


def test_thresholds(tmp_path: Path) -> None:
    rooms = prepare_rooms(tmp_path / "rooms")
    weights = tmp_path / "resnet.safetensors"
    net = make_encoder("plain_net", 2, NoFusion())  # whose checkpoints are small
    randomise_norms(net)
    save_file(net.state_dict(), weights)
    changes = {
        "data.root=/data/nyudv2": f"data.root={rooms}",
        "model.weights=/data/resnet50.pth": f"model.weights={weights}",
    }
    found = commands("thresholds.md", changes)
    assert [words[0] for words in found] == ["train", "train", "evaluate", "export", "evaluate"]
    found[0] += ["data.num_classes=11", "model.encoder=plain_net", "run.steps=1"]
    cen(tmp_path, *found)
    thresholds = json.loads((tmp_path / "runs" / "relative" / "config.json").read_text())["thresholds"]
    assert thresholds["rule"] == "0.05*median"
    log = (tmp_path / "runs" / "relative" / "log.txt").read_text()
    (shown,) = blocks("thresholds.md", "text")
    for line in shown.splitlines():
        assert re.sub(NUMBER, "N", line) in re.sub(f"{NUMBER}( to {NUMBER})?", "N", log), line
    (program,) = blocks("thresholds.md", "python")
    values: dict[str, Any] = {}
    exec(program, values)
    assert set(values["values"].values()) == {0.05}
    assert values["net"][1].threshold == 0.05


def test_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = prepare_rooms(tmp_path / "rooms")
    changes = {
        "data.root=/data/rooms": f"data.root={rooms}",
        "encoder.layer1.1.bn1": "encoder.layers.1.norm",
        "000301": "000013",
        # From where all scales start, so that some are below after two steps.
        "fusion.threshold=0.03": "fusion.threshold=0.05",
    }
    found = commands("features.md", changes)
    assert [words[0] for words in found] == ["train", "analyse", "analyse", "analyse"]
    found[0] += ["model.encoder=plain_net", "fusion.threshold=0.05"]
    cen(tmp_path, *found)
    written = [
        json.loads((tmp_path / folder / "features.json").read_text()) for folder in ("runs/demo", "out")
    ]
    assert [(each["layer"], each["images"]) for each in written[1:]] == [("encoder.layers.1.norm", 3)]
    assert len(written[0]["scenes"]) == 3
    assert written[1]["scenes"] == ["000013"]
    monkeypatch.chdir(tmp_path)
    (program,) = blocks("features.md", "python")
    exec(program, {})
    assert cv2.imread("figure.png") is not None


def test_losses(tmp_path: Path) -> None:
    rooms = prepare_rooms(tmp_path / "rooms")
    found = commands("losses.md", {"data.root=/data/nyudv2": f"data.root={rooms}"})
    assert [words[0] for words in found] == ["train", "train", "train", "evaluate"]
    for name, words in zip(("weights", "ohem", "focal"), found, strict=False):
        words += ["data.num_classes=11", f"run.output=runs/{name}"]
    cen(tmp_path, *found)
    config = json.loads((tmp_path / "runs" / "weights" / "config.json").read_text())
    assert len(config["class_weights"]) == 11
    header = (tmp_path / "runs" / "ohem" / "losses.csv").read_text().splitlines()[0].split(",")
    assert {"loss/ohem", "loss/dice"} < set(header)
    evaluation = json.loads((tmp_path / "runs" / "focal" / "evaluation_best.json").read_text())
    assert 0 <= evaluation["metrics"]["ensemble/image_mean_iou"] <= 1


def test_robustness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = prepare_rooms(tmp_path / "rooms")
    changes = {"data.root=/data/rooms": f"data.root={rooms}"}
    small = [*SHORT["segmentation"], "model.encoder=plain_net"]
    train, listed, whole = commands("robustness.md", changes, small=small)
    assert (train[0], listed[0], whole[0]) == ("train", "evaluate", "evaluate")
    cen(tmp_path, train, ["evaluate", "runs/demo", "--output", "plain"], listed, whole)
    run, plain = tmp_path / "runs" / "demo", tmp_path / "plain"
    for suffix in ("json", "csv", "png"):
        name = f"evaluation_best.{suffix}"
        assert (run / name).read_bytes() == (plain / name).read_bytes()
    found = json.loads((run / "corrupted_best.json").read_text())
    assert (found["checkpoint"], found["images"], found["drop_modality"]) == ("runs/demo/best.pt", 3, 0.3)
    corruptions = [row["corruption"] for row in found["rows"]]
    assert corruptions == ["", "depth=missing", "depth=holes:0.3", "rgb=noise:0.1"]
    clean, missing, *rest = (row["metrics"] for row in found["rows"])
    assert clean == json.loads((plain / "evaluation_best.json").read_text())["metrics"]
    assert {name for name in clean if name not in missing} == {name for name in clean if "depth/" in name}
    for metrics in rest:
        assert metrics.keys() == clean.keys()
    assert cv2.imread(str(run / "corrupted_best.png")) is not None
    assert len(json.loads((tmp_path / "out/corrupted/corrupted_best.json").read_text())["rows"]) == 1 + 2 * 11
    (program,) = blocks("robustness.md", "python")
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(program.replace("/data/rooms", str(rooms)), values)
    assert [str(row.corruption) for row in values["rows"]] == ["depth=shift:4"]
    assert (values["sample"].images[1] == 0).mean() > 0.29


@pytest.mark.parametrize(
    ("page", "names", "run"),
    [
        ("adding_an_encoder.md", ["train", "evaluate"], "plain"),
        ("adding_a_fusion.md", ["train", "predict"], "once"),
    ],
)
def test_adding_what_is_imported(tmp_path: Path, page: str, names: list[str], run: str) -> None:
    rooms = prepare_rooms(tmp_path / "rooms")
    write_photo(rooms, tmp_path)
    changes = {"data.root=/data/rooms": f"data.root={rooms}"}
    found = commands(page, changes, start="cen --import", small=SHORT["segmentation"])
    assert list(map(name_of, found)) == names
    cen(tmp_path, *found)
    config = json.loads((tmp_path / "runs" / run / "config.json").read_text())
    chosen = {"plain": config["config"]["model"]["encoder"], "once": config["config"]["fusion"]["name"]}
    assert chosen[run] == {"plain": "plain_net", "once": "concat_once"}[run]
    assert config["imports"] == [{"plain": "examples.own_encoder", "once": "examples.own_fusion"}[run]]


def test_runs(tmp_path: Path) -> None:
    """Of as many steps as show each command's effect."""
    rooms = prepare_rooms(tmp_path / "rooms")
    old, new = (f"runs/demo/step_{step:06d}.pt" for step in (100, 2))
    changes = {"data.root=/data/rooms": f"data.root={rooms}", old: new}
    found = commands("runs.md", changes, small=[*SHORT["segmentation"], "model.encoder=plain_net"])
    names = list(map(name_of, found))
    assert names == ["train", "train", "evaluate", "evaluate", "export", "train", "train"]
    steps = {1: 4, 5: 3, 6: 3}
    cen(
        tmp_path,
        *([*words, f"run.steps={steps[i]}"] if i in steps else words for i, words in enumerate(found)),
    )
    runs = tmp_path / "runs"
    assert [*checkpoint.numbered(runs / "demo")] == [2, 3]
    assert [*checkpoint.numbered(runs / "branch")] == [3]
    for folder in ("demo", "branch"):
        assert checkpoint.load(runs / folder)[1]["loop"]["step"] == 3
    assert (runs / "demo" / "evaluation_best.json").is_file()
    assert (tmp_path / "out" / "step_100" / "evaluation_step_000002.json").is_file()
    assert (tmp_path / "net.safetensors").is_file()
    written = {path.name for path in (runs / "demo").iterdir()} - {
        path.name for path in runs.rglob("evaluation*")
    }
    page = (ROOT / "docs" / "runs.md").read_text()
    told = set(re.findall(r"`([\w.]+)/?`", page.partition("## ")[0])) | {"step_000002.pt", "step_000003.pt"}
    assert written <= told


def test_predicting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With videos in place of cameras, and the watch ended once it has done its work."""
    save_narrow(tmp_path / "runs" / "demo" / "best.pt")
    rgb, depth = rgb_frames(), depth_frames()
    for index, folder in enumerate(("scenes/kitchen", "scenes/hall")):
        (tmp_path / folder).mkdir(parents=True)
        for kind, image in (("rgb", rgb[index]), ("depth", depth[index])):
            cv2.imwrite(str(tmp_path / folder / f"{kind}_7.png"), image)
    for kind, name in (("rgb", "photo"), ("depth", "depth")):
        (tmp_path / "inbox" / kind).mkdir(parents=True)
        for copy in (tmp_path / f"{name}.png", tmp_path / "inbox" / kind / "room.png"):
            shutil.copy(tmp_path / "scenes" / "hall" / f"{kind}_7.png", copy)
    write_clip(tmp_path / "clip.avi", rgb, "FFV1")
    write_clip(tmp_path / "depth.avi", [(frame / 200).astype(np.uint8) for frame in depth], "FFV1")
    changes = {"0": "clip.avi", "300": "2"}
    changes |= {f"{kind}=rtsp://robot/{name}": f"{kind}={file}.avi" for kind, name, file in CAMERAS}
    found = commands("predicting.md", changes)
    (watch,) = (words for words in found if "--watch" in words)
    cen(tmp_path, *(words for words in found if words is not watch))
    labels = {path.name for path in (tmp_path / "out/patterns/labels").iterdir()}
    assert labels == {"kitchen_7.png", "hall_7.png"}
    assert (tmp_path / "out/files/labels/photo.png").is_file()
    assert {path.name for path in (tmp_path / "out").glob("*/overlays/*.mp4")} == {"clip.mp4"}
    assert len(list((tmp_path / "out").glob("*/overlays/*.mp4"))) == 2
    monkeypatch.chdir(tmp_path)
    ended = until(tmp_path / "out/watched/overlays/room.png", stop=signal.SIGTERM)
    assert main(watch) == 0
    ended.join()
    (program,) = blocks("predicting.md", "python")
    values: dict[str, Any] = {"depth": depth[0]}
    exec(program, values)
    assert values["labels"].shape == values["unsure"].shape == depth[0].shape
