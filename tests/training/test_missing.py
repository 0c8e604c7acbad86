"""Training with scenes that lack modalities, and with modalities dropped at random."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import models.segmentation.recipes  # noqa: F401 - fills the registry
from cen_ext import present, sparsity_penalty
from models.__main__ import main
from models.data import Batch
from models.segmentation.settings import SegmentationRecipe
from models.segmentation.task import SegmentationTask, check_absences
from models.training import config, distributed, registry
from models.training.absence import dropped_modality
from models.training.errors import UsageError
from models.training.rng import preserved_rng
from tests.helpers.same import assert_same
from tests.helpers.training_runs import assert_same_runs, column, command, prepare_rooms, tiny_task

FILL = ["data.missing=fill", "data.crop=40"]
LACKING = {"depth": (2, 5, 13), "rgb": (3, 7)}  # 13 is one of the three to evaluate on


def dropped(recipe: SegmentationRecipe, step: int) -> tuple[int, ...]:
    data = recipe.data
    return dropped_modality(data.drop_modality, len(data.modalities), recipe.run.seed, step)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rooms some of which have no depth, or no colors."""
    root = prepare_rooms(tmp_path_factory.mktemp("data") / "rooms")
    for folder, numbers in LACKING.items():
        for number in numbers:
            (root / folder / f"{number:06d}.png").unlink()
    return root


@pytest.fixture(scope="module")
def whole_rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_rooms(tmp_path_factory.mktemp("data") / "whole")


def a_batch(absent: tuple[tuple[int, ...], ...], fill: float = 0.0) -> Batch:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(2, len(absent), 3, 40, 40, dtype=torch.float64, generator=generator)
    for n, modalities in enumerate(absent):
        images[list(modalities), n] = fill
    target = torch.randint(0, 11, (len(absent), 40, 40), generator=generator)
    target[0, :30] = 255  # pixels that count are spread unevenly
    return Batch(images.flatten(0, 1), target, ["a"] * len(absent), absent=absent if any(absent) else ())


def doubled(rooms: Path, *overrides: str) -> SegmentationTask:
    task = tiny_task(rooms, *FILL, "model.dropout=0", "optim.step_in_backward=false", *overrides)
    task.net.double()
    return task


def gradients(task: SegmentationTask) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in task.net.named_parameters()}


ABSENT = ((), (1,), (), (0,), (1,), ())


def test_the_loss_is_that_of_each_branch_where_it_is(rooms: Path) -> None:
    """Equation 4 written out: sums over the pixels of every output that there is, by the batch's pixels."""
    extra = ["optim.accumulate=2", "data.batch_size=6", "model.frozen_statistics=true"]
    task, batch = doubled(rooms, *extra), a_batch(ABSENT)
    task._updates.start(0)
    losses = task._gradients(batch.images, batch.target, batch.absent)
    found, net = gradients(task), task.net
    net.zero_grad()
    images, pixels = batch.images.unflatten(0, (2, 6)), (batch.target != 255).sum()
    sums = torch.zeros(3, dtype=torch.float64)
    with preserved_rng():
        for n, absent in enumerate(
            ABSENT
        ):  # with frozen statistics images have nothing to do with each other
            there = [m for m in range(2) if m not in absent]
            with present(net, there):
                out = net(images[there, n])
            for where, logits in zip([*there, 2], [*out.branches, out.ensemble], strict=True):
                large = F.interpolate(logits, (40, 40), mode="bilinear")
                target = batch.target[n : n + 1]
                sums[where] = sums[where] + F.cross_entropy(large, target, reduction="sum", ignore_index=255)
    penalty = task.recipe.loss.sparsity * sparsity_penalty(net)
    total = sums.sum() / pixels + penalty
    total.backward()
    torch.testing.assert_close(losses[0], total.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(losses[1], sums.detach() / pixels, rtol=1e-10, atol=0)
    torch.testing.assert_close(losses[2].double(), penalty.detach(), rtol=1e-10, atol=0)
    expected = gradients(task)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-11)


def test_what_is_absent_reaches_nothing(rooms: Path) -> None:
    """Not even as NaN: neither losses, nor gradients, nor statistics."""
    results = []
    for fill in (0.0, float("nan")):
        task, batch = doubled(rooms), a_batch(ABSENT, fill)
        values = task.step(batch, 0)
        results.append([values, gradients(task), task.net.state_dict()])
        assert all(torch.isfinite(value) for value in values.values())
    assert_same(*results)
    dropping = [doubled(rooms, "data.drop_modality=1") for _ in range(2)]
    step = next(step for step in range(50) if dropped(dropping[0].recipe, step) == (1,))
    batch = a_batch(((),) * 4)
    blind = replace(batch, images=batch.images.clone())
    blind.images[4:] = float("nan")
    values = [task.step(each, step) for task, each in zip(dropping, (batch, blind), strict=True)]
    assert_same(values[0], values[1])
    assert_same(dropping[0].net.state_dict(), dropping[1].net.state_dict())
    assert values[0]["depth"] == 0
    assert values[0]["rgb"] > 0


