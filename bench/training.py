"""Training steps of whole networks: ours against the baseline, interleaved in one process.

    python -m bench.training                                             # RefineNet-50, crop 224, batch 2
    python -m bench.training --network pspnet
    python -m bench.training --network unet                             # U-Net-256 and PatchGAN, batch 1
    python -m bench.training --device cuda --encoder resnet101           # crop 500, batch 6

All hold the same weights and train on the same generated rooms. A step is what a training does: forward pass,
loss of all branches and the ensemble at label resolution with the penalty, backward pass, SGD; of the U-Net,
an update of the discriminator and one of the generator, for which the baseline generates twice,
as the released one. Steps of the networks are interleaved; the median counts. Apart from the timed steps, the
memory of each is measured in a step of its own, above what was held when it began:

- peak: most tensors alive at once during the step, gradients among them (PyTorch's allocations, exact);
- resident, on a CPU: most memory of the process at once (VmHWM): also the workspace of the convolutions, and
  what the C library's allocator keeps; varies by a few per cent.

Then those that are not compiled train anew without dropout, whose random numbers would differ: loss curves.
Writes a table as Markdown, everything as JSON and the curves as PNG.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.harness import segmentation_providers, translation_providers
from bench.harness.configs import BASELINE, CONFIGS, CONTIGUOUS
from bench.harness.files import RESULTS, write
from bench.harness.machine import gpu, machine
from bench.harness.memory import device_bytes, resident_bytes, tensor_bytes
from models.networks.messages import first_line

MIB = 2.0**20
SYSTEMS = {
    "refinenet": segmentation_providers,
    "pspnet": segmentation_providers,
    "unet": translation_providers,
}
Provider = segmentation_providers.Provider | translation_providers.Provider
Batch = segmentation_providers.Batch | translation_providers.TranslationBatch


@dataclass
class Result:
    """Measurements of one config."""

    peak: int = 0  # bytes
    resident: int | None = None
    first_step: float = 0.0  # seconds; with the compilation, where there is one
    steps: list[float] = field(default_factory=list)  # seconds
    failed: str = ""

    @property
    def seconds(self) -> float:
        return statistics.median(self.steps)


def measure(args: argparse.Namespace, configs: Sequence[str]) -> dict[str, Result]:
    """Time and memory of a training step under every config."""
    results, interleaved = {}, {}
    system = SYSTEMS[args.network]
    recipe = system.recipe_of(args, CONFIGS[BASELINE])
    state = system.initial_state(recipe)
    (batch,) = system.batches(recipe, 1)
    for name in configs:
        results[name] = result = Result()
        try:
            made = system.make_provider(system.recipe_of(args, CONFIGS[name]), CONFIGS[name], state)
            result.first_step = seconds(made, batch)
            seconds(made, batch)  # the optimizer's state is there, and the network has its second shape
            measure_memory(made, batch, result)
            interleaved[name] = made
        except Exception as error:  # compilers have errors of their own; the others are to run all the same
            result.failed = first_line(error)
            print(f"{name}: {result.failed}", file=sys.stderr)
    for i in range(args.steps):
        # The order alternates, so that none always runs in another's wake.
        for name in sorted(interleaved, reverse=i % 2 == 1):
            results[name].steps.append(seconds(interleaved[name], batch))
    return results


def seconds(made: Provider, batch: Batch) -> float:
    """Seconds that a step takes."""
    wait: Callable[[], object] = torch.cuda.synchronize if batch.images.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    made.step(batch)
    wait()
    elapsed = time.perf_counter() - start
    made.release()
    return elapsed


def measure_memory(made: Provider, batch: Batch, result: Result) -> None:
    """Peak memory of a step."""

    def step() -> None:
        made.step(batch)

    if batch.images.is_cuda:
        result.peak = device_bytes(step)
    else:
        result.peak = tensor_bytes(step)[1]
        made.release()
        result.resident = resident_bytes(step)
    made.release()


def curves(args: argparse.Namespace, configs: Sequence[str]) -> dict[str, list[float]]:
    """The loss in every step of a training without dropout."""
    system = SYSTEMS[args.network]
    recipe = system.recipe_of(args, CONFIGS[BASELINE], dropout=0.0)
    state = system.initial_state(recipe)
    stream = system.batches(recipe, args.curve)
    found = {}
    for name in configs:
        torch.manual_seed(0)
        made = system.make_provider(system.recipe_of(args, CONFIGS[name], dropout=0.0), CONFIGS[name], state)
        found[name] = [float(made.step(batch)) for batch in stream]
    return found


def report(results: dict[str, Result], losses: dict[str, list[float]], batch: int) -> str:
    """The table as Markdown."""
    lines = [
        "| network | images/s | × contiguous | × channels_last | peak MiB | of contiguous | resident MiB "
        "| largest difference of the loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        if result.failed:
            lines.append(f"| {name} | failed: {result.failed} |  |  |  |  |  |  |")
            continue
        speedups = [
            f"{results[other].seconds / result.seconds:.2f}"
            if other in results and results[other].steps
            else ""
            for other in (CONTIGUOUS, BASELINE)
        ]
        share = (
            f"{result.peak / results[CONTIGUOUS].peak:.2f}"
            if CONTIGUOUS in results and results[CONTIGUOUS].peak
            else ""
        )
        resident = "" if result.resident is None else f"{result.resident / MIB:.0f}"
        difference = ""
        if name in losses and BASELINE in losses:
            pairs = zip(losses[name], losses[BASELINE], strict=True)
            difference = f"{max(abs(a - b) / b for a, b in pairs):.1e}"
        cells = [
            name,
            f"{batch / result.seconds:.2f}",
            *speedups,
            f"{result.peak / MIB:.0f}",
            share,
            resident,
        ]
        lines.append(f"| {' | '.join([*cells, difference])} |")
    return "\n".join(lines) + "\n"


def plot(losses: dict[str, list[float]]) -> bytes | None:
    """The loss curves as PNG; None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: it needs matplotlib", file=sys.stderr)
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    styles = ("-", "--", ":", "-.")
    for i, (name, values) in enumerate(losses.items()):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, styles[i % len(styles)], label=name, linewidth=2.5 - 0.3 * i)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    on_gpu = args.device.startswith("cuda")
    configs = [name for name in args.configs or CONFIGS if on_gpu or not CONFIGS[name].cuda_graphs]
    results = measure(args, configs)
    plain = [name for name in configs if not CONFIGS[name].compile and not results[name].failed]
    losses = curves(args, plain) if args.curve else {}
    table = report(results, losses, args.batch)
    print(table)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "configs")}
    everything = {
        "machine": {**machine(), **(gpu() if on_gpu else {})},
        "settings": settings,
        "results": {name: vars(result) for name, result in results.items()},
        "losses": losses,
    }
    parts = ("training", args.network, args.encoder, "gpu" if on_gpu else None)
    out = args.out or RESULTS / "_".join(part for part in parts if part)
    facts = [f"{key} {value}" for key, value in settings.items()]
    header = f"`python -m bench.training`: {', '.join(facts)}\n\n"
    write(out.with_suffix(".md"), header + table)
    write(out.with_suffix(".json"), json.dumps(everything, indent=2) + "\n")
    if losses and (image := plot(losses)):
        write(out.with_suffix(".png"), image)
    print(f"written to {out}.*")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what is not given depends on the device."""
    parser = argparse.ArgumentParser(prog="bench.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--network", choices=SYSTEMS, default="refinenet")
    parser.add_argument("--encoder", help="default: resnet50 on a CPU, resnet101 on a GPU; unet has none")
    parser.add_argument(
        "--crop", type=int, help="height and width of the images; default: 224 and 500; unet: 256"
    )
    parser.add_argument("--batch", type=int, help="images of each modality; default: 2 and 6; unet: 1")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each")
    parser.add_argument("--curve", type=int, default=20, help="steps of the loss curves; 0: none")
    parser.add_argument("--statistics", choices=("frozen", "batch"), default="batch")
    parser.add_argument(
        "--configs", "--ways", nargs="+", choices=CONFIGS, metavar="NAME", help=f"of: {'; '.join(CONFIGS)}"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="without suffix; default: below bench/results")
    args = parser.parse_args(argv)
    defaults: tuple[str | None, int, int]
    if args.network == "unet":
        defaults = (None, 256, 1)
    else:
        defaults = ("resnet101", 500, 6) if args.device.startswith("cuda") else ("resnet50", 224, 2)
    for name, default in zip(("encoder", "crop", "batch"), defaults, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


if __name__ == "__main__":
    sys.exit(main())
