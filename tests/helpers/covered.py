"""Which backends the tests run, and which kinds of calls each of them covers, by its own word."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import cen_ext
from cen_ext.ops import dispatch
from cen_ext.ops.norm_exchange.reference import DTYPES, Options

BACKENDS = [name for name, state in cen_ext.available_backends().items() if state == "ok"]
NORMS = ("batch", "instance")


def proper_groups(channels: int) -> int:
    """A number of groups that is neither 1 nor C where there is one."""
    return max(g for g in range(1, max(channels, 2)) if channels % g == 0)


def refusal(backend: str, x: Tensor, **options: object) -> str | None:
    """Why the backend cannot run this call, None where it can."""
    try:
        dispatch.choose("norm_exchange", backend, x, Options(**options))
    except RuntimeError as error:
        return str(error)
    return None


def skip_if_refused(backend: str, x: Tensor, **options: object) -> None:
    """Not every backend covers every call; what it refuses is tested where refusals are."""
    reason = refusal(backend, x, **options)
    if reason is not None:
        pytest.skip(reason)


def every_kind(
    dtypes: Sequence[torch.dtype] = DTYPES, norms: Sequence[str] = NORMS, names: Sequence[str] = BACKENDS
) -> pytest.MarkDecorator:
    """Parametrises a test over ``backend, norm, dtype``; what a backend refuses is skipped, saying why."""
    kinds = []
    for backend in names:
        for norm in norms:
            for dtype in dtypes:
                reason = refusal(backend, torch.empty(2, 1, 2, dtype=dtype), norm=norm)
                marks = () if reason is None else pytest.mark.skip(reason=reason)
                name = f"{backend}-{norm}-{str(dtype).removeprefix('torch.')}"
                kinds.append(pytest.param(backend, norm, dtype, marks=marks, id=name))
    return pytest.mark.parametrize(("backend", "norm", "dtype"), kinds)
