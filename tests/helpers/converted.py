"""Converted networks compared with copies of the original, and with an exchange made by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cen_ext import make_multimodal, stack_modalities, unstack_modalities
from cen_ext.modules import ExchangeNorm
from cen_ext.tables import PrivateTables
from tests.helpers import formulas

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
)


def with_history(net: nn.Module) -> nn.Module:
    """The network in float64 with norms that have some history and affines of every size."""
    for layer in net.double().modules():
        if isinstance(layer, NORMS):
            if layer.weight is not None:
                nn.init.uniform_(layer.weight, 0.01, 1.0)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1)
            if getattr(layer, "running_mean", None) is not None:
                nn.init.normal_(layer.running_mean, std=0.1)
                nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return net


def run(net: nn.Module, x: Tensor, dy: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the gradients of x and of the output; those of the parameters lie in the network."""
    x = x.clone().requires_grad_()
    y = net(x)
    dy = torch.randn_like(y) if dy is None else dy
    y.backward(dy)
    return y.detach(), x.grad, dy


def assert_equals_copies(net: nn.Module, parts: Sequence[Tensor]) -> None:
    """Without exchange, each modality gets the original's outputs, gradients and running statistics."""
    count = len(parts)
    ours = make_multimodal(net, count, threshold=0)
    theirs = [copy.deepcopy(net) for _ in parts]
    make_different(ours, theirs)
    y, dx, dy = run(ours, stack_modalities(parts))
    for m, single in enumerate(theirs):
        expected_y, expected_dx, _ = run(single, parts[m], unstack_modalities(dy, count)[m])
        torch.testing.assert_close(unstack_modalities(y, count)[m], expected_y)
        torch.testing.assert_close(unstack_modalities(dx, count)[m], expected_dx)

    states = [single.state_dict(keep_vars=True) for single in theirs]
    for key, value in ours.state_dict(keep_vars=True).items():
        # A norm without affine has none to compare with, and torch's instance norm does not count.
        if key not in states[0] or key.endswith("num_batches_tracked"):
            continue
        private = value.shape != states[0][key].shape
        each = torch.stack([state[key] for state in states])
        # Scales and shifts of all modalities are one-dimensional.
        torch.testing.assert_close(value, each.view_as(value) if private else each[0])
        if states[0][key].grad is None:
            assert value.grad is None
        else:
            each = torch.stack([state[key].grad for state in states])
            torch.testing.assert_close(value.grad, each.view_as(value) if private else each.sum(0))


def make_different(ours: nn.Module, theirs: Sequence[nn.Module]) -> None:
    """Give each modality's norms scales and shifts of their own, in its copy of the original, too."""
    with torch.no_grad():
        for path, layer in ours.named_modules():
            for name in ("weight", "bias") if isinstance(layer, PrivateTables) else ():
                tables = [getattr(single.get_submodule(path), name, None) for single in theirs]
                if tables[0] is not None:
                    for m, table in enumerate(tables):
                        table += 0.1 * torch.rand_like(table)
                        getattr(layer, name)[m] = table


def exchange_by_hand(net: nn.Module, ours: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The original with hooks that put ``formulas.forward`` in the place of each norm; their scales."""
    net = copy.deepcopy(net)
    private = dict(ours.named_modules(remove_duplicate=False))
    scales = {}

    def hook_for(layer: ExchangeNorm, weight: Tensor):
        def hook(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            mean, var = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
            frozen = not layer.training and mean is not None
            last = getattr(layer, "channel_dim", 1)
            y = formulas.forward(
                inputs[0].movedim(last, 1),
                weight,
                torch.zeros_like(weight) if layer.bias is None else layer.bias.detach(),
                mean if frozen else None,
                var if frozen else None,
                None,
                threshold=layer.threshold,
                region=layer.region,
                norm=layer.norm,
                num_groups=getattr(norm, "num_groups", 1),
                eps=norm.eps,
            )[0].movedim(1, last)
            return norm.act(norm.drop(y)) if hasattr(norm, "act") else y  # timm's ends in both

        return hook

    for name, norm in net.named_modules():
        if isinstance(norm, NORMS) and isinstance(private[name], ExchangeNorm):
            scales[name] = private[name].weight.detach().clone().requires_grad_()
            norm.register_forward_hook(hook_for(private[name], scales[name]))
    return net, scales


def assert_equals_exchange_by_hand(net: nn.Module, ours: nn.Module, x: Tensor) -> None:
    """Outputs and gradients are those of the original with an exchange made by hand."""
    by_hand, scales = exchange_by_hand(net, ours)
    y, dx, dy = run(ours, x)
    expected_y, expected_dx, _ = run(by_hand, x, dy)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(dx, expected_dx)
    for key, scale in scales.items():
        torch.testing.assert_close(ours.get_submodule(key).weight.grad, scale.grad)
    parameters = dict(ours.named_parameters())
    for key, parameter in by_hand.named_parameters():
        if parameter.grad is not None:  # those of the norms have none: the hooks put others in their place
            torch.testing.assert_close(parameters[key].grad, parameter.grad)
