"""Released U-Nets and PatchGANs load and give the released code's numbers (tests/golden/README.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models
from models.networks.released.translation import released_names, unused_names
from models.translation import discriminate, generator_loss
from tests.helpers import paths
from tests.helpers.golden_numbers import assert_matches, draw, released_form
from tests.helpers.networks import only_backend

GOLDEN = json.loads((paths.GOLDEN / "unet.json").read_text())
DOMAINS = ("shade", "texture")
MODES = ("eval", "train")
SIZE = [1, 3, 256, 256]


def generator(**options: object) -> models.UNet:
    return models.unet(**{"base_width": 16, "region": "all", "decoder_norms": "private", **options})


def networks() -> dict[str, nn.Module]:
    return {"generator": generator(dropout=0.0), "discriminator": models.patchgan(base_width=16)}


def released_shapes(net: nn.Module) -> dict[str, list[int]]:
    state = released_form(released_names(net), net.state_dict())
    return {name: list(value.shape) for name, value in state.items()}


def released_state(net: nn.Module) -> dict[str, Tensor]:
    """A checkpoint by the rules of the golden numbers, with entries of the norms that are never run."""
    state = {name: draw(name, shape) for name, shape in released_shapes(net).items()}
    return state | {name: torch.zeros(5) for name in unused_names(net)}


class Run(NamedTuple):
    """The outputs of one backend with the golden weights; by mode and, in the middle, by dtype."""

    outputs: dict[tuple[str, torch.dtype], dict[str, Tensor]]
    decisions: dict[tuple[str, torch.dtype], dict[str, Tensor]]
    loss: dict[str, float]
    gradients: dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module", params=["reference", "cpu"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """The networks on one backend; all comparisons share it."""
    with only_backend(request.param):
        yield golden_run()


def golden_run() -> Run:
    nets = {name: models.load_released(net, released_state(net)) for name, net in networks().items()}
    run = Run({}, {}, {}, {})
    inputs = torch.cat([draw(f"input:{name}", SIZE) for name in DOMAINS])
    target = draw("input:real", SIZE).double().tanh()
    for mode in MODES:
        for dtype in (torch.float32, torch.float64):
            net, discriminator = (net.to(dtype).train(mode == "train") for net in nets.values())
            out = net(inputs.to(dtype))
            (decisions,) = discriminate(discriminator, inputs.to(dtype), out.branches)
            images = [image[..., ::4, ::4].detach() for image in (*out.branches, out.ensemble)]
            run.outputs[mode, dtype] = dict(zip((*DOMAINS, "ensemble"), images, strict=True))
            run.decisions[mode, dtype] = dict(zip(DOMAINS, decisions.sigmoid().detach(), strict=True))
        net.zero_grad()
        total = generator_loss(out, decisions, target, torch.zeros(())).total
        total.backward()
        run.loss[mode] = total.item()
        gradients = {key: parameter.grad for key, parameter in net.named_parameters()}
        run.gradients[mode] = released_form(released_names(net), gradients)
    return run


@pytest.mark.parametrize("mode", MODES)
def test_outputs_and_decisions(run: Run, mode: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 2e-7)):
        for what in ("outputs", "decisions"):
            for name, found in getattr(run, what)[mode, dtype].items():
                # The golden numbers are float64 rounded to float32: round ours too.
                assert_matches(found.float(), GOLDEN[what][mode][name], tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_outputs_element_by_element(run: Run, mode: str, shared: Path) -> None:
    golden = np.load(shared / "golden" / "unet.npz")
    for prefix, found in (("", run.outputs), ("decision_", run.decisions)):
        for name in found[mode, torch.float64]:
            expected = torch.from_numpy(golden[f"{mode}_{prefix}{name}"])
            single, double = (found[mode, dtype][name] for dtype in (torch.float32, torch.float64))
            assert (single - expected).abs().max() <= 1e-5 * expected.abs().max()
            one_ulp = 2.0**-23
            torch.testing.assert_close(double.float(), expected, rtol=one_ulp, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradients(run: Run, mode: str) -> None:
    assert run.loss[mode] == pytest.approx(GOLDEN["loss"][mode], rel=1e-10)
    for name, golden in GOLDEN["grads"][mode].items():
        assert_matches(run.gradients[mode][name], golden, 1e-6)


@pytest.mark.parametrize("which", ["generator", "discriminator"])
def test_names_shapes_and_number_of_parameters(which: str) -> None:
    net = networks()[which]
    lines = sorted(f"{key} {shape}" for key, shape in released_shapes(net).items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == GOLDEN["shapes_sha256"][which]
    assert sum(parameter.numel() for parameter in net.parameters()) == GOLDEN["parameters"][which]


@pytest.mark.parametrize("which", ["generator", "discriminator"])
def test_names_against_the_listed_ones(which: str, shared: Path) -> None:
    listed = json.loads((shared / "golden" / "unet.json").read_text())["shapes"][which]
    net = networks()[which]
    unused = unused_names(net)
    assert unused <= listed.keys()
    assert released_shapes(net) == {key: shape for key, shape in listed.items() if key not in unused}


@pytest.mark.parametrize("num_modalities", [1, 3])
@pytest.mark.parametrize("size", [16, 32])
def test_other_sizes_and_numbers_of_modalities(num_modalities: int, size: int) -> None:
    options = {"num_modalities": num_modalities, "size": size, "base_width": 3}
    net, other = generator(**options), generator(**options)
    nn.init.normal_(net.alpha)
    state = released_form(released_names(net), net.state_dict())
    models.load_released(other, {f"module.{key}": value for key, value in state.items()})
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_what_does_not_fit_is_named() -> None:
    net = generator(size=16, base_width=3)
    state = released_form(released_names(net), net.state_dict())
    with pytest.raises(ValueError, match=r"a UNet of decoder_norms='private', got .*'shared'"):
        models.load_released(generator(size=16, base_width=3, decoder_norms="shared"), state)
    with pytest.raises(ValueError, match=r"3-modality network: missing: conv2\.insnorm_conv\.insnorm_2"):
        models.load_released(generator(size=16, base_width=3, num_modalities=3), state)
    with pytest.raises(ValueError, match=r"left over: conv5\.conv\.module\.weight"):
        models.load_released(net, state | {"conv5.conv.module.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"alpha \(3,\) \(expected \(2,\)\)"):
        models.load_released(net, state | {"alpha": torch.zeros(3)})
    with pytest.raises(ValueError, match="net must be a RefineNet, a SegFormer, a UNet or a PatchGAN, got"):
        models.load_released(nn.Linear(1, 1), state)
