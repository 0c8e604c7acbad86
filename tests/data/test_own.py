"""The page "Your own data" of docs/data.md: its description and its command are run."""

import json
import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.__main__ import main
from models.data import IMAGENET_MEAN, IMAGENET_STD, DataError, SegmentationSet
from tests.helpers.paths import ROOT
from tests.helpers.trees import SIZE, Scene, scene, units, void_255, write

PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
OWN = PAGE.split("## Your own data")[1]


def thermal_of(one: Scene) -> np.ndarray:
    return np.rint(27000 + 100 * one.depth).astype(np.uint16)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Folders as the page describes them."""
    (description,) = re.findall(r"```json\n(.*?)```", OWN, re.S)
    (tmp_path / "layout.json").write_text(description)
    for split, names in (("train", ("a", "b 2", "c.3")), ("val", ("d",))):
        for name in names:
            one = scene(ord(name[0]), 4)
            write(tmp_path / f"color/{name}.jpg", one.rgb)
            write(tmp_path / f"depth/{name}.png", units(one.depth, 1000))
            write(tmp_path / f"infrared/{name}.png", thermal_of(one))
            write(tmp_path / f"annotations/{name}.png", void_255(one.classes))
        (tmp_path / f"{split}.txt").write_text("\n".join(names) + "\n")
    return tmp_path


def test_values(own: Path) -> None:
    dataset = SegmentationSet(own, "train", modalities=("thermal", "rgb", "depth"), num_classes=4)
    assert dataset.class_names == ("soil", "crop", "weed", "stone")
    assert [dataset[i].name for i in range(3)] == ["a", "b 2", "c.3"]
    one, sample = scene(ord("b"), 4), dataset[1]
    thermal, rgb, depth = sample.images
    np.testing.assert_allclose(thermal[:, :, 0], (thermal_of(one) - 27000.0) / 4000, atol=1e-6)
    np.testing.assert_allclose(depth[:, :, 0], one.depth, rtol=1e-6)
    assert np.abs(rgb - (one.rgb / 255 - IMAGENET_MEAN) / IMAGENET_STD).mean() < 0.1
    np.testing.assert_array_equal(sample.target, void_255(one.classes))


def test_the_pages_command(own: Path, tmp_path: Path) -> None:
    """As it stands, but for the folder, the weights and a size that suits a test."""
    (line,) = [line for line in OWN.splitlines() if line.startswith("python -m models train")]
    words = shlex.split(line)[3:]
    assert words[1] == "nyudv2_cen_refinenet101"
    command = [word.replace("data.root=FOLDER", f"data.root={own}") for word in words]
    command = [word for word in command if not word.startswith("model.weights=")]
    small = ["model.encoder=resnet18", "model.frozen_statistics=false", "model.width=4", "data.batch_size=2"]
    small += ["data.crop=32", "data.shorter_side=32", "eval.pictures=1", "run.steps=1", "run.workers=0"]
    output = tmp_path / "run"
    assert main([*command, *small, f"run.output={output}"]) == 0
    settings = json.loads((output / "config.json").read_text())["config"]
    assert settings["data"]["modalities"] == ["rgb", "depth", "thermal"]
    assert main(["evaluate", str(output)]) == 0
    found = json.loads((output / "evaluation_best.json").read_text())
    assert list(found["classes"]) == ["soil", "crop", "weed", "stone"]
    inputs = [f"rgb={own}/color/d.jpg", f"depth={own}/depth/d.png", f"thermal={own}/infrared/d.png"]
    flags = [part for word in inputs for part in ("--input", word)]
    assert main(["predict", str(output), *flags, "--output", str(tmp_path / "out")]) == 0
    labels = cv2.imread(str(tmp_path / "out/labels/d.png"), cv2.IMREAD_UNCHANGED)
    assert labels.shape == SIZE
    assert labels.max() < 4


def test_commands_of_the_page_are_understood() -> None:
    """Recipe and fields of every training command exist; every other command's flags do."""
    commands = [
        shlex.split(line, comments=True)[3:] for line in PAGE.splitlines() if line.startswith("python")
    ]
    assert {words[0] for words in commands} == {"train", "data", "prepare", "predict", "evaluate"}
    for words in commands:
        if words[0] in ("train", "data"):
            assert main(["recipes", *words[1:]]) == 0
        elif words[0] == "prepare":  # those of networks are run in tests/cli/test_missing.py
            with pytest.raises(SystemExit) as caught:
                main([*words, "--help"])
            assert caught.value.code == 0


