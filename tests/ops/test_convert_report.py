"""What becomes of the norms that make_multimodal does not convert: each is kept, refused or named."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from cen_ext import (
    ConversionReport,
    ExchangeBatchNorm2d,
    PrivateNorm,
    conversion_report,
    make_multimodal,
    masks,
)
from cen_ext.modules import ExchangeNorm
from tests.helpers import vision
from tests.helpers.converted import assert_equals_copies, with_history


class Frozen(nn.Module):
    """Batch norm with constants: buffers, or parameters that do not train."""

    def __init__(self, kind: type[Tensor] = Tensor) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = torch.rand(4) + 0.5
            if kind is nn.Parameter:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Functional(nn.Module):
    """Batch norm without a layer, of what a convolution returns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(self.conv(x))

    def normalized(self, x: Tensor) -> Tensor:
        return normalize_batch(x)


def normalize_batch(x: Tensor) -> Tensor:
    return torch.nn.functional.batch_norm(x, None, None, training=True)


class StandardizedConv2d(nn.Conv2d):
    """Batch norm of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.flatten(1)[None], None, None, training=True)
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


class ConvolutionAndNorm(nn.Conv2d):
    """Batch norm of what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(super().forward(x), None, None, training=True)


class BatchRenorm(nn.Module):
    """Mixes rows in its statistics alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.running_mean.lerp_(x.mean((0, 2, 3)), 0.1)
        return x


class GhostNorm(nn.Module):
    """Mixes pairs of rows."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(0, (-1, 2))
        return (pairs - pairs.mean(1, keepdim=True)).flatten(0, 1)


