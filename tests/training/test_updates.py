"""Schedules, averages, clipping, loss scaling, and parts of a batch: against their formulas."""

from __future__ import annotations

import copy
import math
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench.harness.memory import tensor_bytes
from cen_ext import ExchangeBatchNorm2d
from models.segmentation.settings import OptimSettings, SegmentationStage
from models.segmentation.step import make_optimizer
from models.training import run_folder
from models.training.ema import Ema
from models.training.optimization import Optimization, fused
from models.training.precision import at_least_float32, autocast, loss_scaler
from models.training.schedules import rate_factor
from models.training.settings import UpdateSettings
from tests.helpers.same import assert_same

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (UpdateSettings(), [1, 1, 1, 1]),
        (UpdateSettings(schedule="polynomial"), [1, 0.75**0.9, 0.5**0.9, 0.25**0.9]),
        (UpdateSettings(schedule="polynomial", power=2), [1, 0.5625, 0.25, 0.0625]),
        (UpdateSettings(schedule="cosine"), [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
        (UpdateSettings(schedule="polynomial", power=1, warmup_steps=2), [0.5, 1, 1, 0.5]),
        (UpdateSettings(warmup_steps=8), [0.25, 0.5, 0.75, 1]),
        (UpdateSettings(schedule="step", decay=0.8, decay_steps=2), [1, 1, 0.8, 0.8]),
        (UpdateSettings(schedule="step", decay=0.5, decay_steps=1, warmup_steps=1), [1, 1, 0.5, 0.25]),
    ],
)
def test_schedules(settings: UpdateSettings, expected: list[float]) -> None:
    assert [rate_factor(settings, step, 4) for step in range(4)] == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"ema": 1.0}, "ema must be between 0 and 1"),
        ({"power": -1.0}, "power must be at least 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"schedule": "step", "decay": 0.0}, "decay must be above 0"),
        ({"schedule": "step", "decay_steps": 0}, "decay_steps must be at least 1"),
    ],
)
def test_settings_out_of_range(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpdateSettings(**values)


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double()


def test_average_of_weights() -> None:
    net = small_net()
    ema = Ema(net, 0.5)
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    for step in range(6):
        for value in net.state_dict().values():
            value.add_(torch.randn(value.shape) if value.is_floating_point() else 1)
        ema.update(net, step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in net.state_dict().items():
            mixed = decay * expected[name] + (1 - decay) * value
            expected[name] = mixed if value.is_floating_point() else value
    torch.testing.assert_close(dict(ema.net.state_dict()), expected, rtol=1e-14, atol=1e-14)
    assert ema.net[1].num_batches_tracked == 6
    assert not ema.net.training
    assert not any(parameter.requires_grad for parameter in ema.net.parameters())
    ema.restart(net)
    torch.testing.assert_close(dict(ema.net.state_dict()), dict(net.state_dict()), rtol=0, atol=0)


def test_the_record_of_what_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", "c"]
    for arguments in (["init", "-q"], commit):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True)
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "run_folder.py"))
    found = run_folder.environment()
    assert (found["git"], found["processes"]) == (head.stdout.strip(), 1)
    monkeypatch.setenv("PATH", "")
    assert run_folder.environment()["git"] is None


class Squares(nn.Module):
    """Mean square of what a network makes of a part, and a vector beside it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.net(x)
        return y.square().mean(), y.mean((0, 2, 3))


class Ones(nn.Module):
    """A loss whose gradient is one number everywhere."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        loss = torch.stack([parameter.sum() for parameter in self.net.parameters()]).sum() * gradient
        return loss, loss


def optimization(net: nn.Module, settings: UpdateSettings, precision: str = "fp32") -> Optimization:
    optimizer = torch.optim.SGD([{"params": list(net.parameters()), "lr": 0.1, "name": "all"}], fused=True)
    return Optimization(optimizer, settings, 10, 5, loss_scaler(precision, CPU))


