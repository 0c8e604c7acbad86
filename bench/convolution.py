"""3x3 convolutions on this CPU: the kernels of ``cen_ext.conv3x3`` against PyTorch's, interleaved.

    python -m bench.convolution

Shapes are those of RefineNet-50 and PSPNet-50 at crop 224, two images of two modalities, in float32 and
channels_last. Milliseconds are medians; the last columns say how many times as fast ours are, and how far
both are from float64 at worst, as a share of the largest value.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.files import RESULTS, write
from bench.harness.machine import machine
from bench.harness.report import geometric_mean, lines_of
from cen_ext import available_backends

# N, C, K, H and W, dilation
SHAPES = [
    (4, 64, 64, 56, 1),
    (4, 128, 128, 28, 1),
    (4, 256, 256, 56, 1),
    (4, 256, 256, 28, 1),
    (4, 256, 256, 14, 1),
    (4, 512, 256, 28, 1),
    (4, 1024, 256, 14, 1),
    (4, 512, 512, 7, 1),
    (4, 2048, 512, 7, 1),
    (4, 256, 256, 28, 2),
    (4, 512, 512, 28, 4),
    (4, 4096, 512, 28, 1),
]
Call = Callable[[], Tensor]


def calls(shape: Sequence[int]) -> dict[str, tuple[Call, Call, Call]]:
    """By pass: ours, PyTorch's, and PyTorch's in float64."""
    images, channels, outputs, side, dilation = shape
    sizes = ((images, channels, side, side), (outputs, channels, 3, 3), (images, outputs, side, side))
    x, weight, dy = (torch.randn(size).to(memory_format=torch.channels_last) for size in sizes)
    ops, aten = torch.ops.cen_ext, torch.ops.aten
    same = ([1, 1], [dilation] * 2, [dilation] * 2, False, [0, 0], 1)

    def theirs(which: int, *tensors: Tensor) -> Tensor:
        if which == 2:
            return aten.convolution(*tensors[1:], None, *same)
        mask = [i == which for i in range(3)]
        result: Tensor = aten.convolution_backward(*tensors, None, *same, mask)[which]
        return result

    def three(which: int, own: Call) -> tuple[Call, Call, Call]:
        tensors = (dy, x, weight)
        return own, lambda: theirs(which, *tensors), lambda: theirs(which, *(t.double() for t in tensors))

    return {
        "forward": three(2, lambda: ops.conv3x3(x, weight, None, dilation)),
        "gradient of x": three(0, lambda: ops.conv3x3_backward(dy, weight, dilation)),
        "gradient of weight": three(1, lambda: ops.conv3x3_weight_gradient(dy, x, dilation)),
    }


def measure(shape: Sequence[int], repetitions: int) -> list[dict[str, Any]]:
    """One row per pass."""
    rows = []
    for name, (ours, theirs, exact) in calls(shape).items():
        expected = exact()
        errors = [
            ((call().double() - expected).abs().max() / expected.abs().max()).item()
            for call in (ours, theirs)
        ]
        times: dict[str, list[float]] = {"cen_ext": [], "torch": []}
        for i in range(repetitions):
            interleaved = {"cen_ext": ours, "torch": theirs}
            for who in sorted(interleaved, reverse=i % 2 == 1):
                start = time.perf_counter()
                interleaved[who]()
                times[who].append(1e3 * (time.perf_counter() - start))
        medians = {who: statistics.median(taken) for who, taken in times.items()}
        row = dict(zip(("N", "C", "K", "side", "dilation"), shape, strict=True))
        rows.append({**row, "pass": name, **medians, "errors": dict(zip(medians, errors, strict=True))})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of ``measure`` as Markdown, with the geometric means of each pass."""
    lines = [
        "| N×C→K, side, dilation | pass | cen_ext, ms | torch, ms | times as fast | error, cen_ext | torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape = f"{row['N']}×{row['C']}→{row['K']}, {row['side']}, {row['dilation']}"
        own, other = row["cen_ext"], row["torch"]
        errors = " | ".join(f"{error:.1e}" for error in row["errors"].values())
        lines.append(f"| {shape} | {row['pass']} | {own:.2f} | {other:.2f} | {other / own:.2f} | {errors} |")
    for name in dict.fromkeys(row["pass"] for row in rows):
        ratios = [row["torch"] / row["cen_ext"] for row in rows if row["pass"] == name]
        lines.append(f"| geometric mean | {name} | | | {geometric_mean(ratios):.2f} | | |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="3x3 convolutions on this CPU: ours against PyTorch's.")
    parser.add_argument("--repetitions", type=int, default=15, help="timed calls of each")
    parser.add_argument("--out", type=Path, default=RESULTS / "convolution", help="without suffix")
    args = parser.parse_args(argv)
    if args.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, got {args.repetitions}")
    if (state := available_backends()["cpu"]) != "ok":
        parser.error(f"there is nothing to measure: {state}")
    rows = []
    for shape in SHAPES:
        rows += measure(shape, args.repetitions)
        print(f"{shape}: done", file=sys.stderr)
    settings = machine()
    text = table(rows)
    print(text)
    write(args.out.with_suffix(".md"), f"{' · '.join(lines_of(settings))}\n\n{text}")
    write(args.out.with_suffix(".json"), json.dumps({"machine": settings, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
