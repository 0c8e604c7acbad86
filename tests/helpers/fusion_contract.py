"""The contract of a fusion as a test that a new one inherits."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import models
from models.networks.fusion import Fusion
from models.networks.fusion.base import FUSIONS
from models.training import config, registry


def check_fusion(fusion: Fusion, num_modalities: int = 2) -> None:
    """Build networks with the fusion and hold them, and its options, to the contract."""
    name = FUSIONS.name_of(fusion)
    assert isinstance(FUSIONS[name](), type(fusion))  # every option has a default
    assert all(field.metadata.get("help") for field in dataclasses.fields(fusion))
    recipe = dataclasses.replace(registry.find("synthetic_demo"), fusion=fusion)
    assert config.from_plain(recipe, config.to_plain(recipe)) == recipe
    chosen = config.override(registry.find("synthetic_demo"), [f"fusion={name}"]).fusion
    assert type(chosen) is type(fusion)

    encoder = "resnet50" if fusion.uses_lateral else "resnet18"
    branches = fusion.branches(num_modalities)
    assert branches in (1, num_modalities)
    for build in (models.refinenet, models.pspnet):
        torch.manual_seed(0)
        options = {"width": 8, "dropout": 0.0, "frozen_statistics": False}
        if build is models.pspnet and not serves_pspnet(fusion):
            with pytest.raises(ValueError, match="no effect"):
                build(encoder, 5, num_modalities, fusion=fusion, **options)
            continue
        net = build(encoder, 5, num_modalities, fusion=fusion, **options).train()
        x = torch.randn(2 * num_modalities, 3, 33, 49)
        out = net(x)
        assert out.branches.shape[:3] == (branches, 2, 5)
        assert out.ensemble.shape == out.branches.shape[1:]
        assert (out.alpha is None) == (net.head is not None)
        assert fusion.penalty_on_scales(net).shape == ()
        loss = fusion.loss(net)
        assert loss is None or loss.shape == ()
        outputs = [out.branches, out.ensemble, *out.auxiliary]
        total = sum(each.square().sum() for each in outputs) + (0 if loss is None else loss)
        total.backward()
        unused = {key for key, p in net.named_parameters() if p.grad is None}
        assert not unused - {"alpha"}
        copied = copy.deepcopy(net)  # also between a forward pass and the next
        assert fusion.loss(copied) is None
        twin = build(encoder, 5, num_modalities, fusion=fusion, **options)
        twin.load_state_dict(net.state_dict())
        assert torch.equal(twin.eval()(x).branches, net.eval()(x).branches)


def serves_pspnet(fusion: Fusion) -> bool:
    """Whether the fusion says that it can do with a decoder that reads the last two features."""
    try:
        fusion.check_read((3, 4))
    except ValueError:
        return False
    return True
