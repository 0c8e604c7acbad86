"""Every registered encoder and fusion keeps its contract, and so do the examples'."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import examples.own_encoder
import examples.own_fusion
import examples.own_system
import models
from models.data import prepare_synthetic
from models.fusion import FusionStage
from models.networks.fusion.base import FUSIONS
from models.segmentation.losses import segmentation_loss
from tests.helpers import vision
from tests.helpers.encoder_contract import check_encoder
from tests.helpers.fusion_contract import check_fusion
from tests.helpers.own_recipes import train_two_steps
from tests.helpers.paths import ROOT
from tests.helpers.system_contract import check_system

STANDARD = sys.stdlib_module_names


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet18_nbt1d", "plain_net", "mit_b0"])
def test_encoders(name: str) -> None:
    assert name in models.encoders()
    check_encoder(name)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "tf_efficientnet_lite0", "hrnet_w18_small"])
def test_encoders_of_timm(name: str) -> None:
    vision.timm()
    check_encoder(f"timm:{name}", has_stages=name != "hrnet_w18_small")


@pytest.mark.parametrize("name", models.fusions())
def test_fusions(name: str) -> None:
    check_fusion(FUSIONS[name]())


def test_the_example_of_a_system() -> None:
    check_system("own_system", (3, 1), dropout=0.1, width=4)
    check_system("own_system", (3, 3, 1), dropout=0.1, width=4)


@pytest.mark.parametrize("stage", [1, 4])
def test_streams_are_joined_after_any_stage(stage: int) -> None:
    check_fusion(examples.own_fusion.ConcatOnce(stage), num_modalities=3 if stage == 1 else 2)


def test_concatenation_of_the_example_by_hand() -> None:
    block = examples.own_fusion.Concat(3, 2).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    fused, feature = block(x)
    weight = block.reduce.weight[:, :, 0, 0]
    expected = torch.einsum("oc,nchw->nohw", weight, torch.cat([x[:2], x[2:]], 1))
    torch.testing.assert_close(fused, expected)
    assert feature is fused


class Distance(FusionStage):
    """Adds a loss: the modalities' mean squared difference."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = x.chunk(2)
        self.loss = 0.5 * (one - other).square().mean()
        return x, x


def test_a_loss_of_a_stage_is_part_of_the_training_loss() -> None:
    class Close(models.fusion.NoFusion):
        def after_stage(self, stage: int, channels: int, num_modalities: int) -> nn.Module | None:
            return Distance() if stage == 4 else None

    net = models.refinenet("resnet18", 5, 2, width=8, fusion=Close(), frozen_statistics=False)
    x, target = torch.randn(4, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long)
    loss = segmentation_loss(net, net(x), target, sparsity=0.0, per_output=False, ignore_index=255)
    expected = net.encoder.fusion_stages["4"].loss
    assert expected > 0
    assert torch.equal(loss.fusion, expected)
    torch.testing.assert_close(loss.total, loss.entropies.sum() + expected)


@pytest.mark.parametrize("example", ["own_encoder", "own_fusion", "own_system"])
def test_examples_are_short_and_train(example: str, tmp_path: Path) -> None:
    assert len((ROOT / "examples" / f"{example}.py").read_text().splitlines()) <= 60
    rooms = prepare_synthetic(tmp_path / "rooms", train=4, val=2, size=(48, 64), seed=0)
    train_two_steps(f"examples.{example}:recipe", rooms, tmp_path / "run")


def test_networks_import_torch_and_cen_ext_alone() -> None:
    """At module level; what a file needs only when it is asked for (timm, safetensors) is imported there."""
    allowed = {"torch", "cen_ext", "models.networks", "__future__"}
    for path in sorted((ROOT / "models" / "networks").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in names:
                if name.split(".")[0] in ("models", "torch", "cen_ext") or "." in name:
                    ours = name.startswith("models.networks") or name.split(".")[0] in allowed
                    assert ours or name.split(".")[0] in STANDARD, f"{path}: imports {name}"
                else:
                    assert name in allowed | STANDARD, f"{path}: imports {name}"
