"""Division of a call into programs: sizes, tiles and the constants that tell kernels of them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cen_ext.ops.norm_exchange.reference import memory_format


@dataclass(frozen=True)
class Geometry:
    """Sizes of x in the kernels' terms (``tile``): units, channels, lines and positions."""

    modalities: int
    units: int  # per modality, each with its own statistics
    channels: int
    lines: int
    positions: int
    channels_last: bool
    step: int = 1  # rows from a sample to the next one of the same modality
    group: int = 1  # channels that share statistics

    @staticmethod
    def of(x: Tensor, num_modalities: int, units: int, order: str, group: int = 1) -> Geometry:
        rows, channels = int(x.shape[0]), int(x.shape[1])
        samples, spatial = rows // (num_modalities * units), math.prod(int(size) for size in x.shape[2:])
        last = memory_format(x) != torch.contiguous_format
        step = num_modalities if order == "sample" else 1
        lines, positions = (1, samples * spatial) if last and step == 1 else (samples, spatial)
        return Geometry(num_modalities, units, channels, lines, positions, last, step, group)

    @property
    def values(self) -> int:
        """Number of values of a unit."""
        return self.channels * self.lines * self.positions

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """``units, C, L, P``, the kernels' arguments."""
        return self.units, self.channels, self.lines, self.positions


@dataclass(frozen=True)
class Plan:
    """Extents of a tile, all powers of two, tiles per program and warps per program."""

    channels: int
    lines: int
    positions: int
    tiles: int
    warps: int
    group: int = 1  # channels that a program has all of

    def pieces(self, g: Geometry) -> int:
        """Number of tiles per channel."""
        return divide_up(g.lines, self.lines) * divide_up(g.positions, self.positions)

    def chunks(self, g: Geometry) -> int:
        """Number of programs per channel."""
        return divide_up(self.pieces(g), self.tiles)

    def programs(self, g: Geometry) -> int:
        places = g.channels // self.group * power_above(self.group)
        return g.units * divide_up(places, self.channels) * self.chunks(g)


# None of these numbers has been measured on a GPU. They follow from what ptxas reports for sm_90: with them,
# kernels use 40 to 130 registers per thread (180 with a residual, channels last, in half types) and spill
# only a few values of the largest whole channels. A thread has at least two 16-byte loads per tensor in
# flight, about 60 KB per multiprocessor, where 20 KB would hide the memory latency of an H100.
WHOLE_VALUES = 2**15  # float32 values that a program of 16 warps holds in registers, 64 per thread
FORWARD_VALUES = 4096  # values per tile, over all modalities, for four warps
BACKWARD_VALUES = 2048  # the counterpart for kernels that read two tensors of the size of x
STATISTICS_VALUES = 2048  # values per tile of one modality; each takes three registers
PROGRAMS_PER_MULTIPROCESSOR = 8  # programs per multiprocessor before a program processes more than one tile
RESIDENT_WARPS = 16  # per multiprocessor, at 128 registers per thread
JOINED_VALUES = 4096  # of partial sums that a program joins at a time
MOST_TILES = 4  # per program without sums: several amortize the loads of tables, more unbalance the last wave


