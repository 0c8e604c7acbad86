"""RDFNet: the released networks' sizes, the formulas, and what it is fed and gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cen_ext import ExchangeBatchNorm2d
from models.networks.counting import count_parameters
from models.networks.encoders import load_imagenet
from models.networks.systems import rdfnet
from models.networks.systems.base import make_system
from tests.helpers.networks import randomise_norms
from tests.helpers.plain_resnets import DEPTHS, NARROW, Plain, made_up, make_narrow, resnet_shapes

COUNTS = {"resnet50_v1": 149_143_080, "resnet101_v1": 187_127_208, "resnet152_v1": 218_414_504}
CLASSES = 5


class Formulas(Plain):
    """RDFNet by the names of our state dict."""

    def features(self, name: str, image: Tensor) -> list[Tensor]:
        x = self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", image, 2)).clamp_min(0)
        # Windows from the first pixel on, as many as start within the image; the last ones may be cut.
        rows, columns = (-(-(side - 3) // 2) * 2 + 3 for side in x.shape[2:])
        x = F.pad(x, (0, columns - x.shape[3], 0, rows - x.shape[2]), value=-torch.inf)
        x, found = x.unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2)), []
        for number, depth in enumerate(DEPTHS, 1):
            x = self.stage(f"{name}.layer{number}", x, depth, 1 if number == 1 else 2, "1x1")
            found.append(x)
        return found

    def units(self, name: str, x: Tensor, numbers: range) -> Tensor:
        for i in numbers:
            y = self.conv(f"{name}.{i}.conv1", x.clamp_min(0)).clamp_min(0)
            x = x + self.conv(f"{name}.{i}.conv2", y)
        return x

    def pooled(self, name: str, x: Tensor) -> Tensor:
        x = F.pad(x, (2, 2, 2, 2), value=-torch.inf)
        return self.conv(name, x.unfold(2, 5, 1).unfold(3, 5, 1).amax((-1, -2)))

    def fused(self, name: str, rgb: Tensor, depth: Tensor) -> Tensor:
        total = torch.zeros(())
        for i, x in enumerate((rgb, depth)):
            stream = f"{name}.streams.{i}"
            x = self.units(stream, self.conv(f"{stream}.0", x), range(1, 3))
            total = total + self.conv(f"{stream}.3", x)
        f = total.clamp_min(0)
        return f + self.pooled(f"{name}.pooled", f)

    def __call__(self, rgb: Tensor, depth: Tensor) -> Tensor:
        pairs = list(
            zip(self.features("encoder.rgb", rgb), self.features("encoder.depth", depth), strict=True)
        )
        x = torch.zeros(())
        for number, pair in enumerate(reversed(pairs)):
            name = f"decoder.cascades.{number}"
            y = self.units(f"{name}.adapt", self.fused(f"{name}.reduce", *pair), range(2))
            if number > 0:
                x = F.interpolate(x, y.shape[2:], mode="bicubic", align_corners=True)
                y = self.conv(f"{name}.join", y) + x
            y = y.clamp_min(0)
            first = self.pooled(f"{name}.pool.convs.0", y)
            y = y + first + self.pooled(f"{name}.pool.convs.1", first)
            x = self.units(f"{name}.refine", y, range(3))
            x = self.conv(f"{name}.project", x) if number < 3 else x
        weight, bias = self.state["decoder.classifier.weight"], self.state["decoder.classifier.bias"]
        return torch.einsum("kc,nchw->nkhw", weight[:, :, 0, 0], x) + bias[:, None, None]


Narrow = Callable[..., rdfnet.RDFNet]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Narrow:
    """Makes networks of few channels in float64."""
    make_narrow(monkeypatch)
    monkeypatch.setattr(rdfnet, "WIDTH", 6)
    return lambda channels=(3, 3), **options: make_system("rdfnet", CLASSES, channels, **options).double()


def images(height: int = 33, width: int = 49) -> list[Tensor]:
    return list(torch.randn(2, 2, 3, height, width, dtype=torch.float64))


@pytest.mark.parametrize("encoder", COUNTS)
def test_parameters_are_the_released(encoder: str) -> None:
    with torch.device("meta"):
        net = make_system("rdfnet", 40, (3, 3), encoder=encoder)
    assert count_parameters(net) == COUNTS[encoder]
    assert count_parameters(net.decoder) == 102_126_888


@pytest.mark.parametrize("size", [(64, 96), (33, 33), (37, 53)])
@pytest.mark.parametrize("channels", [(3, 3), (3, 1)])
def test_it_is_the_formulas(narrow: Narrow, size: tuple[int, int], channels: tuple[int, int]) -> None:
    net = narrow(channels).eval()
    randomise_norms(net)
    for parameter in [*net.decoder.parameters(), *(stream.conv1.bias for stream in net.encoder.streams)]:
        torch.nn.init.normal_(parameter, std=0.1)
    rgb, depth = images(*size)
    expected = Formulas(net.state_dict())(rgb, depth[:, : channels[1]])
    out = net([rgb, depth])
    torch.testing.assert_close(out.branches[0], expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(out.ensemble, out.branches[0])


def test_output_of_nyudv2s_size() -> None:
    with torch.device("meta"):
        net = make_system("rdfnet", 40, (3, 3))
        out = net.train()(torch.empty(2, 3, 480, 640))
    assert out.branches.shape == (1, 1, 40, 120, 160)
    assert out.auxiliary == ()


def test_gradients_reach_every_parameter(narrow: Narrow) -> None:
    net = narrow().train()
    net(images()).branches.square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == ["alpha"]  # of a single branch


def test_initial_weights_are_the_papers(narrow: Narrow) -> None:
    for module in narrow().decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.3)
            assert module.bias is None or not module.bias.any()


def test_dropout_acts_on_every_feature_and_before_the_classifier(narrow: Narrow) -> None:
    """With all values dropped, the logits are the classifier's bias."""
    net = narrow(dropout=1.0).train()
    bias = torch.nn.init.normal_(net.decoder.classifier.bias)
    for stream in net.encoder.parameters():
        stream.requires_grad_(False)
    seen = []
    for cascade in net.decoder.cascades:
        cascade.reduce.register_forward_pre_hook(lambda _, streams: seen.extend(streams[0]))
    out = net(images()).branches
    assert torch.equal(out, bias[:, None, None].expand_as(out))
    assert len(seen) == 8
    assert not any(feature.any() for feature in seen)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_statistics(narrow: Narrow, frozen: bool) -> None:
    net = narrow(frozen_statistics=frozen).train()
    norms = [module for module in net.modules() if isinstance(module, ExchangeBatchNorm2d)]
    assert {norm.training for norm in norms} == {not frozen}


