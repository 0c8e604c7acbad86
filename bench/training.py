"""One training step of RefineNet on the CPU: this project's network against the straightforward one.

    python -m bench.training --encoder resnet50 --crop 224 --batch 2 --steps 5

A step is the forward pass, the loss of all branches and the ensemble at label resolution, the backward pass
and SGD. Both networks hold the same weights in one process and take turns; the median step counts. Apart from
the timed steps, each network's memory is measured in a step of its own, above what was held when it began:

- kept: tensors alive between the forward and the backward pass (PyTorch's allocations, exact);
- peak: most tensors alive at once during the step, gradients among them (the same);
- resident: most memory of the process at once (VmHWM): also the workspace of the convolutions, and what the C
  library's allocator keeps; varies by a few per cent.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import cen_ext
import models
from bench.straightforward import StraightforwardRefineNet, split_state

RESULTS = Path(__file__).parent / "results"
SMALL_SCALES = 0.1  # share of scales below the threshold; the paper's authors logged 8 % after training
NUM_CLASSES = 40
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr otherwise


class Contestant:
    """A network, its optimiser and one training step on given data."""

    def __init__(self, net: nn.Module, images: list[Tensor] | Tensor, target: Tensor) -> None:
        self.net = net.train()
        self.images = images
        self.target = target
        self.optimiser = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-5)

    def forward(self) -> Tensor:
        branches, ensemble, *_ = self.net(self.images)
        size = self.target.shape[-2:]
        return torch.stack(
            [
                F.cross_entropy(F.interpolate(logits, size, mode="bilinear"), self.target, ignore_index=255)
                for logits in (*branches, ensemble)
            ]
        ).sum()

    def step(self) -> None:
        self.optimiser.zero_grad()
        self.forward().backward()
        self.optimiser.step()


def contestants(args: argparse.Namespace, frozen_statistics: bool) -> dict[str, Contestant]:
    """Both networks with equal weights, and the same random data."""
    torch.manual_seed(0)
    options = {"num_modalities": args.modalities, "frozen_statistics": frozen_statistics}
    ours = models.refinenet(args.encoder, NUM_CLASSES, **options)
    for layer in cen_ext.exchanging_layers(ours).values():
        with torch.no_grad():
            layer.weight[torch.rand_like(layer.weight) < SMALL_SCALES] = 0.001
    usual = StraightforwardRefineNet(args.encoder, NUM_CLASSES, **options)
    usual.load_state_dict(split_state(ours.state_dict(), args.modalities))

    layout = LAYOUTS[args.layout]
    images = torch.randn(args.modalities * args.batch, 3, args.crop, args.crop).to(memory_format=layout)
    target = torch.randint(NUM_CLASSES, (args.batch, args.crop, args.crop))
    return {
        "cen_ext": Contestant(ours.to(memory_format=layout), images, target),
        "straightforward": Contestant(usual.to(memory_format=layout), list(images.split(args.batch)), target),
    }


def tensor_bytes(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes of tensors that ``run`` leaves (its result is alive) and the most it held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return held, peak


def resident_bytes(run: Callable[[], object]) -> int | None:
    """The most resident memory that ``run`` added to the process; None where Linux does not tell."""
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed goes back first
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except (OSError, AttributeError):
        return None

    def read(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1]) * 1024

    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def measure(args: argparse.Namespace, frozen_statistics: bool) -> dict[str, dict[str, object]]:
    """Time and memory of both networks."""
    both = contestants(args, frozen_statistics)
    results: dict[str, dict[str, object]] = {}
    for name, contestant in both.items():
        contestant.step()  # warm-up; the optimiser's state is there from now on
        contestant.optimiser.zero_grad()
        kept, _ = tensor_bytes(contestant.forward)
        _, peak = tensor_bytes(contestant.step)
        contestant.optimiser.zero_grad()
        resident = resident_bytes(contestant.step)
        contestant.optimiser.zero_grad()
        results[name] = {"kept": kept, "peak": peak, "resident": resident, "steps": []}
    for i in range(args.steps):
        # Turns alternate, so that neither always runs in the other's wake.
        for name in sorted(both, reverse=i % 2 == 1):
            start = time.perf_counter()
            both[name].step()
            results[name]["steps"].append(time.perf_counter() - start)
            both[name].optimiser.zero_grad()
    for result in results.values():
        result["seconds"] = statistics.median(result["steps"])
    return results


def machine() -> dict[str, object]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cen_ext": cen_ext.__version__,
        "backends": cen_ext.available_backends(),
    }


def show(mode: str, results: dict[str, dict[str, object]]) -> dict[str, float]:
    """Print a table of one mode; returns the ratios, below 1 where cen_ext is better."""
    ours, usual = results["cen_ext"], results["straightforward"]
    ratios = {
        field: ours[field] / usual[field]
        for field in ("seconds", "kept", "peak", "resident")
        if ours[field] is not None
    }
    print(f"\n{f'{mode} statistics':<25}{'cen_ext':>12}{'straightforward':>18}{'ratio':>8}")
    for field, ratio in ratios.items():
        unit, scale = ("s", 1.0) if field == "seconds" else ("MiB", 2.0**20)
        found, expected = ours[field] / scale, usual[field] / scale
        print(f"{f'{field} [{unit}]':<25}{found:>12.3f}{expected:>18.3f}{ratio:>8.3f}")
    return ratios


def write(path: Path, report: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--modalities", type=int, default=2)
    parser.add_argument("--crop", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=2, help="images of each modality")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each network")
    parser.add_argument("--statistics", nargs="+", choices=("frozen", "batch"), default=["frozen", "batch"])
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last", help="of both networks")
    parser.add_argument("--out", type=Path, help="default: bench/results/training_<encoder>_<layout>.json")
    args = parser.parse_args(argv)
    out = args.out or RESULTS / f"training_{args.encoder}_{args.layout}.json"
    report: dict[str, object] = {
        "machine": machine(),
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "statistics")},
    }
    for mode in args.statistics:
        results = measure(args, frozen_statistics=mode == "frozen")
        report[mode] = {**results, "ratios": show(mode, results)}
    write(out, report)
    print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
