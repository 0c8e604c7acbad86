"""Latency of one scene: ours, pruned and exported, against RGB alone and the straightforward network.

    python -m bench.deployment                                   # 480x640, three networks, three shares
    python -m bench.deployment --networks light_refinenet18 --shares 0.5 --size 240x320

Networks of RGB and depth with 40 classes and random weights, whose scales let each modality exchange a share
of the channels, chosen at random among its own. All answer to the same scene with the ensemble, one at a time
in turns in one process; the median counts. Outputs are compared before anything is timed. Memory is what one
answer adds to the process at the most.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import models
from bench.baselines.straightforward import Straightforward
from bench.harness.files import RESULTS, write
from bench.harness.machine import machine
from bench.harness.memory import resident_bytes
from models.cli.export import size_of
from models.deployment import prune
from models.deployment.export import trace
from models.deployment.formats import FORMATS, check_needs
from models.deployment.interface import Interface
from models.deployment.operators import check as check_operators
from models.networks.counting import count_multiply_adds
from models.training.errors import UsageError
from tests.helpers import vision  # noqa: F401 - timm imports torchvision, which may lack its operators
from tests.helpers.networks import exchange_share

CLASSES, MODALITIES = 40, ("rgb", "depth")
THETA = 0.02
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "refinenet50": functools.partial(models.refinenet, "resnet50"),
    "light_refinenet18": functools.partial(models.light_refinenet, "resnet18"),
    "deeplabv3plus18": functools.partial(models.deeplabv3plus, "resnet18", width=128),
    "light_mobilenetv2": functools.partial(models.light_refinenet, "timm:mobilenetv2_100"),
}
RGB, STRAIGHTFORWARD, OURS, PRUNED = "RGB alone, ours", "straightforward PyTorch", "ours", "ours, pruned"
# Files by what the command line calls them: their ways' titles, formats and operators.
EXPORTED = {
    "onnx": ("ONNX Runtime, pruned", "onnx", "standard"),
    "aot": ("AOTInductor, pruned", "aot", "standard"),
    "compiled": ("AOTInductor, pruned, compiled operators", "aot", "compiled"),
}
TOLERANCE = 1e-4  # of the largest output


class Way(NamedTuple):
    """A way to answer.

    Attributes:
        title: in the table.
        net: whose multiply-adds to count; None for a file.
        answer: the ensemble of the scene, ``[1, K, h, w]``.
    """

    title: str
    net: nn.Module | None
    answer: Callable[[], Tensor]


@dataclass
class Result:
    """One way to answer.

    Attributes:
        network, share, way: what answered.
        multiply_adds: of a scene; None for files, whose program is that of the pruned network.
        difference: largest one from the network's output, relative to the largest output; None for RGB.
        added: MiB.
        seconds: of each answer.
    """

    network: str
    share: float
    way: str
    multiply_adds: int | None
    difference: float | None
    added: float | None
    seconds: list[float] = field(default_factory=list)

    @property
    def milliseconds(self) -> float:
        return 1000 * statistics.median(self.seconds)


def ways(name: str, share: float, x: Tensor, folder: Path, files: list[str]) -> Iterator[Way]:
    """The ways to answer to a scene."""
    torch.manual_seed(0)
    build = NETWORKS[name]
    net = build(num_classes=CLASSES, num_modalities=2, threshold=THETA).eval()
    exchange_share(net, share)
    alone = build(num_classes=CLASSES, num_modalities=1).eval()
    last = x.contiguous(memory_format=torch.channels_last)

    def of(each: nn.Module, images: Tensor) -> Callable[[], Tensor]:
        return lambda: each(images).ensemble

    straightforward = Straightforward(net)
    net, alone = (each.to(memory_format=torch.channels_last) for each in (net, alone))
    yield Way(OURS, net, of(net, last))
    yield Way(RGB, alone, of(alone, last[:1]))
    yield Way(STRAIGHTFORWARD, straightforward, of(straightforward, x))
    faster = Straightforward(net)
    yield Way(f"{STRAIGHTFORWARD}, channels_last", faster, of(faster, last))
    pruned = prune(net, last).net
    yield Way(PRUNED, pruned, of(pruned, last))
    for file in files:
        title, format, operators = EXPORTED[file]
        height, width = x.shape[-2:]
        interface = Interface(MODALITIES, size=(height, width))
        path = folder / f"{file}{FORMATS[format].suffix}"
        FORMATS[format].write(trace(net, interface, x, operators=operators), interface, {}, path)
        run, inputs = FORMATS[format].load(path), interface.arguments(x)
        yield Way(title, None, functools.partial(_first, run, inputs))


def _first(run: Callable[..., list[Tensor]], inputs: tuple[Tensor, ...]) -> Tensor:
    return run(inputs)[0]


@torch.inference_mode()
def measure(name: str, share: float, size: tuple[int, int], repeats: int, files: list[str]) -> list[Result]:
    """All ways of one network.

    Raises:
        RuntimeError: one of them gives another output.
    """
    results, answers = [], []
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected: Tensor | None = None
    with tempfile.TemporaryDirectory() as folder:
        for way, net, answer in ways(name, share, x, Path(folder), files):
            y = answer()
            expected = y if expected is None else expected  # ours come first
            difference = None
            if way != RGB:
                difference = ((y - expected).abs().max() / expected.abs().max()).item()
                if not difference <= TOLERANCE:
                    raise RuntimeError(f"{name}, {way}: outputs differ by {difference:.1e}")
            added = resident_bytes(answer)
            rows = 1 if way == RGB else 2
            cost = None if net is None else count_multiply_adds(net, (rows, 3, *size))
            mib = None if added is None else added / 2**20
            results.append(Result(name, share, way, cost, difference, mib))
            answers.append(answer)
        for _ in range(repeats):
            for result, answer in zip(results, answers, strict=True):
                start = time.perf_counter()
                answer()
                result.seconds.append(time.perf_counter() - start)
    return results


def table(results: list[Result]) -> str:
    """Markdown, with ratios to the straightforward network and to ours unpruned."""
    lines = [
        "| network | exchanged | way | ms | times straightforward | times ours | multiply-adds, 1e9 | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_case = {(r.network, r.share, r.way): r.milliseconds for r in results}
    for r in results:
        usual = min(
            value
            for (network, share, way), value in by_case.items()
            if (network, share) == (r.network, r.share) and way.startswith(STRAIGHTFORWARD)
        )
        ours = by_case[r.network, r.share, OURS]
        cost = "" if r.multiply_adds is None else f"{r.multiply_adds / 1e9:.1f}"
        added = "" if r.added is None else f"{r.added:.0f}"
        lines.append(
            f"| {r.network} | {r.share:.0%} | {r.way} | {r.milliseconds:.1f} | "
            f"{usual / r.milliseconds:.2f} | {ours / r.milliseconds:.2f} | {cost} | {added} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="bench.deployment",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.1, 0.5])
    parser.add_argument("--size", type=size_of, default=(480, 640), metavar="HxW")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--formats", nargs="*", choices=EXPORTED, default=list(EXPORTED))
    parser.add_argument("--output", type=Path, default=RESULTS / "deployment", help="without suffix")
    arguments = parser.parse_args(argv)
    for file in arguments.formats:
        _, format, operators = EXPORTED[file]
        check_needs(format)
        check_operators(operators, format, half=False)
    about = {**machine(), "size": arguments.size, "repeats": arguments.repeats}
    results: list[Result] = []
    for name in arguments.networks:
        for share in arguments.shares:
            print(f"{name}, {share:.0%} exchanged", file=sys.stderr, flush=True)
            results += measure(name, share, arguments.size, arguments.repeats, arguments.formats)
            text = save(arguments.output, about, results)
    print(text)
    return 0


def save(output: Path, about: dict[str, object], results: list[Result]) -> str:
    """Write what there is so far, and return the page."""
    height, width = about["size"]
    heading = (
        f"`python -m bench.deployment`, {height}x{width}, batch 1, float32, medians of {about['repeats']}; "
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, {about['date']}.\n\n"
    )
    content = {"machine": about, "results": [asdict(each) for each in results]}
    write(output.with_suffix(".md"), heading + table(results))
    write(output.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    return heading + table(results)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        sys.exit(f"error: {error}")
