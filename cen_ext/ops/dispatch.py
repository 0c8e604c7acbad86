"""Dispatch of calls to backends: one table for all ops, and the switch ``use_backend``.

One predicate per backend both chooses it and explains a refusal. An op registers its backends where it is
defined; this module imports none of them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Collection
from contextlib import ContextDecorator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Backend(NamedTuple):
    """One implementation of an op."""

    why_not: Callable[..., str | None]  # returns the reason why it cannot run a call, or None
    run: Callable[..., Any]
    # For ``norm_exchange`` only: run() with batch statistics that also updates the running statistics.
    update: Callable[..., Any] | None = None


# Ends messages of what compiled backends cannot do.
REMEDY = "backend='reference' or cen_ext.use_backend('reference')"


def _load_compiled() -> str | None:
    """Load the compiled part, which registers ``torch.ops.cen_ext.*``; return the reason if that fails."""
    try:
        importlib.import_module("cen_ext._C")
    except ModuleNotFoundError as error:
        return f"the compiled part is missing ({error}); build it with: python setup.py build_ext --inplace"
    except ImportError as error:
        return f"the compiled part cannot be loaded ({error})"
    return None


_NOT_COMPILED = _load_compiled()
IS_COMPILED = _NOT_COMPILED is None
if _NOT_COMPILED is None:
    _BUILD = importlib.import_module("cen_ext._C").build_info()
    _CUDA_ARCHITECTURES = [divmod(architecture, 10) for architecture in _BUILD["cuda_architectures"]]
else:
    warnings.warn(
        f"cen_ext: {_NOT_COMPILED}. Running in Triton or plain PyTorch.", RuntimeWarning, stacklevel=2
    )


def why_not_reference(x: Tensor | None = None, *_: Any) -> str | None:
    """The definition runs everywhere."""
    return None


_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def why_not_triton(x: Tensor | None = None, *_: Any) -> str | None:
    """Reason why Triton cannot run this call (or any call, without arguments)."""
    if not _HAS_TRITON:
        return "Triton is not installed; it comes with the CUDA builds of PyTorch"
    if _INTERPRETED:
        return None if x is None or x.is_cpu else f"x is on {x.device}; Triton is interpreted"
    if x is not None and not x.is_cuda:
        return "x is not on a GPU"  # no formatted text: every call on a CPU comes by
    if not torch.cuda.is_available():
        return "there is no GPU"
    capability = torch.cuda.get_device_capability(None if x is None else x.device)
    if capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, needed is 8.0"
    return None


def why_not_cuda(x: Tensor | None = None, *_: Any) -> str | None:
    """Reason why the compiled CUDA kernels cannot run this call (or any call, without arguments)."""
    if _NOT_COMPILED is not None:
        return _NOT_COMPILED
    if not _CUDA_ARCHITECTURES:
        return "the compiled part was built without CUDA; see FORCE_CUDA in setup.py"
    if x is not None and not x.is_cuda:
        return "x is not on a GPU"
    if not torch.cuda.is_available():
        return "there is no GPU"
    index = None if x is None else x.device.index
    return _why_not_device(torch.cuda.current_device() if index is None else index)


@functools.cache
def _why_not_device(index: int) -> str | None:
    """Reason why the compiled kernels do not run on a GPU; they run on newer architectures, not on older."""
    capability = torch.cuda.get_device_capability(index)
    oldest = min(_CUDA_ARCHITECTURES)
    if capability >= oldest:
        return None
    found, needed = (".".join(map(str, c)) for c in (capability, oldest))
    return f"the GPU has compute capability {found}, the compiled part is for {needed} and newer"


def why_not_cpu(x: Tensor | None = None, *_: Any) -> str | None:
    """Reason why the compiled CPU kernels cannot run this call (or any call, without arguments)."""
    if _NOT_COMPILED is not None:
        return _NOT_COMPILED
    if x is not None and not x.is_cpu:
        return f"x is on {x.device}"
    return None


NAMES = ("cuda", "triton", "cpu", "reference")  # of all ops' backends; part of the public API

# The backends of each op by name, best first.
BACKENDS: dict[str, dict[str, Backend]] = {}


def register(op: str, **backends: Backend) -> None:
    """Register the backends of an op, best first."""
    BACKENDS[op] = backends


def available_backends() -> dict[str, str]:
    """Backends of ``norm_exchange`` by name, with ``"ok"`` or the reason why each cannot run here."""
    return {name: backend.why_not() or "ok" for name, backend in BACKENDS["norm_exchange"].items()}


class _Switch(threading.local):
    """The backend that ``use_backend`` names in this thread.

    Thread-local rather than a context variable, because torch.compile guards the former and cannot trace the
    latter. Each thread sets its own default here: a default of the class would not be guarded.
    """

    def __init__(self) -> None:
        self.name: str | None = None


_SWITCH = _Switch()


class use_backend(ContextDecorator):
    """Context, or decorator of a function, in which the ops of ``cen_ext`` run the named backend.

    It acts on the calls of this thread that neither their argument ``backend`` nor that of their layer
    decides; contexts nest. An op that has the backend runs it, or raises RuntimeError where it cannot. An op
    that has none of that name (``max_pool_same`` has no ``"cuda"``) runs the best that it has.
    ``conv3x3`` runs PyTorch's convolution for ``"reference"``, and for all others what is faster.

    ``"reference"`` is plain PyTorch. It can be differentiated twice and in forward mode, transformed by
    ``torch.func``, traced and exported as other networks of ``torch.nn``. A backward pass belongs to the
    backend that ran forward, wherever it is called; but ``torch.utils.checkpoint`` runs forward again in the
    backward pass, which then has to be called in the context, too.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``, or None for the best that can run.

    Raises:
        ValueError: no op has a backend of that name.
    """

    def __init__(self, name: str | None) -> None:
        check_name(name, NAMES)
        self.name = name
        self.outer: list[str | None] = []  # a context may be entered again

    def _recreate_cm(self) -> use_backend:  # calls of a decorated function may run in several threads
        return use_backend(self.name)

    def __enter__(self) -> None:
        self.outer.append(_SWITCH.name)
        _SWITCH.name = self.name

    def __exit__(self, *_: object) -> None:
        _SWITCH.name = self.outer.pop()


def named_backend() -> str | None:
    """The backend that the surrounding ``use_backend`` names, or None."""
    return _SWITCH.name


def check_name(name: str | None, known: Collection[str]) -> None:
    """Raise ValueError unless the name is None or among the known ones."""
    if name is not None and name not in known:
        raise ValueError(f"backend must be one of {', '.join(map(repr, known))} or None, got {name!r}")


def why_only_reference() -> str | None:
    """Reason why PyTorch, at this moment, can use none but its own operations, or None.

    Compilers and torch.export record the ops of kernels, but ONNX has none for them; PyTorch's other tracers
    and transforms cannot look into them.
    """
    if torch.compiler.is_compiling():
        if torch.onnx.is_in_onnx_export():  # takes a microsecond
            return "it is being exported to ONNX"
    elif torch._C._is_tracing():
        return "torch.jit.trace is recording it"
    if torch._C._are_functorch_transforms_active():
        return "torch.func is transforming it"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    return None


def choose(op: str, name: str | None, *call: Any) -> Backend:
    """Choose the backend for a call of an op: the requested one, or the best that can run it.

    Args:
        op: a registered op.
        name: one of its backends, or None for that of ``use_backend``, if the op has it, or else the best.
        call: the arguments of the op's ``why_not`` predicates.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the requested backend cannot run this call; the message says why.
    """
    table = BACKENDS[op]
    check_name(name, table)
    name = name or _SWITCH.name
    if name is None or name not in table:
        return best(op, *call)
    reason = (why_only_reference() if name != "reference" else None) or table[name].why_not(*call)
    if reason is not None:
        raise RuntimeError(
            f"backend {name!r} cannot run this call: {reason}; {REMEDY} can, and None takes the best that can"
        )
    return table[name]


def best(op: str, *call: Any) -> Backend:
    """Choose the best backend of an op that can run a call; arguments as for ``choose``."""
    table = BACKENDS[op]
    if why_only_reference() is not None:
        return table["reference"]
    return next(backend for backend in table.values() if backend.why_not(*call) is None)
