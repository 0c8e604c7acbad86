"""Options of a run that change the time and the memory it takes, and not the numbers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import examples.own_encoder  # noqa: F401 - registers plain_net
import models
from cen_ext import exchanging_layers, synchronise_statistics
from models.__main__ import main
from models.data import Batch
from models.networks.fusion import exchange_points
from models.networks.released.segmentation import released_names
from models.segmentation.settings import LossSettings, SegmentationRecipe
from models.segmentation.step import Objective
from models.training import checkpoint, distributed, graphs
from models.training.errors import UsageError
from models.training.optimization import Optimization
from models.training.precision import loss_scaler
from models.training.settings import RunSettings, UpdateSettings
from tests.helpers.golden_numbers import assert_matches, draw, released_form
from tests.helpers.same import assert_same
from tests.helpers.training_runs import (
    STEPS,
    assert_same_runs,
    column,
    command,
    prepare_rooms,
    tiny_task,
    together,
)
from tests.networks.test_released import GOLDEN, golden_net, inputs_and_target, released_shapes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_rooms(tmp_path_factory.mktemp("data") / "rooms")


# ---- the released code's numbers


def released_net() -> models.RefineNet:
    net = golden_net("resnet50")
    models.load_released(net, {key: draw(key, shape) for key, shape in released_shapes("resnet50").items()})
    if distributed.world_size() > 1:
        synchronise_statistics(net)
    return net.double().to(memory_format=torch.channels_last)


def assert_golden(mode: str, parts: int) -> None:
    """Loss and gradients of this process's share of the golden batch, channels_last, in so many parts."""
    net = released_net()
    net.encoder.frozen_statistics = mode == "frozen"
    net.train()
    objective = Objective(net, SegmentationRecipe(loss=LossSettings(sparsity=0.0)), CPU)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimization = Optimization(optimizer, UpdateSettings(), 0, 1, loss_scaler("fp32", CPU))
    xs, target = inputs_and_target()
    pixels = (target != 255).sum().double() / (parts * distributed.world_size())
    images = torch.cat(xs).double().to(memory_format=torch.channels_last)
    share = Batch(images, target, ["", ""]).split(distributed.world_size())[distributed.rank()]
    loss, *_ = optimization.gradients(
        distributed.parallel(objective, CPU),
        [(part.images, part.target, pixels) for part in share.split(parts)],
    )
    assert distributed.mean(loss).item() == pytest.approx(GOLDEN["loss"][mode], rel=1e-10)
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    released = released_form(released_names(net), gradients)
    for name, golden in GOLDEN["grads"][mode].items():
        assert_matches(released[name], golden, 1e-6)


def test_golden_in_channels_last_and_in_parts() -> None:
    assert_golden("frozen", 2)


def test_golden_in_two_processes() -> None:
    assert together(assert_golden, "batch", 1) == [0, 0]


# ---- the parts of the loss


@pytest.mark.parametrize(
    ("overrides", "times"),
    [
        (["optim.accumulate=2"], 1),
        (["loss.per_output=true"], 3),
        (["model.network=pspnet", "model.encoder=resnet18", "fusion.penalty=all"], 1),
        (["fusion.penalty=none"], 0),
    ],
)
def test_a_step_tells_the_parts_of_its_loss(rooms: Path, overrides: list[str], times: int) -> None:
    task = tiny_task(rooms, "loss.sparsity=0.03", *overrides)
    if "fusion.penalty=all" in overrides:
        scales = [point.weight for point in exchange_points(task.net)]
    else:  # the first half of the channels is rgb's share, the second one depth's
        layers = exchanging_layers(task.net).values()
        scales = [layer.weight.chunk(2, dim=1)[m][m] for layer in layers for m in range(2)]
    expected = 0.03 * times * sum(weight.abs().sum().item() for weight in scales)
    assert task.penalty_strength == pytest.approx(0.03 * max(times, 1))
    batch = next(iter(task.batches(0, 0)))
    torch.manual_seed(4)
    whole = task.loss(batch).item()
    torch.manual_seed(4)
    found = {name: value.item() for name, value in task.step(batch, 0).items()}
    if "optim.accumulate=2" not in overrides:  # whose parts have statistics of their own
        assert found["loss"] == pytest.approx(whole, rel=1e-6)
    outputs = ["rgb", "depth", "ensemble"]
    auxiliary = ["auxiliary"] * ("model.network=pspnet" in overrides)
    assert list(found) == ["loss", "cross_entropy", "penalty", *auxiliary, *outputs]
    assert set(task.shown) <= found.keys()
    assert found["penalty"] == pytest.approx(expected, rel=1e-5)
    assert found["cross_entropy"] == pytest.approx(sum(found[name] for name in outputs), rel=1e-6)
    rest = found["penalty"] + found.get("auxiliary", 0)
    assert found["loss"] == pytest.approx(found["cross_entropy"] + rest, rel=1e-6)
    assert all(found[name] > 0 for name in auxiliary)


# ---- compilation


