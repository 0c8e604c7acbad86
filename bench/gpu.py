"""Everything that needs a GPU, in one call and one folder of results: ``python -m bench.gpu``.

    build      the compiled part, by the Python that runs this; nothing is downloaded
    tests      pytest -m gpu
    sanitizer  compute-sanitizer's memcheck, racecheck, synccheck and initcheck over the small subset of those
               tests that is named for it
    bench      bench.operator, the full run on the GPU, the most telling cases first
    training   bench.training of every network; only if asked for, since its compilers take minutes

A step that fails is recorded, and the others go on. ``--budget-seconds`` are for all together: the benchmark
takes what the other steps leave, and starts no case later; the one at work has a minute to end. The folder
holds build.txt, tests.txt, sanitizer.txt, operator.txt and training.txt, tables and plots, versions.json (the
machine and its versions) and steps.json (each step's outcome and seconds).

Exit status: 0 if no step failed, 1 if one did, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from bench.harness.files import RESULTS, write

ROOT = Path(__file__).parents[1]
USUAL_STEPS = ("build", "tests", "sanitizer", "bench")
STEPS = (*USUAL_STEPS, "training")
NETWORKS = ("refinenet", "pspnet", "unet")
CHECKS = ("memcheck", "racecheck", "synccheck", "initcheck")
CHECK_SECONDS = 90  # at most for each of them
GRACE_SECONDS = 60
SHOWN_LINES = 60  # the last of what a step printed
PYTEST = ["-m", "pytest", "-m", "gpu", "-ra", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
# Lines of the sanitizer's and of pytest's that say how it went.
TELLING = r"SUMMARY:|^\d+ (passed|failed|skipped|errors?|deselected)\b|^no tests ran"
SOME_PASSED = r"\b[1-9]\d* passed\b"  # where all tests are skipped nothing has been tested
OK, MISSING = "ok", "missing"


class Task(NamedTuple):
    """A command of a step."""

    name: str
    log: str  # file of the results' folder that gets what it prints
    command: list[str] | None  # None: the program is not there
    limit: float  # seconds
    environment: Mapping[str, str] = {}
    proof: str = ""  # regular expression: an output without it is no success
    kept: str = ""  # the same: the lines that its log keeps if all is well


class Outcome(NamedTuple):
    """Result of a task."""

    name: str
    state: str  # OK, MISSING or what went wrong
    seconds: float
    summary: str  # of what it printed


def tasks(steps: Sequence[str], out: Path, budget: float) -> Iterator[Task]:
    """The tasks of the steps, each made when its turn comes, with the time that is left then."""
    end = time.monotonic() + budget

    def left() -> float:
        return max(end - time.monotonic(), 0)

    python = sys.executable
    if "build" in steps:
        yield Task("build", "build.txt", [python, "setup.py", "build_ext", "--inplace"], left())
    command = [python, "-m", "bench.harness.machine", str(out / "versions.json")]
    yield Task("versions", "build.txt", command, GRACE_SECONDS)
    if "tests" in steps:
        command = [python, *PYTEST, "--durations=10"]
        yield Task("tests", "tests.txt", command, left(), proof=SOME_PASSED)
    if "sanitizer" in steps:
        tool = find_sanitizer()
        for check in CHECKS:
            yield sanitizer_task(tool, check, min(CHECK_SECONDS, left()))
    if "bench" in steps:
        seconds = max(int(left()), 1)
        command = [python, "-m", "bench.operator", "--device", "cuda", "--budget-seconds", str(seconds)]
        command += ["--out", str(out / "operator")]
        yield Task("bench", "operator.txt", command, seconds + GRACE_SECONDS)
    if "training" in steps:
        for network in NETWORKS:
            command = [python, "-m", "bench.training", "--device", "cuda", "--network", network]
            command += ["--out", str(out / f"training_{network}")]
            yield Task(network, "training.txt", command, left())


def find_sanitizer() -> str | None:
    """The program compute-sanitizer, on the PATH or in the toolkit's folder."""
    folders = [os.environ.get("PATH", os.defpath)]
    folders += [str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def sanitizer_task(tool: str | None, check: str, limit: float) -> Task:
    """One of the ``CHECKS`` over the tests named for them."""
    command = None
    if tool is not None:
        command = [tool, "--tool", check, "--target-processes", "all", "--error-exitcode", "86"]
        if check == "memcheck":  # PyTorch tries calls that may fail
            command += ["--report-api-errors", "no"]
        command += [sys.executable, *PYTEST, "-k", "sanitizer"]
    # Every tensor gets an allocation of its own, and none starts where another ends.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Task(check, "sanitizer.txt", command, limit, environment, SOME_PASSED, f"^=========|{TELLING}")


def run(task: Task) -> tuple[Outcome, str]:
    """Run a task in the checkout, within its limit; its outcome, and what it printed."""
    if task.command is None:
        return Outcome(task.name, MISSING, 0.0, "compute-sanitizer is not here"), ""
    start = time.monotonic()
    # Not a pipe, whose end comes only when the last who holds it is gone.
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(
            task.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **task.environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children end with it
        )
        try:
            code = process.wait(task.limit)
            state = OK if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            state = f"stopped after {task.limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(0)
        output = portable(file.read())
    if state == OK and not re.search(task.proof, output):
        state = "nothing passed"
    return Outcome(task.name, state, round(time.monotonic() - start, 1), summary(output)), output


def portable(text: str) -> str:
    """Without the folders of this machine."""
    names = {f"{ROOT}{os.sep}": "", sys.prefix: "<python>"}
    for folder in sorted(names, key=len, reverse=True):  # the one may lie within the other
        text = text.replace(folder, names[folder])
    return text


def summary(output: str) -> str:
    """The last two telling lines of an output, or its last line."""
    lines = [line.strip("= \n") for line in output.splitlines() if re.search(TELLING, line)]
    return "; ".join(lines[-2:]) or (output.rstrip().splitlines() or [""])[-1]


def run_all(todo: Iterable[Task], out: Path) -> list[Outcome]:
    """Run tasks one after the other; write logs and steps.json after each."""
    outcomes: list[Outcome] = []
    logs: dict[str, str] = defaultdict(str)
    for task in todo:
        print(f"--- {task.name}: {portable(' '.join(task.command or [MISSING]))}", flush=True)
        outcome, output = run(task)
        outcomes.append(outcome)
        kept = task.kept if outcome.state == OK else ""
        lines = [line for line in output.splitlines() if re.search(kept, line)]
        print("\n".join(lines[-SHOWN_LINES:]))
        print(f"--- {outcome.name}: {outcome.state}, {outcome.seconds} s", flush=True)
        logs[task.log] += "\n".join([f"--- {task.name}: {outcome.state}", *lines, ""])
        write(out / task.log, logs[task.log])
        write(out / "steps.json", json.dumps([step._asdict() for step in outcomes], indent=2) + "\n")
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", nargs="+", choices=STEPS, default=USUAL_STEPS, help="(default: all but training)")
    add("--budget-seconds", type=float, default=480, metavar="S", help="(default: 480)")
    add("--out", type=Path, help="folder of results (default: bench/results/gpu_<the GPU's name>)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: PyTorch finds no GPU here, and all of this is about one", file=sys.stderr)
        return 2
    device = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower())
    out = (args.out or RESULTS / f"gpu_{device}").resolve()
    outcomes = run_all(tasks(args.steps, out, args.budget_seconds), out)
    print(f"\nresults in {out}")
    for outcome in outcomes:
        print(f"{outcome.name:<10}{outcome.seconds:>8.1f} s  {outcome.state}; {outcome.summary}")
    return 0 if all(outcome.state in (OK, MISSING) for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
