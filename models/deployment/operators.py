"""This library's compiled operators in exported programs: which stay, and where their library is."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from cen_ext import Conv3x3
from cen_ext.ops import conv3x3, dispatch
from cen_ext.ops.streams import Streams
from models.training.errors import UsageError

OPERATORS = ("standard", "compiled")
LIBRARY = "operators.so"  # in a package


def check(operators: str, format: str, half: bool) -> None:
    """Refuse compiled operators where a file cannot have them.

    Raises:
        UsageError: of another format, or in float16; or the library is not compiled here.
    """
    if operators == OPERATORS[0]:
        return
    if format != "aot":
        raise UsageError(f"--operators compiled goes with --format aot, not with {format}")
    if half:
        raise UsageError("--operators compiled computes in float32: it does not go with --half")
    reason = dispatch.why_not_cpu()
    if reason is not None:
        raise UsageError(f"--operators compiled is not possible here: {reason}")


def library() -> Path:
    """The file of the compiled operators."""
    file = importlib.import_module("cen_ext._C").__file__
    assert file is not None  # as it is of no namespace
    return Path(file)


def names(program: ExportedProgram) -> list[str]:
    """The operators of this library that a program calls, such as ``"cen_ext::conv3x3"``."""
    calls = (node.target for node in program.graph.nodes)
    return sorted({op._schema.name for op in calls if getattr(op, "namespace", None) == "cen_ext"})


@torch.no_grad()
def choose(net: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Have 3x3 convolutions run for any input what is faster for this one, as programs have no choice.

    Their inputs become channels_last, as compilers' layouts may differ from those of an ordinary call.
    """
    handles = []
    for conv in net.modules():
        if isinstance(conv, Conv3x3):
            conv.register_forward_pre_hook(_channels_last)
            handles.append(conv.register_forward_pre_hook(_fix_backend))
    net(*inputs)
    for handle in handles:
        handle.remove()


def _channels_last(_: nn.Module, inputs: tuple[Tensor | Streams]) -> tuple[Tensor | Streams]:
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


def _fix_backend(conv: Conv3x3, inputs: tuple[Tensor | Streams]) -> None:
    x = inputs[0].parts[0] if isinstance(inputs[0], Streams) else inputs[0]
    conv.backend = conv3x3.faster(x, conv.weight, conv.bias, conv.dilation[0])
