"""What PyTorch asks of every module, after its documentation and the names of its own module tests.

A check takes a ``Case`` and raises where the module falls short. It knows no more of the module than what all
modules have.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, update_bn

import cen_ext
from cen_ext import unstack_modalities
from tests.peers.infos import Case

CHECKS: dict[str, Callable[[Case], None]] = {}
equal = torch.testing.assert_close


def check(function: Callable[[Case], None]) -> Callable[[Case], None]:
    CHECKS[function.__name__] = function
    return function


def run(module: nn.Module, x: Tensor, dy: Tensor | None = None) -> dict[str, Tensor | None]:
    """The output, all gradients, and the state that is left."""
    module.zero_grad()
    y = module(x)
    if y.requires_grad:
        y.backward(torch.cos(y.detach()) if dy is None else dy)
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return {"y": y.detach(), "gradient of x": x.grad, **gradients, **state}


def with_history(case: Case) -> nn.Module:
    """A module whose state no constructor makes. Its scales stay on their side of the threshold."""
    module = case.make()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5)
        else:
            assert name == "num_batches_tracked"
            buffer.fill_(2)
    return module


@contextmanager
def future(swap: bool = False, overwrite: bool = False) -> Iterator[None]:
    """torch.__future__: conversions swap tensors, or replace parameters, instead of setting their data."""
    setters = (
        torch.__future__.set_swap_module_params_on_conversion,
        torch.__future__.set_overwrite_module_params_on_conversion,
    )
    try:
        for set_option, value in zip(setters, (swap, overwrite), strict=True):
            set_option(value)
        yield
    finally:
        for set_option in setters:
            set_option(False)


def refusal(call: Callable[[Any], object], argument: Any) -> str:
    """The message of what a call raises; pytest.raises fails with no Exception."""
    try:
        call(argument)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        return str(error)
    raise AssertionError(f"accepted {type(argument).__name__}")


FUTURES = ({}, {"swap": True}, {"overwrite": True})


@check
def forward(case: Case) -> None:
    module = with_history(case)
    if case.reference_fn is None:
        assert module(case.input()).shape == case.x.shape
        return
    equalized = module.state_dict()  # the reference has one state for all modalities
    for value in equalized.values():
        if value.dim():
            parts = value.reshape(case.num_modalities, -1)
            parts.copy_(parts[0].clone())
    module.load_state_dict(equalized)
    equal(module(case.input()), case.reference_fn(module, case.input()))


@check
def grad(case: Case) -> None:
    module = with_history(case)
    with torch.random.fork_rng():
        assert gradcheck(lambda x, *_: module(x), (case.input(), *module.parameters()), fast_mode=True)


@check
def gradgrad(case: Case) -> None:
    """Compiled kernels refuse, which is documented; the reference is differentiated twice."""
    module = with_history(case)
    with cen_ext.use_backend("reference"), torch.random.fork_rng():
        assert gradgradcheck(lambda x, *_: module(x), (case.input(), *module.parameters()), fast_mode=True)


@check
def determinism(case: Case) -> None:
    module = with_history(case)
    first, second = (run(copy.deepcopy(module), case.input()) for _ in range(2))
    equal(first, second, rtol=0, atol=0)


@check
def non_contiguous_tensors(case: Case) -> None:
    module, dy = with_history(case), torch.randn_like(case.x)
    expected = run(copy.deepcopy(module), case.input(), dy)
    for axis in range(1, case.x.dim()):
        strided = [t.transpose(0, axis).contiguous().transpose(0, axis) for t in (case.x, dy)]
        gaps = [torch.stack([t, t], -1)[..., 0] for t in (case.x, dy)]
        for x, gradient in (strided, gaps):
            equal(run(copy.deepcopy(module), x.detach().requires_grad_(), gradient), expected)


@check
def memory_format(case: Case) -> None:
    module = with_history(case)
    expected = run(copy.deepcopy(module), case.input())
    for of_module in (torch.contiguous_format, torch.channels_last):
        for of_x in (torch.contiguous_format, torch.channels_last):
            converted = copy.deepcopy(module).to(memory_format=of_module)
            x = case.input().detach().contiguous(memory_format=of_x).requires_grad_()
            equal(run(converted, x), expected)
            assert converted(x).is_contiguous(memory_format=of_x)


@check
def factory_kwargs(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        for device in ("meta", "cpu"):
            tensors = case.make(dtype, device=device).state_dict().values()
            assert all(t.device.type == device for t in tensors)
            assert all(t.dtype == dtype for t in tensors if t.is_floating_point())


@check
def device_context(case: Case) -> None:
    with torch.device("meta"):
        module = case.make()
        assert all(t.is_meta for t in module.state_dict().values())
        assert module(torch.empty(case.x.shape, dtype=case.x.dtype)).is_meta


@check
def default_dtype(case: Case) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module = case.make(None)
    finally:
        torch.set_default_dtype(before)
    assert all(t.dtype == torch.float64 for t in module.state_dict().values() if t.is_floating_point())


@check
def skip_init(case: Case) -> None:
    module = nn.utils.skip_init(case.module_class, *case.args, **case.kwargs)
    made = case.make(None)
    module.load_state_dict(made.state_dict())
    equal(dict(module.state_dict()), dict(made.state_dict()))


@check
def representation(case: Case) -> None:
    module = case.make()
    assert type(module).__name__ in repr(module)
    assert str(case.args[0]) in str(nn.Sequential(module))


def copies_of(module: nn.Module) -> list[nn.Module]:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    return [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved]


@check
def copies(case: Case) -> None:
    """deepcopy, pickle and torch.save, of a module that has run forward and backward."""
    module = with_history(case)
    run(module, case.input())
    others = copies_of(module)
    module.zero_grad()
    states = [other.state_dict() for other in others]
    for state in states:
        equal(dict(state), dict(module.state_dict()), rtol=0, atol=0)
        addresses = [{t.data_ptr() for t in tensors.values()} for tensors in (state, module.state_dict())]
        assert not addresses[0] & addresses[1]
    expected = run(module, case.input())
    for other in others:
        equal(run(other, case.input()), expected, rtol=0, atol=0)


@check
def state_dict(case: Case) -> None:
    source, file = with_history(case), io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file)  # weights only
    expected = run(copy.deepcopy(source), case.input())
    for assign in (False, True):
        for options in FUTURES[:2]:
            target = case.make()
            run(target, case.input())  # nothing of which may stay
            with future(**options):
                result = target.load_state_dict(copy.deepcopy(state), assign=assign)
            assert not result.missing_keys
            assert not result.unexpected_keys
            assert all(p.requires_grad and p.is_leaf for p in target.parameters())
            equal(run(target, case.input()), expected, rtol=0, atol=0)


@check
def state_dict_errors(case: Case) -> None:
    module = with_history(case)
    state = module.state_dict()
    for change, message in (
        ({"other": torch.ones(1)}, "Unexpected key"),
        ({name: torch.ones(7) for name, value in state.items() if value.dim()}, "size mismatch"),
    ):
        if change:
            assert message in refusal(module.load_state_dict, {**state, **change})
    for name in state:
        left = copy.copy(state)
        del left[name]
        result = module.load_state_dict(left, strict=False)
        assert result.missing_keys == [name]


@check
def state_dict_prefix(case: Case) -> None:
    """Of a module inside others, with and without the tensors' history."""
    net = nn.ModuleDict({"a": nn.Sequential(with_history(case))})
    names = [*dict(net.named_parameters()), *dict(net.named_buffers())]
    for options in ({}, {"keep_vars": True}):
        state = net.state_dict(**options)
        assert sorted(state) == sorted(names)
        parameters = dict(net.named_parameters())
        for name, value in state.items():
            assert value.requires_grad == (name in parameters and bool(options))
    assert list(net.state_dict(prefix="p.")) == [f"p.{name}" for name in net.state_dict()]


