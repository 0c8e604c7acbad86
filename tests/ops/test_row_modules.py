"""The layers of norms of single rows, against torch's own layers."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.nn import quantized

import cen_ext
from cen_ext import (
    ExchangeBatchNorm2d,
    ExchangeGroupNorm,
    ExchangeLayerNorm,
    exchanging_layers,
    masks,
    sparsity_penalty,
)
from cen_ext.modules import ExchangeNorm
from tests.helpers.converted import run
from tests.helpers.same import assert_same

M, C = 3, 6
LAST, SECOND = (4, 5, C), (C, 4, 5)  # shapes of a row


def first_channels(layer: nn.Module) -> nn.Module:
    """torch's layer norm over the second dimension."""
    return nn.Sequential(nn.Flatten(2), Transposed(), layer, Transposed(), nn.Unflatten(2, SECOND[1:]))


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


# How the layer is made of further arguments, how torch's is, and the shape of a row.
KINDS: dict[str, tuple[Callable[..., ExchangeNorm], Callable[..., nn.Module], tuple[int, ...]]] = {
    "layer": (functools.partial(ExchangeLayerNorm, C), functools.partial(nn.LayerNorm, C), LAST),
    "layer of tokens": (
        functools.partial(ExchangeLayerNorm, (C,)),
        functools.partial(nn.LayerNorm, C),
        (7, C),
    ),
    "layer of vectors": (functools.partial(ExchangeLayerNorm, [C]), functools.partial(nn.LayerNorm, C), (C,)),
    "layer of images": (
        lambda *args, **options: ExchangeLayerNorm(C, *args, channel_dim=1, **options),
        functools.partial(nn.LayerNorm, C),
        SECOND,
    ),
    "group": (functools.partial(ExchangeGroupNorm, 2, C), functools.partial(nn.GroupNorm, 2, C), SECOND),
    "one group": (functools.partial(ExchangeGroupNorm, 1, C), functools.partial(nn.GroupNorm, 1, C), (C, 9)),
}
AFFINE = {
    "affine": {},
    "without bias": {"bias": False},
    "without affine": {"affine": False},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def options_of(kind: str, affine: str) -> dict[str, Any]:
    options = dict(AFFINE[affine])
    if "layer" in kind and "affine" in options:
        options["elementwise_affine"] = options.pop("affine")
    return options


def make(kind: str, num_modalities: int = M, **options: Any) -> ExchangeNorm:
    """A layer with scales and shifts of its own for each modality, in float64."""
    layer = KINDS[kind][0](num_modalities, **options).double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return layer


def rows(kind: str, count: int = 2 * M, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, *KINDS[kind][2], dtype=dtype) * 3 + 1


def singles(kind: str, layer: ExchangeNorm, **options: Any) -> list[nn.Module]:
    """torch's layer of each modality, with its scales and shifts."""
    nets = []
    for m in range(layer.num_modalities):
        single = KINDS[kind][1](**options).double()
        single.load_state_dict(
            {name: value.view(layer.num_modalities, C)[m] for name, value in layer.state_dict().items()}
        )
        nets.append(first_channels(single) if kind == "layer of images" else single)
    return nets


@each_kind
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("order", ["modality", "sample"])
def test_without_exchange_it_is_one_torch_layer_a_modality(kind: str, affine: str, order: str) -> None:
    options = options_of(kind, affine)
    layer = make(kind, order=order, **options)
    theirs = singles(kind, layer, **options)
    x = rows(kind)
    for training in (True, False):
        y, dx, dy = run(layer.train(training), x)
        for m, (single, part) in enumerate(
            zip(theirs, cen_ext.unstack_modalities(x, M, order=order), strict=True)
        ):
            expected = run(single, part, cen_ext.unstack_modalities(dy, M, order=order)[m])
            for ours, other in zip((y, dx), expected[:2], strict=True):
                torch.testing.assert_close(cen_ext.unstack_modalities(ours, M, order=order)[m], other)
    for (name, parameter), *others in zip(
        layer.named_parameters(), *(single.named_parameters() for single in theirs), strict=True
    ):
        expected = torch.cat([other.grad for _, other in others])
        torch.testing.assert_close(parameter.grad, expected, msg=lambda text, n=name: f"{n}: {text}")


@each_kind
def test_exchange_residual_and_activation_follow_the_norm(kind: str) -> None:
    layer = make(kind, 2, threshold=0.5, region="all", activation="relu")
    with torch.no_grad():
        layer.weight[:, :2] = torch.tensor([[0.1, 0.9], [0.9, 0.1]])
    plain = copy.deepcopy(layer)
    plain.threshold, plain.activation = 0.0, "identity"
    x, residual = rows(kind, 4), rows(kind, 4)
    first, second = plain(x).chunk(2)
    channels = -1 if KINDS[kind][2] in (LAST, (7, C), (C,)) else 1
    spread = (C,) + (1,) * (first.dim() - 2) if channels == 1 else (C,)
    replaced = [mask.view(spread) for mask in layer.replaced()]
    u = [torch.where(replaced[0], second, first), torch.where(replaced[1], first, second)]
    torch.testing.assert_close(layer(x, residual), torch.relu(torch.cat(u) + residual))
    assert layer.replaced()[:, :2].tolist() == [[True, False], [False, True]]


@each_kind
def test_it_is_torchs_layer_to_what_looks_for_one(kind: str) -> None:
    layer, theirs = KINDS[kind][0](M), KINDS[kind][1]()
    torch_class = type(theirs)
    assert isinstance(layer, torch_class)
    assert layer.eps == theirs.eps == inspect.signature(torch_class).parameters["eps"].default
    for name in ("normalized_shape", "elementwise_affine", "num_groups", "num_channels", "affine"):
        assert getattr(layer, name, None) == getattr(theirs, name, None)
    assert set(layer.state_dict()) == set(theirs.state_dict()) == {"weight", "bias"}
    assert all(parameter.shape == (M * C,) for parameter in layer.parameters())
    nn.init.normal_(layer.weight)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(M, C))


