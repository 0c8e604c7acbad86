"""The operator against other ways to write it, on the layers of the networks: ``python -m bench.operator``.

One process. In every repetition each provider takes its turn: forward of all input sets with gradients
recorded, then backward of all of them, every call timed. With ``--cache cold``, the default, there are so
many input sets that a call finds nothing of its own in the cache, as in training. Before anything is timed,
every provider's y and gradients are compared with the reference's. Memory is the most that tensors take at
once in one forward and backward beyond the inputs; y is let go in between, as in training. With
``--allocator kept``, the default, glibc is told to keep freed memory: otherwise page faults, which come with
whatever a provider allocates, take a large part of the time. ``default`` leaves the allocator as training
finds it.

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
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.machine import RESULTS, last_level_cache, machine, write
from bench.memory import keep_freed_memory, populate, return_free_memory, tensor_bytes
from bench.plot import plot
from bench.providers import (
    MAKERS,
    InputSet,
    Provider,
    check_agreement,
    chosen_backend,
    make_provider,
    make_sets,
)
from bench.report import Row, as_csv, as_markdown, as_text, make_rows
from bench.shapes import DTYPES, GROUPS, LAYOUTS, STATISTICS, Case, cases, full_run, quick_run

PROVIDERS = [name for name in MAKERS if name != "compile_reference"]
OTHER_RESULTS = Path("runs/bench")  # of all but the full run; not kept under version control
MOST_SETS = 16
MOST_MEMORY = 6 * 2**30
TENSORS_A_SET = 20  # of x's size: inputs, and what the reference takes until its backward pass is over


def count_sets(case: Case, cache: int) -> int:
    """Input sets until x alone is twice the cache, within the limits above; 1 without a cache to flush."""
    wanted = -(-2 * cache // case.x_bytes)
    return max(1, min(wanted, MOST_SETS, MOST_MEMORY // (TENSORS_A_SET * case.x_bytes)))


def time_provider(provider: Provider) -> Iterator[tuple[str, float]]:
    """One turn: forward of all sets, then backward of all; phase and seconds of each call."""
    outputs, forwards = [], []
    for i in range(len(provider.calls)):
        start = time.perf_counter()
        outputs.append(provider.forward(i))
        forwards.append(time.perf_counter() - start)
    for i, forward in enumerate(forwards):
        start = time.perf_counter()
        gradients = provider.backward(i, outputs[i])
        backward = time.perf_counter() - start
        del gradients  # here and not in the next set's time
        outputs[i] = ()
        yield from (("forward", forward), ("backward", backward), ("both", forward + backward))


def time_copy(sets: list[InputSet]) -> Iterator[tuple[str, float]]:
    """The same of a plain copy of x, which has no backward."""
    copies = []
    for tensors in sets:
        start = time.perf_counter()
        copies.append(tensors.x.clone())
        yield "forward", time.perf_counter() - start


def measure(case: Case, names: Sequence[str], repetitions: int, cache: int, kept: bool) -> list[Row]:
    """Check all providers of one case, measure their memory, then time them by turns.

    Args:
        cache: bytes that the input sets must exceed; 0 for a warm run.
        kept: freed memory is kept, and is had from the system before anything is timed.

    Raises:
        AssertionError: a provider's results differ from the reference's.
    """
    torch.compiler.reset()  # the earlier shapes' code is not needed again
    return_free_memory()
    sets = make_sets(case, count_sets(case, cache))
    providers = [make_provider(name, case, sets) for name in names]
    check_agreement(case, providers, sets)
    peaks = {provider.name: tensor_bytes(provider.step)[1] for provider in providers}
    if kept:
        populate(len(sets) * max(peaks.values()))
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    gc.collect()
    gc.disable()
    try:
        for repetition in range(repetitions + 1):
            turns = {provider.name: time_provider(provider) for provider in providers}
            for name, turn in {**turns, "copy": time_copy(sets)}.items():
                for phase, seconds in turn:
                    if repetition > 0:  # the first one warms up
                        times[name, phase].append(seconds)
    finally:
        gc.enable()
    return make_rows(case, times, peaks, {"cen_ext": chosen_backend(case, sets[0])})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.operator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="about a minute: the ResNet's stages and two U-Net shapes")
    add("--groups", nargs="+", choices=GROUPS, help="run these layers in all combinations of the next four")
    add("--modalities", nargs="+", type=_positive, metavar="M", help="how many (default: 2)")
    add("--statistics", nargs="+", choices=STATISTICS, help="(default: both, where a group has both)")
    add("--dtypes", nargs="+", choices=DTYPES, help="(default: float32)")
    add("--layouts", nargs="+", choices=LAYOUTS, help="(default: contiguous)")
    add("--providers", nargs="+", choices=MAKERS, default=PROVIDERS, help="beside cen_ext and copy")
    add("--repetitions", type=_positive, default=7, help="timed turns of each provider (default: 7)")
    add("--cache", choices=("cold", "warm"), default="cold", help="warm: one input set again and again")
    add("--allocator", choices=("kept", "default"), default="kept", help="default: glibc's, as it is")
    add("--threads", type=_positive, help="of PyTorch and of the operator (default: PyTorch's)")
    add(
        "--out",
        type=Path,
        help="results' path without ending (default: bench/results/ or, if not the full run, runs/bench/)",
    )
    args = parser.parse_args(argv)
    if args.quick and _selection(args):
        parser.error(
            "--quick runs a fixed list; leave out --groups, --modalities, --statistics, --dtypes, --layouts"
        )
    return args


def _selection(args: argparse.Namespace) -> bool:
    return any((args.groups, args.modalities, args.statistics, args.dtypes, args.layouts))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def choose_cases(args: argparse.Namespace) -> tuple[str, list[Case]]:
    """The run's name and cases: the quick run, the full one, or the selection if there is any."""
    if args.quick:
        return "quick", list(quick_run())
    if not _selection(args):
        return "full", list(full_run())
    chosen = cases(
        args.groups or list(GROUPS),
        args.statistics or list(STATISTICS),
        args.modalities or [2],
        args.dtypes or ["float32"],
        args.layouts or ["contiguous"],
    )
    return "selected", list(chosen)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    run, chosen = choose_cases(args)
    names = list(dict.fromkeys(["cen_ext", *args.providers]))
    cache = last_level_cache() if args.cache == "cold" else 0
    kept = args.allocator == "kept" and keep_freed_memory()
    settings = {
        **machine(),
        "cache": args.cache,
        "allocator": "keeps freed memory (mallopt)" if kept else "the C library's, as it is",
        "repetitions": args.repetitions,
    }
    rows: list[Row] = []
    for done, case in enumerate(chosen, start=1):
        start = time.perf_counter()
        rows += measure(case, names, args.repetitions, cache, kept)
        seconds = time.perf_counter() - start
        print(f"[{done}/{len(chosen)}] {case}: {seconds:.1f} s", file=sys.stderr, flush=True)
    print(as_text(rows, settings))
    out = args.out or (RESULTS if run == "full" else OTHER_RESULTS) / f"operator_{run}"
    write(out.with_name(f"{out.name}.csv"), as_csv(rows, settings))
    write(out.with_name(f"{out.name}.md"), as_markdown(rows, settings))
    for layout, picture in plot(rows).items():
        write(out.with_name(f"{out.name}_{layout}.png"), picture)
    print(f"\nwritten to {out}*")
    return 0


if __name__ == "__main__":
    sys.exit(main())
