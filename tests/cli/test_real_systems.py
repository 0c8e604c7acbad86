"""Every system of Table 3 through the commands, on real images; ``make systems`` runs this, in minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.__main__ import main
from models.training import checkpoint, registry

pytestmark = pytest.mark.systems

RECIPES = (
    "nyudv2_fcn32s",
    "nyudv2_fusenet",
    "nyudv2_acnet",
    "nyudv2_adapnetpp",
    "nyudv2_ssma",
    "nyudv2_rdfnet50",
    "nyudv2_gnn3d",
    "nyudv2_esanet_resnet34_nbt1d",
    "nyudv2_cen_esanet_resnet34_nbt1d",
    "nyudv2_cen_segformer_b2",
)
SMALL = [
    *["data.batch_size=2", "data.crop=96", "data.shorter_side=96", "run.workers=0", "run.device=cpu"],
    *["run.log_steps=1", "run.checkpoint_steps=5", "eval.pictures=0", "eval.limit=2", "eval.scales=0.5"],
    *["model.frozen_statistics=false", "data.depth_scale=5000"],
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_steps_resume_evaluate_and_predict(recipe: str, shared: Path, tmp_path: Path) -> None:
    sample = shared / "data" / "nyudv2_sample"
    if not sample.is_dir():
        pytest.skip("needs the real images nyudv2_sample beside the checkout")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    settings = ["train", recipe, f"data.root={sample}", *SMALL]
    assert main([*settings, f"run.output={whole}", "run.steps=10"]) == 0
    assert main([*settings, f"run.output={halves}", "run.steps=5"]) == 0
    assert main([*settings, f"run.output={halves}", "run.steps=10", "--resume"]) == 0
    one, other = (checkpoint.load(run / "last.pt")[1]["task"]["net"] for run in (whole, halves))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
    assert main(["evaluate", str(whole)]) == 0
    metrics = json.loads((whole / "evaluation_best.json").read_text())["metrics"]
    assert 0 < metrics["ensemble/pixel_accuracy"] < 1
    colors, _, depth = (sample / "val.txt").read_text().splitlines()[0].split("\t")
    files = ["--rgb", str(sample / colors), "--depth", str(sample / depth)]
    needed = 2 if len(registry.find(recipe).data.modalities) == 1 else 4
    assert main(["predict", str(whole), *files[:needed], "--output", str(tmp_path / "labels")]) == 0
    assert any((tmp_path / "labels").rglob("*.png"))
    # Compares the file's answers with the network's on validation images.
    exported = main(["export", str(whole), "--output", str(tmp_path / "net.pt2"), "--scenes", "2"])
    # torch.export asks whether 1 can be divided by the sizes of a Mix Transformer's maps.
    assert exported == (2 if "segformer" in recipe else 0)