@check
def to_dtype(case: Case) -> None:
    """Conversions keep values and requires_grad; with swapped tensors, the parameters' identity, too."""
    for options in FUTURES:
        module = with_history(case)
        before = copy.deepcopy(dict(module.state_dict()))
        for parameter in list(module.parameters())[:1]:
            parameter.requires_grad_(False)
        flags = [p.requires_grad for p in module.parameters()]
        identities = [id(p) for p in module.parameters()]
        with future(**options):
            converted = module.float().to(torch.float64)
        assert converted is module
        assert [p.requires_grad for p in module.parameters()] == flags
        if not options.get("overwrite"):
            assert [id(p) for p in module.parameters()] == identities
        rounded = {
            name: value.float().double() if value.is_floating_point() else value
            for name, value in before.items()
        }
        equal(dict(module.state_dict()), rounded, rtol=0, atol=0)
        other = case.make()
        other.load_state_dict(rounded)
        for single, parameter in zip(other.parameters(), module.parameters(), strict=True):
            single.requires_grad_(parameter.requires_grad)
        equal(run(module, case.input()), run(other, case.input()), rtol=0, atol=0)


@check
def to_empty(case: Case) -> None:
    source = with_history(case)
    for options in FUTURES[:2]:
        with future(**options):
            module = case.make().to("meta")
            assert all(t.is_meta for t in module.state_dict().values())
            module.to_empty(device="cpu")
        module.load_state_dict(source.state_dict())
        equal(run(module, case.input()), run(copy.deepcopy(source), case.input()), rtol=0, atol=0)


