"""The discriminator: sizes, the patch that a decision sees, its own pass for every image, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import models
from models.translation import discriminate
from tests.helpers.networks import randomise_norms

M, N = 3, 2


def small_net() -> models.PatchGAN:
    net = models.patchgan(base_width=4).double()
    randomise_norms(net)
    return net


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_number_of_parameters() -> None:
    with torch.device("meta"):
        net = models.patchgan(in_channels=4)
    convs = [(4, 64), (64, 128), (128, 256), (256, 512), (512, 1)]
    expected = sum(16 * a * b + b for a, b in convs) + 2 * (128 + 256 + 512)
    assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize(
    ("size", "patches"), [((256, 256), (30, 30)), ((24, 47), (1, 3)), ((128, 64), (14, 6))]
)
def test_size_of_decisions(size: tuple[int, int], patches: tuple[int, int]) -> None:
    assert small_net()(randn(2, 6, *size)).shape == (2, 1, *patches)


def test_a_decision_sees_a_patch_of_70() -> None:
    net = small_net().eval()  # running statistics: no pixel is seen through those of the image
    x = randn(1, 6, 128, 128).requires_grad_()
    net(x)[0, 0, 7, 7].backward()
    seen = x.grad.abs().sum((0, 1))
    rows, columns = (seen.sum(axis).nonzero().flatten() for axis in (1, 0))
    assert [int(line[-1] - line[0]) + 1 for line in (rows, columns)] == [70, 70]


def test_weights_start_as_pix2pixs() -> None:
    net = models.patchgan()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert module.bias.abs().max() == 0


def test_judge_is_a_call_for_every_image_beside_its_input() -> None:
    net = small_net()
    inputs, branches, target = randn(M * N, 3, 32, 40), randn(M, N, 3, 32, 40), randn(N, 3, 32, 40)
    real, fake = discriminate(net, inputs, target, branches)
    assert real.shape == fake.shape == (M, N, 1, 2, 3)
    for m in range(M):
        for n in range(N):
            own = inputs[m * N + n]
            for found, image in ((real, target[n]), (fake, branches[m, n])):
                torch.testing.assert_close(found[m, n], net(torch.cat([own, image])[None])[0])
    (alone,) = discriminate(net, inputs, branches)
    torch.testing.assert_close(alone, fake)


def test_detached_images_train_the_discriminator_alone() -> None:
    net, inputs = small_net(), randn(M * N, 3, 32, 32)
    branches = randn(M, N, 3, 32, 32).requires_grad_()
    (decisions,) = discriminate(net, inputs, branches.detach())
    decisions.sum().backward()
    assert branches.grad is None
    assert all(p.grad is not None for p in net.parameters())
    discriminate(net, inputs, branches)[0].sum().backward()
    assert branches.grad.abs().flatten(2).amax(2).min() > 0


def test_bad_arguments_and_input_are_refused() -> None:
    for name in ("in_channels", "base_width"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            models.patchgan(**{name: 0})
    net = small_net()
    with pytest.raises(ValueError, match=r"x must be \[rows, 6, H, W\], got \(1, 3, 32, 32\)"):
        net(randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="at least 24 x 24 pixels, got 23 x 32"):
        net(randn(1, 6, 23, 32))
    inputs = randn(M * N, 3, 32, 32)
    for shape in ((4, 3, 32, 32), (M, 1, 3, 32, 32), (3, 32, 32), (0, 3, 32, 32)):
        with pytest.raises(
            ValueError, match=r"a candidate must be .* the inputs' 6 rows, got \(" + str(shape[0])
        ):
            discriminate(net, inputs, randn(*shape))
