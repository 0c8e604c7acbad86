"""make_multimodal on networks that know nothing of it: equal to the original without exchange, and to an
exchange made by hand with forward hooks on the original with it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from cen_ext import (
    ExchangeBatchNorm2d,
    ExchangeGroupNorm,
    ExchangeInstanceNorm2d,
    ExchangeLayerNorm,
    exchanging_layers,
    make_multimodal,
    recompute_outputs,
)
from cen_ext.convert import layer_for, replace_norms
from cen_ext.modules import ExchangeNorm
from tests.helpers import vision
from tests.helpers.converted import (
    NORMS,
    assert_equals_copies,
    assert_equals_exchange_by_hand,
    run,
    with_history,
)


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
    return vision.torchvision().models.resnet18(num_classes=4)


# network, spatial size of x
NETWORKS = {
    "densenet": (DenseNet, (7, 6)),
    "unet": (UNet, (8, 12)),
    "volume": (volume, (3, 4, 3)),
    "resnet": (resnet, (64, 64)),
}


def make(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    build, spatial = NETWORKS[name]
    return with_history(build()), spatial


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_without_exchange_every_modality_gets_the_original(name, training):
    net, spatial = make(name)
    x = torch.randn(2, 3, *spatial, dtype=torch.float64)
    assert_equals_copies(net.train(training), [x, -x, x])  # the same and another


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
    assert_equals_exchange_by_hand(net, ours, torch.randn(4, 3, *spatial, dtype=torch.float64))


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


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's layer as far as a conversion sees it."""

    def __init__(self, channels: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop = drop or nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Derived(BatchNormAct2d):
    """One that only has other defaults."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, nn.ReLU())


class Bent(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(x - x.mean(0))


class KeepsHalf(nn.Module):
    """A drop that can be compared: dropout without chance."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.arange(x.shape[-1]) % 2 == 0, x, -1)


# layer -> what the operator applies itself
NORM_ACTS = {
    "relu": (lambda: BatchNormAct2d(4, nn.ReLU(inplace=True)), "relu"),
    "relu6": (lambda: BatchNormAct2d(4, nn.ReLU6(inplace=True)), "relu6"),
    "leaky relu": (lambda: BatchNormAct2d(4, nn.LeakyReLU(0.3)), "leaky_relu"),
    "none": (lambda: BatchNormAct2d(4, nn.Identity()), "identity"),
    "derived": (lambda: Derived(4), "relu"),
    "silu": (lambda: BatchNormAct2d(4, nn.SiLU(inplace=True)), "silu"),
    "gelu": (lambda: BatchNormAct2d(4, nn.GELU()), "gelu"),
    "gelu, tanh": (lambda: BatchNormAct2d(4, nn.GELU("tanh")), "gelu_tanh"),
    "hardswish": (lambda: BatchNormAct2d(4, nn.Hardswish(inplace=True)), "hardswish"),
    "mish": (lambda: BatchNormAct2d(4, nn.Mish(inplace=True)), None),
    "prelu": (lambda: BatchNormAct2d(4, nn.PReLU(4)), None),
    "drop": (lambda: BatchNormAct2d(4, nn.ReLU(), KeepsHalf()), None),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", NORM_ACTS)
def test_a_norm_that_ends_in_an_activation_keeps_it(case, training):
    build, fused = NORM_ACTS[case]
    net = with_history(nn.Sequential(nn.Conv2d(3, 4, 3), build(), nn.Conv2d(4, 2, 1))).train(training)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    assert_equals_copies(net, [x, -x])
    ours = make_multimodal(net, 2, threshold=0.3)
    with torch.no_grad():
        # Channel 0 is the first modality's own, channel 3 the second's.
        ours[1].weight[:] = torch.tensor([0.1, 0.5, 0.5, 0.1])
    assert ours[1].replaced().sum() == 2
    assert_equals_exchange_by_hand(net, ours, torch.cat([x, -x]))
    assert ours[1].activation == (fused or "identity")
    assert type(ours[1].act) is (nn.Identity if fused else type(net[1].act))
    assert list(ours.state_dict()) == list(net.state_dict())
    ours.load_state_dict(net.state_dict())
    assert torch.equal(ours[1].weight, net[1].weight.expand(2, -1))


@pytest.mark.parametrize("training", [True, False])
def test_relu6_cuts_off_both_ends(training):
    net = with_history(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, nn.ReLU6()))).train(training)
    with torch.no_grad():
        net[1].weight.fill_(5.0)
        net[1].bias.fill_(3.0)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    y = make_multimodal(net, 2, threshold=0)(torch.cat([x, -x]))
    for end in (0, 6):
        assert 0.05 < (y == end).double().mean() < 0.95
    assert_equals_copies(net, [x, -x])


