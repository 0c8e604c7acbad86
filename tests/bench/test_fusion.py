"""``bench.fusion``: its trainings' settings, what a search chooses, what the report says; a small table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.fusion.__main__ as command
from bench.fusion import report, runs
from bench.fusion.budgets import BUDGETS, MOMENTUM, RECIPE, Budget
from bench.fusion.methods import METHODS
from bench.fusion.plans import Choice, Plan, chosen, long_plans, search_plans, table_plans
from bench.fusion.runs import Place, carry_out, held_out_lists, result_file
from models.data import prepare_synthetic
from models.segmentation.build import build_network
from models.training import config, registry
from models.training.errors import UsageError
from models.training.loop import Diverged
from models.training.scales import travel_by_stage

SMALL = Budget(
    steps=100,
    settings=(),
    rates=(0.01, 0.05),
    factors=(0.5, 1.0, 2.0),
    methods=("rgb", "none", "concat_all_shared", "asymfusion", "cen_paper"),
    seeds=(0, 1),
)


class Results:
    """Results by plan, in place of files."""

    def __init__(self, score: dict[str, float]) -> None:
        self.score, self.asked = score, []

    def __call__(self, plan: Plan) -> dict[str, Any] | None:
        known = [name for name in (plan.name, plan.name.rpartition("_seed")[0]) if name in self.score]
        return {"metrics": {"ensemble/mean_iou": self.score[known[0]]}} if known else None


SEARCHED = {
    f"search/{method}_rate{factor:g}": score
    for method in ("rgb", "none", "concat_all_shared", "asymfusion")
    for factor, score in ((0.5, 0.1), (1.0, 0.3), (2.0, 0.2))
}
EXCHANGE = {
    "search/cen_paper_rate0.5_threshold0.75m": 0.1,
    "search/cen_paper_rate1_threshold0.75m": 0.2,
    "search/cen_paper_rate2_threshold0.75m": 0.3,
}


def test_a_search_tries_thresholds_at_the_best_rate_and_chooses_the_best_of_all() -> None:
    read = Results({**SEARCHED, **EXCHANGE})
    assert [plan.choice for plan in search_plans(SMALL, "cen_paper", read)][3:] == [
        Choice(2.0, "0.5*median"),
        Choice(2.0, "0.02"),
    ]
    assert chosen(SMALL, "cen_paper", read) is None  # two are to come
    read.score |= {"search/cen_paper_rate2_threshold0.5m": 0.4, "search/cen_paper_rate2_threshold0.02": 0.2}
    assert chosen(SMALL, "cen_paper", read) == Choice(2.0, "0.5*median")
    assert chosen(SMALL, "rgb", read) == Choice(1.0)
    assert list(search_plans(SMALL, "cen_paper_dropout", read)) == []
    assert chosen(SMALL, "cen_paper_dropout", read) == Choice(2.0, "0.5*median")


def test_before_its_rates_are_known_a_search_has_no_thresholds() -> None:
    assert len(list(search_plans(SMALL, "cen_paper", Results({})))) == len(SMALL.factors)


def test_the_table_interleaves_seeds_and_the_best_two_and_none_go_on() -> None:
    read = Results(SEARCHED)
    table = list(table_plans(SMALL, read))
    assert [(plan.seed, plan.method) for plan in table] == [
        (seed, method) for seed in (0, 1) for method in ("rgb", "none", "concat_all_shared", "asymfusion")
    ]
    assert list(long_plans(SMALL, read)) == []
    read.score |= {plan.name: 0.1 for plan in table}
    read.score |= {"table/asymfusion_seed0": 0.3, "table/asymfusion_seed1": 0.0}  # better in the mean
    assert [plan.method for plan in long_plans(SMALL, read)] == [
        "none",
        "asymfusion",
        "concat_all_shared",
    ] * 2


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", METHODS)
def test_settings_are_a_recipes_and_give_the_travel(budget: str, method: str, tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path, tmp_path, tmp_path, BUDGETS[budget])
    for phase in ("search", "table", "long"):
        threshold = "0.5*median" if METHODS[method].exchanges else ""
        plan = Plan(phase, method, Choice(2.0, threshold), seed=1)
        recipe = config.override(registry.find(RECIPE), place.settings(plan))
        steps = place.steps(phase)
        assert sum(stage.length(1) for stage in recipe.optim.stages) == steps
        (way, *_) = travel_by_stage(recipe.optim, [steps], steps, MOMENTUM)
        travel = recipe.loss.sparsity * way * recipe.optim.stages[0].encoder_lr
        assert travel == pytest.approx(METHODS[method].travel or 0, rel=1e-3)
    with torch.device("meta"):
        build_network(recipe)


def test_every_fifth_block_of_the_training_list_is_held_out(tmp_path: Path) -> None:
    rooms = prepare_synthetic(tmp_path / "rooms", train=2, val=2, size=(48, 64), seed=0)
    listed = [f"rgb/{i}.png" for i in range(200)]
    (rooms / "train.txt").write_text("\n".join(listed) + "\n")
    parts = [path.read_text().splitlines() for path in held_out_lists(rooms, tmp_path)]
    assert parts[1] == listed[64:80] + listed[144:160]
    assert parts[0] == [line for line in listed if line not in parts[1]]


def made_up(place: Place, plan: Plan, score: float) -> None:
    both = plan.method != "rgb"
    metrics = {f"{name}/mean_iou": score for name in ("rgb", *["depth"] * both, "ensemble")}
    corrupted = {"": 0.4, "depth=missing": 0.3} if plan.method == "cen_paper" else None
    exchanged = {"a": 0.0, "b": 0.25} if METHODS[plan.method].exchanges else {}
    result = {
        "settings": place.settings(plan),
        "machine": {"cpu": "a CPU", "date": "2026-11-30"},
        "metrics": metrics | {"ensemble/pixel_accuracy": 0.5},
        "alpha": [0.6, 0.4] if both else [1.0],
        "exchanged": exchanged,
        "curve": {"step": [10, 20], "loss/ensemble": [2.0, 1.0], "exchanged": [0.0, 0.125]},
        "parameters": 25_000_000,
        "multiply_adds": 7_000_000_000,
        "training_seconds": 120,
        **({"corrupted": corrupted} if corrupted else {}),
    }
    file = result_file(place, plan)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result))


def test_report_says_where_a_difference_is_beyond_the_spread(tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path, tmp_path, tmp_path / "results", SMALL)
    for method in SMALL.methods:
        while plans := [plan for plan in search_plans(SMALL, method, place.read) if not place.read(plan)]:
            made_up(place, plans[0], 0.1 * plans[0].choice.factor)
    scores = {
        "rgb": (0.2, 0.2),
        "none": (0.3, 0.32),
        "concat_all_shared": (0.3, 0.6),
        "cen_paper": (0.4, 0.43),
    }
    for plan in table_plans(SMALL, place.read):
        if plan.method in scores:
            made_up(place, plan, scores[plan.method][plan.seed])
    report.write(place)
    lines = (place.results / report.REPORT).read_text().splitlines()
    rates = "0.005 / 0.025: 5.0; 0.01 / 0.05: 10.0; 0.02 / 0.1: **20.0**"
    assert f"| RGB alone | {rates} |" in lines
    cells = (
        "2 | 41.5 ± 2.1 | 41.5 ± 2.1 | 41.5 ± 2.1 | 50.0 ± 0.0 | 0.60 | 12.5 % | 25.00 M | 7.0 G | 2 min |"
    )
    assert f"| CEN, the paper's λ | {cells}" in lines
    assert "| CEN, the paper's λ | both, shared, no exchange | +10.50 | 0.50 | beyond |" in lines
    assert "| CEN, the paper's λ | concat, all, same as ours | -3.50 | 13.50 | within |" in lines
    assert "| b | 25.0 |" in lines
    assert "| clean | 40.0 |" in lines
    assert "| depth=missing | 30.0 (-10.0) |" in lines
    assert (place.results / report.CURVES).read_bytes().startswith(b"\x89PNG")
    assert not (place.results / report.SCENES).exists()  # no training left a picture


def test_a_result_of_other_settings_is_refused(tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path, tmp_path, tmp_path, SMALL)
    plan = Plan("table", "rgb", Choice(1.0), 0)
    made_up(place, plan, 0.1)
    assert place.read(plan) is not None
    with pytest.raises(UsageError, match=r"rgb_seed0\.json is of other settings.*steps=100.*steps=50"):
        replace(place, budget=replace(SMALL, steps=50)).read(plan)


def test_a_search_goes_on_past_a_training_that_diverges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(name: str, settings: list[str], resume: bool) -> int:
        raise Diverged("the loss of step 7 is not a finite number")

    rooms = prepare_synthetic(tmp_path / "rooms", train=80, val=2, size=(48, 64), seed=0)
    monkeypatch.setattr(runs, "train", diverge)
    place = Place(rooms, tmp_path, tmp_path / "runs", tmp_path / "results", replace(SMALL, methods=("none",)))
    plan = next(search_plans(place.budget, "none", place.read))
    carry_out(place, plan)
    assert place.read(plan)["metrics"] == {"ensemble/mean_iou": 0.0}
    report.write(place)
    lines = (place.results / report.REPORT).read_text().splitlines()
    assert "| both, shared, no exchange | 0.005 / 0.025: diverged |" in lines
    with pytest.raises(Diverged):
        carry_out(place, Plan("table", "none", plan.choice, 0))


def test_a_small_comparison_from_search_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rooms = prepare_synthetic(tmp_path / "rooms", train=80, val=4, size=(48, 64), seed=0)
    settings = (
        *("model.encoder=resnet18", "model.network=light_refinenet", "model.width=8", "data.num_classes=11"),
        *("data.crop=32", "data.shorter_side=48", "data.batch_size=2", "run.log_steps=1", "run.workers=0"),
    )
    small = Budget(
        5, settings, factors=(1.0,), thresholds=("0.5*median",), methods=("none", "cen_paper"), seeds=(0,)
    )
    monkeypatch.setitem(BUDGETS, "cpu", small)
    given = [str(rooms), "none", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert command.main(given) == 0
    results = tmp_path / "results" / "cpu"
    names = {f"{phase}/{name}_seed0.json" for phase in ("table", "long") for name in ("none", "cen_paper")}
    names |= {"search/none_rate1_seed0.json", "search/cen_paper_rate1_threshold0.5m_seed0.json"}
    assert {str(path.relative_to(results)) for path in results.rglob("*.json")} == names
    shown = capsys.readouterr().out
    assert "| CEN, the paper's λ | 1 | " in shown
    assert "| depth=missing | " in shown
    assert (results / report.SCENES).is_file()
    times = {path: path.stat().st_mtime_ns for path in results.rglob("*.json")}
    assert command.main(given) == 0  # nothing is trained again
    assert times == {path: path.stat().st_mtime_ns for path in results.rglob("*.json")}


def test_ssma_starts_from_experts_of_its_seed_even_where_only_their_results_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, that is, where their checkpoints are not: they are trained again."""
    budget = replace(BUDGETS["cpu"], methods=("adapnetpp_rgb", "adapnetpp_depth", "ssma"))
    place = Place(tmp_path / "data", tmp_path / "weights", tmp_path / "runs", tmp_path / "results", budget)
    best = {"adapnetpp_rgb": 0.5, "adapnetpp_depth": 1.0}
    for method, rate in best.items():
        for plan in search_plans(budget, method, place.read):
            score = 0.2 if plan.choice.factor == rate else 0.1
            runs.write(result_file(place, plan), json.dumps(of(place, plan, score)))
    *experts, ssma = table_plans(replace(budget, seeds=(3,)), place.read)
    assert [(plan.method, plan.choice.factor) for plan in (*experts, ssma)] == [*best.items(), ("ssma", 0.5)]
    for plan in experts:
        runs.write(result_file(place, plan), json.dumps(of(place, plan, 0.3)))
    trained: list[str] = []

    def train(recipe: str, settings: list[str], resume: bool) -> int:
        assert recipe == RECIPE
        assert not resume
        given = dict(setting.split("=", 1) for setting in settings)
        trained.append(Path(given["run.output"]).name)
        if "model.experts" in given:
            starts = [str(place.last(plan)) for plan in experts]
            assert given["model.experts"].split(",") == starts
            assert "model.weights" not in given
        else:
            assert given["model.weights"] == str(tmp_path / "weights")
        return 0

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "load", lambda *_: None)
    monkeypatch.setattr(runs, "measure", lambda *_: {"metrics": {}})
    carry_out(place, ssma)
    assert trained == ["adapnetpp_rgb_seed3", "adapnetpp_depth_seed3", "ssma_seed3"]
    assert result_file(place, ssma).is_file()
    carry_out(place, ssma)
    assert len(trained) == 3


def of(place: Place, plan: Plan, score: float) -> dict[str, Any]:
    """A result of these settings."""
    return {"settings": place.settings(plan), "metrics": {"ensemble/mean_iou": score}}
