"""Outputs computed again for the backward pass: the gradients stay, the memory does not."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cen_ext
from bench.harness.memory import tensor_bytes

SIZE = (4, 6, 10, 10)


class Chain(nn.Module):
    """Convolution, norm, convolution, norm with residual, a strided branch joined by a residual."""

    def __init__(
        self,
        norm: type[cen_ext.ExchangeBatchNorm2d | cen_ext.ExchangeInstanceNorm2d],
        order: str = "modality",
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))
        each = [{"threshold": 0.3, "activation": "relu"}, {}, {"activation": "relu"}]
        self.norms = nn.ModuleList([norm(6, 2, order=order, **options) for options in each])
        for layer in self.norms:
            nn.init.uniform_(layer.weight, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.convs[0](x))
        skip = self.norms[1](self.convs[1](y))
        return self.norms[2](self.convs[2](y), skip)


def gradients(net: nn.Module, x: Tensor, recompute: bool) -> list[Tensor]:
    net.zero_grad()
    x = x.clone().requires_grad_()
    if recompute:
        with cen_ext.recompute_outputs():
            y = net(x)
    else:
        y = net(x)
    y.square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in net.parameters())]


@pytest.mark.parametrize("norm", [cen_ext.ExchangeBatchNorm2d, cen_ext.ExchangeInstanceNorm2d])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("order", ["modality", "sample"])
def test_gradients_are_the_same(norm: type, order: str, training: bool, layout: torch.memory_format) -> None:
    net = Chain(norm, order).double().to(memory_format=layout).train(training)
    x = torch.randn(SIZE, dtype=torch.float64).to(memory_format=layout)
    for found, expected in zip(gradients(net, x, True), gradients(net, x, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_running_statistics_are_updated_once() -> None:
    net, x = Chain(cen_ext.ExchangeBatchNorm2d), torch.randn(SIZE)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradients(net, x, False)
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(before)
    gradients(net, x, True)
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_outputs_are_not_kept() -> None:
    norm, conv = cen_ext.ExchangeBatchNorm2d(16, 2, activation="relu"), nn.Conv2d(16, 1, 1)
    x = torch.randn(4, 16, 64, 64, requires_grad=True)

    def kept(forward: Callable[[], Tensor]) -> int:
        return tensor_bytes(forward)[0]

    def recomputing() -> Tensor:
        with cen_ext.recompute_outputs():
            return conv(norm(x))

    size = x.numel() * x.element_size()
    assert kept(lambda: conv(norm(x))) - kept(recomputing) == size


def test_changed_and_partial_outputs_are_kept() -> None:
    norm = cen_ext.ExchangeBatchNorm2d(6, 2).double()
    weight = torch.randn(6, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    x = torch.randn(SIZE, dtype=torch.float64)

    def changed(x: Tensor) -> Tensor:
        return F.conv2d(F.relu_(norm(x)), weight)

    def part(x: Tensor) -> Tensor:
        return F.conv2d(norm(x)[:, :, 2:7], weight)

    def turned(x: Tensor) -> Tensor:
        return F.conv2d(norm(x).transpose(2, 3), weight)

    for forward in (changed, part, turned):
        found = []
        for recompute in (False, True):
            weight.grad = None
            if recompute:
                with cen_ext.recompute_outputs():
                    y = forward(x)
            else:
                y = forward(x)
            y.square().sum().backward()
            found.append(weight.grad)
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_what_was_changed_in_place_since_is_refused() -> None:
    norm, x = cen_ext.ExchangeBatchNorm2d(6, 2), torch.randn(SIZE, requires_grad=True)
    with cen_ext.recompute_outputs():
        y = x.exp()
        loss = norm(y).sum()
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_a_pass_whose_gradients_nobody_asks_for_leaves_nothing() -> None:
    """Operations that keep their own output, as these, must not keep themselves alive."""
    x = torch.randn(SIZE, requires_grad=True)
    with cen_ext.recompute_outputs():
        y = cen_ext.ExchangeBatchNorm2d(6, 2)(x).relu().sigmoid()
    left = weakref.ref(y)
    del y
    assert left() is None


def test_memory_used_again_is_not_taken_for_an_output() -> None:
    """A freed output's memory is the next tensor's of that size; nothing but the storage tells them apart."""
    norm = cen_ext.ExchangeBatchNorm2d(6, 2)
    x, weight = torch.randn(SIZE), torch.randn(SIZE, requires_grad=True)
    with cen_ext.recompute_outputs():
        for _ in range(20):
            norm(x)  # freed at once
            other = torch.randn(SIZE)
            weight.grad = None
            (weight * other).sum().backward()
            assert torch.equal(weight.grad, other)


def test_without_gradients_and_compiled() -> None:
    norm, x = cen_ext.ExchangeBatchNorm2d(6, 2).eval(), torch.randn(SIZE)
    with torch.no_grad():
        expected = norm(x)
        with cen_ext.recompute_outputs():
            assert torch.equal(norm(x), expected)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    with cen_ext.recompute_outputs():
        y = compiled(x)
    y.sum().backward()
    found, x.grad = x.grad, None
    norm(x).sum().backward()
    torch.testing.assert_close(found, x.grad)