class ChannelNorm(nn.Module):
    """Of single rows, and not known to the library."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x / x.norm(dim=1, keepdim=True)


class PickyNorm(nn.Module):
    """Takes an input that nobody would guess."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.gain * x * scale


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class AdaptiveNorm(nn.LayerNorm):
    """Is torch's until it is called with a scale."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if scale is None else y * scale


class FrozenForward(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Resetting(nn.BatchNorm2d):
    """Redefines what the exchanging layer must define itself."""

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)


class ResettingRows(nn.LayerNorm):
    _load_from_state_dict = Resetting._load_from_state_dict


def parametrized() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.BatchNorm2d(4), "weight", 0.5)


def parametrized_layer_norm() -> nn.Module:
    norm = nn.LayerNorm(5)
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


def monkeypatched(norm: nn.Module, over: int) -> nn.Module:
    norm.forward = lambda x: x - x.mean(over, keepdim=True)
    return norm


def named_as_ours(norm: nn.Module) -> nn.Module:
    norm.threshold, norm.mask, norm.note = 3.0, "none", "kept"
    return norm


# layer -> outcome, and what the reason says
OUTCOMES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "batch norm": (lambda: nn.BatchNorm2d(4), "converted", "is a BatchNorm2d"),
    "layer norm": (lambda: nn.LayerNorm(5), "converted", "is a LayerNorm"),
    "layer norm of two dimensions": (lambda: nn.LayerNorm((4, 5)), "private", "computes another norm"),
    "layer norm 2d": (lambda: LayerNorm2d(4), "converted", "is a LayerNorm"),
    "group norm": (lambda: nn.GroupNorm(2, 4), "converted", "is a GroupNorm"),
    "adaptive layer norm": (lambda: AdaptiveNorm(5), "private", "computes another norm"),
    "layer norm named as ours": (lambda: named_as_ours(nn.LayerNorm(5)), "private", "with mask, threshold"),
    "redefined layer norm": (lambda: ResettingRows(5), "private", "_load_from_state_dict would be lost"),
    "rms norm": (lambda: nn.RMSNorm(5), "private", "no exchange version"),
    "layer norm without affine": (
        lambda: nn.LayerNorm(5, elementwise_affine=False),
        "shared",
        "no parameters",
    ),
    "parametrized layer norm": (parametrized_layer_norm, "shared", "parametrized"),
    "response norm": (lambda: nn.LocalResponseNorm(2), "shared", "each row by itself"),
    "frozen buffers": (Frozen, "shared", "constants"),
    "frozen parameters": (lambda: Frozen(nn.Parameter), "shared", "each row by itself"),
    "frozen forward": (lambda: FrozenForward(4), "shared", "a forward of its own"),
    "weights": (lambda: StandardizedConv2d(4, 4, 3, padding=1), "shared", "normalizes its weights"),
    "single rows": (ChannelNorm, "shared", "each row by itself"),
    "ours": (lambda: ExchangeBatchNorm2d(4, 2), "kept", "cen_ext"),
    "picky": (PickyNorm, "unknown", "cannot be run"),
    "functional": (Functional, "refused", "calls a function of batch or instance norm"),
    "functional in a convolution": (lambda: ConvolutionAndNorm(4, 4, 1), "refused", "would mix"),
    "renorm": (BatchRenorm, "refused", "would mix the modalities"),
    "ghost": (GhostNorm, "refused", "would mix the modalities"),
    "parametrized": (parametrized, "refused", "remove_parametrizations"),
    "pruned": (pruned, "refused", "with weight_mask, weight_orig"),
    "monkeypatched": (
        lambda: monkeypatched(nn.BatchNorm2d(4), 0),
        "refused",
        "forward is not that of nn.BatchNorm2d",
    ),
    "monkeypatched, single rows": (lambda: monkeypatched(nn.LayerNorm(5), 1), "shared", "each row by itself"),
    "redefined": (lambda: Resetting(4), "refused", "_load_from_state_dict would be lost"),
    "named as ours": (
        lambda: named_as_ours(nn.BatchNorm2d(4)),
        "refused",
        "with mask, threshold, which the private norms have, too",
    ),
}
TIMM = {
    "EvoNorm2dB0": "refused",
    "EvoNorm2dB1": "refused",
    "EvoNorm2dS0": "shared",
    "EvoNorm2dS1": "shared",
    "FilterResponseNormAct2d": "shared",
    "FilterResponseNormTlu2d": "shared",
    "FrozenBatchNormAct2d": "shared",
    "InplaceAbn": "refused",
    "ScaledStdConv2d": "shared",
    "SplitBatchNorm2d": "refused",
    "StdConv2d": "shared",
}


def network(layer: nn.Module) -> nn.Module:
    return with_history(nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))


def assert_outcome(layer: nn.Module, outcome: str, reason: str) -> None:
    """The report says so, and what make_multimodal does is what the report says."""
    net = network(layer)
    row, *_, last = conversion_report(net).rows
    assert (row.name, row.kind, row.outcome) == ("1", type(layer).__name__, outcome)
    assert reason in row.reason
    assert last.outcome == "converted"
    trains = any(parameter.requires_grad for parameter in layer.parameters())
    if outcome == "refused":
        with pytest.raises(ValueError, match=r"norm '1' "):
            make_multimodal(net, 2)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = make_multimodal(net, 2)
    named = [str(warning.message) for warning in caught if f"'1' ({row.kind})" in str(warning.message)]
    assert len(named) == (outcome in ("private", "unknown") or (outcome == "shared" and trains))
    kinds = {"converted": ExchangeNorm, "private": PrivateNorm}
    assert isinstance(ours[1], kinds.get(outcome, type(layer)))


@pytest.mark.parametrize("case", OUTCOMES)
def test_every_norm_is_converted_kept_or_refused_and_named(case: str) -> None:
    build, outcome, reason = OUTCOMES[case]
    assert_outcome(build(), outcome, reason)


@pytest.mark.parametrize("name", TIMM)
def test_timms_norms_are_told_apart(name: str) -> None:
    layer = getattr(vision.timm().layers, name)
    options = {"group_size": 2} if "NormS" in name or "2dS" in name else {}
    layer = layer(4, 4, 1) if "Conv" in name else layer(4, **options)
    assert_outcome(layer, TIMM[name], "")


def test_torchvisions_frozen_norms_are_constants() -> None:
    layer = vision.torchvision().ops.FrozenBatchNorm2d(4)
    assert_outcome(layer, "shared", "constants")


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


def called_by_name(module: nn.Module, x: Tensor) -> Tensor:
    from torch.nn.functional import instance_norm

    return instance_norm(x)


def called_by_a_closure() -> Callable[[nn.Module, Tensor], Tensor]:
    normalize = torch.native_batch_norm
    return lambda module, x: torch.cat([normalize(x, *[None] * 4, True, 0.1, 1e-5)[0] for _ in range(2)])


def only_named(module: nn.Module, x: Tensor) -> Tensor:
    """Mentions batch norm, but calls none: nn.BatchNorm2d, F.batch_norm."""
    module.batch_norm = not isinstance(module, nn.BatchNorm2d)
    return F.layer_norm(x, x.shape[1:])


FORWARDS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "autograd function": (lambda module, x: InPlace.apply(x), True),
    "import": (called_by_name, True),
    "closure": (called_by_a_closure(), True),
    "operator": (lambda module, x: torch.ops.aten.batch_norm.default(x), True),
    "only named": (only_named, False),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_functions_of_batch_norm_are_found_in_the_code(case: str) -> None:
    forward, found = FORWARDS[case]
    kind = type("Network", (nn.Sequential,), {"forward": forward})
    rows = conversion_report(kind(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).rows
    assert [(row.name, row.outcome) for row in rows] == [("", "refused")] * found + [("1", "converted")]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
@pytest.mark.parametrize("compile_", [torch.fx.symbolic_trace, torch.jit.script])
def test_functions_of_batch_norm_are_found_in_compiled_code(compile_: Callable[..., nn.Module]) -> None:
    rows = conversion_report(nn.Sequential(compile_(Functional()), nn.BatchNorm2d(4))).rows
    assert [(row.name, row.outcome) for row in rows] == [("0", "refused"), ("1", "converted")]


def test_norms_on_the_meta_device_are_told_apart() -> None:
    with torch.device("meta"):
        net = nn.Sequential(Frozen(), LayerNorm2d(4), GhostNorm(), nn.BatchNorm2d(4))
        outcomes = [row.outcome for row in conversion_report(net).rows]
    assert outcomes == ["shared", "converted", "refused", "converted"]


SHARED = ["frozen buffers", "frozen parameters", "frozen forward", "weights", "single rows"]


@pytest.mark.filterwarnings("ignore:norms without an exchange version")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", SHARED)
def test_what_stays_shared_does_not_mix_the_modalities(case: str, training: bool) -> None:
    x = torch.randn(3, 3, 4, 5, dtype=torch.float64)
    assert_equals_copies(network(OUTCOMES[case][0]()).train(training), [x, 1 - x])


def test_convolutions_keep_their_parametrizations() -> None:
    net = network(nn.Conv2d(4, 4, 1))
    parametrizations.weight_norm(net[0])
    parametrizations.spectral_norm(net[1])
    ours = make_multimodal(net, 2)
    assert all(parametrize.is_parametrized(conv) for conv in ours[:2])
    x = torch.randn(3, 3, 4, 5, dtype=torch.float64)
    assert_equals_copies(net.eval(), [x, 1 - x])


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_what_cannot_be_copied_is_named() -> None:
    net = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"'0' cannot be copied .* use torch\.nn\.utils\.parametrizations"):
        make_multimodal(net, 2)


def test_sharded_parameters_are_refused(single_process_group: None) -> None:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    net = network(nn.Identity())

    def shard(layer: nn.Module) -> None:
        for name, parameter in layer.named_parameters(recurse=False):
            layer.register_parameter(
                name, nn.Parameter(DTensor.from_local(parameter.data, mesh, [Replicate()]))
            )

    shard(net[0])
    with pytest.raises(ValueError, match=r"'0\.weight' is sharded \(DTensor\): convert before fully_shard"):
        make_multimodal(net, 2)
    shard(net[2])
    with pytest.raises(ValueError, match=r"norm '2' is sharded \(DTensor\): convert before fully_shard"):
        make_multimodal(net, 2)


@pytest.fixture
def single_process_group(tmp_path: Any) -> Any:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_scales_that_norms_share_stay_one() -> None:
    net = network(nn.BatchNorm2d(4))
    net[1].weight = net[2].weight
    ours = make_multimodal(net, 2)
    assert len(list(ours.parameters())) == len(list(net.parameters()))
    x = torch.randn(3, 3, 4, 5, dtype=torch.float64)
    assert_equals_copies(net, [x, 1 - x])


def test_scales_that_another_layer_shares_are_refused() -> None:
    net = network(ChannelNorm())
    net[1].weight = net[2].weight
    with pytest.raises(ValueError, match="norm '2' shares a tensor with '1', which stays as it is: untie"):
        make_multimodal(net, 2)


def test_a_norm_without_bias_gets_one_that_does_not_train() -> None:
    net = network(nn.BatchNorm2d(4))
    net[1].bias = None
    ours = make_multimodal(net, 2)
    assert ours[1].weight.requires_grad
    assert not ours[1].bias.requires_grad
    assert not ours[1].bias.any()
    x = torch.randn(3, 3, 4, 5, dtype=torch.float64)
    assert_equals_copies(net, [x, 1 - x])


class Penalized(nn.BatchNorm2d):
    """Has a method and an attribute of its own, and stays in eval mode."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.rate = 0.5

    def penalty(self) -> Tensor:
        return self.rate * self.weight.abs().sum()

    def train(self, mode: bool = True) -> Penalized:
        return super().train(False)


