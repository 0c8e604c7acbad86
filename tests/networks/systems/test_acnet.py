"""ACNet: the published size, the formulas by the public checkpoint's names, and what it is fed and gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.networks.counting import count_parameters
from models.networks.encoders import load_imagenet
from models.networks.outputs import AuxiliaryOutput
from models.networks.systems import acnet
from models.networks.systems.base import make_system
from tests.helpers.plain_resnets import (
    DEPTHS,
    NARROW,
    Plain,
    made_up,
    make_narrow,
    norm_shapes,
    resnet_shapes,
)

AGENTS = (64, 64, 128, 256, 512)
FEW_AGENTS = (6, 4, 8, 10, 12)
UP = (6, 4, 3, 3)  # blocks of deconv1 to deconv4
CLASSES = 5


def released_shapes(
    widths: tuple[int, ...] = (64, 128, 256, 512), agents: tuple[int, ...] = AGENTS, classes: int = 40
) -> dict[str, tuple[int, ...]]:
    """The entries of a public checkpoint."""
    found = resnet_shapes(widths)
    found |= resnet_shapes(widths, 1, "_d")
    found |= resnet_shapes(widths, suffix="_m", stem=False)

    def plain(name: str, channels: int) -> None:
        for j in (1, 2):
            found[f"{name}.conv{j}.weight"] = (channels, channels, 3, 3)
            found.update(norm_shapes(f"{name}.bn{j}", channels))

    for i, (width, agent) in enumerate(zip((64, *(4 * width for width in widths)), agents, strict=True)):
        for stream in ("rgb", "depth"):
            found[f"atten_{stream}_{i}.1.weight"] = (width, width, 1, 1)
            found[f"atten_{stream}_{i}.1.bias"] = (width,)
        found[f"agant{i}.0.weight"] = (agent, width, 1, 1)
        found |= norm_shapes(f"agant{i}.1", agent)
    for number, depth in enumerate(UP, 1):
        before, after = agents[5 - number], agents[4 - number]
        for i in range(depth):
            plain(f"deconv{number}.{i}", before)
        last = f"deconv{number}.{depth - 1}"
        found[f"{last}.conv2.weight"] = (before, after, 3, 3)
        found[f"{last}.upsample.0.weight"] = (before, after, 2, 2)
        found |= norm_shapes(f"{last}.bn2", after) | norm_shapes(f"{last}.upsample.1", after)
        found[f"out{6 - number}_conv.weight"] = (classes, after, 1, 1)
        found[f"out{6 - number}_conv.bias"] = (classes,)
    for i in range(3):
        plain(f"final_conv.{i}", agents[0])
    found["final_deconv.weight"], found["final_deconv.bias"] = (agents[0], classes, 2, 2), (classes,)
    return found


class Formulas(Plain):
    """ACNet by the public names."""

    def attended(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.state[f"{name}.weight"][:, :, 0, 0], self.state[f"{name}.bias"]
        means = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
        return x / (1 + (-(means @ weight.T + bias)).exp())[:, :, None, None]

    def residual(self, name: str, x: Tensor) -> Tensor:
        y = self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x)).clamp_min(0)
        if f"{name}.upsample.0.weight" in self.state:
            y, x = self.transposed(f"{name}.conv2", y, 1, 1), self.transposed(f"{name}.upsample.0", x)
            x = self.norm(f"{name}.upsample.1", x)
        else:
            y = self.conv(f"{name}.conv2", y)
        return (self.norm(f"{name}.bn2", y) + x).clamp_min(0)

    def levels(self, suffix: str, image: Tensor) -> list[Tensor]:
        x = self.norm(f"bn1{suffix}", self.conv(f"conv1{suffix}", image, 2)).clamp_min(0)
        found, x = [x], F.max_pool2d(x, 3, 2, 1)
        for number, depth in enumerate(DEPTHS, 1):
            x = self.stage(f"layer{number}{suffix}", x, depth, 1 if number == 1 else 2)
            found.append(x)
        return found

    def merged(self, rgb: Tensor, depth: Tensor) -> list[Tensor]:
        levels = zip(self.levels("", rgb), self.levels("_d", depth), strict=True)
        added = [
            self.attended(f"atten_rgb_{i}.1", r) + self.attended(f"atten_depth_{i}.1", d)
            for i, (r, d) in enumerate(levels)
        ]
        found, x = added[:1], F.max_pool2d(added[0], 3, 2, 1)
        for number, depth_of in enumerate(DEPTHS, 1):
            x = self.stage(f"layer{number}_m", x, depth_of, 1 if number == 1 else 2) + added[number]
            found.append(x)
        return found

    def __call__(self, rgb: Tensor, depth: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and side outputs."""
        merged = self.merged(rgb, depth)
        agents = [
            self.norm(f"agant{i}.1", self.conv(f"agant{i}.0", m)).clamp_min(0) for i, m in enumerate(merged)
        ]
        x, sides = agents[4], []
        for number, blocks in enumerate(UP, 1):
            for i in range(blocks):
                x = self.residual(f"deconv{number}.{i}", x)
            agent = agents[4 - number]
            x = x[:, :, : agent.shape[2], : agent.shape[3]]
            sides.append(self.conv(f"out{6 - number}_conv", x))
            x = x + agent
        for i in range(3):
            x = self.residual(f"final_conv.{i}", x)
        return self.transposed("final_deconv", x)[:, :, : rgb.shape[2], : rgb.shape[3]], sides


Narrow = Callable[..., acnet.ACNet]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Narrow:
    """Makes networks of few channels in float64."""
    make_narrow(monkeypatch)
    monkeypatch.setattr(acnet, "AGENTS", FEW_AGENTS)
    return lambda channels=(3, 1): make_system("acnet", CLASSES, channels).double()


