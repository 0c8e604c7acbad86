"""RefineNet: the paper's sizes, the ensemble, any number of modalities, dropout, refusals."""

from __future__ import annotations

import pytest
import torch

import models
from tests.helpers.networks import randomise_norms

# Wang et al. 2020, Tables 2 and 5: millions of parameters, 40 classes.
PARAMETERS = {
    ("resnet50", 1): 99.10,
    ("resnet101", 1): 118.10,
    ("resnet152", 1): 133.74,
    ("resnet50", 2): 99.16,
    ("resnet101", 2): 118.20,
    ("resnet152", 2): 133.89,
    ("resnet101", 3): 118.31,
    ("resnet101", 4): 118.41,
}


def small_net(num_modalities: int = 2, **options: object) -> models.RefineNet:
    net = models.refinenet("resnet18", 5, num_modalities, width=8, **options).double()
    randomise_norms(net)
    torch.nn.init.normal_(net.alpha)
    return net


def images(num_modalities: int = 2) -> torch.Tensor:
    return torch.randn(num_modalities * 2, 3, 49, 65, dtype=torch.float64)


@pytest.mark.parametrize(("encoder", "num_modalities"), PARAMETERS)
def test_parameter_counts_are_the_papers(encoder: str, num_modalities: int) -> None:
    with torch.device("meta"):
        net = models.refinenet(encoder, 40, num_modalities)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert round(millions, 2) == PARAMETERS[encoder, num_modalities]


@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_ensemble_is_the_weighted_sum_of_branches(num_modalities: int) -> None:
    net = small_net(num_modalities).eval()
    x = images(num_modalities)
    with torch.no_grad():
        out = net(x)
        from_list = net(list(x.unflatten(0, (num_modalities, 2))))
    assert out.branches.shape == (num_modalities, 2, 5, 13, 17)
    weights = torch.exp(net.alpha) / torch.exp(net.alpha).sum()
    torch.testing.assert_close(out.alpha, weights.detach())
    expected = sum(w * branch for w, branch in zip(weights, out.branches, strict=True))
    torch.testing.assert_close(out.ensemble, expected.detach())
    for found, same in zip(from_list, out, strict=True):
        assert torch.equal(found, same)


def test_alpha_starts_with_equal_weights() -> None:
    net = models.refinenet("resnet18", 5, 4, width=8)
    assert torch.equal(net.alpha, torch.zeros(4))


def test_the_ensembles_loss_trains_alpha_alone() -> None:
    net = small_net()
    out = net(images())
    out.ensemble.square().sum().backward()
    assert net.alpha.grad.abs().min() > 0
    assert all(p.grad is None for name, p in net.named_parameters() if name != "alpha")


def test_a_branchs_loss_trains_all_but_alpha() -> None:
    net = small_net()
    net(images()).branches[0].square().sum().backward()
    assert net.alpha.grad is None
    assert all(p.grad is not None for name, p in net.named_parameters() if name != "alpha")


def test_without_exchange_modalities_do_not_mix() -> None:
    """A branch depends on the other modality through exchanged channels only."""
    x = images()
    changed = x.clone()
    changed[2:] += 1
    for threshold in (0.0, 0.02):
        net = small_net(threshold=threshold).eval()
        with torch.no_grad():
            same = torch.equal(net(x).branches[0], net(changed).branches[0])
        assert same is (threshold == 0)


def test_dropout_acts_in_training_only() -> None:
    net = small_net(dropout=0.5)
    x = images()
    with torch.no_grad():
        net.train()
        assert not torch.equal(net(x).branches, net(x).branches)
        net.eval()
        first = net(x).branches
        assert torch.equal(first, net(x).branches)
        net.decoder.dropout.p = 0.0
        net.train()  # statistics are frozen, so that without dropout training computes what eval does
        assert torch.equal(first, net(x).branches)


def test_batch_statistics_on_request() -> None:
    net = small_net(frozen_statistics=False, dropout=0.0).train()
    before = net.encoder.bn1.running_mean.clone()
    net(images())
    assert not torch.equal(net.encoder.bn1.running_mean, before)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder must be one of .*; did you mean 'resnet50'\?"):
        models.refinenet("resnet-50")
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        models.refinenet("resnet18", 0)
    with pytest.raises(ValueError, match="width must be at least 1, got -1"):
        models.refinenet("resnet18", width=-1)
    with pytest.raises(ValueError, match="has 2 modalities, but x is a list of 1"):
        models.refinenet("resnet18", width=8)([torch.zeros(1, 3, 32, 32)])
