"""What every system has to do."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cen_ext import present
from models.networks.outputs import AuxiliaryOutput, SegmentationOutput
from models.networks.systems import make_system

SIZES = ((33, 33), (37, 53), (48, 64))


def check_system(name: str, channels: Sequence[int] = (3, 1), num_classes: int = 5, **options: Any) -> None:
    """Build a system and check sizes, outputs, gradients, copies, what it refuses, and its state dict.

    Args:
        name: by which it is registered.
        channels: of its modalities.
        options: further arguments of its constructor.
    """
    count = len(channels)
    net = make_system(name, num_classes, channels, **options).train()
    x = torch.randn(count * 2, 3, 37, 53)
    out = net(x)
    assert isinstance(out, AuxiliaryOutput if net.sides else SegmentationOutput)
    assert len(out.auxiliary) == net.num_sides == net.sides
    assert all(side.shape[:3] == (1, 2, num_classes) for side in out.auxiliary)
    sum(each.square().sum() for each in (out.branches, out.ensemble, *out.auxiliary)).backward()
    assert not {key for key, parameter in net.named_parameters() if parameter.grad is None} - {"alpha"}
    assert any(key.startswith("encoder.") for key in net.state_dict())
    net.eval()
    with torch.no_grad():
        for size in SIZES:
            out = net(torch.randn(count, 3, *size))
            assert isinstance(out, SegmentationOutput)
            assert out.branches.shape[:3] == (1, 1, num_classes)
            torch.testing.assert_close(out.ensemble, out.branches[0])
            assert min(out.ensemble.shape[2:]) >= 1
        expected = net(x).branches
        torch.testing.assert_close(net(list(x.chunk(count))).branches, expected)
        assert torch.equal(copy.deepcopy(net)(x).branches, expected)
        twin = make_system(name, num_classes, channels, **options).eval()
        twin.load_state_dict(net.state_dict())
        assert torch.equal(twin(x).branches, expected)
        # Of a modality with one channel the others are not read.
        for m, used in enumerate(channels):
            changed = x.clone()
            changed.unflatten(0, (count, 2))[m, :, used:] = torch.nan
            assert torch.equal(net(changed).branches, expected)
    if count > 1:
        with pytest.raises(ValueError, match=f"network={name} joins all modalities"), present(net, [0]):
            pass
    with pytest.raises(ValueError, match=r"channels of a modality must be 1 or 3, got 2"):
        make_system(name, num_classes, (*channels[:-1], 2), **options)
