"""make_multimodal on networks that know nothing of it: equal to the original without exchange, and to an
exchange made by hand with forward hooks on the original with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cen_ext import (
    ExchangeBatchNorm2d,
    ExchangeInstanceNorm2d,
    exchanging_layers,
    make_multimodal,
    stack_modalities,
    unstack_modalities,
)
from cen_ext.modules import ExchangeNorm
from tests.helpers import formulas

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class DenseNet(nn.Module):
    """Norms before convolutions, concatenated features, one norm used thrice and kept in a plain list too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(6 + 4 * i), nn.ReLU(inplace=True), nn.Conv2d(6 + 4 * i, 4, 3, padding=1)
            )
            for i in range(2)
        )
        self.last = nn.BatchNorm2d(14, momentum=0.3)
        self.again = self.last
        self.aside = [self.last]
        self.head = nn.Sequential(nn.Linear(14, 5), nn.BatchNorm1d(5, eps=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        x = self.aside[0](torch.sigmoid(self.again(self.last(x))))
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Down and up once, with a skip; instance norm with and without affine and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, 6, 4, 2, 1), nn.InstanceNorm2d(6, affine=True), nn.LeakyReLU(0.2)
        )
        self.middle = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.InstanceNorm2d(6), nn.ReLU())
        self.up = nn.Sequential(
            nn.ConvTranspose2d(12, 4, 4, 2, 1), nn.InstanceNorm2d(4, track_running_stats=True), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.up(torch.cat([x, self.middle(x)], 1))


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 4, 2),
        nn.BatchNorm3d(4, track_running_stats=False),
        nn.ReLU(),
        nn.Flatten(2),
        nn.InstanceNorm1d(4, affine=True),
        nn.Conv1d(4, 2, 3),
        nn.BatchNorm1d(2, affine=False, momentum=None),
    )


def resnet() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(num_classes=4)


# network, spatial size of x
NETWORKS = {
    "densenet": (DenseNet, (7, 6)),
    "unet": (UNet, (8, 12)),
    "volume": (volume, (3, 4, 3)),
    "resnet": (resnet, (64, 64)),
}


