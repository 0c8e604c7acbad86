"""The U-Net: sizes, the ensemble, exchange and its gradients, dropout, modes, compilation, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import models
from cen_ext import exchanging_layers, sparsity_penalty
from tests.helpers.networks import randomise_norms


def small_net(num_modalities: int = 2, **options: object) -> models.UNet:
    """In float64, 32 x 32, without dropout; the scales above the threshold but for a share of them."""
    options = {"size": 32, "base_width": 4, "dropout": 0.0, **options}
    net = models.unet(3, 3, num_modalities, **options).double()
    randomise_norms(net)
    nn.init.normal_(net.alpha)
    return net


def images(num_modalities: int = 2, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(num_modalities * 2, 3, *size, dtype=torch.float64)


def convolutions(widths: list[int]) -> int:
    """Parameters of the 4x4 convolutions with bias, from 3 channels to 3 by these widths and back."""
    down = zip([3, *widths[:-1]], widths, strict=True)
    up = zip([widths[-1], *(2 * w for w in reversed(widths[:-1]))], [*reversed(widths[:-1]), 3], strict=True)
    return sum(16 * a * b + b for a, b in [*down, *up])


@pytest.mark.parametrize("size", [128, 256, 512])
@pytest.mark.parametrize("decoder_norms", ["shared", "private"])
@pytest.mark.parametrize("num_modalities", [1, 2, 3, 4])
def test_number_of_parameters(num_modalities: int, decoder_norms: str, size: int) -> None:
    with torch.device("meta"):
        net = models.unet(3, 3, num_modalities, size=size, decoder_norms=decoder_norms)
    widths = [64, 128, 256, 512, 512, 512, 512, 512, 512][: {128: 7, 256: 8, 512: 9}[size]]
    encoder_norms = 2 * num_modalities * sum(widths[1:-1])
    decoder_norms = 2 * (num_modalities if decoder_norms == "private" else 1) * sum(widths[:-1])
    expected = convolutions(widths) + encoder_norms + decoder_norms + num_modalities
    assert sum(p.numel() for p in net.parameters()) == expected


def test_pix2pixs_generator_has_54_million_parameters() -> None:
    with torch.device("meta"):
        net = models.unet(num_modalities=1)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(54.41e6, rel=1e-3)


def test_weights_start_as_pix2pixs() -> None:
    net = models.unet(size=64, base_width=16)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
    scales = torch.cat([layer.weight.flatten() for layer in exchanging_layers(net).values()])
    assert scales.mean().item() == pytest.approx(1, abs=0.005)
    assert scales.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(p.abs().max() == 0 for name, p in net.named_parameters() if name.endswith(("bias", "alpha")))


@pytest.mark.parametrize("num_modalities", [1, 2, 3, 4])
def test_ensemble_is_the_weighted_sum_of_branches(num_modalities: int) -> None:
    net = small_net(num_modalities)
    x = images(num_modalities, (32, 64))
    with torch.no_grad():
        out = net(x)
        from_list = net(list(x.unflatten(0, (num_modalities, 2))))
    assert out.branches.shape == (num_modalities, 2, 3, 32, 64)
    weights = torch.exp(net.alpha) / torch.exp(net.alpha).sum()
    torch.testing.assert_close(out.alpha, weights.detach())
    assert net.branch_weights() == pytest.approx(weights.tolist())
    expected = sum(w * branch for w, branch in zip(weights, out.branches, strict=True))
    torch.testing.assert_close(out.ensemble, expected.detach())
    assert out.branches.abs().max() < 1
    for found, same in zip(from_list, out, strict=True):
        assert torch.equal(found, same)


def test_the_ensembles_loss_trains_alpha_alone() -> None:
    net = small_net()
    net(images()).ensemble.square().sum().backward()
    assert net.alpha.grad.abs().min() > 0
    assert all(p.grad is None for name, p in net.named_parameters() if name != "alpha")


@pytest.mark.parametrize("num_modalities", [2, 3])
def test_branches_train_all_but_alpha_and_replaced_channels(num_modalities: int) -> None:
    net = small_net(num_modalities)
    (net(images(num_modalities)).branches - 1).square().sum().backward()
    assert net.alpha.grad is None
    assert all(p.grad.abs().max() > 0 for name, p in net.named_parameters() if name != "alpha")
    for name, layer in exchanging_layers(net).items():
        replaced = layer.replaced()
        assert replaced.any(), name
        # With region="own" nobody borrows a channel that is itself replaced.
        assert layer.weight.grad[replaced].abs().max() == 0, name
        assert layer.weight.grad[~replaced].abs().min() > 0, name


def test_the_encoders_inner_levels_exchange() -> None:
    net = models.unet(size=64, base_width=4)
    assert list(exchanging_layers(net)) == [f"encoder.levels.{i}.norm" for i in range(1, 5)]
    expected = sum(
        layer.weight[m, m * c // 2 : (m + 1) * c // 2].abs().sum()
        for layer in exchanging_layers(net).values()
        for c in [layer.num_features]
        for m in (0, 1)
    )
    torch.testing.assert_close(sparsity_penalty(net), expected)


def test_without_exchange_modalities_do_not_mix() -> None:
    """A branch depends on the other modality through exchanged channels only."""
    x = images()
    changed = x.clone()
    changed[2:] += torch.randn_like(changed[2:])
    for threshold in (0.0, 0.01):
        net = small_net(threshold=threshold)
        with torch.no_grad():
            same = torch.equal(net(x).branches[0], net(changed).branches[0])
        assert same is (threshold == 0)


def test_in_training_every_image_has_its_own_statistics() -> None:
    net, x = small_net(), images()
    with torch.no_grad():
        both = net(x).branches
        alone = net(x[[0, 2]]).branches  # the first image of either modality
        torch.testing.assert_close(both[:, :1], alone)
        assert not torch.allclose(net.eval()(x).branches, both)


def test_running_statistics_follow_training_and_stay_in_eval() -> None:
    net, x = small_net(), images()
    norms = [module for name, module in net.named_modules() if name.endswith(".norm")]
    for training in (False, True):
        before = [norm.running_var.clone() for norm in norms]
        net.train(training)(x)
        moved = [not torch.equal(norm.running_var, old) for norm, old in zip(norms, before, strict=True)]
        assert moved == [training] * 7  # three in the encoder, four in the decoder


def test_dropout_acts_in_training_in_three_levels() -> None:
    net, x = small_net(dropout=0.5), images()
    assert [level.dropout.p for level in net.decoder.levels] == [0.5, 0.5, 0.5, 0.0]
    with torch.no_grad():
        assert not torch.equal(net(x).branches, net(x).branches)
        net.eval()
        assert torch.equal(net(x).branches, net(x).branches)


def test_decoder_norms_shared_and_private_agree_where_their_weights_do() -> None:
    shared, private = small_net(), small_net(decoder_norms="private")
    private.load_state_dict({k: v[0] if v.shape[:1] == (1,) else v for k, v in shared.state_dict().items()})
    x = images()
    for training in (False, True):  # in training the running statistics part
        with torch.no_grad():
            expected = shared.train(training)(x).branches
            torch.testing.assert_close(private.train(training)(x).branches, expected)
    assert shared.decoder.levels[0].norm.weight.shape == (1, 32)
    assert private.decoder.levels[0].norm.weight.shape == (2, 32)


def test_autocast_is_close_to_float32() -> None:
    net = small_net().float()
    x = images().float()
    with torch.no_grad():
        expected = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = net(x)
    assert (found.branches - expected.branches).abs().mean() < 0.03
    assert (found.ensemble - expected.ensemble).abs().mean() < 0.03


def test_channels_last_gives_the_same() -> None:
    net, x = small_net(), images()
    with torch.no_grad():
        expected = net(x).branches
        net.to(memory_format=torch.channels_last)
        torch.testing.assert_close(net(x.to(memory_format=torch.channels_last)).branches, expected)


def test_compiles_without_a_break() -> None:
    torch.compiler.reset()
    net, x = small_net(size=16), images(size=(16, 16))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)

    def step(call: nn.Module) -> list[Tensor]:
        net.zero_grad()
        out = call(x)
        (out.branches.square().sum() + out.ensemble.square().sum()).backward()
        return [out.branches.detach(), out.ensemble.detach(), *(p.grad for p in net.parameters())]

    for found, expected in zip(step(compiled), step(net), strict=True):
        torch.testing.assert_close(found, expected)


def test_bad_arguments_are_refused() -> None:
    for name in ("in_channels", "out_channels", "base_width", "num_modalities"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            models.unet(**{name: 0})
    for size in (0, 4, 100, -256):
        with pytest.raises(ValueError, match=f"size must be a power of two from 8 on, got {size}"):
            models.unet(size=size)
    with pytest.raises(ValueError, match="decoder_norms must be 'shared' or 'private', got 'own'"):
        models.unet(decoder_norms="own")
    with pytest.raises(ValueError, match="threshold must not be negative"):
        models.unet(base_width=1, threshold=-1.0)
    with pytest.raises(ValueError, match="region must be one of 'own', 'all', got 'half'"):
        models.unet(base_width=1, region="half")


def test_bad_input_is_refused() -> None:
    net = small_net()
    expected = "a height and a width divisible by 32, since each of 5 levels halves them, got"
    for size in ((32, 48), (40, 32)):
        with pytest.raises(ValueError, match=f"{expected} {size[0]} x {size[1]}"):
            net(images(size=size))
    with pytest.raises(ValueError, match="has 2 modalities, but x is a list of 1"):
        net([torch.zeros(1, 3, 32, 32)])
    with pytest.raises(ValueError, match="3 rows on its batch axis, not divisible by 2 modalities"):
        net(torch.zeros(3, 3, 32, 32))
    with pytest.raises(ValueError, match=r"x must be \[M\*N, 3, H, W\], got \(2, 1, 32, 32\)"):
        net(torch.zeros(2, 1, 32, 32))
