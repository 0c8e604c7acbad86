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
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cen_ext
import models
from bench.files import RESULTS, write
from bench.machine import machine
from bench.memory import resident_bytes, tensor_bytes
from bench.shapes import LAYOUTS, SMALL_SCALES
from bench.straightforward import StraightforwardRefineNet, split_state

NUM_CLASSES = 40


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
    usual.load_state_dict(split_state(ours.state_dict()))

    layout = LAYOUTS[args.layout]
    images = torch.randn(args.modalities * args.batch, 3, args.crop, args.crop).to(memory_format=layout)
    target = torch.randint(NUM_CLASSES, (args.batch, args.crop, args.crop))
    return {
        "cen_ext": Contestant(ours.to(memory_format=layout), images, target),
        "straightforward": Contestant(usual.to(memory_format=layout), list(images.split(args.batch)), target),
    }


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
    write(out, json.dumps(report, indent=2) + "\n")
    print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