@each_kind
def test_state_of_every_shape_loads(kind: str) -> None:
    layer, table = KINDS[kind][0](M), torch.rand(M, C)
    for value in (table[0], table, table.flatten()):
        layer.load_state_dict({"weight": value, "bias": value})
        assert torch.equal(layer.weight, value.view(-1, C).expand(M, C))
        assert torch.equal(layer.bias, layer.weight)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict({"weight": torch.rand(C + 1), "bias": table})


@each_kind
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_half_precision_network_keeps_its_norms_in_float32(kind: str, half: torch.dtype) -> None:
    layer = KINDS[kind][0](M, threshold=0.5)
    nn.init.uniform_(layer.weight)
    before = copy.deepcopy(layer.state_dict())
    layer.to(half)
    assert_same(layer.state_dict(), before)
    x = rows(kind, dtype=half).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (half, half, torch.float32)


@each_kind
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_copies_and_pickles_do_what_the_layer_does(kind: str, duplicate: Any) -> None:
    layer = make(kind, threshold=0.5, activation="gelu")
    other, x = duplicate(layer), rows(kind)
    assert torch.equal(other(x), layer(x))
    assert repr(other) == repr(layer)


@each_kind
def test_it_is_compiled_exported_and_traced(kind: str) -> None:
    layer, x = make(kind, threshold=0.5), rows(kind)
    expected = run(layer, x)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, x, expected[2]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    net = nn.Sequential(layer)
    for other in (torch.export.export(net, (x,)).module(), torch.fx.symbolic_trace(net)):
        torch.testing.assert_close(other(x), layer(x))


@each_kind
def test_masks_and_lenders_decide_as_in_other_layers(kind: str) -> None:
    tail, other = masks.tail(2, C, 0.5), torch.tensor([[1], [0]]).expand(2, C)
    x = rows(kind, 4)
    swap = make(kind, 2, replaced=tail, lender=other)
    chosen = make(kind, 2, mask=functools.partial(masks.smallest, k=1, region="all"))
    assert swap.replaced().sum() == C
    assert chosen.replaced().sum(1).tolist() == [1, 1]
    for layer in (swap, chosen):
        plain = copy.deepcopy(layer)
        plain.replaced_mask = plain.mask = plain.lender = None
        assert not torch.equal(layer(x), plain(x))
        chosen_by_tensor = copy.deepcopy(plain)
        chosen_by_tensor.replaced_mask = layer.replaced()
        torch.testing.assert_close(layer(x), chosen_by_tensor(x))
    alone = options_of(kind, "without affine")
    assert make(kind, 2, replaced=tail, **alone).replaced().any()
    with pytest.raises(ValueError, match=r"threshold=0\.1 compares scales, .*affine=False has none"):
        make(kind, 2, threshold=0.1, **alone)
    with pytest.raises(ValueError, match=r"mask is a function of the scales, of which .*affine=False"):
        make(kind, 2, mask=masks.valley, **alone)


