"""The note on scales at a training's start: the way of a scale against optimizers, and the warnings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import examples.own_encoder  # noqa: F401 - registers plain_net, which takes milliseconds
import models
from models.data.survey import Overview
from models.fusion import Discard, Exchange, FixedPortion, Fusion
from models.networks.encoders import load_imagenet
from models.training.optimization import Optimization
from models.training.precision import loss_scaler
from models.training.scales import Penalty, scales_at_start, travel_by_stage
from models.training.settings import UpdateSettings

SCHEDULES = {
    "constant": UpdateSettings(),
    "polynomial": UpdateSettings(schedule="polynomial"),
    "cosine": UpdateSettings(schedule="cosine"),
    "warm-up": UpdateSettings(schedule="polynomial", power=2, warmup_steps=7),
}
STRENGTH = 0.03
STAGES = ((40, 2e-3), (25, 1e-3), (0, 1.0), (30, 5e-4))  # steps and learning rates


class Lone(nn.Module):
    """A scale on which the penalty alone acts."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor(-5.0, dtype=torch.float64))

    def forward(self) -> tuple[torch.Tensor]:
        return (STRENGTH * self.gamma.abs(),)


def trained(settings: UpdateSettings, steps: int, momentum: float | None) -> float:
    """How far a lone scale comes in the project's own updates, with fresh optimizers in each stage."""
    lone, begin = Lone(), 0
    for length, rate in STAGES:
        groups = [{"name": "all", "params": [lone.gamma], "lr": rate}]
        optimizer = (
            torch.optim.Adam(groups) if momentum is None else torch.optim.SGD(groups, momentum=momentum)
        )
        updates = Optimization(optimizer, settings, begin, length, loss_scaler("fp32", torch.device("cpu")))
        for step in range(begin, min(begin + length, steps)):
            updates.start(step)
            updates.gradients(lone, [()])
            updates.step()
        begin += length
    return 5.0 + lone.gamma.item()


@pytest.mark.parametrize("steps", [95, 50, 3])
@pytest.mark.parametrize("momentum", [0.9, 0.0, None])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_way_of_a_scale_is_what_optimizers_do(schedule: str, momentum: float | None, steps: int) -> None:
    settings = SCHEDULES[schedule]
    ways = travel_by_stage(settings, [length for length, _ in STAGES], steps, momentum)
    travel = sum(way * rate for way, (_, rate) in zip(ways, STAGES, strict=True))
    travel *= 1.0 if momentum is None else STRENGTH
    # Adam's epsilon, 1e-8, is less than 1e-6 of the gradient.
    assert trained(settings, steps, momentum) == pytest.approx(
        travel, rel=1e-12 if momentum is not None else 1e-6
    )


def test_of_a_long_training_it_is_the_formula_of_the_limit() -> None:
    """λ/(1 - m) times the sum of the rates; NYUDv2, 132 steps an epoch, three stages of 100 epochs."""
    lengths, rates = [13200] * 3, (5e-4, 2.5e-4, 1e-4)
    ways = travel_by_stage(UpdateSettings(), lengths, 39600, 0.9)
    for strength, expected in ((6e-4, 0.067), (5e-3, 0.56), (1.5e-2, 1.7)):
        travel = strength * sum(way * rate for way, rate in zip(ways, rates, strict=True))
        limit = strength / 0.1 * 13200 * sum(rates)
        assert travel == pytest.approx(limit, rel=1e-3)
        assert travel == pytest.approx(expected, rel=0.02)


def network(fusion: Fusion, low: float, high: float, num_modalities: int = 2) -> nn.Module:
    """A network whose scales lie evenly between two numbers, in each row."""
    net = models.refinenet("plain_net", 5, num_modalities, width=8, fusion=fusion)
    for module in net.encoder.modules():
        if getattr(module, "exchange_point", False):
            with torch.no_grad():
                module.weight.copy_(torch.linspace(low, high, module.num_features).expand_as(module.weight))
    return net


def noted(net: nn.Module, travel: float, *, strength: float = 1.0, momentum: float | None = 0.9) -> Overview:
    return scales_at_start(net, Penalty(strength, momentum, (travel, 0.0), 100))


