"""evaluate with a network that reads the classes off its input, so that every count is known."""

import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from models.data import DataError, Sample, palette
from models.segmentation import SegmentationOutput
from models.segmentation.evaluate import chosen_images, evaluate, example_images
from models.segmentation.metrics import SHARE, SegmentationMetrics, class_rows, class_table, write_class_csv
from models.segmentation.settings import DataSettings, EvalSettings, SegmentationRecipe
from models.segmentation.visualize import contact_sheet, legend
from models.training.settings import RunSettings
from models.visualize import CELL
from tests.helpers.training_runs import prepare_rooms, tiny_task

K, IGNORE = 4, 255
SIZES = [(40, 56), (40, 56), (40, 56), (33, 70), (64, 40)]


class Reads(nn.Module):
    """Says the class that a pixel's first channel holds; the first branch says the next one.

    The ensemble is the second branch's but for the third class, which is lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> SegmentationOutput:
        assert not self.training
        self.batches.append(x.shape[0] // 2)
        classes = torch.arange(K, dtype=torch.float32)[:, None, None]
        away = (x[:, :1] - classes).abs()
        branches = -away.unflatten(0, (2, -1))
        lost = torch.tensor([0.0, 0.0, 9.0, 0.0])[:, None, None]
        return SegmentationOutput(
            torch.stack([branches[0].roll(1, 1), branches[1]]), branches[1] - lost, None
        )


def samples() -> list[Sample]:
    """Classes in blocks; depth holds the class, and so does the red of rgb."""
    rng = np.random.default_rng(0)
    found = []
    for index, size in enumerate(SIZES):
        blocks = rng.integers(0, K, (4, 5), np.uint8)
        target = cv2.resize(blocks, size[::-1], interpolation=cv2.INTER_NEAREST)
        depth = target[:, :, None].astype(np.float32)
        rgb = np.repeat(depth, 3, axis=2)
        void = target.copy()
        void[:5] = IGNORE
        found.append(Sample((rgb, depth), void, f"scene {index}", ("rgb", "depth")))
    return found


def recipe(**settings: object) -> SegmentationRecipe:
    settings = {"interpolation": "bilinear", **settings}
    return SegmentationRecipe(
        data=DataSettings(num_classes=K, ignore_index=IGNORE),
        eval=EvalSettings(**settings),
        run=RunSettings(workers=0),
    )


def test_a_limit_is_spread_evenly() -> None:
    data = samples()
    for limit, chosen in ((1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (4, [0, 1, 3, 4]), (5, list(range(5)))):
        assert chosen_images(data, recipe(limit=limit)) == chosen
    assert chosen_images(data, recipe()) == chosen_images(data, recipe(limit=9)) == list(range(5))
    whole = chosen_images(range(654), recipe(limit=100))
    assert (len(set(whole)), whole[0], whole[-1]) == (100, 0, 653)
    assert {b - a for a, b in itertools.pairwise(whole)} == {6, 7}


def test_training_and_the_command_evaluate_the_same_images(tmp_path: Path) -> None:
    """The first and the last of three."""
    task = tiny_task(prepare_rooms(tmp_path / "rooms"), "eval.limit=2")
    found = evaluate(task.net, task.validation, task.recipe)
    ends = SegmentationMetrics(found.names, 11, IGNORE)
    for index in (0, 2):
        one = evaluate(task.net, Subset(task.validation, [index]), task.recipe)
        ends._confusion += one.confusion
    assert torch.equal(found.confusion, ends.confusion)
    assert task.evaluate(lambda: False) == found.compute()
    assert found.compute()["ensemble/mean_iou"] == ends.compute()["ensemble/mean_iou"]


def expected(chosen: Sequence[Sample]) -> Tensor:
    """``[3, K, K]``"""
    confusion = torch.zeros(3, K, K, dtype=torch.long)
    for sample in chosen:
        for truth in sample.target[sample.target != IGNORE].tolist():
            confusion[0, truth, (truth + 1) % K] += 1
            confusion[1, truth, truth] += 1
            # Of the classes beside 2, that are as near, the first.
            confusion[2, truth, 1 if truth == 2 else truth] += 1
    return confusion


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        ({}, [1] * 5),
        ({"limit": 3}, [1] * 3),
        ({"limit": 99}, [1] * 5),
        ({"flip": True}, [1] * 10),
        ({"window": 32, "overlap": 0.0, "batch_size": 4}, [4, 4, 4, 4, 2, 4]),
    ],
)
def test_counts(settings: dict[str, int], batches: list[int]) -> None:
    net, data = Reads(), samples()
    found = evaluate(net, data, recipe(**settings))
    assert found is not None
    chosen = [data[index] for index in ((0, 2, 4) if settings.get("limit") == 3 else range(5))]
    assert torch.equal(found.confusion, expected(chosen))
    assert net.batches == batches
    assert net.training


def test_images_of_different_size_in_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match="of one size"):
        evaluate(Reads(), samples(), recipe(batch_size=2))


def test_parts_add_up_to_the_whole() -> None:
    data = samples()
    parts = [evaluate(Reads(), Subset(data, range(part, 5, 2)), recipe()) for part in range(2)]
    whole = evaluate(Reads(), data, recipe())
    assert torch.equal(sum(part.confusion for part in parts), whole.confusion)


def test_it_stops_when_asked() -> None:
    net, asked = Reads(), []
    assert evaluate(net, samples(), recipe(), lambda: bool(asked.append(0)) or len(asked) == 2) is None
    assert len(net.batches) == 2
    assert net.training


def test_pictures_show_inputs_target_and_outputs() -> None:
    net, data = Reads(), samples()
    found = example_images(net, data, recipe(pictures=3))
    assert list(found) == ["scene 0", "scene 2", "scene 4"]
    assert net.training
    for name, pictures in found.items():
        assert list(pictures) == ["input rgb", "input depth", "target", "rgb", "depth", "ensemble"]
        sample = data[int(name[-1])]
        truth = np.where(sample.target == IGNORE, 0, sample.target)
        shown = palette(K)[truth] * (sample.target != IGNORE)[:, :, None]
        np.testing.assert_array_equal(pictures["target"], shown)
        np.testing.assert_array_equal(pictures["depth"][5:], shown[5:])
        np.testing.assert_array_equal(pictures["rgb"][5:], palette(K)[(truth + 1) % K][5:])
    assert list(example_images(net, data, recipe(pictures=3), 9)) == [sample.name for sample in data]


def test_rows_by_class(tmp_path: Path) -> None:
    counts = SegmentationMetrics(("rgb", "ensemble"), K, IGNORE)
    target = torch.tensor([[[0, 0, 0, 1, IGNORE]]])
    counts.update([torch.tensor([[[0, 0, 1, 1, 1]]]), torch.tensor([[[0, 0, 0, 2, 3]]])], target)
    names = ("wall", "floor, tiled", "bed", "lamp")
    rows = class_rows(counts, names)
    assert rows == {
        "wall": {SHARE: 0.75, "rgb": 2 / 3, "ensemble": 1.0},
        "floor, tiled": {SHARE: 0.25, "rgb": 0.5, "ensemble": 0.0},
        "bed": {SHARE: 0.0, "rgb": None, "ensemble": 0.0},
        "lamp": {SHARE: 0.0, "rgb": None, "ensemble": None},
    }
    lines = class_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[-3:] == ["25.00", "50.00", "0.00"]
    assert lines[4].split() == ["lamp", "0.00", "-", "-"]
    write_class_csv(tmp_path / "classes.csv", rows)
    with (tmp_path / "classes.csv").open(newline="") as file:
        read = {row.pop("class"): row for row in csv.DictReader(file)}
    for name in names:
        assert {key: float(cell) if cell else None for key, cell in read[name].items()} == rows[name]
    json.dumps(rows, allow_nan=False)


def test_a_sheet_of_scenes_of_any_size() -> None:
    scenes = {
        name: {what: np.full((*size, 3), shade, np.uint8) for what, shade in (("input", 10), ("target", 200))}
        for name, size in (("small", (30, 60)), ("large", (500, 400)))
    }
    sheet = contact_sheet(scenes, ["wall"] * K)
    heights = [20 + 120, 20 + 300, 40]  # captions and pictures, legend
    assert sheet.shape == (sum(heights) + 2 * 4, 2 * CELL + 4, 3)
    for top, bottom in ((20, 140), (164, 464)):
        assert (sheet[top:bottom, :CELL] == 10).all()
        assert (sheet[top:bottom, CELL + 4 :] == 200).all()
        assert (sheet[top - 20 : top] == 255).mean() > 0.8
        assert (sheet[top - 20 : top] < 100).any()
    np.testing.assert_array_equal(sheet[-32, 5], palette(K)[0])
    assert contact_sheet(scenes).shape[0] == sheet.shape[0] - 44


def test_every_class_has_its_colour_in_the_legend() -> None:
    found = legend([f"class {label}" for label in range(40)], 800)
    assert found.shape == (8 * 20, 800, 3)
    for label, shade in enumerate(palette(40)):
        top, left = 20 * (label // 5), 160 * (label % 5)
        np.testing.assert_array_equal(found[top + 10, left + 8], shade)
