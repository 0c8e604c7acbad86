"""Whole networks traced, exported, packaged and differentiated twice; only the last needs ``use_backend``."""

from __future__ import annotations

import copy
import io
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cen_ext
import examples.own_encoder  # noqa: F401 - registers plain_net
import models
from models.networks.private import PrivateConv2d
from tests.helpers import small_xception  # noqa: F401 - registers it
from tests.helpers.networks import randomise_norms

CLASSES = dict(num_classes=5, num_modalities=2)
NETWORKS = {
    "refinenet": lambda: models.refinenet("plain_net", width=8, **CLASSES),
    "asymfusion": lambda: models.refinenet("small_xception", width=8, fusion="asymfusion", **CLASSES),
    "pspnet": lambda: models.pspnet("resnet18", **CLASSES),
    "deeplabv3plus": lambda: models.deeplabv3plus("resnet18", **CLASSES),
    "unet": lambda: models.unet(size=16, base_width=4),
}


class Ensemble(nn.Module):
    """The ensemble of a network's output, a tensor, as tracers and ONNX need it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        ensemble: Tensor = self.net(x).ensemble
        return ensemble


def make_network(name: str) -> nn.Module:
    net = NETWORKS[name]().eval()
    randomise_norms(net)
    return Ensemble(net).to(memory_format=torch.channels_last)


def make_input(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, 64, 64).contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_traced_networks_are_saved_and_loaded(name):
    net, file = make_network(name), io.BytesIO()
    torch.jit.save(torch.jit.trace(net, (make_input(),), check_trace=False), file)
    file.seek(0)
    traced = torch.jit.load(file)
    x = make_input(4)
    torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "training"), [("refinenet", False), ("pspnet", True), ("deeplabv3plus", False), ("unet", True)]
)
def test_exported_networks_are_saved_and_loaded(name, training):
    net, file, x = NETWORKS[name]().train(training), io.BytesIO(), make_input(4)
    randomise_norms(net)
    torch.export.save(torch.export.export(copy.deepcopy(net), (x,)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    states = []
    for module in (loaded, net):
        torch.manual_seed(1)  # of dropout
        output = module(x)
        states.append((output, type(output).__name__, {**module.state_dict()}))
    assert states[0][1] == states[1][1]
    torch.testing.assert_close(states[0][::2], states[1][::2])


class Small(nn.Module):
    """The ends of a translation network, with little to compile between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = cen_ext.ExchangeBatchNorm2d(3, 2, threshold=0.5, activation="relu")
        nn.init.uniform_(self.norm.weight)

    def forward(self, x: Tensor) -> models.TranslationOutput:
        branches = self.norm(x).unflatten(0, (2, -1))
        return models.TranslationOutput(branches, branches.sum(0), branches[:, 0, 0, 0, 0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_packages_of_networks_return_their_outputs(tmp_path: Path):
    net, x, file = Small().eval(), make_input(), str(tmp_path / "net.pt2")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(torch.export.export(net, (x,)), package_path=file)
        output, expected = torch._inductor.aoti_load_package(file)(x), net(x)
    assert type(output) is models.TranslationOutput
    torch.testing.assert_close(output, expected)


class Shifted(nn.Module):
    """AsymFusion's shift, which takes an Xception otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return cen_ext.pixel_shift(x.tile(1, 4, 1, 1), 2, base=x.sin().tile(1, 4, 1, 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["refinenet", "unet", "shift"])
def test_networks_export_to_onnx(name, tmp_path: Path):
    pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
    net, x, file = Shifted() if name == "shift" else make_network(name), make_input(), tmp_path / "net.onnx"
    torch.onnx.export(net, (x,), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x), rtol=0, atol=1e-5)


def test_a_gradient_penalty_trains_a_discriminator():
    """R1 (Mescheder et al., ICML 2018): its gradient is the slope of the penalty along a direction."""
    net = models.patchgan(base_width=2).double()
    x = torch.randn(2, 6, 24, 24, dtype=torch.float64, requires_grad=True)
    parameters = list(net.parameters())

    def penalty() -> Tensor:
        (dx,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return dx.square().sum()

    with pytest.raises(RuntimeError, match=r"twice .*cen_ext\.use_backend\('reference'\)"):
        penalty().backward()
    directions = [torch.randn_like(p) for p in parameters]
    with cen_ext.use_backend("reference"):
        gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True)
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p.add_(d, alpha=step)
            values.append(penalty().detach())
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope.detach(), rtol=1e-5, atol=0)


class PrivateOfSeparate(nn.Module):
    """Two inputs, stacked, and a convolution for each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = PrivateConv2d(nn.Conv2d(3, 4, 1), 2)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        y: Tensor = self.conv(torch.cat([one, other]))
        return y


def test_private_convolutions_are_exported_for_any_batch() -> None:
    net, batch = PrivateOfSeparate().eval(), torch.export.Dim("batch", min=1)
    example = torch.randn(2, 2, 3, 5, 6).unbind()
    program = torch.export.export(net, example, dynamic_shapes=({0: batch},) * 2, strict=False).module()
    for images in (1, 3):
        inputs = torch.randn(2, images, 3, 5, 6).unbind()
        torch.testing.assert_close(program(*inputs), net(*inputs))
