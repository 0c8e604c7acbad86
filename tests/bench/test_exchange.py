"""Table of ``bench.experiments.exchange``: means and ranges over seeds, shares by layer; its trainings."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import models.recipes  # noqa: F401 - fills the registry
from bench.experiments import exchange
from models.training import config, registry
from tests.helpers.paths import ROOT


def result(rgb: float | None, ensemble: float, shares: dict[str, float]) -> dict[str, Any]:
    metrics = {"ensemble/mean_iou": ensemble, "ensemble/pixel_accuracy": 0.5}
    if rgb is not None:
        metrics["rgb/mean_iou"] = rgb
    row = {"step": 10.0, "loss/ensemble": 2.0, "exchanged": 0.1}
    alpha = [0.6, 0.4] if shares else [1.0]
    return {"metrics": metrics, "alpha": alpha, "exchanged": shares, "losses": [row]}


def test_scores_are_means_with_their_range_and_shares_stand_by_layer() -> None:
    found = {
        "rgb": {0: result(0.2, 0.2, {})},
        "cen20": {0: result(0.1, 0.3, {"a": 0.0, "b": 0.5}), 1: result(0.2, 0.4, {"a": 0.1, "b": 0.2})},
    }
    lines = exchange.report(found).splitlines()
    assert "| RGB alone | 20.0 |  | 20.0 | 50.0 |  |  |" in lines
    title = exchange.TITLES["cen20"]
    assert (
        f"| {title} | 15.0 (10.0 to 20.0) |  | 35.0 (30.0 to 40.0) | 50.0 (50.0 to 50.0) | 0.60 | 20.0 % |"
    ) in lines
    assert lines[-4:] == [f"| layer | {title} |", "|---|---|", "| a | 0.0 |", "| b | 50.0 |"]
    assert exchange.plot(found).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", exchange.RUNS)
def test_every_training_has_a_title_and_settings_of_the_recipe(name: str) -> None:
    recipe = config.override(registry.find(exchange.RECIPE), [*exchange.BUDGET, *exchange.RUNS[name]])
    assert sum(stage.length(1) for stage in recipe.optim.stages) == 500
    assert exchange.TITLES[name]


def test_the_commands_earlier_name_still_runs_it() -> None:
    command = [sys.executable, "-m", "bench.exchange", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.startswith("usage: bench.experiments.exchange")