@pytest.mark.parametrize("channels", [(3, 1), (3, 3)])
def test_imagenet_weights_go_into_both_streams(
    narrow: Narrow, tmp_path: Path, channels: tuple[int, int]
) -> None:
    state = made_up({**resnet_shapes(NARROW), "fc.weight": (1000, 40), "fc.bias": (1000,)})
    torch.save(state, tmp_path / "resnet50.pth")
    net = narrow(channels)
    report = load_imagenet(net.encoder, tmp_path / "resnet50.pth")
    assert report == (["rgb.conv1.bias", "depth.conv1.bias"], [])
    own = net.encoder.state_dict()
    assert not any(own.pop(key).any() for key in report.missing)
    stem = own.pop("depth.conv1.weight")
    expected = state["conv1.weight"]
    torch.testing.assert_close(stem, expected.mean(1, keepdim=True) if channels[1] == 1 else expected)
    for key, value in own.items():
        assert torch.equal(value.flatten(), state[key.split(".", 1)[1]].flatten()), key


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"channels": (3, 3, 3)}, "network=rdfnet takes 2 modalities, got 3"),
        ({"channels": (4, 3)}, "channels of a modality must be 1 or 3, got 4"),
        ({"encoder": "resnet50"}, r"encoder must be .* with network=rdfnet, got 'resnet50'"),
    ],
)
def test_refusals(options: dict[str, object], named: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=named):
        make_system("rdfnet", CLASSES, **{"channels": (3, 3), **options})


def test_caffes_models_are_refused() -> None:
    with torch.device("meta"):
        net = make_system("rdfnet", CLASSES, (3, 3))
    with pytest.raises(ValueError, match="network=rdfnet: no public checkpoint's layout is known"):
        net.from_released({"RGBres2a_branch2b.weight": torch.empty(64, 64, 3, 3)})