def test_gradients_of_parts_are_those_of_their_mean() -> None:
    net = small_net().eval()
    twin = copy.deepcopy(net)
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64)
    expected = optimization(net, UpdateSettings()).gradients(Squares(net), [(x,)])
    for _ in range(2):  # the second call starts anew
        parts = [(part,) for part in x.split(2)]
        found = optimization(twin, UpdateSettings()).gradients(Squares(twin), parts)
    torch.testing.assert_close(found, expected)
    assert not any(value.requires_grad for value in found)
    for one, other in zip(twin.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


class Alternating(nn.Module):
    """Parts of one row pass the first layer alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return ((self.net[0](x) if len(x) == 1 else self.net(x)).square().mean(),)


@pytest.mark.parametrize(
    "make",
    [partial(torch.optim.SGD, momentum=0.9), partial(torch.optim.AdamW, fused=True), torch.optim.RMSprop],
)
def test_updates_in_backward(make: Callable[..., torch.optim.Optimizer]) -> None:
    """The same bits, also of weights that only an earlier part reaches, and across a saved state."""
    original = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.float64) for _ in range(4)))
    original[2].requires_grad_(False)
    batch, found = torch.randn(5, 4, dtype=torch.float64), []
    parts = [(batch[:4],), (batch[4:],)]
    for in_backward in (True, False):
        net = copy.deepcopy(original)
        groups = [
            {"name": "first", "params": list(net[:2].parameters()), "lr": 0.1},
            {"name": "rest", "params": list(net[2:].parameters()), "lr": 0.01, "weight_decay": 0.5},
        ]
        scaler, settings = loss_scaler("fp32", CPU), UpdateSettings(schedule="cosine")
        updates = Optimization(make(groups), settings, 0, 6, scaler, in_backward=in_backward)
        for step in range(4):
            updates.start(step)
            updates.gradients(Alternating(net), parts if step % 2 else parts[:1])
            left = [weight.grad is not None for weight in net.parameters()]
            none, some = [False] * 8, [False, False, True, True, False, False, True, True]
            if in_backward:
                assert left == (some if step % 2 else none)
            updates.step()
            updates.load_state_dict(copy.deepcopy(updates.state_dict()))
        found.append((list(net.parameters()), updates.state_dict(), updates.learning_rates()))
    assert_same(found[0], found[1])


def test_updates_in_backward_need_no_memory_for_all_gradients() -> None:
    net = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    peaks = []
    for in_backward in (True, False):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        scaler = loss_scaler("fp32", CPU)
        updates = Optimization(optimizer, UpdateSettings(), 0, 1, scaler, in_backward=in_backward)
        objective, parts = Alternating(net), [(torch.randn(2, 256),)]
        peaks.append(tensor_bytes(lambda u=updates, o=objective, p=parts: u.gradients(o, p))[1])
        updates.step()
        optimizer.zero_grad()
    weight = 256 * 256 * 4
    assert peaks[0] < 2.5 * weight < 8 * weight <= peaks[1]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("clip", [None, 1e-3, 1e6])
def test_an_update(clip: float | None, precision: str) -> None:
    """Scheduled rate times the gradient, scaled to the clipped norm; the loss scale leaves no trace."""
    net = small_net().eval()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    update = optimization(net, UpdateSettings(clip=clip, schedule="polynomial", power=1), precision)
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64)
    update.start(12)  # the stage's third of five
    update.gradients(Squares(net), [(x,)])
    scale = 65536.0 if precision == "fp16" else 1.0
    gradients = [parameter.grad / scale for parameter in net.parameters()]
    update.step()
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    shrunk = 1.0 if clip is None else min(1.0, clip / norm.item())
    assert update.learning_rates() == {"all": pytest.approx(0.06)}
    for parameter, old, gradient in zip(net.parameters(), before, gradients, strict=True):
        # torch adds 1e-6 to the norm that it divides by.
        torch.testing.assert_close(old - parameter, 0.06 * shrunk * gradient, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_that_overflows_is_left_out_and_the_scale_halved(clip: float | None) -> None:
    net = small_net().eval()
    update = optimization(net, UpdateSettings(clip=clip), "fp16")
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64)
    for factor, scale in ((float("inf"), 32768.0), (1.0, 32768.0)):
        before = [parameter.detach().clone() for parameter in net.parameters()]
        update.gradients(Squares(net), [(x,)])
        next(net.parameters()).grad.mul_(factor)
        update.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
        assert all(moved) if factor == 1 else not any(moved)
        assert update.state_dict()["scaler"]["scale"] == scale
    other = optimization(net, UpdateSettings(), "fp16")
    other.load_state_dict(update.state_dict())
    assert other.state_dict()["scaler"] == update.state_dict()["scaler"]


def test_an_overflow_in_the_first_step_leaves_no_momentum() -> None:
    """It is likely to overflow: fp16 begins with a large scale. Torch goes on with memory as it comes."""
    net = nn.ModuleDict({"encoder": nn.Linear(3, 3), "decoder": nn.Linear(3, 3)}).double()
    settings = OptimSettings(momentum=0.5, weight_decay=0)
    stage = SegmentationStage(steps=2, encoder_lr=0.1, decoder_lr=0.1)
    optimizer = make_optimizer(net, settings, stage, "fp16")
    update = Optimization(optimizer, settings, 0, 2, loss_scaler("fp16", CPU))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    for factor, moved in ((float("inf"), 0.0), (1.0, 1.0), (1.0, 2.5)):
        update.gradients(Ones(net), [(torch.tensor(factor),)])
        update.step()
        for parameter, old in zip(net.parameters(), before, strict=True):
            torch.testing.assert_close(parameter.detach(), old - 0.1 * moved, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precisions(precision: str, dtype: torch.dtype) -> None:
    class Pair(NamedTuple):
        y: Tensor
        nothing: None

    x = torch.randn(1, 2, 5, 5)
    with autocast(precision, CPU):
        y = nn.functional.conv2d(x, torch.randn(3, 2, 3, 3))
    assert y.dtype == dtype
    pair = at_least_float32(Pair(y, None))
    assert (type(pair), pair.y.dtype, pair.nothing) == (Pair, torch.float32, None)
    assert at_least_float32(Pair(y.double(), None)).y.dtype == torch.float64


def test_fused_optimisers_where_they_serve() -> None:
    net = nn.Conv2d(2, 2, 3)
    assert fused(net, "fp32")
    net.to(memory_format=torch.channels_last)
    assert not fused(net, "fp32")  # copied back and forth on a CPU
    assert fused(net, "fp16")


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW])
def test_moments_of_files_that_have_tables_of_scales(make: Callable[..., torch.optim.Optimizer]) -> None:
    original = nn.Sequential(nn.Conv2d(2, 3, 3), ExchangeBatchNorm2d(3, 2, threshold=0.1))
    images, runs = torch.randn(4, 2, 5, 5), []
    for tables in (False, True):
        net = copy.deepcopy(original)
        optimizer = make(net.parameters(), 0.1)
        updates = Optimization(optimizer, UpdateSettings(), 0, 2, loss_scaler("fp32", CPU))
        for _ in range(2):
            optimizer.zero_grad()
            net(images).cos().sum().backward()
            updates.step()
            state = copy.deepcopy(updates.state_dict())
            for number in (2, 3):  # the norm's scale and shift
                moments = state["optimizer"]["state"][number]
                moments |= {
                    name: value.view(2, 3) for name, value in moments.items() if tables and name != "step"
                }
            updates.load_state_dict(state)
        runs.append(list(net.parameters()))
    for flat, table in zip(*runs, strict=True):
        assert torch.equal(flat, table)
