"""The translation networks written a second time, the usual way: the same values and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import models
from bench.baselines.exchange import split_state, stacked_state
from bench.baselines.translation import EagerPatchGAN, EagerUNet
from models.translation import discriminate
from tests.helpers.networks import randomise_norms

CASES = [
    # modalities, region, threshold, the decoder's norms, training
    (2, "own", 0.01, "shared", True),
    (2, "all", 0.01, "private", True),
    (3, "own", 0.01, "private", False),
    (3, "all", 0.01, "shared", False),
    (3, "own", 0.0, "shared", True),
    (1, "own", 0.01, "private", True),
]


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    # A bias before a norm of each image's own statistics has no gradient but rounding.
    scale = max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * scale, msg=lambda m: f"{what}: {m}")


def assert_same_gradients(found: nn.Module, expected: nn.Module) -> None:
    gradients = stacked_state({name: p.grad for name, p in expected.named_parameters()})
    assert {name for name, _ in found.named_parameters()} == gradients.keys()
    for name, parameter in found.named_parameters():
        assert_close(parameter.grad, gradients[name].view_as(parameter), f"gradient of {name}")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("num_modalities", "region", "threshold", "decoder_norms", "training"), CASES)
def test_unet(num_modalities: int, region: str, threshold: float, decoder_norms: str, training: bool) -> None:
    options = {"size": 32, "base_width": 6, "dropout": 0.0, "region": region, "threshold": threshold}
    net = models.unet(num_modalities=num_modalities, decoder_norms=decoder_norms, **options).double()
    randomise_norms(net)
    nn.init.normal_(net.alpha)
    usual = EagerUNet(num_modalities, decoder_norms=decoder_norms, **options).double()
    usual.load_state_dict(split_state(net.state_dict(), usual))
    net.train(training)
    usual.train(training)
    xs = [randn(2, 3, 32, 64) for _ in range(num_modalities)]
    dys = [randn(2, 3, 32, 64) for _ in range(num_modalities + 1)]

    out = net(xs)
    branches, ensemble = usual(xs)
    for m in range(num_modalities):
        assert_close(out.branches[m], branches[m], f"branch {m}")
    assert_close(out.ensemble, ensemble, "ensemble")

    sum((y * dy).sum() for y, dy in zip([*out.branches, out.ensemble], dys, strict=True)).backward()
    sum((y * dy).sum() for y, dy in zip([*branches, ensemble], dys, strict=True)).backward()
    assert_same_gradients(net, usual)
    buffers = stacked_state(dict(usual.named_buffers()))
    for name, buffer in net.named_buffers():
        # There a norm that all modalities share runs M times, and its statistics follow each call; the
        # counter of torch's instance norm stays 0.
        alike = decoder_norms == "private" or name.startswith("encoder.")
        if alike and not name.endswith("num_batches_tracked"):
            assert_close(buffer, buffers[name], name)


def test_patchgan() -> None:
    net = models.patchgan(base_width=6).double()
    randomise_norms(net)
    usual = EagerPatchGAN(base_width=6).double()
    usual.load_state_dict(split_state(net.state_dict(), usual))
    inputs, images = [randn(2, 3, 40, 32) for _ in range(3)], [randn(2, 3, 40, 32) for _ in range(3)]
    (found,) = discriminate(net, torch.cat(inputs), torch.stack(images))
    expected = torch.stack(usual(inputs, images))
    assert_close(found, expected, "decisions")
    dy = randn(*expected.shape)
    (found * dy).sum().backward()
    (expected * dy).sum().backward()
    assert_same_gradients(net, usual)
