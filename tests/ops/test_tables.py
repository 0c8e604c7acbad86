"""Scales and shifts are one-dimensional parameters, to all that looks at these, and tables to their layer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

import cen_ext
from cen_ext import ExchangeBatchNorm2d, ExchangeInstanceNorm2d, sparsity_penalty
from cen_ext.tables import table_shapes
from tests.helpers import vision
from tests.helpers.training_runs import spawn_two

M, C = 2, 5
LAYERS = [ExchangeBatchNorm2d, ExchangeInstanceNorm2d]


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    made = request.param(C, M, threshold=0.3, track_running_stats=True)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    return made


def x() -> Tensor:
    return torch.randn(2 * M, C, 4, 3)


def stored(layer: nn.Module, name: str = "weight") -> nn.Parameter:
    return dict(layer.named_parameters())[name]


def test_parameters_and_state_are_one_dimensional(layer):
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight": (M * C,),
        "bias": (M * C,),
    }
    for name, parameter in layer.named_parameters():
        assert torch.equal(layer.state_dict()[name], parameter)
        assert torch.equal(getattr(layer, name), parameter.view(M, C))
        assert isinstance(getattr(layer, name), nn.Parameter)


def test_nothing_takes_the_scales_for_a_matrix():
    net = nn.Sequential(nn.Conv2d(3, C, 1), ExchangeBatchNorm2d(C, M))
    scales = net[1].weight.clone()
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    assert torch.equal(net[1].weight, scales)
    optimizer = torch.optim.Adafactor(net.parameters())
    net(torch.randn(2 * M, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    assert {name for name, p in net.named_parameters() if "row_var" in optimizer.state[p]} == {"0.weight"}


def test_timm_does_not_decay_the_scales():
    vision.timm()
    from timm.optim import param_groups_weight_decay

    net = nn.Sequential(nn.Conv2d(3, C, 1), ExchangeBatchNorm2d(C, M))
    without, decayed = param_groups_weight_decay(net, 0.1)
    assert (without["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(net[0].weight)]


def test_what_is_written_to_a_table_is_the_parameters(layer):
    layer.weight.data[0, :3] = 0
    with torch.no_grad():
        layer.weight[1, 4] = 7
        layer.bias.mul_(2).clamp_(min=0.5)
    nn.init.constant_(layer.bias[1], 3)
    assert stored(layer)[:3].tolist() == [0, 0, 0]
    assert stored(layer)[9] == 7
    assert stored(layer, "bias")[C:].tolist() == [3] * C
    assert stored(layer, "bias")[:C].min() >= 0.5
    assert layer.replaced()[0, :2].tolist() == [True, True]  # modality 0's own share
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        layer.weight[0, 0] = 1


def test_requires_grad_is_the_parameters(layer):
    parameter = stored(layer)
    assert layer.weight.requires_grad_(False) is not None
    assert not parameter.requires_grad
    assert not layer.weight.requires_grad
    table = layer.weight.requires_grad_()
    assert parameter.requires_grad
    (table * 2).sum().backward()
    assert parameter.grad.tolist() == [2] * (M * C)
    layer.weight.requires_grad = False
    assert not parameter.requires_grad
    layer.weight.requires_grad = True
    with torch.no_grad():
        assert layer.weight.requires_grad


def test_gradients_are_the_parameters(layer):
    assert layer.weight.grad is None
    layer(x()).square().sum().backward()
    parameter = stored(layer)
    assert torch.equal(layer.weight.grad, parameter.grad.view(M, C))
    layer.weight.grad[0] = 0
    assert parameter.grad[:C].tolist() == [0] * C
    layer.weight.grad = torch.arange(M * C).float().view(M, C)
    assert parameter.grad.tolist() == list(range(M * C))
    del layer.weight.grad
    assert parameter.grad is None


def test_hooks_get_tables_of_the_parameters_gradient(layer):
    got = []

    def keep_first_modality(grad: Tensor) -> Tensor:
        got.append(grad)
        return torch.cat([grad[:1], torch.zeros_like(grad[1:])])

    handle = layer.weight.register_hook(keep_first_modality)
    layer.bias.register_hook(lambda grad: got.append(grad))
    done = []
    layer.weight.register_post_accumulate_grad_hook(lambda table: done.append(table.grad.clone()))
    layer(x()).square().sum().backward()
    assert [grad.shape for grad in got] == [(M, C)] * 2
    assert layer.weight.grad[0].abs().sum() > 0
    assert layer.weight.grad[1].tolist() == [0] * C
    assert torch.equal(done[0], layer.weight.grad)
    handle.remove()
    layer(x()).square().sum().backward()
    assert layer.weight.grad[1].abs().sum() > 0


def test_a_table_is_no_leaf_to_optimizers(layer):
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([layer.weight], 0.1)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(layer(x()).sum(), layer.weight)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("shape", [(M * C,), (M, C), (C,)])
def test_state_of_every_shape_loads(layer, shape, assign):
    state = layer.state_dict()
    for name in ("weight", "bias"):
        state[name] = torch.randn(shape)
    for name in ("running_mean", "running_var"):
        state[name] = torch.rand(shape)
    given = {name: state[name].clone() for name in table_shapes(layer)}
    layer.load_state_dict(state, assign=assign)
    assert list(given) == ["weight", "bias", "running_mean", "running_var"]
    for name, value in given.items():
        expected = value.expand(M, C) if shape == (C,) else value.view(M, C)
        assert torch.equal(getattr(layer, name), expected)
        with torch.no_grad():
            getattr(layer, name)[0] = -1  # each modality has memory of its own
        assert torch.equal(getattr(layer, name)[1], expected[1])
    assert stored(layer).shape == (M * C,)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight.*\[2, 4\].*current model is .*\[10\]"):
        layer.load_state_dict({**layer.state_dict(), "weight": torch.ones(M, 4)})


def test_parameters_are_assigned_and_tied(layer):
    with pytest.raises(ValueError, match=r"weight of Exchange.* is stored one-dimensional.*shape \(2, 5\)"):
        layer.weight = nn.Parameter(torch.ones(M, C))
    layer.weight = nn.Parameter(torch.full((M * C,), 0.5))
    assert torch.equal(layer.weight, torch.full((M, C), 0.5))
    other = copy.deepcopy(layer)
    assert stored(other) is not stored(layer)
    other.weight = layer.weight
    assert stored(other) is stored(layer)
    del other.weight
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        other.weight  # noqa: B018
    other.weight = torch.ones(M * C)  # as FSDP does
    assert torch.equal(other.weight, torch.ones(M, C))
    other(x())


def test_calls_with_other_parameters(layer):
    weight, bias, given = torch.randn(M, C), torch.randn(M * C), x()
    y = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (given,))
    other = copy.deepcopy(layer)
    other.load_state_dict({**other.state_dict(), "weight": weight, "bias": bias})
    assert torch.equal(y, other(given))


def test_layers_that_were_pickled_with_tables(layer):
    given = x()
    expected = layer.eval()(given)
    for parameter in layer.parameters():
        parameter.data = parameter.data.view(M, C)
    again = pickle.loads(pickle.dumps(layer))
    assert stored(again).shape == (M * C,)
    assert torch.equal(again(given), expected)


def test_half_parameters_are_made_float(layer):
    given = x().bfloat16()
    expected = layer(given)
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()
    layer(given).float().sum().backward()
    assert stored(layer).grad.dtype == torch.bfloat16
    torch.testing.assert_close(layer(given), expected, rtol=2**-7, atol=2**-7)


def test_sharded_parameters(tmp_path: Path) -> None:
    spawn_two(shard, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(first) == 2
    for found, other in zip(first, second, strict=True):
        assert torch.equal(found["penalty"], found["expected_penalty"])
        assert torch.equal(found["replaced"], found["expected_replaced"])
        assert found["replaced"].any()
        # The gradient of the mean loss, as all processes see it.
        expected = (found["expected_gradient"] + other["expected_gradient"]) / 2
        bound = {"torch.float32": 1e-6, "torch.bfloat16": 2e-2}[found["dtype"]]
        scale = expected.abs().max()
        for each in (found, other):
            torch.testing.assert_close(each["gradient"] / scale, expected / scale, rtol=0, atol=bound)


def shard(rank: int, folder: Path) -> None:
    """FSDP2 with and without bfloat16 parameters: what each process finds."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    found = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 5, 3), ExchangeBatchNorm2d(5, 3, threshold=0.5))
        nn.init.uniform_(net[1].weight)
        alone = copy.deepcopy(net)
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
        torch.manual_seed(rank)
        images = torch.randn(6, 3, 8, 8)
        y = net(images)
        (y.float().square().mean() + 0.1 * sparsity_penalty(net)).backward()
        (alone(images).square().mean() + 0.1 * sparsity_penalty(alone)).backward()
        found.append(
            {
                "dtype": str(y.dtype),
                "penalty": sparsity_penalty(net).detach(),
                "expected_penalty": sparsity_penalty(alone).detach(),
                "replaced": net[1].replaced(),
                "expected_replaced": alone[1].replaced(),
                "gradient": stored(net[1]).grad.full_tensor(),
                "expected_gradient": stored(alone[1]).grad,
            }
        )
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_the_penalty_is_compiled_and_its_gradient_the_parameters():
    layer = ExchangeBatchNorm2d(C, M, threshold=0.3)
    nn.init.normal_(layer.weight)
    torch.compile(sparsity_penalty, backend="aot_eager", fullgraph=True)(layer).backward()
    share = torch.zeros(M, C)
    share[0, :2] = share[1, 2:] = 1
    assert torch.equal(layer.weight.grad, layer.weight.sign() * share)
    assert cen_ext.sparsity_penalty(layer) == (layer.weight.abs() * share).sum()
