"""The operator against other ways to write it, on the layers of the networks: ``python -m bench.operator``.

Providers are timed interleaved, in one process: in every repetition each runs forward on all input sets with
gradients recorded, then backward on all of them, every call timed. Before anything is timed, every provider's
y and gradients are compared with the reference's. Memory is the most that tensors take at once in one forward
and backward beyond the inputs; y is freed in between, as in training.

    cen_ext            this project's operator, its best backend
    cuda, triton       its backends by name
    reference          its definition in plain PyTorch
    straightforward    the usual code: lists of M tensors, the exchange by boolean masks into a fresh tensor
    where              the same with torch.where
    compile            that under torch.compile
    compile_max        that under torch.compile(mode="max-autotune-no-cudagraphs"); by default on GPUs
    compile_reference  the reference under torch.compile; only with --providers
    norm               PyTorch's norm alone, one call per modality: without exchange, residual and activation,
                       and so unchecked: it shows what a library's call costs
    copy               Tensor.clone of x: the 100 % line of ``bench.harness.shapes.floor_bytes``

On a CPU, with ``--cache cold``, the default, there are enough input sets that a call finds nothing of its own
in the cache, as in training. With ``--allocator kept``, the default, glibc is told to keep freed memory:
otherwise page faults, which come with whatever a provider allocates, take a large part of the time.
``default`` leaves the allocator as training finds it.

On a GPU there is one input set, ``--cache cold`` flushes the L2 before every call, and time is what passes
between two events. Every provider is timed in two modes: as eager calls, each of which starts on an idle
device, so that the host's part counts, and as replays of CUDA graphs, the kernels alone. Boolean masks make
the host wait, so that ``straightforward`` cannot be captured and has no second mode.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bench.harness.devices import Cpu, Device, Gpu
from bench.harness.files import RESULTS, write
from bench.harness.goals import goal_tables
from bench.harness.plot import plot
from bench.harness.providers import MAKERS, unavailable
from bench.harness.report import Row, as_csv, as_markdown, as_text
from bench.harness.run import Run
from bench.harness.shapes import (
    DTYPES,
    GROUPS,
    LAYOUTS,
    STATISTICS,
    Case,
    cases,
    full_run,
    gpu_run,
    most_telling_first,
    quick_run,
)

_USUAL = ["reference", "straightforward", "where", "compile"]
PROVIDERS = {"cpu": [*_USUAL, "norm"], "cuda": ["cuda", "triton", *_USUAL, "compile_max", "norm"]}
OTHER_RESULTS = Path("runs/bench")  # of all but the full run; not kept under version control


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.operator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="(default: cuda where there is a GPU)")
    add("--quick", action="store_true", help="about a minute: the ResNet's stages and two U-Net shapes")
    add("--groups", nargs="+", choices=GROUPS, help="run these layers in all combinations of the next four")
    add("--modalities", nargs="+", type=_positive, metavar="M", help="how many (default: 2)")
    add("--statistics", nargs="+", choices=STATISTICS, help="(default: both, where a group has both)")
    add("--dtypes", nargs="+", choices=DTYPES, help="(default: float32)")
    add("--layouts", nargs="+", choices=LAYOUTS, help="(default: contiguous)")
    add("--providers", nargs="+", choices=MAKERS, help="beside cen_ext and copy (default: the device's)")
    add("--repetitions", type=_positive, help="timed rounds of all providers (default: 7, on GPUs 25)")
    add("--cache", choices=("cold", "warm"), default="cold", help="warm: one input set again and again")
    add("--allocator", choices=("kept", "default"), help="of CPUs (default: kept)")
    add("--threads", type=_positive, help="of PyTorch and of the operator (default: PyTorch's)")
    add("--budget-seconds", type=_positive, metavar="S", help="start no case later; most telling first")
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
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.allocator and args.device == "cuda":
        parser.error("--allocator is about CPUs")
    return args


def _selection(args: argparse.Namespace) -> bool:
    return any((args.groups, args.modalities, args.statistics, args.dtypes, args.layouts))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def choose_cases(args: argparse.Namespace) -> tuple[str, list[Case]]:
    """The run's name and cases: the quick run, the device's full one, or the selection if there is any."""
    if args.quick:
        return "quick", list(quick_run())
    if not _selection(args):
        return "full", list(gpu_run() if args.device == "cuda" else full_run())
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
    cold = args.cache == "cold"
    device = Gpu(cold) if args.device == "cuda" else Cpu(cold, kept=args.allocator != "default")
    run = Run(device, args.repetitions or device.repetitions, args.budget_seconds or math.inf)
    names = dict.fromkeys(["cen_ext", *(args.providers or PROVIDERS[args.device]), "copy"])
    skipped = unavailable(list(names), args.device)
    settings = {**device.settings(), "repetitions": run.repetitions}
    if skipped:
        settings["skipped"] = skipped
    name, chosen = choose_cases(args)
    out = args.out or default_out(name, args.device)

    rows: dict[Case, list[Row]] = {}
    begin = time.perf_counter()
    for case in most_telling_first(chosen) if args.budget_seconds else chosen:
        start = time.perf_counter()
        if start - begin > run.budget:
            settings["left out for time"] = "; ".join(str(case) for case in chosen if case not in rows)
            break
        rows[case] = run.measure(case, [name for name in names if name not in skipped])
        if run.missing:
            settings["missing"] = {what: f"({count} cases)" for what, count in run.missing.items()}
        # After every case: a run that is stopped was not in vain.
        write(out.with_name(f"{out.name}.csv"), as_csv(in_order(rows, chosen), settings))
        seconds = time.perf_counter() - start
        print(f"[{len(rows)}/{len(chosen)}] {case}: {seconds:.1f} s", file=sys.stderr, flush=True)
    report(in_order(rows, chosen), settings, out, device)
    return 1 if run.failed else 0


def in_order(rows: dict[Case, list[Row]], chosen: Sequence[Case]) -> list[Row]:
    """All rows in the order in which their cases were chosen."""
    return [r for case in chosen for r in rows.get(case, [])]


def default_out(run: str, device: str) -> Path:
    """Default path of a run's results, without ending."""
    name = f"operator_{run}" if device == "cpu" else f"operator_{run}_{device}"
    return (RESULTS if run == "full" else OTHER_RESULTS) / name


def report(rows: Sequence[Row], settings: Mapping[str, object], out: Path, device: Device) -> None:
    """Print the tables, and write the rows, the tables and the plots."""
    write(out.with_name(f"{out.name}.csv"), as_csv(rows, settings))
    if not rows:
        print("nothing could be measured", file=sys.stderr)
        return
    goals = goal_tables(rows, device.l2) if isinstance(device, Gpu) else {}
    print(as_text(rows, settings, goals))
    write(out.with_name(f"{out.name}.md"), as_markdown(rows, settings, goals))
    for layout, image in plot(rows).items():
        write(out.with_name(f"{out.name}_{layout}.png"), image)
    print(f"\nwritten to {out}*")


if __name__ == "__main__":
    sys.exit(main())
