"""torch.fx records the exchanging layers as its own; quantization and fusion keep them or refuse them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.utils import mkldnn

import cen_ext
from cen_ext import ExchangeBatchNorm2d, ExchangeInstanceNorm2d, make_multimodal
from cen_ext.modules import ExchangeNorm
from tests.helpers import vision
from tests.helpers.same import assert_same

LAYERS = [ExchangeBatchNorm2d, ExchangeInstanceNorm2d]
M = 2


class Residual(nn.Module):
    """Of one modality."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.batch = nn.BatchNorm2d(6)
        self.last = nn.Sequential(
            nn.Conv2d(6, 6, 1), nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.batch(self.conv(x)).relu()
        return y + self.last(y)


def exchanging() -> nn.Module:
    net = make_multimodal(Residual(), M, threshold=0.5)
    for layer in cen_ext.exchanging_layers(net).values():
        nn.init.uniform_(layer.weight)
    assert all(layer.replaced().any() for layer in cen_ext.exchanging_layers(net).values())
    return net


def images() -> Tensor:
    return torch.randn(2 * M, 3, 8, 7)


def step(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """What the network returns, its gradients, and the state that it leaves."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = net(x)
    y.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return y.detach(), x.grad, gradients, copy.deepcopy(dict(sorted(net.state_dict().items())))


def test_a_traced_network_does_what_the_network_does():
    net = exchanging()
    traced = fx.symbolic_trace(copy.deepcopy(net))
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["conv", "batch", "last.0", "last.1"]
    for training in (True, False, True):
        x = images()
        expected = step(net.train(training), x)
        assert_same(step(traced.train(training), x), expected)
    assert net.batch.num_batches_tracked == 2
    assert torch.equal(copy.deepcopy(traced).eval()(x), traced.eval()(x))


def test_a_graph_is_cut_behind_a_layer():
    net, x, seen = exchanging().eval(), images(), []
    traced = fx.symbolic_trace(copy.deepcopy(net))
    graph = traced.graph
    node = next(node for node in graph.nodes if node.target == "batch")
    graph.erase_node(graph.find_nodes(op="output")[0])
    graph.output(node)
    graph.eliminate_dead_code()
    traced.recompile()
    net.batch.register_forward_hook(lambda layer, inputs, y: seen.append(y))
    net(x)
    assert torch.equal(traced(x), seen[0])
    assert len(graph.nodes) == 4


class Functions(nn.Module):
    """Every public function of a tensor, and a layer with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(M, 5)), nn.Parameter(torch.rand(M, 5))
        self.conv = cen_ext.Conv3x3(5, 5)
        self.norm = ExchangeBatchNorm2d(5, M, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        y = cen_ext.norm_exchange(x, self.weight, self.bias, training=True, threshold=0.5)
        y = cen_ext.pixel_shift(cen_ext.max_pool_same(y, 3), M, base=x)
        first, second = cen_ext.unstack_modalities(y, M)
        y = cen_ext.stack_modalities([second, first + second])
        return self.norm(cen_ext.conv3x3(self.conv(y), self.conv.weight), x)


def test_functions_are_recorded_as_calls():
    net = Functions()
    traced = fx.symbolic_trace(copy.deepcopy(net))
    called = [node.target for node in traced.graph.nodes if node.op.startswith("call")]
    names = ["norm_exchange", "max_pool_same", "pixel_shift", "unstack_modalities"]
    names += ["getitem", "getitem", "add", "stack_modalities", "conv3x3", "conv3x3"]
    assert [getattr(target, "__name__", target) for target in called] == [*names, "norm"]
    x = torch.randn(2 * M, 5, 8, 7)
    assert_same(step(traced, x), step(net, x))


@pytest.mark.filterwarnings("ignore:norms without an exchange version")
def test_private_norms_are_recorded():
    net = make_multimodal(nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(3, 3), nn.RMSNorm(7)), M)
    traced = fx.symbolic_trace(copy.deepcopy(net))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    x = images()
    assert_same(step(traced, x), step(net, x))


def test_hooks_run_once():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), ExchangeBatchNorm2d(6, M), nn.Flatten())
    net[1].act = nn.Sigmoid()
    net[1].register_forward_pre_hook(lambda layer, inputs: (inputs[0] + 1,))
    net[1].register_forward_hook(lambda layer, inputs, y: layer.act(y) * 2)
    traced = fx.symbolic_trace(copy.deepcopy(net))
    for training in (True, False):
        x = images()
        assert_same(step(traced.train(training), x), step(net.train(training), x))


