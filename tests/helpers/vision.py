"""timm and torchvision for tests: imported where they are installed, whatever torch they were built for.

Import this before what imports torchvision where it is installed, as torchmetrics does.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # definitions last as long as their library


def torchvision() -> ModuleType:
    """torchvision, or the test is skipped."""
    return pytest.importorskip("torchvision", reason="torchvision is not installed")


def timm() -> ModuleType:
    """timm, which imports torchvision, or the test is skipped."""
    torchvision()
    return pytest.importorskip("timm", reason="timm is not installed")


def _declare_operators() -> None:
    """Declare the operators that torchvision registers fake kernels for, where its own library cannot load.

    A wheel for CUDA beside a CPU build of torch has none, and importing it fails on the first such kernel.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _libraries:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        _libraries.append(torch.library.Library("torchvision", "DEF"))
        for schema in _SCHEMAS:
            _libraries[0].define(schema)


_declare_operators()
