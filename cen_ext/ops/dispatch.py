"""Dispatch of calls to backends: one table for all ops.

One predicate per backend both chooses it and explains a refusal. An op registers its backends where it is
defined; this module imports none of them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Backend(NamedTuple):
    """One implementation of an op."""

    why_not: Callable[..., str | None]  # returns the reason why it cannot run a call, or None
    run: Callable[..., Any]
    # For ``norm_exchange`` only: run() with batch statistics that also updates the running statistics.
    update: Callable[..., Any] | None = None


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
        return None if x is None or x.device.type == "cpu" else f"x is on {x.device}; Triton is interpreted"
    if x is not None and x.device.type != "cuda":
        return f"x is on {x.device}"
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
    if x is not None and x.device.type != "cuda":
        return f"x is on {x.device}"
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
    if x is not None and x.device.type != "cpu":
        return f"x is on {x.device}"
    return None


# The backends of each op by name, best first; the names are part of the public API.
BACKENDS: dict[str, dict[str, Backend]] = {}


def register(op: str, **backends: Backend) -> None:
    """Register the backends of an op, best first."""
    BACKENDS[op] = backends


def available_backends() -> dict[str, str]:
    """Backends of ``norm_exchange`` by name, with ``"ok"`` or the reason why each cannot run here."""
    return {name: backend.why_not() or "ok" for name, backend in BACKENDS["norm_exchange"].items()}


def choose(op: str, name: str | None, *call: Any) -> Backend:
    """Choose the backend for a call of an op: the requested one, or the best that can run it.

    Args:
        op: a registered op.
        name: one of its backends, or None for the best.
        call: the arguments of the op's ``why_not`` predicates.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the requested backend cannot run this call; the message says why.
    """
    table = BACKENDS[op]
    if name is None:
        return next(backend for backend in table.values() if backend.why_not(*call) is None)
    if name not in table:
        raise ValueError(f"backend must be one of {', '.join(map(repr, table))} or None, got {name!r}")
    reason = table[name].why_not(*call)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
    return table[name]
