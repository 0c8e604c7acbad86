"""Channel exchanging against single modalities, in minutes on a CPU.

    python examples/demo.py [FOLDER [field=value ...]]

Makes the procedural rooms, trains the recipe ``synthetic_demo`` with RGB and depth, with RGB alone and with
depth alone for the same number of steps, prints one table and writes a page to open in a browser. Started
again, it takes up where it stopped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models.__main__ import main as cen
from models.data import DataError, prepare_synthetic
from models.training import checkpoint

RUNS = {"exchanging": "rgb,depth", "rgb_alone": "rgb", "depth_alone": "depth"}  # modalities by run
REPORT_IMAGES = 30  # validation rooms of the page's pictures and tables by class

children: list[subprocess.Popen[str]] = []


def main(folder: Path, settings: Sequence[str] = ()) -> int:
    """Train ``RUNS`` side by side below ``folder``, with these settings, and compare them; the exit code."""
    start = time.perf_counter()
    root = prepare_synthetic(folder / "data")
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    with ThreadPoolExecutor(len(RUNS)) as pool:
        codes = list(pool.map(lambda name: train(folder, name, [f"data.root={root}", *settings]), RUNS))
    for number, handler in before.items():
        signal.signal(number, handler)
    if any(codes):
        return max(codes)
    runs = [str(folder / name) for name in RUNS]
    report = folder / "report.html"
    images = ["--images", str(REPORT_IMAGES)]
    if code := cen(["compare", *runs]) or cen(["report", *runs, "--output", str(report), *images]):
        return code
    print(f"\nAfter {time.perf_counter() - start:.0f} s. Open {report.resolve()} in a browser.")
    return 0


def stop(*_: object) -> None:
    """Have the trainings save where they are, and end."""
    for child in children:
        child.terminate()


def train(folder: Path, name: str, settings: Sequence[str]) -> int:
    """Train a run on its share of the cores, from where an earlier attempt came to; the exit code."""
    run = folder / name
    resume = ["--resume"] if (run / checkpoint.LAST).is_file() else []
    own = [f"data.modalities={RUNS[name]}", f"run.output={run}", f"run.precision={precision()}"]
    child = subprocess.Popen(
        [sys.executable, "-m", "models", "train", "synthetic_demo", *own, *settings, *resume],
        env=os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(RUNS)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C reaches it through the handler above, and once
    )
    children.append(child)
    assert child.stdout is not None
    for line in child.stdout:
        print(f"{name:>11}  {line}", end="", flush=True)
    if code := abs(child.wait()):
        stop()  # a comparison needs all of them
    return code


def precision() -> str:
    """bfloat16, where the processor multiplies in it: convolutions take half the time then."""
    told = Path("/proc/cpuinfo")
    return "bf16" if told.is_file() and "avx512_bf16" in told.read_text() else "fp32"


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"), sys.argv[2:]))
    except DataError as error:
        sys.exit(f"error: {error}")