def test_they_count_among_the_exchanging_layers() -> None:
    net = nn.Sequential(
        ExchangeLayerNorm(4, 2, threshold=0.02),
        ExchangeGroupNorm(2, 4, 2, threshold=0.02),
        ExchangeBatchNorm2d(4, 2, threshold=0.02),
        ExchangeLayerNorm(4, 2),
    )
    assert list(exchanging_layers(net)) == ["0", "1", "2"]
    torch.testing.assert_close(sparsity_penalty(net), torch.tensor(3 * 4.0))


def test_what_is_no_contiguous_row_gives_a_contiguous_result() -> None:
    """As torch's layer norm does, on whose results networks call ``view``."""
    layer, x = make("layer of tokens"), rows("layer of tokens")
    seen = layer(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert seen.is_contiguous()
    torch.testing.assert_close(seen, layer(x))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: ExchangeLayerNorm((4, 5), 2),
            ValueError,
            r"the channels alone, got \(4, 5\).*GroupNorm\(1,",
        ),
        (lambda: ExchangeLayerNorm(0, 2), ValueError, "normalized_shape must be at least 1, got 0"),
        (lambda: ExchangeLayerNorm(4.0, 2), TypeError, "normalized_shape must be an integer, got float"),
        (lambda: ExchangeLayerNorm(4, 0), ValueError, "num_modalities must be at least 1, got 0"),
        (lambda: ExchangeLayerNorm(4, 2, channel_dim=2), ValueError, "channel_dim must be 1 or -1"),
        (lambda: ExchangeLayerNorm(4, 2, activation="mish"), ValueError, "activation must be one of"),
        (lambda: ExchangeGroupNorm(0, 4, 2), ValueError, "num_groups must be at least 1, got 0"),
        (lambda: ExchangeGroupNorm(3, 4, 2), ValueError, r"num_channels \(4\) must be divisible by"),
        (lambda: ExchangeGroupNorm(2, 4, 2, eps=-1), ValueError, "eps must not be negative"),
        (
            lambda: ExchangeGroupNorm(2, 4, 2, momentum=0.1),
            TypeError,
            "unexpected keyword argument 'momentum'",
        ),
        (lambda: ExchangeLayerNorm(4, 2)(torch.zeros(3, 4)), ValueError, "3 rows, not divisible by 2"),
        (
            lambda: ExchangeLayerNorm(4, 2)(torch.zeros(4, 5)),
            ValueError,
            "weight has 4 channels, but x has 5",
        ),
    ],
)
def test_mistakes_are_refused(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize(
    ("make_quantized", "layer"),
    [(quantized.LayerNorm, ExchangeLayerNorm(4, 2)), (quantized.GroupNorm, ExchangeGroupNorm(2, 4, 2))],
)
def test_what_would_make_a_norm_of_one_modality_is_refused(make_quantized: Any, layer: ExchangeNorm) -> None:
    layer.activation_post_process = quantization.MinMaxObserver()
    layer.activation_post_process(torch.rand(4))
    with pytest.raises(TypeError, match=rf"cannot turn {type(layer).__name__}.* into a layer of one$"):
        make_quantized.from_float(layer)


def test_data_parallel_needs_sample_order() -> None:
    with pytest.raises(RuntimeError, match="order='sample'"):
        ExchangeLayerNorm(4, 2)._replicate_for_data_parallel()
    assert isinstance(
        ExchangeGroupNorm(2, 4, 2, order="sample")._replicate_for_data_parallel(), ExchangeGroupNorm
    )
