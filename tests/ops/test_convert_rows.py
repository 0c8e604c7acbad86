"""make_multimodal on layer and group norms, which exchange: torch's, and others that compute the same."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext import (
    ExchangeBatchNorm2d,
    ExchangeGroupNorm,
    ExchangeLayerNorm,
    conversion_report,
    exchanging_layers,
    make_multimodal,
    masks,
    stack_modalities,
    unstack_modalities,
)
from cen_ext.modules import ExchangeNorm
from tests.helpers import vision
from tests.helpers.converted import (
    assert_equals_copies,
    assert_equals_exchange_by_hand,
    make_different,
    run,
    with_history,
)

M = 2


class LayerNorm2d(nn.LayerNorm):
    """A forward of one's own: over the channels of each position."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class InHalf(nn.LayerNorm):
    """CLIP's, as far as that is of interest: it takes half types through float32."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return F.layer_norm(wide, self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class OtherEps(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-6)


class PlusOne(nn.LayerNorm):
    """Its scales begin at zero."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


class Everywhere(nn.LayerNorm):
    """Over the last dimension of tokens, over the second one of images."""

    def forward(self, x: Tensor) -> Tensor:
        second = x.dim() == 4
        y = super().forward(x.movedim(1, -1) if second else x)
        return y.movedim(-1, 1) if second else y


class Windows(nn.Module):
    """Folds windows into the batch axis, as Swin does, and normalizes in them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        rows, channels, height, width = x.shape
        windows = x.unflatten(2, (2, -1)).unflatten(4, (3, -1)).permute(0, 2, 4, 3, 5, 1).flatten(0, 2)
        windows = self.norm(windows).view(rows, 2, 3, height // 2, width // 3, channels)
        return windows.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def without_bias() -> nn.Module:
    norm = nn.GroupNorm(2, 4)
    norm.bias = None
    return norm


NORMS: dict[str, tuple[Callable[[], nn.Module], type[ExchangeNorm]]] = {
    "layer": (lambda: nn.LayerNorm(6), ExchangeLayerNorm),
    "layer without bias": (lambda: nn.LayerNorm(6, bias=False, eps=0.1), ExchangeLayerNorm),
    "layer 2d": (lambda: LayerNorm2d(4), ExchangeLayerNorm),
    "in half": (lambda: InHalf(6), ExchangeLayerNorm),
    "group": (lambda: nn.GroupNorm(2, 4, eps=0.1), ExchangeGroupNorm),
    "group without bias": (without_bias, ExchangeGroupNorm),
    "windows": (Windows, ExchangeLayerNorm),
}
# timm's layers, with what they normalize of [N, 4, 4, 6] and the activation that the operator applies
TIMM = {
    "GroupNorm": (4, "identity"),
    "GroupNorm1": (4, "identity"),
    "GroupNorm1Act": (4, "relu"),
    "GroupNormAct": (4, "relu"),
    "LayerNorm": (6, "identity"),
    "LayerNorm2d": (4, "identity"),
    "LayerNormAct": (6, "relu"),
    "LayerNormAct2d": (4, "relu"),
}


def network(norm: nn.Module) -> nn.Module:
    """With the norm between convolutions that keep ``[N, 4, 4, 6]``, and a batch norm."""
    convolutions = [nn.Conv2d(channels, 4, 3, padding=1) for channels in (3, 4)]
    return with_history(nn.Sequential(convolutions[0], norm, nn.BatchNorm2d(4), convolutions[1]))


def images() -> list[Tensor]:
    x = torch.randn(3, 3, 4, 6, dtype=torch.float64)
    return [x, 2 - x]


def assert_exchanges(norm: nn.Module, layer: type[ExchangeNorm]) -> Any:
    """It becomes this layer, which is returned: copies without exchange, one made by hand with it."""
    net, parts = network(norm), images()
    for training in (True, False):
        assert_equals_copies(net.train(training), parts)
    ours = make_multimodal(net, M, threshold=0.5, region="all")
    found = [other for name, other in ours.named_modules() if isinstance(other, ExchangeNorm)]
    assert isinstance(found[0], layer)
    assert found[0].activation != "gelu"
    for other in found:
        other.weight.data[:, 0] = torch.tensor([0.1, 0.9])
        assert other.replaced().any()
    assert_equals_exchange_by_hand(net, ours, torch.cat(parts))
    return found[0]


@pytest.mark.parametrize("case", NORMS)
def test_norms_of_single_rows_exchange(case: str) -> None:
    build, layer = NORMS[case]
    assert_exchanges(build(), layer)


@pytest.mark.parametrize("name", TIMM)
def test_timms_norms_exchange(name: str) -> None:
    channels, activation = TIMM[name]
    options = {"num_groups": 2} if name in ("GroupNorm", "GroupNormAct") else {}
    theirs = getattr(vision.timm().layers, name)
    found = assert_exchanges(
        theirs(channels, **options), ExchangeGroupNorm if "Group" in name else ExchangeLayerNorm
    )
    assert isinstance(found, theirs)
    assert found.activation == activation


@pytest.mark.parametrize("name", ["LayerNorm2dFp32", "LayerNormActFp32", "LayerNormAct2dFp32"])
def test_timms_norms_in_float32_exchange(name: str) -> None:
    """They round to float32 in float64, too, which the exchanging ones do not."""
    norm = getattr(vision.timm().layers, name)(4 if "2d" in name else 6)
    net = network(norm).float()
    assert_equals_copies(net, [part.float() for part in images()])
    assert isinstance(make_multimodal(net, M)[1], ExchangeLayerNorm)


ACTIVATIONS = {
    "relu": (nn.ReLU(inplace=True), nn.Identity(), "relu"),
    "gelu": (nn.GELU(), nn.Identity(), "gelu"),
    "leaky relu": (nn.LeakyReLU(0.3), nn.Identity(), "leaky_relu"),
    "prelu": (nn.PReLU(4), nn.Identity(), None),
    "mish": (nn.Mish(inplace=True), nn.Identity(), None),
    "drop": (nn.ReLU(), nn.Hardtanh(-1, 1), None),
}


class GroupNormAct(nn.GroupNorm):
    """timm's layer as far as a conversion sees it."""

    def __init__(self, act: nn.Module, drop: nn.Module) -> None:
        super().__init__(2, 4)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_what_ends_in_an_activation_keeps_it(case: str) -> None:
    act, drop, fused = ACTIVATIONS[case]
    net = network(GroupNormAct(copy.deepcopy(act), drop))
    assert_equals_copies(net, images())
    ours = make_multimodal(net, M, threshold=0.5)
    assert_equals_exchange_by_hand(net, ours, torch.cat(images()))
    assert ours[1].activation == (fused or "identity")
    assert type(ours[1].act) is (nn.Identity if fused else type(act))
    again = pickle.loads(pickle.dumps(ours))
    assert isinstance(again[1], GroupNormAct)
    x = torch.cat(images())
    torch.testing.assert_close(again(x), ours(x))


