"""Training on a GPU: nothing in a step waits for it; recorded and compiled steps are the plain ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.segmentation.task import SegmentationTask
from models.training.precision import set_tf32
from tests.helpers.training_runs import prepare_rooms, tiny_task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Frozen so that rounding does not grow; float32 throughout, as a GPU's default would round to TF32.
RESNET = "model.encoder=resnet18"
PLAIN = ["run.device=cuda", "model.dropout=0", "run.tf32=false", "model.frozen_statistics=true"]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_rooms(tmp_path_factory.mktemp("data") / "rooms")


@pytest.fixture(autouse=True)
def _float32_is_float32() -> None:
    set_tf32(False)


OPTIONS = [
    [],
    ["run.precision=bf16", "optim.accumulate=2", "optim.method=adamw"],
    ["run.precision=fp16", "optim.clip=0.1", "optim.ema=0.9", "optim.schedule=cosine"],
    ["run.precision=fp16"],
    ["model.network=pspnet", "fusion.penalty=all", "run.recompute=false"],
    ["run.cuda_graphs=true", "run.precision=fp16", "optim.accumulate=2"],
]


@pytest.mark.parametrize("overrides", OPTIONS)
def test_a_step_does_not_wait_for_the_gpu(rooms: Path, overrides: list[str]) -> None:
    task = tiny_task(rooms, RESNET, "run.device=cuda", *overrides)
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


def after_three_steps(task: SegmentationTask) -> list[torch.Tensor]:
    """Losses, and all weights and statistics."""
    batches = task.batches(0, 0)
    losses = [task.step(batch, step)["loss"].clone() for step, batch in enumerate(batches)]
    return [*losses, *task.net.state_dict().values()]


@pytest.mark.parametrize("option", ["run.cuda_graphs", "run.compile"])
@pytest.mark.parametrize(
    "rest", [[], ["optim.accumulate=2", "optim.clip=1"], ["model.frozen_statistics=false"]]
)
def test_recorded_and_compiled_steps_are_the_plain_ones(rooms: Path, option: str, rest: list[str]) -> None:
    tasks = [tiny_task(rooms, RESNET, *PLAIN, *rest, f"{option}={choice}") for choice in ("false", "true")]
    plain, other = map(after_three_steps, tasks)
    # Batch statistics of a few values make rounding grow.
    tolerance = 1e-2 if "model.frozen_statistics=false" in rest else 1e-4
    torch.testing.assert_close(other, plain, rtol=tolerance, atol=tolerance)


def test_recording_leaves_no_trace_in_statistics_and_generators(rooms: Path) -> None:
    """Dropout draws anew in every replay, and a step's draws are those of the generator's state."""
    found = []
    for choice in ("false", "true"):
        task = tiny_task(rooms, RESNET, "run.device=cuda", "run.tf32=false", f"run.cuda_graphs={choice}")
        torch.cuda.manual_seed(4)
        batch = next(iter(task.batches(0, 0)))
        task.gradients(batch.images, batch.target)
        buffers = {name: value.clone() for name, value in task.net.named_buffers()}
        first = task.gradients(batch.images, batch.target)[0].clone()
        second = task.gradients(batch.images, batch.target)[0].clone()
        assert not torch.equal(first, second)
        found.append(buffers)
    assert all(value == 1 for name, value in found[1].items() if name.endswith("num_batches_tracked"))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_batches_reach_the_gpu_whole(rooms: Path) -> None:
    task = tiny_task(rooms, RESNET, "run.device=cuda")
    on_gpu = list(task.batches(0, 0))
    task.loader.seek(0, 0)
    for moved, batch in zip(on_gpu, task.loader, strict=True):
        assert torch.equal(moved.images.cpu(), batch.images)
        assert torch.equal(moved.target.cpu(), batch.target)
