"""Batch statistics over a process group: two processes are one with the whole batch."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import cen_ext
from cen_ext import ExchangeBatchNorm2d, ExchangeInstanceNorm2d, make_multimodal, synchronise_statistics
from tests.helpers.cases import Shape, in_order, make_inputs
from tests.helpers.training_runs import spawn_two

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
BACKENDS = [name for name, state in cen_ext.available_backends().items() if state == "ok"]


class Case(NamedTuple):
    """One call of the operator by two processes."""

    batches: tuple[int, int]  # samples of each process
    spatial: tuple[int, ...] = (4, 3)
    channels_last: bool = False
    num_modalities: int = 2
    activation: str = "leaky_relu"
    with_residual: bool = True
    cyclic: bool = False  # the next modality lends, not the mean of the others
    order: str = "modality"

    def inputs(self) -> dict[str, Tensor]:
        """The whole batch, the same in every process."""
        torch.manual_seed(1)
        shape = Shape(self.num_modalities, sum(self.batches), 6, self.spatial)
        inputs = make_inputs(shape, channels_last=self.channels_last)._asdict()
        for name in ("x", "residual", "dy"):
            inputs[name] = in_order(inputs[name], self.num_modalities, self.order)
        return inputs if self.with_residual else {**inputs, "residual": None}

    def share(self, whole: Tensor, rank: int) -> Tensor:
        """The rows of one process, of every modality."""
        if self.order == "sample":
            return whole.split([self.num_modalities * batch for batch in self.batches])[rank]
        rows = whole.unflatten(0, (self.num_modalities, sum(self.batches))).split(self.batches, dim=1)
        return rows[rank].flatten(0, 1)

    def run(self, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        """Output, gradients and running statistics of one training call."""
        leaves = {
            name: inputs[name].detach().clone().requires_grad_()
            for name in ("x", "weight", "bias", "residual")
            if inputs[name] is not None
        }
        running = {"running_mean": inputs["mean"].clone(), "running_var": inputs["var"].clone()}
        lender = (torch.arange(self.num_modalities)[:, None] + 1) % self.num_modalities
        with Collectives() as forward:
            y = cen_ext.norm_exchange(
                **leaves,
                **running,
                threshold=0.02,
                lender=lender.expand(-1, 6) if self.cyclic else None,
                training=True,
                momentum=0.3,
                activation=self.activation,
                negative_slope=0.2,
                order=self.order,
                **options,
            )
        with Collectives() as backward:
            y.backward(inputs["dy"])
        gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
        calls = {"forward": torch.tensor(forward.count), "backward": torch.tensor(backward.count)}
        return {"y": y.detach(), **gradients, **running, **calls}


CASES = {
    "equal": Case((2, 2)),
    "unequal": Case((1, 4), channels_last=True),
    "one empty": Case((3, 0)),
    "all empty": Case((0, 0)),
    "a value each": Case((1, 1), spatial=()),
    "three modalities": Case((2, 1), num_modalities=3, activation="identity", with_residual=False),
    "lenders": Case((1, 2), num_modalities=3, cyclic=True),
    "sample by sample": Case((1, 3), num_modalities=3, channels_last=True, order="sample"),
}


class Collectives(TorchDispatchMode):
    """Counts the collectives that run inside it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def small_network() -> nn.Module:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6, momentum=None),
        nn.Flatten(),
        nn.Linear(6 * 4, 5),
    )
    for layer in (net[1], net[4]):
        nn.init.uniform_(layer.weight, -0.2, 0.2)
    return make_multimodal(net.double(), 2, threshold=0.05)


TRAINING = Case((3, 3), spatial=(6, 6))


def train(net: nn.Module, rank: int | None = None) -> dict[str, Tensor]:
    """State after a few steps on one process's share of each batch, or on the whole of it."""
    model = net if rank is None else DistributedDataParallel(synchronise_statistics(net))
    torch.manual_seed(3)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        x, target = torch.randn(12, 3, 6, 6).double(), torch.randn(12, 5).double()
        if rank is not None:
            x, target = TRAINING.share(x, rank), TRAINING.share(target, rank)
        optimiser.zero_grad()
        (model(x) - target).square().mean().backward()
        optimiser.step()
    return net.state_dict()