def test_an_activation_is_a_copy_and_stays_one_where_it_was_shared():
    act = nn.PReLU()
    net = nn.Sequential(BatchNormAct2d(3, act), act, BatchNormAct2d(3, act))
    ours = make_multimodal(net, 2)
    assert ours[0].act is ours[1] is ours[2].act
    assert ours[1] is not act
    again = copy.deepcopy(ours)
    assert again[0].act is again[1]
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), again(x))


def test_an_unfused_activation_is_compiled_exported_and_recomputed():
    net = nn.Sequential(BatchNormAct2d(3, nn.Mish(inplace=True)), nn.Conv2d(3, 4, 3))
    ours = make_multimodal(with_history(net), 2, threshold=0.5)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    again, compiled = copy.deepcopy(ours), copy.deepcopy(ours)
    y, dx, dy = run(ours, x)
    results = [run(torch.compile(compiled, backend="aot_eager", fullgraph=True), x, dy)]
    with recompute_outputs():
        results.append(run(again, x, dy))
    for other_y, other_dx, _ in results:
        torch.testing.assert_close(other_y, y)
        torch.testing.assert_close(other_dx, dx)
    exported = torch.export.export(ours.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), ours(x))


class BatchRenorm(nn.Module):
    """One that cannot be run by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running_var", torch.ones(3))


def test_all_that_cannot_be_converted_is_named_at_once():
    net = nn.Sequential(Scaled(3), nn.BatchNorm2d(3), nn.Sequential(BatchRenorm(), Bent(3, nn.ReLU())))
    with pytest.raises(
        ValueError, match=r"norm '0' is a Scaled, .*; norm '2\.0' is a Batch.*'2\.1' is a Bent"
    ):
        make_multimodal(net, 2)


def test_norms_of_ones_own_begin_as_the_original():
    net = nn.Sequential(BatchNormAct2d(3, nn.LeakyReLU(0.3)), nn.BatchNorm2d(3, eps=0.1, momentum=0.5))
    with_history(net).eval()
    calls = []

    def make_norm(norm: nn.BatchNorm2d, exchanges: bool, activation: str) -> nn.Module:
        calls.append((norm, exchanges, activation))
        return ExchangeBatchNorm2d(3, 1, activation=activation)

    ours = replace_norms(net, make_norm, where=["1"])
    assert calls == [(net[0], False, "leaky_relu"), (net[1], True, "identity")]
    assert (ours[1].eps, ours[1].momentum, ours[0].negative_slope) == (0.1, 0.5, 0.3)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), net(x))
    with pytest.raises(ValueError, match="ExchangeInstanceNorm2d for norm '0' and the original differ in"):
        replace_norms(net, lambda norm, *_: ExchangeInstanceNorm2d(3, 2))


def test_norms_that_do_not_exchange_stay_shared_beside_norms_of_ones_own():
    net = nn.Sequential(nn.RMSNorm(5), nn.LayerNorm(5), nn.GroupNorm(2, 4))
    with pytest.warns(UserWarning, match=r"stay shared between the modalities: '0' \(RMSNorm\)$"):
        ours = replace_norms(net, make_by_kind)
    assert [type(layer) for layer in ours] == [nn.RMSNorm, ExchangeLayerNorm, ExchangeGroupNorm]
    x = torch.randn(4, 4, 5)
    torch.testing.assert_close(ours(x), net(x))


def make_by_kind(norm: nn.Module, exchanges: bool, activation: str) -> nn.Module:
    layer, channels = layer_for(norm)
    return layer(channels, 2, activation=activation)


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
