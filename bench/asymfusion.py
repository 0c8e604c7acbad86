"""A training step of AsymFusion's ResNet-50 against the plain shared network's, interleaved in one process.

    python -m bench.asymfusion                       # crop 224, two images of two modalities, frozen norms
    python -m bench.asymfusion --statistics batch

A step is forward pass, sum of the squares of the last feature, backward pass. ``plain`` shares the
convolutions and exchanges nothing; ``asymfusion`` swaps channels within the norms and shifts by its own op;
``straightforward`` is the same network of slices and concatenations (``bench.baselines.asymfusion``), with
PyTorch's norms, contiguous and in channels_last. All hold the same weights. Seconds are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench.baselines.asymfusion import AsymEncoder
from bench.baselines.exchange import split_state
from bench.harness.files import RESULTS, write
from bench.harness.machine import machine
from models.fusion import AsymFusion, NoFusion
from models.networks.encoders.resnet import ExchangeResNet

Step = Callable[[], Tensor]


def steps(args: argparse.Namespace) -> dict[str, Step]:
    """A training step of each network, by name."""
    torch.manual_seed(0)
    frozen = args.statistics == "frozen"
    ours = {
        name: ExchangeResNet("resnet50", 2, fusion, frozen_statistics=frozen).train()
        for name, fusion in (("plain", NoFusion()), ("asymfusion", AsymFusion()))
    }
    ours["asymfusion"].load_state_dict(ours["plain"].state_dict())
    images = torch.randn(2 * args.batch, 3, args.crop, args.crop)
    made: dict[str, Step] = {}
    for name, net in ours.items():
        net.to(memory_format=torch.channels_last)
        x = images.contiguous(memory_format=torch.channels_last)
        made[name] = training_step(net, lambda net=net, x=x: net(x)[-1])
    for layout in (torch.contiguous_format, torch.channels_last):
        net = AsymEncoder("resnet50").train()
        net.load_state_dict(split_state(ours["plain"].state_dict()))
        if frozen:
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        net.to(memory_format=layout)
        xs = [x.contiguous(memory_format=layout) for x in images.chunk(2)]
        name = "straightforward" + (", channels_last" if layout is torch.channels_last else "")
        made[name] = training_step(net, lambda net=net, xs=xs: torch.cat(net(xs)[-1]))
    return made


def training_step(net: nn.Module, forward: Step) -> Step:
    """Forward pass, loss and backward pass; the loss."""

    def step() -> Tensor:
        net.zero_grad()
        loss = forward().square().mean()
        loss.backward()
        return loss.detach()

    return step


def measure(made: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, interleaved in alternating order after a step of each to warm up."""
    losses = {name: step().item() for name, step in made.items()}
    fused = [loss for name, loss in losses.items() if name != "plain"]
    if max(fused) - min(fused) > 1e-3 * abs(fused[0]):
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
    lines = ["| network | seconds per step | times the plain network's |", "|---|---|---|"]
    for name, seconds in medians.items():
        lines.append(f"| {name} | {seconds:.3f} | {seconds / medians['plain']:.3f} |")
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2, help="images of each modality")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--statistics", choices=("frozen", "batch"), default="frozen")
    parser.add_argument("--output", default=RESULTS / "asymfusion.md", help="the Markdown file")
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
