"""Networks without what their exchange discards: the same outputs, fewer multiply-adds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import cen_ext
import examples.own_encoder  # noqa: F401 - registers plain_net
import models
from cen_ext import ExchangeBatchNorm2d, ExchangeInstanceNorm2d
from cen_ext.network import exchanging_layers
from models.deployment import prune
from models.deployment.pairs import Pair, find_pairs
from models.fusion import Exchange, NoFusion
from models.networks.counting import count_multiply_adds
from models.translation.inference import translating
from tests.helpers import small_xception  # noqa: F401 - registers it
from tests.helpers.networks import exchange_share, randomise_norms

TWO = dict(num_classes=5, num_modalities=2)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "refinenet": lambda: models.refinenet("resnet18", width=8, **TWO),
    "light_refinenet": lambda: models.light_refinenet("resnet50", width=8, **TWO),
    "pspnet": lambda: models.pspnet("resnet18", width=16, **TWO),
    "deeplabv3plus": lambda: models.deeplabv3plus("resnet18", width=16, decoder_norms="private", **TWO),
    "depthwise": lambda: models.deeplabv3plus("small_xception", width=16, **TWO),
    "own encoder": lambda: models.refinenet("plain_net", width=8, **TWO),
    "three": lambda: models.refinenet("plain_net", 5, 3, width=8),
    "everywhere": lambda: models.refinenet("plain_net", 5, 3, width=8, fusion=Exchange(region="all")),
    "private": lambda: models.refinenet("plain_net", width=8, fusion=Exchange(convolutions="private"), **TWO),
    "shared norms": lambda: models.refinenet("plain_net", width=8, fusion=NoFusion(norms="shared"), **TWO),
    "late concat": lambda: models.refinenet("plain_net", width=8, fusion="late_concat", **TWO),
    "asymfusion": lambda: models.refinenet("small_xception", width=8, fusion="asymfusion", **TWO),
    "self-attention": lambda: models.refinenet("plain_net", width=8, fusion="self_attention", **TWO),
    "conditional": lambda: models.refinenet("plain_net", width=8, fusion="conditional_norm", **TWO),
    "alone": lambda: models.refinenet("plain_net", 5, 1, width=8),
}


def made(name: str, share: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    randomise_norms(net)
    exchange_share(net, share)
    return net


def image(net: nn.Module, samples: int = 1, size: tuple[int, int] = (64, 96)) -> Tensor:
    return torch.randn(samples * net.num_modalities, 3, *size)


def assert_same_outputs(found: nn.Module, net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        for y, expected in zip(found(x)[:2], net(x)[:2], strict=True):
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_same(name):
    net = made(name)
    before = copy.deepcopy(net.state_dict())
    pruned = prune(net, image(net)).net
    for samples, size in ((1, (64, 96)), (2, (75, 101))):
        assert_same_outputs(pruned, net, image(net, samples, size))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)  # it is a copy that was pruned


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("encoder", ["resnet18", "resnet50"])
def test_multiply_adds_fall_in_proportion(encoder, share):
    """By hand: what the exchanging convolutions cost, times the share that each modality gives up."""
    torch.manual_seed(0)
    net = models.light_refinenet(encoder, width=8, **TWO).eval()
    exchange_share(net, share)
    x = image(net)
    costs = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Conv2d, _: object, y: Tensor) -> None:
            costs[name] = y.numel() * module.weight[0].numel()

        return hook

    exchanging = {pair.conv: pair.norm for pair in find_pairs(net, x) if pair.norm in exchanging_layers(net)}
    handles = [net.get_submodule(conv).register_forward_hook(note(conv)) for conv in exchanging]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    pruned = prune(net, x, multiple=1)
    left_out = 0.0
    for conv, norm in exchanging.items():
        channels = net.get_submodule(norm).num_features
        left_out += costs[conv] * round(share * channels) / channels
    assert len(exchanging) == 16
    assert (len(pruned.channels) > 0) == (share > 0)
    before, after = (count_multiply_adds(each, x.shape) for each in (net, pruned.net))
    assert before - after == left_out
    assert_same_outputs(pruned.net, net, x)


def test_exchanging_all_own_channels_costs_what_one_modality_does():
    net, alone = (models.light_refinenet("resnet18", 5, count, width=8).eval() for count in (2, 1))
    exchange_share(net, 0.5)
    pruned = prune(net, image(net))
    assert {counts for counts, _ in pruned.channels.values()} == {
        (n // 2, n // 2) for n in (64, 128, 256, 512)
    }
    of_blocks = []
    for each, count in ((pruned.net, 2), (alone, 1)):
        blocks = [block for layer in each.encoder.stages() for block in layer if block.downsample is None]
        block = blocks[0]
        of_blocks.append(count_multiply_adds(block, (count, 64, 16, 16)))
    assert of_blocks[0] == of_blocks[1]


def test_channels_are_kept_for_the_kernel_and_for_borrowers():
    torch.manual_seed(0)
    conv, norm = cen_ext.Conv3x3(32, 64, bias=False), ExchangeBatchNorm2d(64, 2, threshold=0.1)
    exchange_share(norm, 0.1)
    net = nn.Sequential(conv, norm).eval()
    x = torch.randn(4, 32, 8, 8)
    assert prune(net, x).channels == {}  # 58 channels would go to the slower convolution
    assert prune(net, x, multiple=1).channels == {"1": ((58, 58), 64)}
    with torch.no_grad():
        norm.weight.data.fill_(0.01)
    everywhere = ExchangeBatchNorm2d(64, 2, threshold=0.1, region="all")
    everywhere.weight.data.fill_(0.01)
    each_lends = nn.Sequential(conv, everywhere).eval()
    assert prune(each_lends, x, multiple=1).channels == {}
    own = prune(net, x, multiple=1)
    assert own.channels == {"1": ((32, 32), 64)}


@settings(max_examples=60, deadline=None)
@given(
    modalities=st.integers(1, 4),
    channels=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    lends=st.booleans(),
    residual=st.booleans(),
    instance=st.booleans(),
    transposed=st.booleans(),
    activation=st.sampled_from(["identity", "relu", "leaky_relu", "silu"]),
)
def test_any_route_is_kept(modalities, channels, seed, lends, residual, instance, transposed, activation):
    """Random masks and lenders in float64, against the layer itself."""
    torch.manual_seed(seed)
    replaced = torch.rand(modalities, channels) < 0.4
    lender = None
    if lends and modalities > 1:
        steps = torch.randint(1, modalities, (modalities, channels))
        others = (torch.arange(modalities)[:, None] + steps) % modalities
        lender = torch.where(torch.rand(modalities, channels) < 0.5, others, -1)
    layer = ExchangeInstanceNorm2d if instance else ExchangeBatchNorm2d
    norm = layer(
        channels, modalities, replaced=replaced, lender=lender, activation=activation, dtype=torch.float64
    )
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(3, channels, 3, dtype=torch.float64)
    net = OneLayer(conv, norm, residual).eval()
    for table in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if table is not None:
            nn.init.uniform_(table.data, 0.5, 1.5)
    x = torch.randn(2 * modalities, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(prune(net, x, multiple=1).net(x), net(x))


class OneLayer(nn.Module):
    """A convolution and its norm, with another one's result for a residual."""

    def __init__(self, conv: nn.Module, norm: nn.Module, residual: bool) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm
        self.residual = copy.deepcopy(conv) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.norm(self.conv(x), None if self.residual is None else self.residual(x))
        return F.relu(z)


