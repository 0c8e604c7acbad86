"""A training step of AsymFusion's ResNet-50 against the plain shared network's, interleaved in one process.

    python -m bench.asymfusion                       # crop 224, two images of two modalities, frozen norms
    python -m bench.asymfusion --statistics batch

A step is forward pass, mean of the squares of the last feature, backward pass; there is no decoder and no
optimizer, which would hide the fusion's cost. Each network stands beside the same without fusion: ours, whose
norms swap the channels and whose shift is an op, in channels_last; and the straightforward code of slices and
concatenations (``bench.baselines.asymfusion``) with PyTorch's norms, in both layouts. All hold the same
weights. Seconds are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.baselines.asymfusion import AsymEncoder
from bench.baselines.exchange import split_state
from bench.baselines.segmentation import Encoder
from bench.harness.files import RESULTS, write
from bench.harness.machine import machine
from models.fusion import AsymFusion, NoFusion
from models.networks.encoders.resnet import ExchangeResNet

Step = Callable[[], Tensor]
FUSED = ", AsymFusion"


def steps(args: argparse.Namespace) -> dict[str, Step]:
    """A training step of each network, by name; "X, AsymFusion" beside "X"."""
    torch.manual_seed(0)
    frozen = args.statistics == "frozen"
    images = torch.randn(2 * args.batch, 3, args.crop, args.crop)
    plain, fused = (
        ExchangeResNet("resnet50", 2, fusion, frozen_statistics=frozen).train()
        for fusion in (NoFusion(), AsymFusion())
    )
    state = plain.state_dict()
    fused.load_state_dict(state)
    made: dict[str, Step] = {}
    for name, net in (("ours", plain), (f"ours{FUSED}", fused)):
        net.to(memory_format=torch.channels_last)
        made[name] = training_step(net, images.contiguous(memory_format=torch.channels_last))
    for layout, suffix in ((torch.contiguous_format, ""), (torch.channels_last, ", channels_last")):
        for eager, fusion in ((Encoder("resnet50", 2, 0.0, "own"), ""), (AsymEncoder("resnet50"), FUSED)):
            eager.load_state_dict(split_state(state, eager))
            eager.train()
            for module in eager.modules():
                if frozen and isinstance(module, nn.BatchNorm2d):
                    module.eval()
            eager.to(memory_format=layout)
            xs = [x.contiguous(memory_format=layout) for x in images.chunk(2)]
            made[f"straightforward{suffix}{fusion}"] = training_step(eager, xs)
    return made


def training_step(net: nn.Module, inputs: Tensor | list[Tensor]) -> Step:
    """Forward pass, loss and backward pass; the loss."""

    def step() -> Tensor:
        net.zero_grad()
        last = net(inputs)[-1]
        loss = (last if isinstance(last, Tensor) else torch.cat(last)).square().mean()
        loss.backward()
        return loss.detach()

    return step


def measure(made: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, interleaved in alternating order after a step of each to warm up."""
    losses = {name: step().item() for name, step in made.items()}
    for of_fused in (False, True):
        same = [loss for name, loss in losses.items() if name.endswith(FUSED) == of_fused]
        if max(same) - min(same) > 1e-3 * abs(same[0]):
            raise RuntimeError(f"the networks differ: losses {losses}")
    times: dict[str, list[float]] = {name: [] for name in made}
    for i in range(rounds):
        for name in sorted(made, reverse=i % 2 == 1):
            start = time.perf_counter()
            made[name]()
            times[name].append(time.perf_counter() - start)
    return times


def report(times: dict[str, list[float]]) -> str:
    """The table as Markdown."""
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    lines = ["| network | seconds per step | times the same without fusion |", "|---|---|---|"]
    for name, seconds in medians.items():
        ratio = f"{seconds / medians[name.removesuffix(FUSED)]:.3f}" if name.endswith(FUSED) else ""
        lines.append(f"| {name} | {seconds:.3f} | {ratio} |")
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2, help="images of each modality")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--statistics", choices=("frozen", "batch"), default="frozen")
    parser.add_argument("--output", type=Path, default=RESULTS / "asymfusion.md", help="the Markdown file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    table = report(measure(steps(args), args.rounds))
    settings = (
        f"ResNet-50, crop {args.crop}, {args.batch} images of 2 modalities, {args.statistics} statistics"
    )
    setup = "; ".join(f"{name}: {value}" for name, value in machine().items())
    print(table)
    write(args.output, f"{settings}; medians of {args.rounds} interleaved steps.\n\n{table}\n{setup}\n")


if __name__ == "__main__":
    main()