@pytest.mark.parametrize("norm", [OtherEps(6), PlusOne(6), Everywhere(6)], ids=lambda n: type(n).__name__)
def test_what_computes_another_norm_is_left_without_exchange(norm: nn.Module) -> None:
    net = nn.Sequential(norm, nn.BatchNorm2d(4))
    assert [row.outcome for row in conversion_report(net).rows] == ["private", "converted"]


def test_windows_in_the_batch_axis_need_modality_order() -> None:
    net, parts = network(Windows()), images()
    with pytest.warns(
        UserWarning, match=r"not get windows folded .* order='sample' .*'1\.norm' \(LayerNorm\)"
    ):
        make_multimodal(net, M, order="sample")
    with (
        pytest.warns(UserWarning, match="windows"),
        pytest.raises(ValueError, match=r"example: .* first seen in what '1\.norm' \(ExchangeLayerNorm\)"),
    ):
        make_multimodal(net, M, order="sample", example=parts[0])
    make_multimodal(net, M, example=parts[0])


@pytest.mark.filterwarnings("ignore:norms of each row by itself must not get windows")
def test_rows_may_come_in_sample_order() -> None:
    parts = images()
    net = network(nn.Sequential(nn.LayerNorm(6), nn.GroupNorm(2, 4), LayerNorm2d(4)))
    ours = make_multimodal(net, M, 0, order="sample", example=parts[0])
    copies = [copy.deepcopy(net) for _ in range(M)]
    make_different(ours, copies)
    y = unstack_modalities(ours(stack_modalities(parts, order="sample")), M, order="sample")
    for single, rows, result in zip(copies, parts, y, strict=True):
        torch.testing.assert_close(single(rows), result)