def test_a_compiled_objective_gives_the_same(rooms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without code generation, which takes minutes for a whole network on a CPU.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    found = []
    for choice in ("false", "true"):
        overrides = ["model.encoder=plain_net", "model.dropout=0", "optim.step_in_backward=false"]
        task = tiny_task(rooms, *overrides, f"run.compile={choice}")
        task.net.double()
        batch = next(iter(task.batches(0, 0)))
        values = task.gradients(batch.images.double(), batch.target)
        gradients = {name: parameter.grad for name, parameter in task.net.named_parameters()}
        found.append((values, gradients, dict(task.net.named_buffers())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here\nat all")

    monkeypatch.setattr(torch, "compile", none)
    with pytest.raises(UsageError, match=r"run\.compile=true: .* not work for cpu here \(no c"):
        graphs.check(RunSettings(compile=True), CPU)


@pytest.mark.parametrize(
    ("overrides", "obstacle"),
    [
        (["optim.clip=1"], "optim.clip"),
        (["run.precision=fp16"], "run.precision=fp16"),
    ],
)
def test_steps_in_backward_where_all_gradients_are_needed(
    rooms: Path, overrides: list[str], obstacle: str
) -> None:
    assert not tiny_task(rooms, *overrides).in_backward
    with pytest.raises(UsageError, match=rf"optim\.step_in_backward=true does not go with {obstacle}"):
        tiny_task(rooms, *overrides, "optim.step_in_backward=true")


def test_steps_in_backward_are_the_same_steps(rooms: Path) -> None:
    """Recomputed norms, a penalty on their scales and convolutions that modalities share among them."""
    found = []
    for overrides in ([], ["optim.step_in_backward=false"]):
        task = tiny_task(rooms, *overrides)
        assert task.in_backward == (not overrides)
        losses = [task.step(batch, step) for step, batch in enumerate(task.batches(0, 0))]
        found.append((losses, task.state_dict()))
    assert_same(found[0], found[1])


def test_graphs_need_a_gpu(rooms: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.cuda_graphs=true needs a CUDA device and a single process"):
        tiny_task(rooms, "run.cuda_graphs=true")


# ---- nothing waits for the device


class NoReading(TorchFunctionMode):
    """Raises where Python asks for a tensor's values."""

    READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(func, "__name__", "") not in self.READS, func
        return func(*args, **(kwargs or {}))


class NoSizesFromValues(TorchDispatchMode):
    """Raises where an operation must wait for values, to return one or to know its result's size."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, func
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a choice by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "overrides",
    [
        ["run.precision=fp32", "optim.method=adamw", "run.recompute=true"],
        ["run.precision=bf16", "optim.accumulate=2", "model.frozen_statistics=true"],
        ["run.precision=fp16", "optim.clip=0.1", "optim.ema=0.9", "optim.schedule=cosine"],
        ["model.network=pspnet", "model.encoder=resnet18", "fusion.penalty=all"],
        ["loss.kind=ohem", f"loss.class_weights=0{',1' * 10}", "loss.label_smoothing=0.1", "loss.dice=1"],
        ["loss.kind=focal", "run.precision=fp16"],
    ],
)
def test_a_step_does_not_wait_for_the_device(rooms: Path, overrides: list[str]) -> None:
    # The optimisers are fused then, as on a GPU.
    task = tiny_task(rooms, *overrides, "run.channels_last=false")
    batches = list(task.batches(0, 0))
    task.step(batches[0], 0)  # what is made in the first step may look at things
    with NoReading(), NoSizesFromValues():
        losses = task.step(batches[1], 1)
    assert all(value.isfinite() for value in losses.values())


def test_the_guards_notice_what_waits() -> None:
    x = torch.ones(3)
    with NoReading(), NoSizesFromValues():
        for wait in (lambda: x.sum().item(), lambda: float(x[0]), lambda: x[x > 0], lambda: x.nonzero()):
            with pytest.raises(AssertionError):
                wait()


# ---- whole runs


def test_half_precision_trains_as_float32_does(rooms: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        task = tiny_task(rooms, f"run.precision={precision}", "model.dropout=0")
        found[precision] = [task.step(batch, 0)["loss"] for batch in task.batches(0, 0)]
    for precision, tolerance in (("bf16", 3e-2), ("fp16", 3e-3)):
        torch.testing.assert_close(found[precision], found["fp32"], rtol=tolerance, atol=0)
        assert not torch.equal(torch.stack(found[precision]), torch.stack(found["fp32"]))


ALL = [
    *["optim.ema=0.9", "optim.accumulate=2", "optim.schedule=polynomial", "optim.clip=1"],
    "run.precision=bf16",
]


def test_options_at_once_resume_exactly(rooms: Path, tmp_path: Path) -> None:
    """And the average is what is evaluated, kept, and loaded."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(command(rooms, whole, *ALL)) == 0
    assert main(command(rooms, halves, *ALL, "run.steps=4")) == 0
    (halves / "metrics.csv").unlink()  # of the evaluation at that end
    contents = checkpoint.load(halves)[1]
    contents["loop"] |= {"best": -float("inf"), "evaluated": 0}
    checkpoint.save(halves / "last.pt", contents)
    assert main([*command(rooms, halves, *ALL, f"run.steps={STEPS}"), "--resume"]) == 0
    assert_same_runs(whole, halves)

    state = checkpoint.load(whole)[1]["task"]
    weights = models.load(whole).net.state_dict()
    assert_same(dict(weights), dict(state["ema"]))
    assert any(not torch.equal(state["net"][name], weights[name]) for name in weights)
    assert main(["evaluate", str(whole / "last.pt"), "--output", str(tmp_path)]) == 0
    found = str(column(whole, "metrics.csv", "ensemble/mean_iou")[-1])
    assert found in next(tmp_path.glob("*.json")).read_text()
