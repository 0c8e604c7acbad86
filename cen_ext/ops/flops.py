"""What ``torch.utils.flop_counter`` counts for the ops: what it counts for PyTorch's own of the same layer.

That is two for each multiply-add of a convolution, and nothing for norms, pooling and shifts. The formulas
wait until somebody imports that module: it imports Triton where that is installed, which takes 180 ms, where
``import cen_ext`` adds 90 to torch's own.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

Formula = Callable[..., int]
_COUNTER = "torch.utils.flop_counter"
_PENDING: dict[str, Formula] = {}  # by the op's name


def nothing(*_: Any, **__: Any) -> int:
    """The count of an op without products of matrices."""
    return 0


def register(*ops: str, formula: Formula = nothing) -> None:
    """Register a formula for ops of ``torch.ops.cen_ext`` that are defined.

    Args:
        ops: their names there.
        formula: takes the op's arguments, with shapes in the place of tensors, and ``out_shape``.
    """
    _PENDING.update(dict.fromkeys(ops, formula))
    if _COUNTER in sys.modules:
        _hand_over(sys.modules[_COUNTER])


def _hand_over(counter: Any) -> None:
    while _PENDING:
        op, formula = _PENDING.popitem()
        counter.register_flop_formula(getattr(torch.ops.cen_ext, op))(formula)


class _Waiting(importlib.abc.MetaPathFinder):
    """Leaves the counter's module to the other finders, and hands over the formulas once it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_hand_over(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            _hand_over(module)

        spec.loader.exec_module = run_and_hand_over  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Waiting())