@check
def shared_memory(case: Case) -> None:
    module = with_history(case).share_memory()
    assert all(t.is_shared() for t in module.state_dict().values())


@check
def apply_and_freeze(case: Case) -> None:
    module, seen = with_history(case), []
    nn.Sequential(module).apply(seen.append)
    assert seen[0] is module
    module.requires_grad_(False)
    x = case.input()
    run(module, x)
    assert all(p.grad is None for p in module.parameters())
    assert x.grad is not None


@check
def hooks(case: Case) -> None:
    module, seen = with_history(case), []
    module.register_forward_pre_hook(lambda m, inputs: seen.append("pre"))
    module.register_forward_hook(lambda m, inputs, output: output * 2)
    module.register_full_backward_pre_hook(lambda m, dy: seen.append("backward pre"))
    module.register_full_backward_hook(lambda m, dx, dy: seen.append(("backward", dx[0].shape)))
    plain = copy.deepcopy(module)
    plain._forward_hooks.clear()
    y = module(case.input())
    equal(y, 2 * plain(case.input()))
    seen.clear()
    y.sum().backward()
    assert seen == ["backward pre", ("backward", case.x.shape)]


@check
def parameters_as_a_vector(case: Case) -> None:
    module = with_history(case)
    if not (parameters := list(module.parameters())):
        return
    vector = nn.utils.parameters_to_vector(parameters).detach() * 0.9
    expected = [p.detach() * 0.9 for p in parameters]
    nn.utils.vector_to_parameters(vector, module.parameters())
    equal([p.detach() for p in module.parameters()], expected)
    other = case.make()
    other.load_state_dict(module.state_dict())
    equal(run(module, case.input()), run(other, case.input()), rtol=0, atol=0)


