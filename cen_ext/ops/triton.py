"""What the ops in Triton share: their definition, and the calls of their kernels."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import Parameter

# Whether TRITON_INTERPRET was set at import, so that kernels run on the CPU for tests.
INTERPRETED: bool = triton.knobs.runtime.interpret

# Compilers trace into a triton_op, but not if its kernels are interpreted.
define_op: Any = torch.library.custom_op if INTERPRETED else torch.library.triton_op


def wrap_kernel(kernel: Any) -> Any:
    """Make a kernel traceable by compilers, unless it is interpreted, which torch 2.11 refuses."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context that makes the device of x current, where Triton launches; none while tracing."""
    return (
        torch.cuda.device(x.device)
        if x.is_cuda and type(x) in (Tensor, Parameter)
        else contextlib.nullcontext()
    )
