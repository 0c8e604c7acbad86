"""What the code of a module's forward refers to, without running it."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

# Parts of the names of functions, without underscores: torch.batch_norm, native_batch_norm,
# SyncBatchNormFunction, inplace_abn_sync and so on.
_BATCH_NORMS = ("batchnorm", "instancenorm", "inplaceabn")


def calls_batch_norm(layer: nn.Module) -> bool:
    """Whether the forward of a module that is not torch's own refers to a function of batch or instance norm.

    Functions and methods outside torch that it refers to are followed, modules below it are not, unless they
    are scripted. What is looked up in other ways, in a dictionary for example, is not found.
    """
    if isinstance(layer, torch.jit.ScriptModule):
        return hasattr(layer, "inlined_graph") and _is_batch_norm_name(str(layer.inlined_graph))
    inherited = [vars(base)["forward"] for base in type(layer).__mro__ if "forward" in vars(base)]
    pending = [layer.forward, *inherited]
    seen: set[CodeType] = set()
    while pending:
        function = _python_function(pending.pop())
        if function is None or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        for value in _referred_to(function, layer):
            if callable(value) and _is_batch_norm_name(getattr(value, "__name__", "")):
                return True
            pending.append(value)
    return False


def _is_batch_norm_name(name: str) -> bool:
    return any(part in name.replace("_", "").lower() for part in _BATCH_NORMS)


def _python_function(value: Any) -> FunctionType | None:
    """The function to look into, if it is one that torch does not define."""
    if isinstance(value, MethodType):
        value = value.__func__
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, type) and issubclass(value, torch.autograd.Function):
        value = inspect.getattr_static(value, "forward").__func__
    own = isinstance(value, FunctionType) and not f"{value.__module__}.".startswith("torch.")
    return value if own else None


def _referred_to(function: FunctionType, layer: nn.Module) -> Iterator[Any]:
    """Functions and classes of autograd functions that the code refers to by a name or ``module.name``."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    names = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    if function.__code__.co_varnames[:1] == ("self",):
        names["self"] = layer
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        value: Any = None
        for instruction in dis.get_instructions(code):
            value = _loaded(instruction, value, names, function.__globals__)
            if isinstance(value, type) and not issubclass(value, torch.autograd.Function):
                continue  # isinstance(layer, BatchNorm2d) is no call
            if value is not None and not isinstance(value, nn.Module | ModuleType):
                yield value


def _loaded(
    instruction: dis.Instruction, before: Any, names: dict[str, Any], global_names: dict[str, Any]
) -> Any:
    """What an instruction puts on the stack, if it is the value of a name or of an attribute."""
    operation, name = instruction.opname, instruction.argval
    if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
        return global_names.get(name)
    if operation.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return names.get(name[-1] if isinstance(name, tuple) else name)
    if operation == "IMPORT_NAME":
        return sys.modules.get(name)
    if operation in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM") and before is not None:
        dynamic = isinstance(before, ModuleType | torch._ops.OpOverloadPacket)
        look_up = getattr if dynamic else inspect.getattr_static
        return look_up(before, name, None)
    return None


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