def test_generators_are_pruned_as_they_translate():
    torch.manual_seed(0)
    net = models.unet(size=16, base_width=4, threshold=0.02).eval()
    randomise_norms(net)
    exchange_share(net, 0.25)
    x = image(net, 2, (16, 32))
    with translating(net, dropout=False):
        pruned = prune(net, x, multiple=1)
        assert pruned.channels
        assert_same_outputs(pruned.net, net, x)
    by_running_statistics = prune(net, x, multiple=1).net
    assert_same_outputs(by_running_statistics, net, x)


def test_depthwise_convolutions_prune_what_feeds_them():
    """Both the depthwise convolution's channels and those of the one that makes its input."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(6, 12, 1),
        ExchangeBatchNorm2d(12, 2, activation="relu6"),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        ExchangeBatchNorm2d(12, 2, threshold=0.1),
        nn.Conv2d(12, 4, 1),
        ExchangeBatchNorm2d(4, 2),
    ).eval()
    randomise_norms(net)
    exchange_share(net, 0.5)
    x = torch.randn(2, 6, 8, 8)
    pruned = prune(net, x)
    assert pruned.channels == {"1": ((6, 6), 12), "3": ((6, 6), 12)}
    with torch.no_grad():
        torch.testing.assert_close(pruned.net(x), net(x), rtol=1e-5, atol=1e-5)


class Reader(nn.Module):
    """A convolution whose result something beside its norm reads, in a way of its choice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), ExchangeBatchNorm2d(4, 2, threshold=0.1)
        self.how = how

    def forward(self, x: Tensor) -> object:
        y = self.conv(x)
        if self.how == "residual":
            return self.norm(y, y)
        if self.how == "keyword":
            return self.norm(y, residual=y)
        if self.how == "output":
            return self.norm(y), y
        if self.how == "function":
            return self.norm(y) + y.relu()
        if self.how == "twice":
            return self.norm(self.conv(self.norm(y)))
        if self.how == "before":
            return self.norm(F.relu(y))
        return self.norm(y) * y.shape[-1]


