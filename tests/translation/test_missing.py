"""Training steps and evaluations that a domain is absent from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cen_ext import exchanging_layers
from models.__main__ import main
from models.training.absence import dropped_modality
from models.training.errors import UsageError
from models.translation.task import TranslationTask
from tests.helpers.same import assert_same
from tests.helpers.translation_runs import DOMAINS, batches_of, command, prepare_views, tiny_recipe, tiny_task

DROPPED = DOMAINS[1]
ALWAYS = ["data.drop_modality=1", "model.dropout=0", "loss.sparsity=0", "optim.step_in_backward=false"]


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_views(tmp_path_factory.mktemp("data") / "views")


def stepped(views: Path, value: float | None, *overrides: str) -> tuple[TranslationTask, dict[str, Tensor]]:
    """A task after the first step that drops ``DROPPED``, whose images are of one value, if that is given."""
    task = tiny_task(views, *ALWAYS, *overrides, dtype=torch.float64)
    seed = task.recipe.run.seed
    step = next(step for step in range(99) if dropped_modality(1.0, len(DOMAINS), seed, step) == (1,))
    (batch, *_) = batches_of(task, torch.float64)
    if value is not None:
        batch.images.chunk(len(DOMAINS))[1].fill_(value)
    return task, task.step(batch, step)


@pytest.mark.parametrize("passes", [1, 2])
def test_nothing_of_a_dropped_domain_reaches_anything(views: Path, passes: int) -> None:
    found = []
    for value in (None, math.nan):
        task, losses = stepped(views, value, f"optim.passes={passes}")
        found.append((losses, task.state_dict()))
    assert_same(found[0], found[1])
    losses = found[0][0]
    for name, loss in losses.items():
        assert torch.isfinite(loss), name
        assert (loss == 0) == (name == "penalty" or name.endswith(f"/{DROPPED}")), name
    for layer in exchanging_layers(task.nets.generator).values():
        there, gone = layer.weight.grad
        assert there.abs().max() > 0
        assert gone.abs().max() == 0


def test_every_domain_is_dropped_now_and_then() -> None:
    drawn = [dropped_modality(0.5, 3, 7, step) for step in range(3000)]
    assert {each for each in drawn if each} == {(0,), (1,), (2,)}
    assert sum(map(bool, drawn)) / len(drawn) == pytest.approx(0.5, abs=0.05)


def test_evaluation_without_a_domain(views: Path) -> None:
    """Its files are read, and say nothing."""
    task = tiny_task(views, f"eval.without={DROPPED}")
    found = task.evaluate(lambda: False)
    assert found is not None
    assert {name.split("/")[0] for name in found} == {DOMAINS[0], "ensemble"}
    for score in ("l1", "ssim"):  # alone, a branch is the ensemble
        assert found[f"ensemble/{score}"] == pytest.approx(found[f"{DOMAINS[0]}/{score}"], rel=1e-6)
    whole = tiny_task(views).evaluate(lambda: False)
    assert whole is not None
    assert whole[f"{DOMAINS[0]}/l1"] != found[f"{DOMAINS[0]}/l1"]  # which took channels of the other


def test_the_command_without_a_domain(
    views: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(views, tmp_path / "run", "data.drop_modality=0.5", "run.steps=2")) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run" / "last.pt"), f"eval.without={DROPPED}"]) == 0
    printed = capsys.readouterr().out
    assert f"note: without {DROPPED}" in printed
    record = json.loads((tmp_path / "run" / "evaluation_last.json").read_text())
    assert record["inference"]["without"] == [DROPPED]
    assert list(record["alpha"]) == [DOMAINS[0]]
    assert record["alpha"][DOMAINS[0]] == 1
    assert not any(name.startswith(f"{DROPPED}/") for name in record["metrics"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"eval.without={','.join(DOMAINS)}"], r"^eval\.without must be some of .*, not all"),
        (["eval.without=sonar"], r"^eval\.without must be some of .* got sonar$"),
        (
            [f"eval.without={DROPPED}", "fusion=concat", "fusion.stages=2"],
            r"^eval\.without: fusion=concat ",
        ),
        (
            ["data.drop_modality=0.1", "fusion=concat", "fusion.stages=2"],
            r"^data\.drop_modality: fusion=concat ",
        ),
        (["data.drop_modality=1.5"], r"data\.drop_modality must be from 0 to 1, got 1\.5"),
        (
            ["data.drop_modality=0.1", f"data.domains={DOMAINS[0]}"],
            r"data\.drop_modality must be 0 with a single modality",
        ),
    ],
)
def test_refusals(views: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TranslationTask(tiny_recipe(views, *overrides))