def whole_plan(g: Geometry, dtype: torch.dtype, tensors: int) -> Plan | None:
    """Plan of tiles that hold whole channels or groups of ``tensors`` tensors, or None if none fits."""
    lines, positions = power_above(g.lines), power_above(g.positions)
    a_channel = lines * positions * g.modalities * tensors * (2 if dtype == torch.float64 else 1)
    most = WHOLE_VALUES // a_channel
    places = power_above(g.group)
    every = places * power_above(g.channels // g.group)
    # For channels last, the smallest memory transaction is a sector of 32 bytes along the channels.
    least = max(places, min(32 // dtype.itemsize, every) if g.channels_last else 1)
    if most < least:
        return None
    wanted = max(least, _power_below(FORWARD_VALUES // a_channel))
    channels = min(wanted, _power_below(most), every)
    warps = min(_power_below(channels * a_channel // 1024), 16)
    return Plan(channels, lines, positions, 1, warps, g.group)


def pass_plan(
    g: Geometry, dtype: torch.dtype, values: int, multiprocessors: int, most_tiles: int = 2**30
) -> Plan:
    """Plan of tiles of ``values`` values over all modalities, with tiles per program to fill the device."""
    values = max(_power_below(values // g.modalities), 256)
    channels, lines, positions = (power_above(size) for size in g.sizes[1:])
    if g.channels_last:  # at least 128 bytes along the channels
        channels = min(channels, max(64, 128 // dtype.itemsize))
        positions = min(positions, values // channels)
        lines = min(lines, values // (channels * positions))
    else:
        positions = min(positions, values)
        lines = min(lines, values // positions)
        channels = min(channels, values // (positions * lines))
    plan = Plan(channels, lines, positions, tiles=1, warps=4)
    spare = plan.programs(g) // (PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)
    return replace(plan, tiles=_power_below(min(spare, plan.pieces(g), most_tiles)))


def layer_plan(g: Geometry, dtype: torch.dtype, tensors: int, multiprocessors: int) -> Plan:
    """Plan of tiles that hold all channels of ``tensors`` tensors or, if they do not fit, some of them."""
    channels = power_above(g.channels)
    a_position = channels * g.modalities * tensors * (2 if dtype == torch.float64 else 1)
    # A sector of memory along the positions, unless the channels lie side by side.
    least = 1 if g.channels_last else min(32 // dtype.itemsize, power_above(g.positions))
    most = WHOLE_VALUES // a_position
    if most < least:
        return layer_pass_plan(g, dtype, FORWARD_VALUES // tensors, multiprocessors)
    values = min(max(least, _power_below(FORWARD_VALUES // a_position)), _power_below(most))
    positions = min(values, power_above(g.positions))
    lines = min(values // positions, power_above(g.lines))
    warps = min(power_above(divide_up(lines * positions * a_position, 1024)), 16)
    return Plan(channels, lines, positions, 1, warps)


def layer_pass_plan(g: Geometry, dtype: torch.dtype, values: int, multiprocessors: int) -> Plan:
    """Plan of tiles of ``values`` values over all modalities, of at most 128 bytes along memory.

    The fewer positions a tile has, the more programs keep the device busy.
    """
    values = max(_power_below(values // g.modalities), 256)
    dense = 128 // dtype.itemsize
    room, least = (values // dense, 1) if g.channels_last else (dense, 32 // dtype.itemsize)
    while True:
        positions = min(room, power_above(g.positions))
        lines = min(room // positions, power_above(g.lines))
        plan = Plan(min(values // room, power_above(g.channels)), lines, positions, tiles=1, warps=4)
        if room <= least or plan.pieces(g) >= multiprocessors:
            return plan
        room //= 2


def layer_programs(g: Geometry, plan: Plan, multiprocessors: int) -> int:
    """Number of programs of a ``layer_plan``: where each has all channels, no more than run at once."""
    if plan.channels < g.channels:
        return plan.pieces(g)
    return min(plan.pieces(g), multiprocessors * RESIDENT_WARPS // plan.warps)


def divide_up(n: int, by: int) -> int:
    return -(-n // by)


def power_above(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _power_below(n: int) -> int:
    """Largest power of two that is at most n, but at least 1."""
    return 1 << max(n.bit_length() - 1, 0)


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_constants(g: Geometry, plan: Plan) -> dict[str, Any]:
    """Constants of the kernels that define a tile."""
    return dict(
        BLOCK_C=plan.channels,
        BLOCK_L=plan.lines,
        BLOCK_P=plan.positions,
        STEP=g.step,
        CHANNELS_LAST=g.channels_last,
        INT64=g.step * g.values >= 2**31,
        num_warps=plan.warps,
    )


def pass_constants(g: Geometry, plan: Plan) -> dict[str, Any]:
    """Constants and arguments of kernels whose programs process several tiles."""
    return dict(chunks=plan.chunks(g), TILES=plan.tiles, **tile_constants(g, plan))
