"""Whether a network keeps its modalities apart, found by running it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from cen_ext.convert.probing import same
from cen_ext.functional import stack_modalities, unstack_modalities
from cen_ext.tables import PrivateTables


def check_example(module: nn.Module, num_modalities: int, order: str, example: Any) -> None:
    """Raise ValueError if, without exchange, a modality's results depend on others' rows or private norms.

    Args:
        module: a network of M modalities; copies of it are run.
        order: of its rows.
        example: an input of one modality, ``[N, ...]``, or a tuple of arguments.
    """
    arguments = example if isinstance(example, tuple) else (example,)
    for training in (True, False):
        for modality in {0, num_modalities - 1}:
            alone, among_others = (
                _results_of(module, num_modalities, order, modality, arguments, training, changed)
                for changed in (False, True)
            )
            if not alone.get(""):
                raise ValueError("example: the network returns no tensor with a row for each of its batch")
            if _all_same(alone[""], among_others[""]):
                continue
            name = next(name for name in alone if not _all_same(alone[name], among_others.get(name, [])))
            kind = type(module.get_submodule(name)).__name__
            mode = "training" if training else "eval"
            raise ValueError(
                f"example: in {mode} mode, what modality {modality} gets depends on the rows or norms of the "
                f"others, as is first seen in what {name!r} ({kind}) returns"
            )


def _results_of(
    module: nn.Module,
    num_modalities: int,
    order: str,
    modality: int,
    arguments: tuple[Any, ...],
    training: bool,
    changed: bool,
) -> dict[str, list[Tensor]]:
    """A modality's share of what each module returns, in the order of their ends, the network's own last.

    Args:
        changed: give the other modalities noise, as rows and as private tables.
    """
    net = copy.deepcopy(module).train(training)
    others = [other for other in range(num_modalities) if other != modality]
    for layer in net.modules():
        if isinstance(layer, PrivateTables):
            _stop_exchange(layer)
            _change_tables(layer, others if changed else [])
    results: dict[str, list[Tensor]] = {}

    def record(name: str, output: Any) -> None:
        leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim() > 0)
        whole = (leaf for leaf in leaves if leaf.shape[0] and leaf.shape[0] % num_modalities == 0)
        own = [
            unstack_modalities(leaf.detach(), num_modalities, order=order)[modality].clone() for leaf in whole
        ]
        results.setdefault(name, []).extend(own)

    for name, layer in net.named_modules():
        layer.register_forward_hook(lambda _, inputs, output, name=name: record(name, output))
    rows = len(next(argument for argument in tree_leaves(arguments) if isinstance(argument, Tensor)))

    def stacked(argument: Any) -> Any:
        if not isinstance(argument, Tensor) or argument.dim() == 0 or len(argument) != rows:
            return argument
        parts = [argument] * num_modalities
        for other in others if changed else ():
            parts[other] = _other_values(argument)
        return stack_modalities(parts, order=order)

    devices = {parameter.device for parameter in net.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(0)
        inputs = tree_map(stacked, arguments)
        torch.manual_seed(1)
        net(*inputs)
    return results


def _stop_exchange(layer: Any) -> None:
    if hasattr(layer, "threshold"):
        layer.threshold, layer.mask, layer.replaced_mask, layer.lender = 0.0, None, None, None


def _change_tables(layer: Any, modalities: list[int]) -> None:
    """Give modalities of a layer other scales, shifts and statistics."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (table := getattr(layer, name, None)) is not None:
            table.detach()[modalities] += 0.5


def _other_values(argument: Tensor) -> Tensor:
    if not argument.is_floating_point():
        return argument.flip(0)
    return torch.randn_like(argument) * (argument.std() + 1) + argument.mean()


def _all_same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(same, first, second))