def test_the_lines_have_percentiles_and_thresholds_by_stage() -> None:
    net = network(Exchange(threshold=0.5), 0.4, 1.4)
    net.encoder.layers[1].norm.threshold = 0.6
    lines, warnings = noted(net, 0.01)
    assert [line.partition(":")[0] for line in lines[:4]] == [f"|γ| of stage {n}" for n in (1, 2, 3, 4)]
    row = np.tile(np.linspace(0.4, 1.4, 16).astype(np.float32), 2)
    values = ", ".join(f"{p} % {np.percentile(row, p):.3g}" for p in (1, 10, 50, 90))
    count = int((row < 0.5).sum())
    assert lines[0] == f"|γ| of stage 1: {values}; threshold 0.5, {count} of 32 below"
    assert "; threshold 0.6, " in lines[1]
    assert lines[4] == "the penalty alone moves a scale by up to 0.01 in 100 steps: λ 1, momentum 0.9"
    assert len(lines) == 5
    assert not warnings


def test_a_threshold_out_of_reach_is_told_with_the_smallest_scale_and_remedies() -> None:
    net = network(Exchange(threshold=0.2), 0.35, 1.65)
    _, (warning,) = noted(net, 0.05)
    assert warning.startswith(
        "the threshold is out of reach everywhere: the penalty alone takes at most 0.05 off"
    )
    assert "the smallest |γ| is 0.35 in stage 1, 0.35 in stage 2" in warning
    # (0.35 - 0.05) / 1 is just not enough.
    assert warning.endswith(
        "give fusion.threshold above 0.3, or above 0.3*median, or 3 times the loss.sparsity or steps"
    )
    assert not noted(network(Exchange(threshold=0.31), 0.35, 1.65), 0.05).warnings
    assert not noted(network(Exchange(threshold=0.2), 0.35, 1.65), 0.16).warnings


def test_the_advice_helps() -> None:
    for threshold in (0.31, "0.31*median"):
        net = network(Exchange(threshold=threshold), 0.35, 1.65)
        models.fusion.resolve_thresholds(net)
        assert not noted(net, 0.05).warnings
    net = network(Exchange(threshold=0.2), 0.35, 1.65)
    assert not noted(net, 0.05, strength=3.01).warnings
    assert not noted(net, 3.01 * 0.05, momentum=None).warnings


def test_stages_out_of_reach_are_named() -> None:
    net = network(Exchange(threshold=0.2), 0.1, 1.0)
    nn.init.ones_(net.encoder.layers[3].norm.weight)
    _, (warning,) = noted(net, 0.05, momentum=None)
    assert warning.startswith(
        "the threshold is out of reach in stage 4: the penalty alone takes at most 0.05 off"
    )
    assert "the smallest |γ| is 1 in stage 4." in warning
    assert warning.endswith("give fusion.threshold above 0.95, or above 0.95*median, or 16 times the steps")


def test_a_relative_threshold_gets_a_larger_factor() -> None:
    net = network(Exchange(threshold="0.1*median"), 0.2, 0.6)
    models.fusion.resolve_thresholds(net)
    lines, (warning,) = noted(net, 0.1)
    assert "; threshold 0.04, 0 of " in lines[0]
    assert "give fusion.threshold above 0.25*median, or 1.6 times the loss.sparsity" in warning


def test_what_is_not_a_modalitys_own_does_not_count() -> None:
    """Small scales that belong to the other one's share are never exchanged."""
    nets = [network(Exchange(threshold=0.2, region=region), 1.0, 1.0) for region in ("own", "all")]
    for net in nets:
        for module in net.encoder.modules():
            if getattr(module, "exchange_point", False):
                with torch.no_grad():
                    module.weight.fill_(1.0)
                    theirs = ~module_share(module.num_features)
                    module.weight[theirs] = 0.1
    assert [len(noted(net, 0.05).warnings) for net in nets] == [1, 0]


def module_share(channels: int) -> torch.Tensor:
    """``[2, C]``: the first half of the channels is the first modality's."""
    first = torch.arange(channels) < channels // 2
    return torch.stack([first, ~first])