def test_weights_updated_within_the_backward_pass_are_the_same(rooms: Path) -> None:
    states = []
    for setting in ("true", "false"):
        task = tiny_task(rooms, *FILL, f"optim.step_in_backward={setting}", "model.dropout=0")
        batch = a_batch(ABSENT)
        for step in range(2):
            task.step(replace(batch, images=batch.images.float()), step)
        states.append(task.state_dict())
    assert_same(*states)


def test_the_dropped_modality_follows_from_seed_and_step() -> None:
    recipe = config.override(registry.find("synthetic_demo"), ["data.drop_modality=0.4"])
    drawn = [dropped(recipe, step) for step in range(4000)]
    torch.randn(3)
    np.random.default_rng(0).random(7)
    assert [dropped(recipe, step) for step in range(100)] == drawn[:100]
    counts = Counter(drawn)
    assert counts.keys() == {(), (0,), (1,)}
    assert counts[()] == pytest.approx(2400, abs=100)
    assert counts[(0,)] == pytest.approx(800, abs=80)
    other = replace(recipe, run=replace(recipe.run, seed=1))
    assert [dropped(other, step) for step in range(100)] != drawn[:100]
    never = replace(recipe, data=replace(recipe.data, drop_modality=0.0))
    assert not any(dropped(never, step) for step in range(100))
    always = replace(recipe, data=replace(recipe.data, drop_modality=1.0))
    assert all(dropped(always, step) for step in range(100))


def test_a_resumed_run_is_one_that_was_never_stopped(rooms: Path, tmp_path: Path) -> None:
    settings = [*FILL, "data.drop_modality=0.5", "run.evaluate_steps=4"]
    assert main(command(rooms, tmp_path / "a", *settings)) == 0
    assert main(command(rooms, tmp_path / "b", *settings, "run.steps=4")) == 0
    assert main(["train", "synthetic_demo", "--resume", str(tmp_path / "b"), "run.steps=none"]) == 0
    assert_same_runs(tmp_path / "a", tmp_path / "b")
    assert all(np.isfinite(column(tmp_path / "a", "losses.csv", "loss/depth")))
    log = (tmp_path / "a" / "log.txt").read_text()
    first = f"2 lack depth (the first {rooms}/depth/000002.png), 2 lack rgb"
    assert f"train: of 12 scenes some lack files, and take part without (missing=fill): {first}" in log
    assert "val: of 3 scenes some lack files" in log


def test_without_missing_files_nothing_changes(whole_rooms: Path, tmp_path: Path) -> None:
    assert main(command(whole_rooms, tmp_path / "a", "data.crop=40", "run.steps=1", "run.log_steps=1")) == 0
    assert main(command(whole_rooms, tmp_path / "b", *FILL, "run.steps=1", "run.log_steps=1")) == 0
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def recipe(*overrides: str) -> SegmentationRecipe:
    found: SegmentationRecipe = config.override(registry.find("synthetic_demo"), overrides)
    return found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fusion=concat"], r"^data\.missing=fill: fusion=concat joins all modalities .*data|can$"),
        (["run.cuda_graphs=true"], r"does not go with run\.cuda_graphs=true"),
        (["run.compile=true"], r"^data\.missing=fill computes .* with run\.compile=true"),
        (["model.network=pspnet"], "model.network=pspnet, a norm of which has a single value"),
        (["data.crop=32"], r"batch statistics and data\.crop=32"),
    ],
)
def test_what_does_not_go_with_missing_files(overrides: list[str], message: str) -> None:
    check_absences(recipe(*overrides), filled=False)
    with pytest.raises(UsageError, match=message):
        check_absences(recipe(*overrides), filled=True)


def test_several_processes_do_not_go_with_missing_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UsageError, match=r"does not go with 2 processes.*; data\.missing=skip leaves"):
        check_absences(recipe(), filled=True)
    check_absences(recipe("data.drop_modality=0.5"), filled=False)


def test_what_does_not_go_with_dropping(whole_rooms: Path) -> None:
    drop = "data.drop_modality=0.5"
    with pytest.raises(UsageError, match=r"^data\.drop_modality: fusion=self_attention joins all modalities"):
        tiny_task(whole_rooms, drop, "fusion=self_attention")
    with pytest.raises(UsageError, match=r"^data\.drop_modality does not go with run\.cuda_graphs"):
        check_absences(recipe(drop, "run.cuda_graphs=true"), filled=False)
    with pytest.raises(UsageError, match=r"^data\.drop_modality must be from 0 to 1, got 2"):
        recipe("data.drop_modality=2")
    for overrides in (["data.modalities=rgb", drop], [drop, "data.modalities=rgb"]):
        with pytest.raises(UsageError, match="drop_modality must be 0 with a single modality"):
            recipe(*overrides)


def test_a_data_set_that_cannot_be_filled_is_refused_before_work(rooms: Path) -> None:
    with pytest.raises(UsageError, match=r"^data\.missing=fill: fusion=concat joins"):
        tiny_task(rooms, *FILL, "fusion=concat")
    tiny_task(rooms, "fusion=concat", "data.missing=skip")
