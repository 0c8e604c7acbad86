"""pytest plugin for processes with TRITON_INTERPRET=1: tiles for an interpreter, and its rounding put right.

A program costs the interpreter milliseconds, whatever its tiles hold; so they are made large. With PASSES set
in the environment no channel or group is taken whole: it is cut into tiles, of which a program walks two.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from cen_ext.ops.max_pool_same import triton as pooling_kernels
from cen_ext.ops.norm_exchange.triton import launch, plan
from cen_ext.ops.norm_exchange.triton.plan import Geometry, Plan


def _cut_in_pieces(g: Geometry, dtype: torch.dtype, *_: int) -> Plan:
    """Four tiles a channel, more where a size is just past a power of two, two of them at a time."""
    channels, lines, positions = (triton.next_power_of_2(size) for size in g.sizes[1:])
    return Plan(min(channels, 64), max(lines // 2, 1), max(positions // 2, 1), tiles=2, warps=4)


def _cut_layers_in_pieces(g: Geometry, dtype: torch.dtype, *_: int) -> Plan:
    """Up to four tiles: of an odd number of channels for one program; else each has half of the channels."""
    channels, lines, positions = (triton.next_power_of_2(size) for size in g.sizes[1:])
    if g.channels % 2 == 0:
        channels //= 2
    return Plan(channels, max(lines // 2, 1), max(positions // 2, 1), tiles=1, warps=plan.RESIDENT_WARPS)


if "PASSES" in os.environ:
    plan.WHOLE_VALUES = 0
    launch.JOINED_VALUES = 8
    launch.pass_plan = _cut_in_pieces
    launch.layer_plan = _cut_layers_in_pieces
else:
    plan.WHOLE_VALUES = plan.FORWARD_VALUES = launch.FORWARD_VALUES = 2**20

pooling_kernels.VALUES = 2**14

_patched: set[str] = set()


def _call(self: interpreter.InterpretedFunction, *arguments: object, **options: object) -> object:
    """A kernel's call of a function; the interpreter patches the language at each, half of the time."""
    if self.fn.__module__ not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(self.fn.__module__)
    return self.rewrite()(*arguments, **options)


interpreter.InterpretedFunction.__call__ = _call

# Checks that no 32-bit sum or product overflows would take a third of the time; shapes here are far too small
# for it, and test_interpreted_with_offsets_of_64_bits takes the path of those that are not.
interpreter.interpreter_builder.options = replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)

_convert_any = interpreter._convert_float


def _convert(values: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
    """Bits of the same values in another type, to the nearest as on a GPU; the interpreter cuts bits off."""
    if (source, target) == (tl.bfloat16, tl.float32):
        return values.view(np.uint16).astype(np.uint32) << 16
    if (source, target) == (tl.float32, tl.bfloat16):
        bits = values.view(np.uint32)
        nearest = bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))
        return (np.where(np.isnan(values), bits | np.uint32(0x400000), nearest) >> 16).astype(np.uint16)
    return _convert_any(values, source, target, mode)


interpreter._convert_float = _convert
