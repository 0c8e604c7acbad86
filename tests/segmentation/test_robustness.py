"""Metrics with corrupted inputs: whose images they are of, and which corruptions cannot be measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models import fusion
from models.data import DataError
from models.data.corruption import Corruption
from models.segmentation.build import open_validation
from models.segmentation.evaluate import evaluate
from models.segmentation.robustness import Measured, figure, measure, plan, table
from models.segmentation.settings import SegmentationRecipe
from models.segmentation.task import SegmentationTask
from models.training.errors import UsageError
from tests.helpers.training_runs import prepare_rooms, tiny_task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> SegmentationTask:
    """A network whose scales are random, so that channels are exchanged."""
    return tiny_task(prepare_rooms(tmp_path_factory.mktemp("data") / "rooms"))


def changed(recipe: SegmentationRecipe, **settings: object) -> SegmentationRecipe:
    """The recipe with other settings of evaluation."""
    return replace(recipe, eval=replace(recipe.eval, **settings))


def test_missing_is_evaluation_without(task: SegmentationTask) -> None:
    """Bit for bit, from the samples to the metrics."""
    for name in ("rgb", "depth"):
        without = changed(task.recipe, without=(name,))
        found = evaluate(task.net, open_validation(without), without)
        assert found is not None
        (row,) = measure(task.net, task.validation, task.recipe, [Corruption(name, "missing")])
        assert row == (Corruption(name, "missing"), found.compute())
        assert row.metrics.keys() < task.evaluate(lambda: False).keys()


def test_each_corruption_is_measured_alone_on_the_chosen_images(task: SegmentationTask) -> None:
    """Of three the first and the last, whose corrupted inputs are made by hand."""
    recipe = changed(task.recipe, limit=2)
    planned = plan(task.validation, recipe, ["depth=shift:3,blank", "rgb=blank", "depth=shift:3"])
    assert list(map(str, planned)) == ["depth=shift:3", "depth=blank", "rgb=blank"]
    rows = measure(task.net, task.validation, recipe, planned)
    assert rows == [measure(task.net, task.validation, recipe, [each])[0] for each in planned]
    changes = {
        "depth=shift:3": lambda images: torch.nn.functional.pad(images[1], (3, -3, 3, -3)),
        "depth=blank": lambda images: 0 * images[1],
        "rgb=blank": lambda images: 0 * images[0],
    }
    task.net.eval()
    for row in rows:
        right, pixels = torch.zeros(3), 0
        for index in (0, 2):
            sample = task.validation[index]
            images = [torch.from_numpy(image.transpose(2, 0, 1)) for image in sample.images]
            images[row.corruption.modality == "depth"] = changes[str(row.corruption)](images)
            stacked = torch.stack([image.expand(3, -1, -1) for image in images])
            with torch.no_grad():
                out = task.net(stacked.contiguous(memory_format=torch.channels_last))
            logits = torch.cat([*out.branches, out.ensemble])
            large = torch.nn.functional.interpolate(logits, sample.target.shape, mode="bicubic")
            right += (large.argmax(1) == torch.from_numpy(sample.target.astype(np.int64))).sum((1, 2))
            pixels += sample.target.size
        for name, share in zip(("rgb", "depth", "ensemble"), right / pixels, strict=True):
            assert row.metrics[f"{name}/pixel_accuracy"] == pytest.approx(float(share), abs=2e-3)
    clean = evaluate(task.net, task.validation, recipe).compute()
    assert all(row.metrics != clean for row in rows)


def test_how_images_are_evaluated_changes_no_corruption(task: SegmentationTask) -> None:
    chosen = plan(task.validation, task.recipe, ["depth=noise:0.2,holes:0.5"])
    plain = measure(task.net, task.validation, task.recipe, chosen)
    batched = measure(task.net, task.validation, changed(task.recipe, batch_size=3), chosen[::-1])
    for row, other in zip(plain, batched[::-1], strict=True):
        assert row.corruption == other.corruption
        assert row.metrics == pytest.approx(
            other.metrics, abs=2e-3
        )  # convolutions of a batch may round apart


METRICS = {"rgb/mean_iou": 0.5, "depth/mean_iou": 0.25, "ensemble/mean_iou": 0.625, "constant/mean_iou": 0.1}


def rows() -> list[Measured]:
    lower = {name: value - 0.125 for name, value in METRICS.items()}
    alone = {name: value for name, value in METRICS.items() if not name.startswith("depth")}
    return [
        Measured(None, METRICS),
        Measured(Corruption("depth", "missing"), alone),
        Measured(Corruption("depth", "shift", 8), lower),
        Measured(Corruption("depth", "shift", -4), METRICS),
        Measured(Corruption("rgb", "shift", 4), lower),
    ]


def test_the_table_has_every_output_and_its_difference() -> None:
    assert table(rows()).splitlines() == [
        "                         rgb         depth      ensemble",
        "clean           50.00         25.00         62.50",
        "depth=missing   50.00  +0.00      -         62.50  +0.00",
        "depth=shift:8   37.50 -12.50  12.50 -12.50  50.00 -12.50",
        "depth=shift:-4  50.00  +0.00  25.00  +0.00  62.50  +0.00",
        "rgb=shift:4     37.50 -12.50  12.50 -12.50  50.00 -12.50",
    ]


def test_the_figure_has_a_panel_for_each_kind() -> None:
    panels = figure(rows()).axes
    assert [panel.get_title() for panel in panels] == ["depth", "depth: shift", "rgb: shift"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in panels[1].lines}
    assert lines == {
        "rgb": [[-4, 50], [0, 50], [8, 37.5]],
        "depth": [[-4, 25], [0, 25], [8, 12.5]],
        "ensemble": [[-4, 62.5], [0, 62.5], [8, 50]],
    }
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["clean", "missing"]
    assert np.isnan(panels[0].lines[1].get_ydata()[1])


def test_refusals(task: SegmentationTask) -> None:
    def refused(*arguments: str, recipe: SegmentationRecipe = task.recipe, **settings: object) -> str:
        here = changed(recipe, **settings)
        with pytest.raises((UsageError, DataError)) as error:
            plan(open_validation(here), here, arguments)
        return str(error.value)

    assert refused("depth=smoke").startswith("--corrupt depth=smoke: unknown kind 'smoke'")
    assert refused("rgb=blank", without=("rgb",)).startswith("--corrupt rgb=blank: expected")
    assert "depth=missing: it is the only one; depth=blank" in refused("depth=missing", without=("rgb",))
    assert "is 48x40; a shift must be of fewer pixels" in refused("rgb=shift:40")
    joined = replace(task.recipe, fusion=fusion.LateConcat())
    message = refused("rgb=blank,missing", recipe=joined)
    assert message.startswith("--corrupt rgb=missing: fusion=late_concat joins all modalities and cannot do")
    assert message.endswith("can; rgb=blank gives it an empty image")
    kinds = {each.kind for each in plan(task.validation, joined, ["all"])}
    assert kinds == {"blank", "noise", "holes", "shift"}


def test_scenes_that_lack_files(tmp_path: Path) -> None:
    root = prepare_rooms(tmp_path / "rooms")
    (root / "depth/000014.png").unlink()
    task = tiny_task(root, "data.missing=fill")
    chosen = plan(task.validation, task.recipe, ["depth"])
    assert "depth=missing" in map(str, chosen)
    with pytest.raises(
        DataError, match=r"000014\.png: the scene has no other modality than rgb, which rgb=miss"
    ):
        plan(task.validation, task.recipe, ["rgb=missing"])
    plan(task.validation, changed(task.recipe, limit=1), ["rgb=missing"])  # the scene is not looked at
    for path in (root / "depth").iterdir():
        path.unlink()
    empty = open_validation(task.recipe)
    with pytest.raises(UsageError, match="depth=blank: none of the images has a file of depth"):
        plan(empty, task.recipe, ["depth=blank"])