def work(rank: int, folder: Path) -> None:
    """The work of each of the two processes; the tests look at what it leaves in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results: dict[Any, Any] = {}
    for name, case in CASES.items():
        inputs = case.inputs()
        for key in ("x", "residual", "dy"):
            inputs[key] = None if inputs[key] is None else case.share(inputs[key], rank)
        for backend in BACKENDS:
            results[name, backend] = case.run(inputs, process_group=dist.group.WORLD, backend=backend)

    x = LARGE_MEAN.double().view(2, 4, 6, 12)[:, 2 * rank :][:, :2].reshape(4, 6, 12).float()
    layer = synchronise_statistics(ExchangeBatchNorm2d(6, 2, momentum=1.0))
    results["large mean"] = {"y": layer(x).detach(), "var": layer.running_var}

    results["training"] = train(small_network(), rank)
    gc.collect()  # gloo aborts now and then at exit where a DistributedDataParallel outlives its group
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


LARGE_MEAN = (torch.randn(8, 6, 12, generator=torch.Generator().manual_seed(4)) * 0.1 + 1e3).float()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """The results of both processes; one start serves all tests."""
    folder = tmp_path_factory.mktemp("processes")
    spawn_two(work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_the_whole_batch(processes, name, backend):
    case = CASES[name]
    found = [process[name, backend] for process in processes]
    expected = case.run(case.inputs(), backend=backend)
    for key in ("y", "dx", "dresidual"):
        for rank in range(2 if key in expected else 0):
            torch.testing.assert_close(found[rank][key], case.share(expected[key], rank), **CLOSE)
    for key in ("dweight", "dbias"):  # each process's own sums, which data parallelism adds up
        torch.testing.assert_close(found[0][key] + found[1][key], expected[key], **CLOSE)
    for key in ("running_mean", "running_var"):
        torch.testing.assert_close(found[0][key], expected[key], **CLOSE)
        assert torch.equal(found[0][key], found[1][key])
    for process in found:
        assert (process["forward"], process["backward"]) == (1, 1)


def test_a_large_mean_costs_no_digits(processes):
    x = LARGE_MEAN.double().view(2, 4, 6, 12)
    var, mean = torch.var_mean(x, (1, 3), keepdim=True, correction=0)
    expected = (x - mean) * torch.rsqrt(var + 1e-5)
    # The mean is a float32: half a unit of its last place, in standard deviations, and a few roundings.
    bound = 1e3 * 2.0**-24 / 0.1 + 8 * 2.0**-24 * expected.abs().max().item()
    for rank, process in enumerate(processes):
        y = process["large mean"]["y"].double().view(2, 2, 6, 12)
        assert (y - expected[:, 2 * rank :][:, :2]).abs().max() <= bound
        # The distance between the processes' means, at most 0.1, carries the rounding of both.
        unbiased = x.var((1, 3), correction=1)
        error = (process["large mean"]["var"] - unbiased).abs().max()
        assert error <= 0.1 * 1e3 * 2.0**-24 * 2


def test_training_in_two_processes_is_training_in_one(processes):
    expected = train(small_network())
    for process in processes:
        assert process["training"].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(process["training"][key], value, rtol=1e-10, atol=1e-10)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_of_one_changes_nothing(group, backend):
    case = Case((2, 1))
    found = case.run(case.inputs(), process_group=group, backend=backend)
    for key, value in case.run(case.inputs(), backend=backend).items():
        if key not in ("forward", "backward"):
            torch.testing.assert_close(found[key], value, **CLOSE)


def test_half_types(group):
    layer = ExchangeBatchNorm2d(6, 2, threshold=0.02, activation="relu")
    x = torch.randn(4, 6, 5, 5).bfloat16()
    results = []
    for process_group in (None, group):
        layer.process_group = process_group
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (leaf, *layer.parameters()))))
    # The two parts of dx are each rounded before they are added: an error in units of the larger one, 2 y.
    bounds = (2.0**-8, 2.0**-8 * 2 * results[0][0].abs().max().item(), 1e-3, 1e-3)
    for alone, together, bound in zip(*results, bounds, strict=True):
        torch.testing.assert_close(together, alone, rtol=2.0**-8, atol=bound)


def test_only_training_synchronises(group):
    layer = synchronise_statistics(ExchangeBatchNorm2d(4, 2, track_running_stats=False))
    x = torch.randn(4, 4, 3, 3)
    for training, calls in ((True, 1), (False, 0)):
        with Collectives() as collectives:
            layer.train(training)(x)
        assert collectives.count == calls
    with Collectives() as collectives:  # x asks for no gradient: nothing to exchange in the backward pass
        layer(x).sum().backward()
    assert collectives.count == 0


def test_the_group_is_set_on_batch_norm_below_and_kept_by_copies(group):
    net = nn.Sequential(
        ExchangeBatchNorm2d(4, 2), nn.Sequential(ExchangeBatchNorm2d(4, 2)), nn.BatchNorm2d(4)
    )
    assert synchronise_statistics(net) is net
    assert net[0].process_group is group
    assert net[1][0].process_group is group
    assert copy.deepcopy(net)[1][0].process_group is group
    assert pickle.loads(pickle.dumps(net[0])).process_group is None
    assert make_multimodal(nn.SyncBatchNorm(4), 2).process_group is group
    assert make_multimodal(nn.BatchNorm2d(4), 2).process_group is None
    instance = synchronise_statistics(ExchangeInstanceNorm2d(4, 2))
    assert instance(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)


def test_mistakes(group):
    layer = ExchangeBatchNorm2d(4, 2, process_group=group)
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer(torch.randn(2, 4))
    with pytest.raises(ValueError, match="process_group synchronizes batch norm, but norm is 'instance'"):
        ExchangeInstanceNorm2d(4, 2, process_group=group)
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup .* got str"):
        synchronise_statistics(layer, "gloo")
    x = torch.randn(4, 4, 3, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dx.sum().backward()


def test_without_torch_distributed_it_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group first"):
        synchronise_statistics(ExchangeBatchNorm2d(4, 2))