def test_without_lists(own: Path) -> None:
    description = json.loads((own / "layout.json").read_text())
    description["lists"] = ""
    description["files"] = {kind: f"{{split}}/{path}" for kind, path in description["files"].items()}
    description["files"]["rgb"] = "{split}/color/{name}.*"
    (own / "layout.json").write_text(json.dumps(description))
    for folder in ("color", "depth", "infrared", "annotations"):
        for split, names in (("train", ("a", "c.3")), ("val", ("d",))):
            (own / split / folder).mkdir(parents=True)
            for name in names:
                (path,) = (own / folder).glob(f"{name}.*g")
                path.rename(own / split / folder / path.name)
    options = {"modalities": ("rgb", "thermal"), "num_classes": 4}
    names = {split: [s.name for s in SegmentationSet(own, split, **options)] for split in ("train", "val")}
    assert names == {"train": ["a", "c.3"], "val": ["d"]}
    for path in (own / "val/color").iterdir():
        path.unlink()
    with pytest.raises(
        DataError, match=r"val/color: no file there is named like \{split\}/color/\{name\}\.\*"
    ):
        SegmentationSet(own, "val", **options)


def test_scenes_of_one_name_in_several_folders(own: Path) -> None:
    for folder, suffix in (("color", "jpg"), ("depth", "png"), ("infrared", "png"), ("annotations", "png")):
        for place in "AB":
            (own / folder / place).mkdir()
            shutil.copy(own / folder / f"d.{suffix}", own / folder / place / f"s5.{suffix}")
    (own / "val.txt").write_text("A/s5\nB/s5\nd\n")
    assert [sample.name for sample in SegmentationSet(own, "val", num_classes=4)] == ["A/s5", "B/s5", "d"]


def test_labels_named_after_the_picture(own: Path) -> None:
    description = json.loads((own / "layout.json").read_text())
    description["files"]["labels"] = "{rgb}/../../annotations/d.png"
    (own / "layout.json").write_text(json.dumps(description))
    assert SegmentationSet(own, "val", num_classes=4)[0].name == "annotations/d"


def test_a_name_that_is_no_modality(own: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown modality 'termal': .*thermal.*; did you mean 'thermal'"):
        SegmentationSet(own, "train", modalities=("rgb", "termal"), num_classes=4)


def test_normals_of_files(own: Path) -> None:
    """Not normalised as colors are; what is black is missing."""
    description = json.loads((own / "layout.json").read_text())
    description["files"]["normals"] = "normals/{name}.png"
    (own / "layout.json").write_text(json.dumps(description))
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(*SIZE, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    stored = np.rint(127.5 + 127.5 * normals).astype(np.uint8)
    stored[:4] = 0
    write(own / "normals/d.png", stored)
    options = {"modalities": ("normals", "rgb"), "num_classes": 4}
    read = SegmentationSet(own, "val", **options)[0].images[0]
    assert read.dtype == np.float32
    np.testing.assert_allclose(read[4:], normals[4:], atol=0.5 / 127.5 + 1e-6)
    assert (read[:4] == 0).all()
    write(own / "normals/d.png", stored[:, :, 0])
    with pytest.raises(
        DataError, match=r"d\.png: expected normals of 8 bits and 3 channels, found 8 bits and 1"
    ):
        SegmentationSet(own, "val", **options)[0]