def test_only_penalized_scales_move() -> None:
    for fusion, messages in (
        (Exchange(threshold=0.2, penalty="none"), 1),
        (Exchange(threshold=0.2, penalty="own"), 0),
        (Exchange(threshold=0.2, penalty="all", region="all"), 0),
        (Discard(threshold=0.2), 0),
        (Discard(threshold=0.2, penalty="none"), 1),
    ):
        lines, warnings = noted(network(fusion, 0.3, 0.9), 0.15)
        assert len(warnings) == messages, fusion
        assert (lines[-1] == "no penalty moves these scales") is (messages == 1)
    assert warnings[0].endswith(
        "or a penalty that moves these scales: loss.sparsity, fusion.penalty, learning rates"
    )
    assert noted(network(Exchange(threshold=0.2), 0.3, 0.9), 0.15, strength=0.0).warnings == warnings


def test_sgd_moves_by_the_strength_and_adam_does_not() -> None:
    net = network(Exchange(threshold=0.2), 0.3, 0.9)
    assert noted(net, 0.15, strength=0.1).warnings
    assert not noted(net, 0.15, strength=0.1, momentum=None).warnings
    line = noted(net, 0.15, strength=0.1, momentum=None).lines[-1]
    assert (
        line
        == "the penalty alone moves a scale by up to 0.15 in 100 steps: a learning rate per step, whatever λ"
    )


def test_signed_scales_below_zero_are_below() -> None:
    net = network(Exchange(threshold=0.2, criterion="signed"), -0.9, -0.3)
    lines, (warning,) = noted(net, 0.0)
    assert " 32 of 32 below" in lines[0]
    assert warning.startswith("100% of the scales are below the threshold before training")
    assert (
        noted(network(Exchange(threshold=0.2), -0.9, -0.3), 0.0)
        .warnings[0]
        .startswith("the threshold is out")
    )


@pytest.mark.parametrize(("threshold", "warned"), [(0.49, False), (0.55, True)])
def test_most_scales_below_the_threshold_at_the_start(threshold: float, warned: bool) -> None:
    warnings = noted(network(Exchange(threshold=threshold), 0.0, 1.0), 0.1).warnings
    assert [text.endswith("give a smaller fusion.threshold") for text in warnings] == [True] * warned


def test_frozen_scales_do_not_move() -> None:
    net = network(Exchange(threshold=0.2), 0.3, 0.9)
    net.encoder.layers[0].norm.weight.requires_grad_(False)
    _, (warning,) = noted(net, 0.15)
    assert warning.startswith(
        "the threshold is out of reach in stage 1: the penalty alone takes at most 0 off"
    )


def test_nothing_is_said_of_networks_without_a_threshold() -> None:
    for fusion, modalities in ((FixedPortion(), 2), (Exchange(threshold=0.0), 2), (Exchange(), 1)):
        assert noted(network(fusion, 0.3, 0.9, modalities), 0.1) == Overview([], [])


def test_a_unet_has_levels() -> None:
    net = models.unet(size=32, base_width=4, threshold=0.01)
    lines, (warning,) = scales_at_start(net, Penalty(1e-3, None, (0.2, 0.2), 1000), "level")
    assert [line.partition(":")[0] for line in lines[:-1]] == [f"|γ| of level {n}" for n in (2, 3, 4)]
    assert warning.startswith("the threshold is out of reach everywhere")


def test_eighty_steps_on_a_resnet50(shared: Path) -> None:
    """The training that exchanged nothing: threshold 0.2, the paper's penalty and rates."""
    path = shared / "data" / "resnet50_imagenet_v1_fp16.safetensors"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    (way,) = travel_by_stage(UpdateSettings(), [80], 80, 0.9)
    penalty = Penalty(5e-3, 0.9, (5e-4 * way, 3e-3 * way), 80)
    net = models.refinenet("resnet50", 5, width=8, threshold=0.2)
    load_imagenet(net.encoder, path)
    lines, (warning,) = scales_at_start(net, penalty)
    assert lines[3].startswith(
        "|γ| of stage 4: 1 % 0.619, 10 % 0.811, 50 % 0.986, 90 % 1.17; threshold 0.2, 0 of"
    )
    assert "out of reach everywhere" in warning
    assert "0.349 in stage 4" in warning
    reachable = models.refinenet("resnet50", 5, width=8, threshold="0.7*median")
    load_imagenet(reachable.encoder, path)
    models.fusion.resolve_thresholds(reachable)
    assert not scales_at_start(reachable, replace(penalty, steps=80)).warnings