@pytest.mark.parametrize("layer_class", LAYERS)
def test_a_layer_by_itself_cannot_be_traced(layer_class):
    with pytest.raises(TypeError, match=r"cannot trace it by itself: .*nn\.Sequential\(layer\)"):
        fx.symbolic_trace(layer_class(4, M))
    fx.symbolic_trace(nn.Sequential(layer_class(4, M)))


def test_features_are_extracted_by_torchvision():
    models = vision.torchvision().models
    net = make_multimodal(models.resnet18(), M, threshold=0.02).eval()
    create = pytest.importorskip("torchvision.models.feature_extraction").create_feature_extractor
    seen = {}
    for name in ("layer1.0.bn1", "layer2"):
        net.get_submodule(name).register_forward_hook(lambda *call, name=name: seen.update({name: call[-1]}))
    x = torch.randn(M, 3, 32, 32)
    features = create(net, ["layer1.0.bn1", "layer2"])(x)
    net(x)
    assert_same(dict(features), {name: seen[name] for name in features})


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:Please use quant_min")
@pytest.mark.parametrize("aware", [False, True])
def test_fx_quantization_keeps_the_layers_in_floating_point(aware):
    net, x = exchanging().train(aware), images()
    prepare = quantize_fx.prepare_qat_fx if aware else quantize_fx.prepare_fx
    mapping = getattr(quantization, f"get_default_{'qat_' if aware else ''}qconfig_mapping")("x86")
    prepared = prepare(copy.deepcopy(net), mapping, (x,))
    y = prepared(x)
    if not aware:
        assert torch.equal(y, net(x))  # observed, no more
    quantized, expected = quantize_fx.convert_fx(prepared.eval()), net.eval()(x)
    assert [type(layer) for layer in quantized.modules() if isinstance(layer, ExchangeNorm)] == LAYERS
    if not aware:
        assert (quantized(x) - expected).norm() < 0.05 * expected.norm()  # of 8 bits, four times


def eagerly_quantized(layer_class: type[ExchangeNorm], *stubs: nn.Module) -> nn.Module:
    conv, layer = nn.Conv2d(3, 6, 1), layer_class(6, M, track_running_stats=True)
    net = nn.Sequential(quantization.QuantStub(), conv, *stubs, layer).eval()
    net.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(net)
    prepared(images())
    return quantization.convert(prepared)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:Please use quant_min")
@pytest.mark.parametrize("layer_class", LAYERS)
def test_eager_quantization_needs_floating_point_before_the_layers(layer_class):
    net, x = eagerly_quantized(layer_class, quantization.DeQuantStub()), images()
    assert torch.equal(net(x), net[3](net[:3](x)))
    assert net[:3](x).dtype == torch.float32
    with pytest.raises(TypeError, match=r"x must be .*got torch\.quint8; .*DeQuantStub before the layer"):
        eagerly_quantized(layer_class)(x)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_dynamic_quantization_passes_by():
    net = nn.Sequential(ExchangeBatchNorm2d(3, M), nn.Flatten(), nn.Linear(3 * 56, 2)).eval()
    quantized = quantization.quantize_dynamic(net, {nn.Linear})
    assert type(quantized[0]) is ExchangeBatchNorm2d
    assert (quantized(images()) - net(images())).shape == (2 * M, 2)


@pytest.mark.parametrize("names", [["conv", "batch"], ["batch", "relu"]])
def test_eager_fusion_refuses_the_layers(names):
    net = exchanging().eval()
    net.relu = nn.ReLU()
    with pytest.raises(AssertionError, match=r"did not find fuser method for: .*ExchangeBatchNorm2d"):
        quantization.fuse_modules(net, [names])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_frozen_and_optimized_traces_do_what_the_network_does():
    net, x = exchanging().eval(), images()
    traced = torch.jit.trace(net, (x,), check_trace=False)
    for optimize in (torch.jit.freeze, torch.jit.optimize_for_inference):
        torch.testing.assert_close(optimize(traced)(x), net(x))


def test_tensors_of_other_layouts_are_refused():
    layer, x = ExchangeInstanceNorm2d(3, M), images()
    for other in (x.to_mkldnn(), x.to_sparse()):
        with pytest.raises(TypeError, match=r"x must be a dense tensor, got one of torch\..*x\.to_dense\(\)"):
            layer(other)
    net = mkldnn.to_mkldnn(nn.Sequential(nn.Conv2d(3, 3, 1), layer).eval())
    with pytest.raises(TypeError, match=r"x must be a dense tensor, got one of torch\._mkldnn"):
        net(x.to_mkldnn())
