"""Translation's step on a GPU: nothing waits, recorded and compiled steps are the plain ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.training.precision import set_tf32
from models.translation.task import TranslationTask
from tests.helpers.translation_runs import prepare_views, tiny_task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# float32 throughout, as a GPU's default would round to TF32.
PLAIN = ["run.device=cuda", "model.dropout=0", "run.tf32=false"]


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_views(tmp_path_factory.mktemp("data") / "views")


@pytest.fixture(autouse=True)
def _float32_is_float32() -> None:
    set_tf32(False)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["run.precision=bf16", "optim.passes=2", "loss.gan=hinge"],
        ["run.precision=fp16", "optim.clip=0.1", "optim.ema=0.9", "optim.schedule=cosine"],
        ["run.cuda_graphs=true", "run.precision=fp16"],
    ],
)
def test_a_step_does_not_wait_for_the_gpu(views: Path, overrides: list[str]) -> None:
    task = tiny_task(views, "run.device=cuda", *overrides)
    losses = []
    for step, batch in enumerate(task.batches(0, 0)):
        # What is made in the first step may look at things.
        torch.cuda.set_sync_debug_mode("error" if step > 0 else "default")
        try:
            losses.append(task.step(batch, step)["loss"].clone())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(losses) == 3
    assert torch.stack(losses).isfinite().all()


def after_three_steps(task: TranslationTask) -> list[torch.Tensor]:
    """Losses, and all weights and statistics of both networks."""
    batches = task.batches(0, 0)
    losses = [value.clone() for i, batch in enumerate(batches) for value in task.step(batch, i).values()]
    states = (net.state_dict() for net in (task.nets.generator, task.nets.discriminator))
    return [*losses, *(value for state in states for value in state.values())]


@pytest.mark.parametrize("option", ["run.cuda_graphs", "run.compile"])
@pytest.mark.parametrize("rest", [[], ["optim.passes=2", "optim.clip=1", "loss.gan=hinge"]])
def test_recorded_and_compiled_steps_are_the_plain_ones(views: Path, option: str, rest: list[str]) -> None:
    tasks = [tiny_task(views, *PLAIN, *rest, f"{option}={choice}") for choice in ("false", "true")]
    plain, other = map(after_three_steps, tasks)
    # Adam divides by the gradients' size: of small ones rounding is a good part.
    torch.testing.assert_close(other, plain, rtol=1e-2, atol=2e-3)


def test_recorded_steps_drop_out_anew(views: Path) -> None:
    options = [
        "run.cuda_graphs=true",
        *(f"optim.stages.0.{net}_lr=0" for net in ("generator", "discriminator")),
    ]
    task = tiny_task(views, "run.device=cuda", *options)
    batch = next(iter(task.batches(0, 0)))
    losses = [task.step(batch, step)["loss"].clone() for step in range(3)]
    assert len({loss.item() for loss in losses}) == 3