def make(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network in float64 whose norms have some history and affines of every size."""
    build, spatial = NETWORKS[name]
    net = build().double()
    for layer in net.modules():
        if isinstance(layer, NORMS):
            if layer.weight is not None:
                nn.init.uniform_(layer.weight, 0.01, 1.0)
                nn.init.normal_(layer.bias, std=0.1)
            if layer.running_mean is not None:
                nn.init.normal_(layer.running_mean, std=0.1)
                nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return net, spatial


def run(net: nn.Module, x: Tensor, dy: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the gradients of x and of the output; those of the parameters lie in the network."""
    x = x.clone().requires_grad_()
    y = net(x)
    dy = torch.randn_like(y) if dy is None else dy
    y.backward(dy)
    return y.detach(), x.grad, dy


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_without_exchange_every_modality_gets_the_original(name, training):
    net, spatial = make(name)
    ours = make_multimodal(net.train(training), 3, threshold=0)
    x = torch.randn(2, 3, *spatial, dtype=torch.float64)
    parts = [x, -x, x]  # the same and another
    y, dx, dy = run(ours, stack_modalities(parts))
    theirs = [copy.deepcopy(net) for _ in parts]
    for m, single in enumerate(theirs):
        expected_y, expected_dx, _ = run(single, parts[m], unstack_modalities(dy, 3)[m])
        torch.testing.assert_close(unstack_modalities(y, 3)[m], expected_y)
        torch.testing.assert_close(unstack_modalities(dx, 3)[m], expected_dx)

    states = [single.state_dict(keep_vars=True) for single in theirs]
    for key, value in ours.state_dict(keep_vars=True).items():
        # A norm without affine has none to compare with, and torch's instance norm does not count.
        if key not in states[0] or key.endswith("num_batches_tracked"):
            continue
        private = value.shape != states[0][key].shape
        each = torch.stack([state[key] for state in states])
        torch.testing.assert_close(value, each if private else each[0])
        if isinstance(value, nn.Parameter):
            each = torch.stack([state[key].grad for state in states])
            torch.testing.assert_close(value.grad, each if private else each.sum(0))


def exchange_by_hand(net: nn.Module, ours: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The original with hooks that put ``formulas.forward`` in the place of each norm; their scales."""
    net = copy.deepcopy(net)
    private = dict(ours.named_modules(remove_duplicate=False))
    scales = {}

    def hook_for(layer: ExchangeNorm, weight: Tensor):
        def hook(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            frozen = not layer.training and layer.running_mean is not None
            return formulas.forward(
                inputs[0],
                weight,
                layer.bias.detach(),
                layer.running_mean if frozen else None,
                layer.running_var if frozen else None,
                None,
                threshold=layer.threshold,
                region=layer.region,
                norm=layer.norm,
                eps=norm.eps,
            )[0]

        return hook

    for name, norm in net.named_modules():
        if isinstance(norm, NORMS):
            scales[name] = private[name].weight.detach().clone().requires_grad_()
            norm.register_forward_hook(hook_for(private[name], scales[name]))
    return net, scales


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_with_exchange_it_is_the_original_with_an_exchange_made_by_hand(name, training):
    net, spatial = make(name)
    net.train(training)
    first = next(name for name, layer in net.named_modules() if isinstance(layer, NORMS))
    ours = make_multimodal(net, 2, threshold=0.3, where=lambda name, _: name != first, region="all")
    for layer in exchanging_layers(ours).values():
        nn.init.uniform_(layer.weight, -1, 1)
        nn.init.normal_(layer.bias, std=0.3)
    assert any(layer.replaced().any() for layer in exchanging_layers(ours).values())
    by_hand, scales = exchange_by_hand(net, ours)
    x = torch.randn(4, 3, *spatial, dtype=torch.float64)
    y, dx, dy = run(ours, x)
    expected_y, expected_dx, _ = run(by_hand, x, dy)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(dx, expected_dx)
    parameters = dict(ours.named_parameters())
    for key, scale in scales.items():
        torch.testing.assert_close(parameters[f"{key}.weight"].grad, scale.grad)
    for key, parameter in by_hand.named_parameters():
        if parameter.grad is not None:  # those of the norms have none: the hooks put others in their place
            torch.testing.assert_close(parameters[key].grad, parameter.grad)


def test_the_layers_keep_what_the_norms_are():
    net = nn.Sequential(
        nn.BatchNorm2d(4, momentum=None, eps=1e-3).to(torch.bfloat16).eval(),
        nn.InstanceNorm2d(5, momentum=0.3),
        nn.BatchNorm3d(6, affine=False, device="meta"),
        nn.SyncBatchNorm(7, dtype=torch.float64),
        nn.Conv2d(1, 1, 1),
    )
    net[0].bias.requires_grad_(False)
    nn.init.uniform_(net[0].weight)
    net[0].num_batches_tracked.fill_(3)
    first, second, third, fourth, conv = ours = make_multimodal(net, 3, region="all", criterion="signed")
    kinds = [ExchangeBatchNorm2d, ExchangeInstanceNorm2d, ExchangeBatchNorm2d, ExchangeBatchNorm2d]
    assert [type(layer) for layer in ours[:4]] == kinds
    assert [layer.num_features for layer in ours[:4]] == [4, 5, 6, 7]
    assert {(layer.threshold, layer.region, layer.criterion) for layer in ours[:4]} == {
        (0.02, "all", "signed")
    }
    assert (first.momentum, first.eps, second.momentum, second.eps) == (None, 1e-3, 0.3, 1e-5)
    assert [layer.training for layer in ours[:4]] == [False, True, True, True]
    assert (first.weight.requires_grad, first.bias.requires_grad) == (True, False)
    assert torch.equal(first.weight, net[0].weight.float().repeat(3, 1))  # float32 with half types
    assert first.num_batches_tracked == 3
    assert second.running_mean is None
    assert torch.equal(second.weight, torch.ones(3, 5))
    assert second.weight.requires_grad
    assert third.weight.device.type == "meta"
    assert fourth.running_var.dtype == torch.float64
    assert fourth.process_group is None  # torch.distributed is not initialised
    assert conv is not net[4]
    assert isinstance(net[0], nn.BatchNorm2d)


def test_a_shared_norm_stays_shared_and_a_norm_may_be_the_whole_network():
    net, _ = make("densenet")
    ours = make_multimodal(net, 2)
    assert ours.last is ours.again
    assert ours.aside == [ours.last]
    assert ours.last is not net.last
    alone = make_multimodal(nn.BatchNorm1d(3), 2)
    assert isinstance(alone, ExchangeBatchNorm2d)


NAMES = {
    "none": (None, ["layers.0.0", "layers.1.0", "last", "head.1"]),
    "callable": (
        lambda name, norm: isinstance(norm, nn.BatchNorm2d) and norm.momentum == 0.1,
        ["layers.0.0", "layers.1.0"],
    ),
    "any name of a shared norm": (["again"], ["last"]),
    "containers": (("layers", "head.1"), ["layers.0.0", "layers.1.0", "head.1"]),
    "nothing": ([], []),
}


@pytest.mark.parametrize("case", NAMES)
def test_where_picks_the_layers_that_exchange(case):
    where, expected = NAMES[case]
    ours = make_multimodal(make("densenet")[0], 2, where=where)
    assert list(exchanging_layers(ours)) == expected
    thresholds = {layer.threshold for layer in ours.modules() if isinstance(layer, ExchangeNorm)}
    assert thresholds <= {0.0, 0.02}


class Scaled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


BAD = [
    (dict(module=3), TypeError, "module must be a torch.nn.Module, got int"),
    (dict(module=nn.Conv2d(1, 1, 1)), ValueError, "module has no BatchNorm"),
    (dict(module=nn.Sequential(nn.LazyBatchNorm2d())), ValueError, "norm '0' is lazy"),
    (dict(module=nn.Sequential(Scaled(3))), ValueError, "norm '0' is a Scaled, whose forward is not"),
    (dict(num_modalities=0), ValueError, "num_modalities must be at least 1"),
    (dict(threshold=-1), ValueError, "threshold must not be negative"),
    (dict(region="mine"), ValueError, "region must be one of"),
    (dict(where=["layers.0.1"]), ValueError, "at or below 'layers.0.1'; close names: 'layers.0.0'"),
    (dict(where=["stem"]), ValueError, "no norm layer at or below 'stem'; close names: none"),
    (dict(where="last"), TypeError, "where must be a callable or a collection of module names, got 'last'"),
    (dict(where=[nn.ReLU()]), TypeError, r"where must be a callable or a .* got \[ReLU"),
    (dict(where=3), TypeError, "where must be a callable or a collection of module names, got 3"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        make_multimodal(**{"module": DenseNet(), "num_modalities": 2, **change})
