"""AsymFusion against the released code's numbers and its formulas; what it leaves alone and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
import models.recipes  # registers the recipe of the contract
from models.fusion import AsymFusion, Exchange, NoFusion
from models.networks.encoders.resnet import Bottleneck, ExchangeResNet
from models.networks.systems.blocks import SLOPE
from tests.helpers import paths
from tests.helpers.fusion_contract import check_fusion
from tests.helpers.networks import randomise_norms
from tests.helpers.small_xception import SmallXception
from tests.networks.test_released import (
    MODES,
    OUTPUTS,
    Run,
    check_every_logit,
    check_logits,
    check_loss_and_gradients,
    golden_run,
)

GOLDEN = json.loads((paths.GOLDEN / "asymfusion50.json").read_text())


@pytest.fixture(scope="module")
def run() -> Run:
    return golden_run(GOLDEN, AsymFusion())


@pytest.mark.parametrize("output", OUTPUTS)
def test_eval_logits(run: Run, output: str) -> None:
    check_logits(run, GOLDEN, output)


@pytest.mark.parametrize("output", OUTPUTS)
def test_eval_logits_element_by_element(run: Run, output: str, shared: Path) -> None:
    check_every_logit(run, shared / "golden" / "asymfusion50.npz", output)


@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradients(run: Run, mode: str) -> None:
    check_loss_and_gradients(run, GOLDEN, mode)


def shifted(a: Tensor) -> Tensor:
    """S of the formulas, one value at a time."""
    result = torch.zeros_like(a)
    g, (height, width) = a.shape[1] // 5, a.shape[2:]
    for i in range(height):
        for j in range(width):
            for k, (row, column) in enumerate([(i - 1, j), (i, j - 1), (i, j + 1), (i + 1, j)]):
                if 0 <= row < height and 0 <= column < width:
                    result[:, k * g : (k + 1) * g, i, j] = a[:, k * g : (k + 1) * g, row, column]
    return result


def norm(layer: nn.Module, m: int, x: Tensor) -> Tensor:
    """The private norm of modality m; in training mode with the statistics of x."""
    given = (None, None) if layer.training else (layer.running_mean[m], layer.running_var[m])
    return F.batch_norm(x, *given, layer.weight[m], layer.bias[m], training=layer.training, eps=layer.eps)


def by_formula(block: Bottleneck, xs: list[Tensor], shuffle: bool, shift: bool) -> list[Tensor]:
    """Section 1.1 of the description of the released code; for M > 2 with the next modality as the other."""
    count = len(xs)
    a = [norm(block.bn1, m, block.conv1(x)).relu() for m, x in enumerate(xs)]
    s = 4 * (a[0].shape[1] // 5) if shuffle else a[0].shape[1]
    u = [torch.cat([a[m][:, :s], a[(m + 1) % count][:, s:]], 1) for m in range(count)]
    v = [norm(block.bn2, m, block.conv2(each)).relu() for m, each in enumerate(u)]
    if shift:
        v = [v[m] + shifted(a[(m + 1) % count]) for m in range(count)]
    w = [torch.cat([v[m][:, :s], v[m - 1][:, s:]], 1) for m in range(count)]
    return [(norm(block.bn3, m, block.conv3(w[m])) + xs[m]).relu() for m in range(count)]


@pytest.mark.parametrize(("shuffle", "shift"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("modalities", [2, 3])
def test_block(modalities: int, training: bool, shuffle: bool, shift: bool) -> None:
    torch.manual_seed(0)
    fusion = AsymFusion(shuffle, shift)
    net = ExchangeResNet("resnet50", modalities, fusion, frozen_statistics=False)
    block = net.layer1[-1].double().train(training)
    randomise_norms(block)
    xs = [torch.randn(2, 256, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(modalities)]
    ours, theirs = block(torch.cat(xs)), torch.cat(by_formula(block, xs, shuffle, shift))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    inputs = [*xs, *block.parameters()]
    dy = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_only_the_last_block_of_a_stage_fuses() -> None:
    with torch.device("meta"):
        net = ExchangeResNet("resnet101", 2, AsymFusion())
    for stage in net.stages():
        *others, last = stage
        assert last.join is not None
        assert last.bn1.exchanges
        assert last.bn2.exchanges
        assert not any(layer.exchanges for layer in (*[b.bn1 for b in others], *[b.bn2 for b in others]))
        assert all(block.join is None for block in others)


@pytest.mark.parametrize(
    ("encoder", "one", "two"),
    [
        ("resnet50", 99_104_104, 99_157_224),
        ("resnet101", 118_096_232, 118_201_576),
        ("resnet152", 133_739_880, 133_891_304),
    ],
)
def test_parameters_and_keys_are_those_of_cen(encoder: str, one: int, two: int) -> None:
    for modalities, expected in ((1, one), (2, two)):
        with torch.device("meta"):
            net = models.refinenet(encoder, 40, modalities, fusion=AsymFusion())
            plain = models.refinenet(encoder, 40, modalities, fusion=Exchange())
        assert sum(p.numel() for name, p in net.named_parameters() if name != "alpha") == expected
        assert net.state_dict().keys() == plain.state_dict().keys()


def test_one_modality_is_a_plain_network() -> None:
    net = models.refinenet("resnet50", 4, 1, width=4, fusion=AsymFusion()).eval()
    plain = models.refinenet("resnet50", 4, 1, width=4, fusion=NoFusion()).eval()
    plain.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, 33, 33)
    assert torch.equal(net(x).ensemble, plain(x).ensemble)


@pytest.mark.parametrize("modalities", [2, 3])
def test_contract(modalities: int) -> None:
    check_fusion(AsymFusion(), modalities)


@pytest.mark.parametrize("tapped", [False, True])
def test_xception_block(tapped: bool) -> None:
    """Ours: around the second separable convolution, rectified unless a feature leaves there."""
    torch.manual_seed(0)
    net = SmallXception(2, AsymFusion(), frozen_statistics=False)
    fusing = [i for i, block in enumerate(net.blocks[:-1]) if block.join is not None]
    strides = [stride for _, stride in net.entry]
    assert fusing == [i - 1 for i in range(1, len(strides)) if strides[i] > 1] + [len(net.blocks) - 3]
    block = next(net.blocks[i] for i in fusing if net.blocks[i].tapped == tapped).double().eval()
    randomise_norms(block)
    channels = block.stack.conv1.conv_dw.in_channels
    xs = [torch.randn(2, channels, 6, 6, dtype=torch.float64) for _ in range(2)]
    first, second = block.stack.conv1, block.stack.conv2

    def sep(part: nn.Module, m: int, x: Tensor) -> Tensor:
        return norm(part.bn_pw, m, part.conv_pw(norm(part.bn_dw, m, part.conv_dw(x))))

    a = [sep(first, m, x.relu()).relu() for m, x in enumerate(xs)]
    s = 4 * (a[0].shape[1] // 5)
    u = [torch.cat([a[m][:, :s], a[1 - m][:, s:]], 1) for m in range(2)]
    v = [sep(second, m, u[m]) for m in range(2)]
    v = [(v[m] if tapped else v[m].relu()) + shifted(a[1 - m]) for m in range(2)]
    w = [torch.cat([v[m][:, :s], v[1 - m][:, s:]], 1) for m in range(2)]
    torch.testing.assert_close(block.begin(torch.cat(xs)), torch.cat(w), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_unet_level(count: int, shift: bool) -> None:
    """Ours: a level's normalized output gets its tail swapped and the next modality's shift added."""
    torch.manual_seed(0)
    net = models.unet(size=32, base_width=10, num_modalities=count, fusion=AsymFusion(shift=shift)).double()
    plain = models.unet(size=32, base_width=10, num_modalities=count, fusion=NoFusion()).double()
    for each in (net, plain):
        randomise_norms(each)
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2 * count, 3, 32, 32, dtype=torch.float64)
    first, second = net.encoder(x)[:2]
    assert torch.equal(first, plain.encoder(x)[0])  # without a norm
    level = plain.encoder.levels[1]
    activated = level(first)
    z = torch.where(activated < 0, activated / SLOPE, activated).chunk(count)
    following = [z[(m + 1) % count] for m in range(count)]
    expected = [torch.cat([z[m][:, :16], following[m][:, 16:]], 1) for m in range(count)]
    if shift:
        expected = [expected[m] + shifted(following[m]) for m in range(count)]
    torch.testing.assert_close(second, F.leaky_relu(torch.cat(expected), SLOPE), rtol=1e-10, atol=1e-10)
    assert not torch.equal(net(x).ensemble, plain(x).ensemble)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="bottleneck blocks, of which this encoder has none it could use"):
        models.refinenet("resnet18", 4, 2, fusion=AsymFusion())
    with pytest.raises(ValueError, match="divides channels into 5 groups, but a block has 4"):
        models.unet(size=32, base_width=2, num_modalities=2, fusion=AsymFusion())
    models.refinenet("resnet18", 4, 1, width=4, fusion=AsymFusion())  # with which one modality needs none
    with pytest.raises(ValueError, match="shuffle and shift are both false"):
        models.refinenet("resnet50", 4, 2, fusion=AsymFusion(shuffle=False, shift=False))