def test_a_subclass_keeps_its_methods_and_attributes() -> None:
    net = network(Penalized(4))
    net[1].note = ["kept"]
    ours = make_multimodal(net, 2).train()
    layer = ours[1]
    assert isinstance(layer, Penalized)
    assert isinstance(layer, ExchangeBatchNorm2d)
    assert (layer.training, layer.note, layer.rate) == (False, ["kept"], 0.5)
    torch.testing.assert_close(layer.penalty(), 2 * net[1].penalty())
    x = torch.randn(3, 3, 4, 5, dtype=torch.float64)
    assert_equals_copies(net.train(), [x, 1 - x])
    torch.testing.assert_close(copy.deepcopy(ours)(torch.cat([x, x])), ours(torch.cat([x, x])))


def test_hooks_are_kept() -> None:
    net = network(nn.RMSNorm(5, dtype=torch.float64))
    calls: list[tuple[str, str]] = []
    for norm in net[1:3]:
        norm.register_forward_pre_hook(lambda layer, inputs: calls.append(("before", type(layer).__name__)))
        norm.register_forward_hook(
            lambda layer, inputs, kwargs, y: calls.append(("after", type(layer).__name__)), with_kwargs=True
        )
        norm.register_full_backward_hook(lambda layer, *_: calls.append(("back", type(layer).__name__)))
    with pytest.warns(UserWarning, match="private"):
        ours = make_multimodal(net, 2)
    ours(torch.randn(2, 3, 4, 5, dtype=torch.float64)).sum().backward()
    private, exchanging = "PrivateNorm[RMSNorm]", "ExchangeBatchNorm2d"
    assert calls == [
        ("before", private),
        ("after", private),
        ("before", exchanging),
        ("after", exchanging),
        ("back", exchanging),
        ("back", private),
    ]


