"""Which implementation runs a call. One predicate a backend both chooses it and explains a refusal."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cen_ext.ops.norm_exchange import reference
from cen_ext.ops.norm_exchange.reference import Options

Run = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Options],
    tuple[Tensor, Tensor, Tensor],
]
# The same with running statistics and their momentum in place of given ones: it updates them.
Update = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, float, Options],
    tuple[Tensor, Tensor, Tensor],
]


class Backend(NamedTuple):
    """Why it cannot run a call (None: it can), what runs one, what runs one and updates statistics."""

    why_not: Callable[..., str | None]
    run: Run
    update: Update | None = None


def _load_compiled() -> str | None:
    """Load the compiled part, which registers ``torch.ops.cen_ext.*``; the reason if it is not there."""
    try:
        importlib.import_module("cen_ext._C")
    except ModuleNotFoundError as error:
        return f"the compiled part is missing ({error}); build it with: python setup.py build_ext --inplace"
    except ImportError as error:
        return f"the compiled part cannot be loaded ({error})"
    return None


_NOT_COMPILED = _load_compiled()
if _NOT_COMPILED is None:
    from cen_ext.ops.norm_exchange import native

    _CUDA_ARCHITECTURES = native.cuda_architectures()
else:
    warnings.warn(
        f"cen_ext: {_NOT_COMPILED}. Running in Triton or plain PyTorch.", RuntimeWarning, stacklevel=2
    )


def why_not_reference(x: Tensor | None = None, options: Options | None = None) -> str | None:
    """The definition runs everywhere."""
    return None


_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def why_not_triton(x: Tensor | None = None, options: Options | None = None) -> str | None:
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


def why_not_cuda(x: Tensor | None = None, options: Options | None = None) -> str | None:
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
    """Reason why the kernels that were built do not run on a GPU: theirs run on newer ones, not on older."""
    capability = torch.cuda.get_device_capability(index)
    oldest = min(_CUDA_ARCHITECTURES)
    if capability >= oldest:
        return None
    found, needed = (".".join(map(str, c)) for c in (capability, oldest))
    return f"the GPU has compute capability {found}, the compiled part is for {needed} and newer"


def why_not_cpu(x: Tensor | None = None, options: Options | None = None) -> str | None:
    """Reason why the compiled CPU kernels cannot run this call (or any call, without arguments)."""
    if _NOT_COMPILED is not None:
        return _NOT_COMPILED
    if x is not None and x.device.type != "cpu":
        return f"x is on {x.device}"
    return None


def _run_compiled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    # Compilers see through the op, eager calls are quicker without the gradient that is registered for it.
    run: Any = native.norm_exchange if torch.compiler.is_compiling() else native.NormExchange.apply
    outputs: tuple[Tensor, Tensor, Tensor] = run(x, weight, bias, mean, var, residual, *options)
    return outputs


def _update_compiled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    momentum: float,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    run: Any = native.NormExchangeUpdating.apply
    outputs: tuple[Tensor, Tensor, Tensor] = run(
        x, weight, bias, running_mean, running_var, residual, momentum, *options
    )
    return outputs


def _run_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    from cen_ext.ops.norm_exchange.triton import launch

    # As for the compiled op; tensors that stand for others (fake ones, say) must meet the op as well.
    eager = type(x) is Tensor and not torch.compiler.is_compiling()
    run: Any = launch.NormExchange.apply if eager else launch.norm_exchange
    outputs: tuple[Tensor, Tensor, Tensor] = run(x, weight, bias, mean, var, residual, *options)
    return outputs


# Best first. Names are part of the public API.
_BACKENDS = {
    "cuda": Backend(why_not_cuda, _run_compiled, _update_compiled),
    "triton": Backend(why_not_triton, _run_triton),
    "cpu": Backend(why_not_cpu, _run_compiled, _update_compiled),
    "reference": Backend(why_not_reference, reference.norm_exchange),
}


def available_backends() -> dict[str, str]:
    """Every backend's name with ``"ok"``, or with the reason why it cannot run here."""
    return {name: backend.why_not() or "ok" for name, backend in _BACKENDS.items()}


def choose(name: str | None, x: Tensor, options: Options) -> Backend:
    """What runs a call of ``norm_exchange``; raises as ``choose_among``."""
    return choose_among(_BACKENDS, name, x, options)


def choose_among(table: Mapping[str, Backend], name: str | None, *call: Any) -> Backend:
    """What runs a call: the best backend of a table that can, or the one asked for.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend asked for cannot run this call; the message says why.
    """
    if name is None:
        return next(backend for backend in table.values() if backend.why_not(*call) is None)
    if name not in table:
        raise ValueError(f"backend must be one of {', '.join(map(repr, table))} or None, got {name!r}")
    reason = table[name].why_not(*call)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
    return table[name]