def images(height: int = 33, width: int = 49, batch: int = 2) -> list[Tensor]:
    rgb, depth = torch.randn(2, batch, 3, height, width, dtype=torch.float64)
    return [rgb, depth[:, :1].expand_as(rgb)]


@pytest.mark.parametrize(("classes", "count"), [(40, 116_628_168), (37, 116_625_849)])
def test_parameters_are_the_published(classes: int, count: int) -> None:
    with torch.device("meta"):
        net = make_system("acnet", classes, (3, 1))
    assert count_parameters(net) == count
    sides = [
        p.numel() for name, p in net.named_parameters() if name.startswith("decoder") and "class" in name
    ]
    assert sum(sides) == 512 * classes + 4 * classes


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (33, 33), (37, 53)])
def test_it_is_the_formulas(narrow: Narrow, training: bool, size: tuple[int, int]) -> None:
    """With the public checkpoint's entries, translated."""
    state = made_up(released_shapes(NARROW, FEW_AGENTS, CLASSES))
    net = narrow().train(training)
    net.load_state_dict(net.from_released(state))
    rgb, depth = images(*size)
    expected, sides = Formulas(state, training)(rgb, depth[:, :1])
    out = net([rgb, depth])
    torch.testing.assert_close(out.branches[0], expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(out.ensemble, out.branches[0])
    found = [side[0] for side in out.auxiliary]
    torch.testing.assert_close(found, sides if training else [], rtol=1e-9, atol=1e-9)


def test_rgb_and_depth_go_on_unfused(narrow: Narrow) -> None:
    net = narrow().eval()
    rgb, depth = images()
    for part in net.encoder.merged.parameters():
        torch.nn.init.zeros_(part)
    with torch.no_grad():
        features = net.merge([rgb, depth[:, :1]])
        streams = [net.encoder.rgb(rgb), net.encoder.depth(depth[:, :1])]
        for i, (r, d) in enumerate(zip(*streams, strict=True), 1):
            torch.testing.assert_close(features[i], net.attention[i](r, d))


def test_outputs_of_nyudv2s_size() -> None:
    with torch.device("meta"):
        net = make_system("acnet", 40, (3, 1))
        x = torch.empty(2, 3, 480, 640)
    assert net.eval()(x).branches.shape == (1, 1, 40, 480, 640)
    out = net.train()(x)
    assert isinstance(out, AuxiliaryOutput)
    sizes = [(30, 40), (60, 80), (120, 160), (240, 320)]
    assert [side.shape for side in out.auxiliary] == [(1, 1, 40, *size) for size in sizes]
    assert net.num_sides == len(out.auxiliary)


def test_gradients_reach_every_parameter(narrow: Narrow) -> None:
    net = narrow().train()
    out = net(images())
    sum(logits.square().mean() for logits in (out.branches, *out.auxiliary)).backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == ["alpha"]  # of a single branch


@pytest.mark.parametrize("channels", [(3, 1), (3, 3)])
def test_imagenet_weights_go_into_all_streams(
    narrow: Narrow, tmp_path: Path, channels: tuple[int, int]
) -> None:
    state = made_up({**resnet_shapes(NARROW), "fc.weight": (1000, 40), "fc.bias": (1000,)})
    torch.save(state, tmp_path / "resnet50.pth")
    net = narrow(channels)
    scale = (1.0, 2.0, 4.0)
    assert load_imagenet(net.encoder, tmp_path / "resnet50.pth", bgr=True, scale=scale) == ([], [])
    own = net.encoder.state_dict()
    stem = state["conv1.weight"].flip(1) * torch.tensor(scale, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(own.pop("rgb.conv1.weight"), stem)
    expected = stem.mean(1, keepdim=True) if channels[1] == 1 else stem
    torch.testing.assert_close(own.pop("depth.conv1.weight"), expected)
    assert {key.split(".")[0] for key in own} == {"rgb", "depth", "merged"}
    for key, value in own.items():
        assert torch.equal(value.flatten(), state[key.split(".", 1)[1]].flatten()), key
    assert not any(key.startswith(("merged.conv1", "merged.bn1")) for key in own)


def test_the_public_checkpoints_shapes() -> None:
    """Old ones have no batch counters."""
    shapes = released_shapes()
    with torch.device("meta"):
        net = make_system("acnet", 40, (3, 1))
        state = {
            name: torch.empty(s) for name, s in shapes.items() if not name.endswith("num_batches_tracked")
        }
    translated = net.from_released(state)
    assert translated.keys() == net.state_dict().keys()
    assert translated["encoder.merged.layer1.0.conv1.weight"] is state["layer1_m.0.conv1.weight"]
    assert translated["decoder.0.blocks.5.downsample.0.weight"] is state["deconv1.5.upsample.0.weight"]
    del state["agant0.0.weight"]
    state["more"] = torch.empty(1)
    with pytest.raises(ValueError, match=r"network=acnet: missing: agant0\.0\.weight; left over: more"):
        net.from_released(state)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"channels": (3,)}, "network=acnet takes 2 modalities, got 1"),
        ({"channels": (3, 3, 3)}, "takes 2 modalities, got 3"),
        ({"channels": (3, 2)}, "channels of a modality must be 1 or 3, got 2"),
        ({"encoder": "resnet101"}, "encoder must be resnet50 with network=acnet, got 'resnet101'"),
    ],
)
def test_refusals(options: dict[str, object], named: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=named):
        make_system("acnet", CLASSES, **{"channels": (3, 1), **options})
