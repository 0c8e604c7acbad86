"""The Cityscapes recipe: its values, a run on a generated tree, windows and sizes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tests.helpers.small_xception  # noqa: F401 - registers its encoder
from models.__main__ import main
from models.segmentation.build import build_network, open_split, with_normalization
from models.segmentation.task import SegmentationTask
from models.training import config, registry
from models.training.errors import UsageError
from tests.helpers.trees import TREES, Tree

NAME = "cityscapes_deeplabv3plus_xception65"
TINY = [
    *["model.encoder=small_xception", "model.width=8", "data.batch_size=2", "data.crop=32"],
    *["data.shorter_side=32", "eval.pictures=0", "eval.sheet=0", "run.workers=0", "run.device=cpu"],
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return TREES["cityscapes"](tmp_path_factory.mktemp("cityscapes"))


def test_the_recipes_values() -> None:
    recipe = with_normalization(registry.find(NAME))
    data, model, optim = recipe.data, recipe.model, recipe.optim
    assert (data.modalities, data.num_classes, data.crop) == (("rgb", "disparity"), 19, 769)
    assert data.normalization == ((0.5,) * 3, (0.5,) * 3)
    assert (model.network, model.encoder, model.output_stride) == ("deeplabv3plus", "xception65", 16)
    assert (model.decoder_norms, model.dropout, model.frozen_statistics) == ("shared", 0.1, False)
    assert (optim.method, optim.momentum, optim.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (optim.schedule, optim.power) == ("polynomial", 0.9)
    rates = [(stage.epochs, stage.encoder_lr, stage.decoder_lr) for stage in optim.stages]
    assert rates == [(400, 0.02, 0.2)]


def test_inputs_are_what_the_tree_holds(tree: Tree) -> None:
    """Colors from -1 to 1, disparity in units of 64 pixels with 0 where it is missing, trainIds."""
    recipe = with_normalization(config.override(registry.find(NAME), [f"data.root={tree.root}"]))
    dataset = open_split(recipe.data, "train")
    assert dataset.reader.layout.name == "cityscapes"
    for sample, scene in zip(dataset, tree.scenes["train"], strict=True):
        rgb, disparity = sample.images
        np.testing.assert_allclose(rgb, scene.rgb / 127.5 - 1, atol=1e-6)
        known = scene.depth > 0
        assert not disparity[~known].any()
        pixels = 60 * 0.25 / scene.depth[known]
        np.testing.assert_allclose(64 * disparity[known][:, 0], pixels, atol=0.5 / 256 + 1e-5)
        np.testing.assert_array_equal(sample.target, np.where(scene.classes < 0, 255, scene.classes))


def test_trains_and_evaluates_with_windows_in_several_sizes(tree: Tree, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = ["run.steps=2", "run.log_steps=1", "fusion=exchange", f"run.output={run}"]
    assert main(["train", NAME, *TINY, f"data.root={tree.root}", *steps]) == 0
    looks = ["eval.window=40", "eval.scales=0.75,1.5", "eval.flip=true"]
    assert main(["evaluate", str(run), *looks, "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("evaluation_*.json")
    found = json.loads(file.read_text())
    assert found["inference"]["window"] == 40
    assert found["images"] == 2
    for output in ("rgb", "disparity", "ensemble"):
        assert 0 <= found["metrics"][f"{output}/mean_iou"] <= 1


def test_settings_of_another_network_are_refused() -> None:
    demo = registry.find("synthetic_demo")
    for name, value, network in (
        ("decoder_norms", "private", "pspnet"),
        ("output_stride", "8", "refinenet"),
        ("decoder_init", "kaiming", "deeplabv3plus"),
    ):
        recipe = config.override(demo, [f"model.network={network}", f"model.{name}={value}"])
        with pytest.raises(
            UsageError, match=rf"^model\.{name} must be .* with model\.network={network}, got "
        ):
            build_network(recipe)
    with pytest.raises(UsageError, match=r"^model\.output_stride must be 8 or 16, got 32"):
        config.override(registry.find(NAME), ["model.output_stride=32"])
    private = config.override(registry.find(NAME), [*TINY, "fusion.convolutions=private"])
    with pytest.raises(UsageError, match=r"^model\.decoder_norms must be 'private' where "):
        build_network(private)


def test_a_batch_of_one_needs_two_modalities_that_share_a_norm(tree: Tree) -> None:
    one = [*TINY, f"data.root={tree.root}", "data.batch_size=1"]
    for wrong in (["model.decoder_norms=private"], ["data.modalities=rgb"]):
        with pytest.raises(UsageError, match=r"at least 2 with model\.network=deeplabv3plus: a norm of its "):
            SegmentationTask(config.override(registry.find(NAME), [*one, *wrong]))
    assert SegmentationTask(config.override(registry.find(NAME), one)).net.num_branches == 2