def test_layers_may_be_shared_on_request() -> None:
    net = nn.Sequential(nn.Sequential(Functional(), nn.LayerNorm(5)), nn.BatchNorm2d(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = make_multimodal(net, 2, shared=["0"])
    assert [type(layer) for layer in ours[0]] == [Functional, nn.LayerNorm]
    report = conversion_report(net, shared=["0.1"])
    assert [row.outcome for row in report.rows] == ["refused", "shared", "converted"]
    with pytest.raises(ValueError, match=r"shared: no layer at or below '0\.2'; close names: '0\.1'"):
        make_multimodal(net, 2, shared=["0.2"])
    with pytest.raises(TypeError, match="shared must be a collection of module names, got '0'"):
        make_multimodal(net, 2, shared="0")


class Deviation(nn.Module):
    """A minibatch standard deviation, which nothing but running it tells."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.std(0)


class SequenceFirst(nn.Module):
    """Normalizes ``[L, N, C]``, where the first axis is not the batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(2).permute(2, 0, 1)).permute(1, 2, 0).view_as(x)


class Dropping(nn.Module):
    """Takes a mask beside x, and is random in training."""

    def forward(self, x: Tensor, mask: Tensor, scale: float) -> dict[str, Tensor]:
        return {"y": scale * F.dropout(x, training=self.training) * mask[:, None, None, None]}


class Wrapped(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.last = last

    def forward(self, x: Tensor, *others: Any) -> Any:
        return self.last(self.first(x), *others)


@pytest.mark.filterwarnings("ignore:norms without an exchange version")
@pytest.mark.parametrize("last", [Deviation, SequenceFirst])
def test_an_example_shows_what_mixes_the_modalities(last: type[nn.Module]) -> None:
    net, x = Wrapped(last()), torch.randn(3, 3, 4, 5)
    make_multimodal(net, 2)
    with pytest.raises(ValueError, match=r"example: in training mode, .* first seen in what 'last"):
        make_multimodal(net, 2, example=x)


class First(nn.Module):
    """A mask that is a module: the first channel."""

    def forward(self, weight: Tensor) -> Tensor:
        return (torch.arange(weight.shape[1]) == 0).expand(weight.shape)


@pytest.mark.parametrize("mask", [functools.partial(masks.smallest, k=1), First()])
def test_an_example_finds_no_fault_with_layers_that_have_a_mask(mask: Callable[[Tensor], Tensor]) -> None:
    net = Wrapped(ExchangeBatchNorm2d(4, 2, mask=mask))
    ours = make_multimodal(net, 2, example=torch.randn(3, 3, 4, 5))
    assert ours.last.replaced().any()


@pytest.mark.filterwarnings("ignore:norms without an exchange version")
def test_an_example_changes_nothing_and_may_be_several_arguments() -> None:
    net = Wrapped(Dropping())
    state = torch.get_rng_state()
    ours = make_multimodal(net, 3, threshold=0.5, example=(torch.randn(3, 3, 4, 5), torch.rand(3), 2.0))
    torch.set_rng_state(state)
    again = make_multimodal(net, 3, threshold=0.5)
    assert ours.first[1].threshold == 0.5
    torch.testing.assert_close(ours.state_dict(), again.state_dict())
    with pytest.raises(ValueError, match="example: the network returns no tensor with a row for each"):
        make_multimodal(Wrapped(nn.MSELoss()), 2, example=(torch.randn(2, 3, 4, 5), torch.zeros(4, 4, 4, 5)))


def test_a_report_is_a_table() -> None:
    report = conversion_report(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), GhostNorm()))
    assert isinstance(report, ConversionReport)
    lines = str(report).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["name", "class", "outcome"],
        ["0", "BatchNorm2d", "converted"],
        ["2", "GhostNorm", "refused"],
    ]
    assert [row.name for row in report.of("refused")] == ["2"]


def test_many_names_are_cut_short() -> None:
    with pytest.warns(UserWarning, match=r"'7' \(RMSNorm\) and 12 more, which cen_ext\.conversion_report"):
        make_multimodal(nn.Sequential(*(nn.RMSNorm(2) for _ in range(20))), 2)
