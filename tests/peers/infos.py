"""torch's ModuleInfo of its norms, and those of the layers here with the same inputs."""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cen_ext import (
    ExchangeBatchNorm2d,
    ExchangeGroupNorm,
    ExchangeInstanceNorm2d,
    ExchangeLayerNorm,
    stack_modalities,
    unstack_modalities,
)
from cen_ext.modules import ExchangeNorm

KINDS: dict[type[nn.Module], type[ExchangeNorm]] = {
    nn.BatchNorm2d: ExchangeBatchNorm2d,
    nn.InstanceNorm2d: ExchangeInstanceNorm2d,
    nn.LayerNorm: ExchangeLayerNorm,
    nn.GroupNorm: ExchangeGroupNorm,
}
# torch's arguments that say how many channels there are, which come first here, too.
_SIZES = ("num_features", "normalized_shape", "num_groups", "num_channels")
# M, the threshold and the order of rows. The scales are below 2: there all channels of a share are replaced.
VARIANTS = {
    "one": (1, 0.0, "modality"),
    "three": (3, 0.0, "modality"),
    "exchanging": (3, 2.0, "modality"),
    "in sample order": (3, 2.0, "sample"),
}


@functools.cache
def common_modules() -> ModuleType:
    """torch's tables of modules to test, or the test is skipped."""
    pytest.importorskip("expecttest", reason="torch's own tests need expecttest")
    # Importing them forbids, for good, to set torch.backends.cudnn.deterministic and the like. The flag is no
    # attribute of torch.backends, which is no plain module.
    flags, name = torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag"
    allowed = flags[name]
    module = importlib.import_module("torch.testing._internal.common_modules")
    flags[name] = allowed
    assert not torch.backends.flags_frozen()
    return module


@dataclass(frozen=True)
class Case:
    """A module and an input from its ModuleInfo.

    Attributes:
        module_class, args, kwargs: what makes the module.
        x: what it is called with.
        training: in which mode.
        num_modalities: M; 1 for torch's.
        reference_fn: of the ModuleInput; None for torch's.
        description: for messages.
    """

    module_class: type[nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor
    training: bool
    num_modalities: int
    reference_fn: Any
    description: str

    def make(self, dtype: torch.dtype | None = torch.float64, **factory: Any) -> nn.Module:
        """A new module."""
        module = self.module_class(*self.args, **self.kwargs, dtype=dtype, **factory)
        return module.train(self.training)

    def input(self) -> Tensor:
        """A leaf of its own with the values of x."""
        return self.x.detach().clone().requires_grad_()


def torch_info(torch_class: type[nn.Module]) -> Any:
    """torch's ModuleInfo of one of its norms."""
    return next(info for info in common_modules().module_db if info.module_cls is torch_class)


def info_of(torch_class: type[nn.Module], variant: str) -> Any:
    """The ModuleInfo of the layer here: torch's inputs, once for each of the equal modalities."""
    theirs = torch_info(torch_class)

    def inputs(info: Any, **options: Any) -> list[Any]:
        singles = theirs.module_inputs_func(theirs, **options)
        return [_ours(torch_class, variant, single) for single in singles]

    return common_modules().ModuleInfo(
        KINDS[torch_class],
        module_inputs_func=inputs,
        train_and_eval_differ=theirs.train_and_eval_differ,
        dtypes=theirs.dtypes,
    )


def _ours(torch_class: type[nn.Module], variant: str, single: Any) -> Any:
    """A ModuleInput of the layer here from torch's, or None where the layer has no such argument or input."""
    num_modalities, threshold, order = VARIANTS[variant]
    made = single.constructor_input
    bound = inspect.signature(torch_class).bind(*made.args, **made.kwargs)
    bound.apply_defaults()
    options = dict(bound.arguments)
    affine = options.get("affine", options.get("elementwise_affine"))
    (x,) = single.forward_input.args
    # No layer here lacks a batch axis, channels, or the scales that a threshold is compared with.
    shape = options.get("normalized_shape", 1)
    several = not isinstance(shape, int) and len(shape) > 1
    batched = x.dim() == 4 if "num_features" in options else x.dim() > 1
    if several or not batched or (threshold > 0 and not affine):
        return None
    function_input = common_modules().FunctionInput
    for name in ("device", "dtype"):
        options.pop(name)
    sizes = [options.pop(name) for name in _SIZES if name in options]
    return common_modules().ModuleInput(
        function_input(*sizes, num_modalities=num_modalities, threshold=threshold, order=order, **options),
        function_input(
            stack_modalities([x.detach()] * num_modalities, order=order).requires_grad_(x.requires_grad)
        ),
        desc=single.desc,
        reference_fn=functools.partial(_reference, torch_class, made),
    )


def _reference(torch_class: type[nn.Module], made: Any, layer: Any, parameters: Any, x: Tensor) -> Tensor:
    """What torch's layer makes of each modality: there is one state for all of them, and equal inputs."""
    count = layer.num_modalities
    single = torch_class(*made.args, **made.kwargs, dtype=x.dtype).train(layer.training)
    state = {
        name: value if value.dim() == 0 else value.reshape(count, -1)[0]
        for name, value in layer.state_dict().items()
    }
    single.load_state_dict(state)
    y = single(unstack_modalities(x, count, order=layer.order)[0])
    return stack_modalities([y] * count, order=layer.order)


def pairs(torch_class: type[nn.Module], variant: str) -> list[tuple[Case, Case]]:
    """torch's layer and the one here, for all inputs and modes."""
    found = []
    for training in (True, False):
        infos = (torch_info(torch_class), info_of(torch_class, variant))
        options = dict(device="cpu", dtype=torch.float64, requires_grad=True, training=training)
        lists = [info.module_inputs_func(info, **options) for info in infos]
        for inputs in zip(*lists, strict=True):
            if inputs[1] is not None:
                theirs, ours = (
                    _case(info, single, training) for info, single in zip(infos, inputs, strict=True)
                )
                found.append((theirs, ours))
    return found


def _case(info: Any, single: Any, training: bool) -> Case:
    made = single.constructor_input
    return Case(
        info.module_cls,
        made.args,
        made.kwargs,
        single.forward_input.args[0].detach(),
        training,
        made.kwargs.get("num_modalities", 1),
        single.reference_fn,
        f"{single.desc or 'default'}, {'training' if training else 'eval'}",
    )
