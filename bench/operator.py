"""The operator against other ways to write it, on the layers of the networks: ``python -m bench.operator``.

One process. In every repetition each provider takes its turn: forward of all input sets with gradients
recorded, then backward of all of them, every call timed. With ``--cache cold``, the default, there are so
many input sets that a call finds nothing of its own in the cache, as in training. Before anything is timed,
every provider's y and gradients are compared with the reference's.

    cen_ext            this project's operator, its best backend
    reference          its definition in plain PyTorch
    straightforward    the usual code: lists of M tensors, the exchange by boolean masks into a fresh tensor
    where              the same with torch.where
    compile            that under torch.compile
    compile_reference  the reference under torch.compile; only with --providers
    copy               Tensor.clone of x: the 100 % line of the byte model (``bench.shapes.floor_bytes``)
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench import report
from bench.machine import RESULTS, last_level_cache, machine
from bench.memory import keep_freed_memory, return_free_memory, tensor_bytes
from bench.providers import (
    MAKERS,
    InputSet,
    Provider,
    check_agreement,
    chosen_backend,
    make_provider,
    make_sets,
)
from bench.shapes import DTYPES, GROUPS, LAYOUTS, STATISTICS, Case, cases, full_run, quick_run

DEFAULT_PROVIDERS = [name for name in MAKERS if name != "compile_reference"]
MOST_SETS = 16
MEMORY = 6 * 2**30
TENSORS_A_SET = (
    10  # of x's size that a set takes at most while it waits for its backward pass, inputs included
)


def count_sets(case: Case, cache: int) -> int:
    """How many input sets it takes for x alone to be twice the cache, within the limits above."""
    wanted = max(2, -(-2 * cache // case.x_bytes))
    return max(1, min(wanted, MOST_SETS, MEMORY // (TENSORS_A_SET * case.x_bytes)))


def seconds(call: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def time_provider(provider: Provider) -> Iterator[tuple[str, float]]:
    """One turn: forward of all sets, then backward of all; seconds of each call, by phase."""
    outputs, forwards = [], []
    for i in range(len(provider.calls)):
        taken, y = seconds(lambda i=i: provider.forward(i))
        outputs.append(y)
        forwards.append(taken)
    for i, forward in enumerate(forwards):
        backward, _ = seconds(lambda i=i: provider.backward(i, outputs[i]))
        outputs[i] = None
        yield from (("forward", forward), ("backward", backward), ("both", forward + backward))


def time_copy(sets: list[InputSet]) -> Iterator[tuple[str, float]]:
    """The same of a plain copy, which has no backward."""
    copies = []
    for tensors in sets:
        taken, copy = seconds(tensors.x.clone)
        copies.append(copy)
        yield "forward", taken


def measure(case: Case, names: Sequence[str], repetitions: int, cache: int) -> list[report.Row]:
    """Check, then time all providers of one case and their memory.

    Raises:
        AssertionError: a provider's results differ from the reference's.
    """
    torch.compiler.reset()  # the earlier shapes' code is not needed again
    return_free_memory()
    sets = make_sets(case, count_sets(case, cache) if cache else 1)
    providers = [make_provider(name, case, sets) for name in names]
    check_agreement(case, providers, sets)
    peaks = {p.name: tensor_bytes(lambda p=p: p.backward(0, p.forward(0)))[1] for p in providers}
    turns: dict[str, Callable[[], Iterator[tuple[str, float]]]] = {
        provider.name: lambda provider=provider: time_provider(provider) for provider in providers
    }
    turns["copy"] = lambda: time_copy(sets)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    gc.collect()
    gc.disable()
    for repetition in range(repetitions + 1):
        for name, turn in turns.items():
            for phase, taken in turn():
                if repetition > 0:  # the first one warms up
                    times[name, phase].append(taken)
    gc.enable()
    backend = chosen_backend(case, sets[0])
    return report.make_rows(case, times, peaks, {"cen_ext": backend})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.operator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="about a minute: the ResNet's stages and two U-Net shapes")
    add("--groups", nargs="+", choices=GROUPS, help="these layers in every combination of the next four")
    add("--modalities", nargs="+", type=_positive, metavar="M")
    add("--statistics", nargs="+", choices=STATISTICS)
    add("--dtypes", nargs="+", choices=DTYPES)
    add("--layouts", nargs="+", choices=LAYOUTS)
    add("--providers", nargs="+", choices=MAKERS, default=DEFAULT_PROVIDERS)
    add("--repetitions", type=_positive, default=7, help="timed turns of each provider (default: 7)")
    add("--cache", choices=("cold", "warm"), default="cold", help="warm: one input set again and again")
    add("--threads", type=_positive, help="of PyTorch and the operator (default: PyTorch's)")
    add("--out", type=Path, help="path without ending (default: bench/results/operator_<run>)")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def choose_cases(args: argparse.Namespace) -> tuple[str, list[Case]]:
    """The run's name and cases: the quick run, the full one, or the selection if there is any."""
    selected = [args.groups, args.modalities, args.statistics, args.dtypes, args.layouts]
    if args.quick:
        return "quick", list(quick_run())
    if not any(selected):
        return "full", list(full_run())
    return "selected", list(
        cases(
            args.groups or list(GROUPS),
            args.statistics or list(STATISTICS),
            args.modalities or [2],
            args.dtypes or ["float32"],
            args.layouts or ["contiguous"],
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    name, chosen = choose_cases(args)
    kept = keep_freed_memory()
    settings = {
        **machine(),
        "cache": args.cache,
        "allocator": "keeps what is freed" if kept else "the C library's default",
    }
    rows: list[report.Row] = []
    for done, case in enumerate(chosen, start=1):
        start = time.perf_counter()
        cache = last_level_cache() if args.cache == "cold" else 0
        rows += measure(case, args.providers, args.repetitions, cache)
        taken = time.perf_counter() - start
        print(f"[{done}/{len(chosen)}] {report.describe(case)}: {taken:.1f} s", file=sys.stderr, flush=True)
    report.show(rows, settings)
    report.write_all(args.out or RESULTS / f"operator_{name}", rows, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