@check
def optimizer_step(case: Case) -> None:
    """A step moves the parameters that forward reads, also those that were loaded by assignment."""
    module = case.make()
    if not list(module.parameters()):
        return
    module.load_state_dict(copy.deepcopy(with_history(case).state_dict()), assign=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = case.input()
    run(module, x)
    expected = {name: p.detach() - 0.1 * p.grad for name, p in module.named_parameters()}
    optimizer.step()
    equal({name: p.detach() for name, p in module.named_parameters()}, expected)
    other = case.make()
    other.load_state_dict(module.state_dict())
    equal(run(module, case.input()), run(other, case.input()), rtol=0, atol=0)


@check
def functional_call(case: Case) -> None:
    module, other = with_history(case), with_history(case)
    before = copy.deepcopy(dict(module.state_dict()))
    values = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    given = {name: value.detach().clone() for name, value in values.items()}
    for name in dict(other.named_parameters()):
        given[name].requires_grad_()
    y = torch.func.functional_call(module, given, (case.input(),))
    expected = run(other, case.input(), torch.ones_like(y))
    equal(y.detach(), expected["y"])
    y.sum().backward()
    for name, value in given.items():
        if value.requires_grad:
            equal(value.grad, expected[f"gradient of {name}"])
        else:
            equal(value, expected[name])  # it has the running statistics of this call
    equal(dict(module.state_dict()), before, rtol=0, atol=0)


@check
def func_transforms(case: Case) -> None:
    """torch.func's gradients and products with Jacobians, along one direction."""
    module = with_history(case)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def call(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        held = {name: value.clone() for name, value in buffers.items()}
        return torch.func.functional_call(module, {**parameters, **held}, (x,)).sin().sum()

    x = case.input().detach()
    gradients = torch.func.grad(call, argnums=(0, 1))(x, parameters)
    directions = (torch.randn_like(x), {name: torch.randn_like(p) for name, p in parameters.items()})
    _, product = torch.func.jvp(call, (x, parameters), directions)
    slope = (gradients[0] * directions[0]).sum()
    for name in parameters:
        slope = slope + (gradients[1][name] * directions[1][name]).sum()
    equal(product, slope)


@check
def ensembles(case: Case) -> None:
    """torch.func.stack_module_state and vmap: several modules at once."""
    modules = [with_history(case) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    y = torch.vmap(call, (0, 0, None))(parameters, buffers, case.x)
    equal(y, torch.stack([module(case.x) for module in modules]))


@check
def inference_mode(case: Case) -> None:
    module = with_history(case)
    expected = run(copy.deepcopy(module), case.input())
    with torch.inference_mode():
        y = module(case.x.clone())
    equal(y, expected["y"])
    for name, value in module.state_dict().items():
        equal(value, expected[name])


class Half(nn.Module):
    """A parametrization."""

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 0.5

    def right_inverse(self, tensor: Tensor) -> Tensor:
        return tensor * 2


@check
def parametrization(case: Case) -> None:
    module = with_history(case)
    if not list(module.parameters()):
        return
    expected = run(copy.deepcopy(module), case.input())
    for name in ("weight", "bias"):
        parametrize.register_parametrization(module, name, Half())
    result = run(module, case.input())
    for name in ("y", "gradient of x"):
        equal(result[name], expected[name])
    original = module.parametrizations["weight"].original
    equal(original.grad.flatten(), 0.5 * expected["gradient of weight"].flatten())
    parametrize.remove_parametrizations(module, "weight")
    equal(run(module, case.input())["y"], expected["y"])


@check
def pruning(case: Case) -> None:
    module = with_history(case)
    if not list(module.parameters()):
        return
    prune.identity(module, "bias")
    prune.random_unstructured(module, "bias", amount=1)
    zeros = int((module.bias == 0).sum())
    run(module, case.input())
    assert zeros == 1
    prune.remove(module, "bias")
    assert int((dict(module.named_parameters())["bias"] == 0).sum()) == 1


@check
def averaged_model(case: Case) -> None:
    """torch.optim.swa_utils: averages of the parameters, and of the buffers if asked."""
    for use_buffers in (False, True):
        module = nn.Sequential(with_history(case))
        averaged = AveragedModel(module, use_buffers=use_buffers)
        states = []
        for _ in range(2):
            module[0].load_state_dict(with_history(case).state_dict())
            states.append(copy.deepcopy(dict(module.state_dict())))
            averaged.update_parameters(module)
        names = dict(module.named_parameters())
        for name, value in averaged.module.state_dict().items():
            if name in names or (use_buffers and value.is_floating_point()):
                equal(value, (states[0][name] + states[1][name]) / 2)


@check
def update_bn_statistics(case: Case) -> None:
    """update_bn: the mean over the batches of their means, for batch norm."""
    module = nn.Sequential(with_history(case)).train(case.training)
    layer = module[0]
    loader = [case.x + 1, case.x * 2]
    update_bn(loader, module)
    assert layer.training == case.training
    batch_norm = isinstance(layer, nn.modules.batchnorm._BatchNorm)
    if not batch_norm or layer.running_mean is None or not case.x.numel():
        return
    order = case.kwargs.get("order", "modality")
    parts = [unstack_modalities(x, case.num_modalities, order=order) for x in loader]
    means = [torch.stack([part.mean((0, 2, 3)) for part in each]) for each in parts]
    equal(layer.running_mean.reshape(case.num_modalities, -1), sum(means) / 2)
    assert layer.num_batches_tracked == 2


@check
def wrong_inputs(case: Case) -> None:
    """Inputs of the wrong rank or number of channels, and all else, are refused."""
    module = with_history(case)
    for x in (case.x.new_ones(4), torch.cat([case.x, case.x], 1), [case.x], None):
        refusal(module, x)