@pytest.mark.parametrize("how", ["residual", "keyword", "output", "function", "twice", "before", "shape"])
def test_only_convolutions_that_the_norm_alone_reads_are_pruned(how):
    net = Reader(how).eval()
    exchange_share(net, 0.5)
    x = torch.randn(2, 4, 5, 5)
    expected = (Pair("conv", "norm"),) if how == "shape" else ()
    assert find_pairs(net, x) == expected
    assert bool(prune(net, x).channels) == (how == "shape")


def test_hooked_layers_stay():
    net = Reader("shape").eval()
    net.conv.register_forward_hook(lambda *_: None)
    assert find_pairs(net, torch.randn(2, 4, 5, 5)) == ()


def test_pruned_networks_are_for_evaluation_with_all_modalities():
    net = made("refinenet")
    pruned = prune(net, image(net)).net
    with pytest.raises(ValueError, match="load the network without prune"), cen_ext.present(pruned, [0]):
        pass
    with pytest.raises(RuntimeError, match="train the one that it was made of"):
        pruned.train()
    with pytest.raises(ValueError, match=r"net\.eval\(\)"):
        prune(net.train(), image(net))


class Chained(Reader):
    """A network that calls its layers by references outside of its submodules, as encoders of timm do."""

    def __init__(self) -> None:
        super().__init__("")
        self.chain = (nn.Sequential(self.conv), [self.norm])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.chain[1][0](self.chain[0](x))
        return y


def test_layers_are_pruned_wherever_they_are_referred_to():
    net = Chained().eval()
    exchange_share(net, 0.5)
    pruned = prune(net, torch.randn(2, 4, 5, 5))
    assert pruned.channels == {"norm": ((2, 2), 4)}
    assert pruned.net.chain[0][0] is pruned.net.conv


class Awkward(Reader):
    """A network whose own code asks for a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if not isinstance(y, Tensor):
            raise TypeError("y is no tensor")
        return y


def test_networks_that_cannot_be_pruned_say_so():
    net = Awkward("").eval()
    with pytest.raises(RuntimeError, match="Awkward cannot be pruned: y is no tensor; it works unpruned"):
        prune(net, torch.randn(2, 4, 5, 5))
