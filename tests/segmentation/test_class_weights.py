"""Class weights of a training: counted in its labels, recorded, restored; refused where they contradict."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from models.__main__ import main
from models.data import SYNTHETIC_CLASSES, DataError, SegmentationSet
from models.data.classes import NYU40
from models.segmentation.class_weights import count_weights, median_frequency
from models.segmentation.settings import LossSettings
from models.training import checkpoint
from models.training.errors import UsageError
from tests.helpers import trees
from tests.helpers.training_runs import column, command, prepare_rooms, tiny_task

COUNTED = "loss.class_weights=median_frequency"


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_rooms(tmp_path_factory.mktemp("data") / "rooms")


def by_hand(maps: list[np.ndarray], classes: int) -> np.ndarray:
    """The definition, class by class, of label maps in which void is 255."""
    frequency = {}
    for c in range(classes):
        those = [labels for labels in maps if (labels == c).any()]
        if those:
            counted = sum((labels != 255).sum() for labels in those)
            frequency[c] = sum((labels == c).sum() for labels in those) / counted
    median = np.median(list(frequency.values()))
    return np.array([median / frequency[c] if c in frequency else 0 for c in range(classes)])


def stored(rooms: Path) -> list[np.ndarray]:
    rows = (rooms / "train.txt").read_text().splitlines()
    return [cv2.imread(str(rooms / row.split("\t")[1]), cv2.IMREAD_UNCHANGED) for row in rows]


def test_median_frequency() -> None:
    # Of class 1 half of one image, of class 0 the other half and all of another one.
    weights = median_frequency(np.array([6, 2, 0, 1]), np.array([8, 4, 0, 4]))
    frequencies = [6 / 8, 2 / 4, 1 / 4]
    assert weights.tolist() == pytest.approx([0.5 / 0.75, 1, 0, 2])
    assert sorted(frequencies)[1] == 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_counting_the_labels_of_a_set(tmp_path: Path, workers: int) -> None:
    tree = trees.nyu_cen(tmp_path)
    dataset = SegmentationSet(tmp_path, "train", modalities=("rgb",), num_classes=40)
    maps = [trees.void_255(scene.classes) for scene in tree.scenes["train"]]
    weights, note = count_weights(dataset, workers)
    np.testing.assert_allclose(weights, by_hand(maps, 40), rtol=1e-12)
    absent = [name for name, weight in zip(dataset.class_names, weights, strict=True) if weight == 0]
    assert f"from {len(maps)} label maps, counted in " in note
    assert ("which no pixel is of" in note) == bool(absent)
    assert all(name in note for name in absent)


def test_merged_classes_are_counted_as_merged(tmp_path: Path) -> None:
    trees.nyu_cen(tmp_path)
    dataset = SegmentationSet(tmp_path, "train", modalities=("rgb",), num_classes=13, merge="nyu13")
    maps = [dataset.sample(index).target for index in range(len(dataset))]
    np.testing.assert_allclose(count_weights(dataset, 0)[0], by_hand(maps, 13), rtol=1e-12)


def test_a_broken_label_map_is_named(rooms: Path, tmp_path: Path) -> None:
    trees.nyu_cen(tmp_path)
    dataset = SegmentationSet(tmp_path, "train", modalities=("rgb",), num_classes=40)
    path = sorted((tmp_path / "masks").iterdir())[1]
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=path.name):
        count_weights(dataset, 0)


def test_weights_of_real_rooms(shared: Path) -> None:
    root = shared / "data" / "nyudv2_sample"
    weights, _ = count_weights(SegmentationSet(root, "train", modalities=("rgb",), num_classes=40), 0)
    np.testing.assert_allclose(weights, by_hand(stored(root), 40), rtol=1e-12)
    assert 0 < weights[NYU40.index("wall")] < weights[NYU40.index("lamp")]


def run(rooms: Path, output: Path, *overrides: str) -> dict[str, Any]:
    assert main(command(rooms, output, COUNTED, "eval.sheet=0", *overrides)) == 0
    return json.loads((output / "config.json").read_text())


def test_a_run_records_its_weights_and_resumes_with_them(rooms: Path, tmp_path: Path) -> None:
    """Also where the labels have changed since."""
    own = prepare_rooms(tmp_path / "rooms")
    expected = by_hand(stored(own), len(SYNTHETIC_CLASSES))
    config = run(own, tmp_path / "run", "run.steps=3", "loss.dice=0.5")
    assert config["class_weights"] == pytest.approx(expected.tolist(), rel=1e-12)
    assert config["config"]["loss"]["class_weights"] == "median_frequency"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "class weights by median_frequency from 12 label maps, counted in " in log
    for path in (own / "masks").iterdir():
        cv2.imwrite(str(path), np.full_like(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), 1))
    resumed = ["--resume", "run.steps=4", "eval.sheet=0"]
    assert main([*command(own, tmp_path / "run", COUNTED, "loss.dice=0.5"), *resumed]) == 0
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["class_weights"] == config["class_weights"]
    )
    contents = checkpoint.load(tmp_path / "run")[1]
    assert contents["class_weights"] == contents["task"]["class_weights"].tolist() == config["class_weights"]
    assert column(tmp_path / "run", "losses.csv", "loss/dice")[0] > 0
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "net.safetensors")]) == 0


def test_a_step_with_given_weights_logs_its_kind(rooms: Path) -> None:
    weights = [0.0, *[0.5] * 10]
    given = f"loss.class_weights={','.join(map(str, weights))}"
    task = tiny_task(rooms, "loss.kind=ohem", given, "loss.dice=0.5", "loss.label_smoothing=0.1")
    losses = task.step(next(iter(task.batches(0, 0))), 0)
    assert list(losses) == ["loss", "ohem", "penalty", "dice", "rgb", "depth", "ensemble"]
    assert set(task.shown) <= losses.keys()
    total = losses["ohem"] + losses["penalty"] + losses["dice"]
    torch.testing.assert_close(losses["loss"], total)
    assert task.class_weights.tolist() == weights
    assert "class_weights" not in task.describe()  # the settings have them


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["loss.kind=focal", "loss.label_smoothing=0.1"],
            "loss.label_smoothing=0.1 has no meaning with loss.k",
        ),
        (["loss.focal_gamma=1"], "loss.focal_gamma=1.0 has no meaning with loss.kind=cross_entropy: it goes"),
        (["loss.ohem_threshold=0.9"], "ohem_threshold=0.9 has no .* it goes with loss.kind=ohem"),
        (
            ["loss.ohem_min_kept=0.1", "loss.kind=focal"],
            "ohem_min_kept=0.1 has no meaning with loss.kind=foc",
        ),
        (["loss.class_weights=1,2"], r"one number for each of data\.num_classes=11 classes, got 2"),
        (["loss.class_weights=median"], "expected a number, or one of median_frequency; did you mean"),
        (["loss.kind=dice"], "expected one of cross_entropy, ohem, focal"),
    ],
)
def test_settings_that_contradict(rooms: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny_task(rooms, *overrides)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"class_weights": (1.0, -1.0)}, "class_weights must be numbers from 0 on, one of them above 0"),
        ({"class_weights": (0.0, 0.0)}, "class_weights must be numbers from 0 on, one of them above 0"),
        ({"class_weights": (1.0, math.inf)}, "class_weights must be numbers from 0 on"),
        ({"class_weights": ()}, "class_weights must be numbers from 0 on"),
        ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1"),
        ({"focal_gamma": -1.0}, "focal_gamma must be a number from 0 on"),
        ({"ohem_threshold": 0.0}, "ohem_threshold must be above 0 and at most 1"),
        ({"ohem_min_kept": 1.1}, "ohem_min_kept must be from 0 to 1"),
        ({"dice": math.nan}, "dice must be a number from 0 on"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**values)