def test_where_keeps_to_the_norms_of_the_paper() -> None:
    net = network(nn.Sequential(nn.LayerNorm(6), nn.GroupNorm(2, 4)))
    assert list(exchanging_layers(make_multimodal(net, M))) == ["1.0", "1.1", "2"]
    ours = make_multimodal(net, M, where=lambda name, norm: isinstance(norm, nn.BatchNorm2d))
    assert list(exchanging_layers(ours)) == ["2"]
    assert isinstance(ours[1][0], ExchangeLayerNorm)


def test_a_mask_takes_the_place_of_the_threshold() -> None:
    net = network(nn.Sequential(nn.LayerNorm(6), nn.GroupNorm(2, 4)))
    mask = functools.partial(masks.smallest, k=2, region="all")
    ours = make_multimodal(net, M, mask=mask, where=["1"])
    layers = exchanging_layers(ours)
    assert list(layers) == ["1.0", "1.1"]
    assert all(layer.replaced().sum(1).tolist() == [2, 2] for layer in layers.values())
    assert isinstance(ours[2], ExchangeBatchNorm2d)
    with pytest.raises(ValueError, match="mask and threshold both say which channels are replaced"):
        make_multimodal(net, M, threshold=0.1, mask=mask)


class Learned(nn.Module):
    """A mask with state, which is not to be shared by layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return torch.ones_like(weight, dtype=torch.bool)


def test_each_layer_has_a_mask_of_its_own() -> None:
    ours = make_multimodal(network(nn.LayerNorm(6)), M, mask=Learned())
    ours(torch.cat(images()))
    assert [ours[1].mask.calls, ours[2].mask.calls] == [1, 1]


def test_hooks_ties_and_training_are_kept() -> None:
    calls = []
    net = network(nn.Sequential(nn.LayerNorm(6), nn.LayerNorm(6)))
    net[1][1].weight = net[1][0].weight
    net[1][0].bias.requires_grad_(False)
    net[1][0].register_forward_hook(lambda layer, inputs, y: calls.append(type(layer)))
    assert_equals_copies(net, images())
    ours = make_multimodal(net.eval(), M)
    first, second = ours[1]
    assert dict(first.named_parameters())["weight"] is dict(second.named_parameters())["weight"]
    assert (first.training, first.bias.requires_grad, second.bias.requires_grad) == (False, False, True)
    calls.clear()
    ours(torch.cat(images()))
    assert calls == [ExchangeLayerNorm]


def test_half_precision_networks_keep_their_norms_in_float32() -> None:
    ours = make_multimodal(network(nn.LayerNorm(6)).bfloat16(), M, 0.5)
    x = torch.cat(images()).bfloat16()
    assert (ours(x).dtype, ours[1].weight.dtype) == (torch.bfloat16, torch.float32)


def test_norms_in_networks_with_the_sequence_first_stay_shared() -> None:
    layers = [nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=first) for first in (True, False)]
    outcomes = [{row.outcome for row in conversion_report(layer).rows} for layer in layers]
    assert outcomes == [{"converted"}, {"shared"}]


@pytest.mark.parametrize("shared", [(), ("layers.0.norm1", "layers.1.norm1")])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_torchs_transformer_runs_its_private_norms(training: bool, padded: bool, shared: Any) -> None:
    """In eval mode without gradients, torch would hand their tables to a kernel of its own."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True).double()
    net = nn.TransformerEncoder(layer, 2).train(training)
    parts = list(torch.randn(M, 3, 5, 4, dtype=torch.float64))
    padding = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None] if padded else None
    ours = make_multimodal(net, M, 0, shared=shared)
    with torch.no_grad():
        every = ours(
            torch.cat(parts), src_key_padding_mask=padding if padding is None else padding.repeat(M, 1)
        )
        for rows, y in zip(parts, every.chunk(M), strict=True):
            expected = net(rows, src_key_padding_mask=padding)
            if padding is not None:  # where torch's kernel leaves zeros
                y, expected = y[~padding], expected[~padding]
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    "build", [lambda: nn.LayerNorm(6), lambda: LayerNorm2d(4), lambda: nn.GroupNorm(2, 4)]
)
def test_converted_norms_are_compiled_and_exported(build: Callable[[], nn.Module]) -> None:
    ours, x = make_multimodal(network(build()), M, threshold=0.5), torch.cat(images())
    again = copy.deepcopy(ours)
    y, dx, dy = run(ours, x)
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True)
    for result, expected in zip(run(compiled, x, dy), (y, dx, dy), strict=True):
        torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.export.export(ours.eval(), (x,)).module()(x), ours(x))
