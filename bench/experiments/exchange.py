"""Does exchanging help? RGB alone, depth alone, shared without exchange, and exchanging, on the same budget.

    python -m bench.experiments.exchange DATA WEIGHTS [FOLDER] [--only NAME ...] [--seeds 0 1 2]

DATA is NYUDv2 at 384x288, WEIGHTS the encoder's, as of the recipe ``nyudv2_384_cen_refinenet18``: 13 classes,
since so short a budget teaches 40 of them to nobody, 500 steps of 4 images, bfloat16. Runs are below FOLDER
and go on where they stopped. Writes bench/results/exchange.md, .json and .png: the scores of the
validation images, the share of channels that every layer exchanges, and the course of the losses.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import models.recipes  # noqa: F401 - fills the registry
from bench.harness.files import RESULTS, write
from bench.harness.machine import machine
from cen_ext import exchanging_layers
from models.data import DataError
from models.segmentation.build import open_split
from models.segmentation.evaluate import evaluate
from models.segmentation.load import load
from models.training import checkpoint
from models.training.errors import UsageError
from models.training.files import write_json
from models.training.train import train

RECIPE = "nyudv2_384_cen_refinenet18"
BUDGET = [
    *["data.merge=nyu13", "data.num_classes=13", "data.crop=192", "data.shorter_side=216"],
    # The last stage has no weights to start from: its scales start where those of the others lie.
    *["model.initial_scale=0.3", "run.precision=bf16", "run.workers=0"],
    *["run.evaluate_steps=250", "eval.limit=100", "run.log_steps=10", "run.checkpoint_steps=50"],
    *[f"optim.stages.{i}.steps={steps}" for i, steps in enumerate((320, 100, 80))],
]
RUNS = {  # by name: modalities and what differs
    "rgb": ["data.modalities=rgb"],
    "depth": ["data.modalities=depth"],
    "shared": ["fusion=none"],
    "cen15": ["fusion.threshold=0.15"],
    "cen20": ["fusion.threshold=0.2"],
    "cen20_l20": ["fusion.threshold=0.2", "loss.sparsity=0.02"],
    "cen30": ["fusion.threshold=0.3"],
}
TITLES = {
    "rgb": "RGB alone",
    "depth": "depth alone",
    "shared": "both, shared, no exchange",
    "cen15": "exchanging, θ 0.15, λ 0.005",
    "cen20": "exchanging, θ 0.2, λ 0.005",
    "cen20_l20": "exchanging, θ 0.2, λ 0.02",
    "cen30": "exchanging, θ 0.3, λ 0.005",
}


def measure(run: Path, images: int | None) -> dict[str, Any]:
    """Scores of the validation images, exchanged shares and losses of a finished run; kept beside it."""
    kept = run / f"measured_{images or 'all'}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    trained = load(run / checkpoint.LAST, [f"eval.limit={images}", "eval.batch_size=4"])
    metrics = evaluate(trained.net, open_split(trained.recipe.data, "val"), trained.recipe).compute()
    shares = {
        name: float(layer.replaced().float().mean()) for name, layer in exchanging_layers(trained.net).items()
    }
    with (run / "losses.csv").open(newline="") as file:
        # Of a run that was resumed, rows of an older version lack losses of today's.
        losses = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    alpha = trained.net.branch_weights()
    result = {"metrics": metrics, "alpha": alpha, "exchanged": shares, "losses": losses}
    write_json(kept, result)
    return result


def report(found: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Tables as Markdown: scores, means over the seeds with their range; exchanged shares by layer."""
    lines = [
        "| training | RGB: mean IoU | depth: mean IoU | ensemble: mean IoU | ensemble: pixel accuracy "
        "| α of RGB | exchanged, mean of the layers |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seeds in found.items():

        def mean(key: str, seeds: dict[int, dict[str, Any]] = seeds) -> str:
            values = [100 * result["metrics"][key] for result in seeds.values() if key in result["metrics"]]
            if not values:
                return ""
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            return f"{statistics.mean(values):.1f}{spread}"

        results = list(seeds.values())
        alphas = [result["alpha"][0] for result in results]
        shares = [share for result in results for share in result["exchanged"].values()]
        scores = [f"{output}/mean_iou" for output in ("rgb", "depth", "ensemble")]
        alone = len(results[0]["alpha"]) == 1
        cells = [
            TITLES[name],
            *(mean(key) for key in scores),
            mean("ensemble/pixel_accuracy"),
            "" if alone else f"{statistics.mean(alphas):.2f}",
            f"{100 * statistics.mean(shares):.1f} %" if shares else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    exchanging = {name: seeds for name, seeds in found.items() if next(iter(seeds.values()))["exchanged"]}
    if exchanging:
        lines += ["", "Share of exchanged channels by layer, in per cent, first seed:", ""]
        lines += [f"| layer | {' | '.join(TITLES[name] for name in exchanging)} |"]
        lines += ["|---|" + "---|" * len(exchanging)]
        columns = [next(iter(seeds.values()))["exchanged"] for seeds in exchanging.values()]
        for layer in columns[0]:
            lines.append(f"| {layer} | {' | '.join(f'{100 * column[layer]:.1f}' for column in columns)} |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, dict[int, dict[str, Any]]]) -> bytes:
    """The ensemble's cross-entropy in training and the exchanged share, of the first seed, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, seeds in found.items():
        rows = next(iter(seeds.values()))["losses"]
        steps = [row["step"] for row in rows]
        ensemble = [row["loss/ensemble"] for row in rows]
        smooth = [statistics.mean(ensemble[max(0, i - 4) : i + 1]) for i in range(len(ensemble))]
        (line,) = left.plot(steps, smooth, label=TITLES[name])
        if next(iter(seeds.values()))["exchanged"]:
            right.plot(steps, [100 * row["exchanged"] for row in rows], color=line.get_color())
    left.set(xlabel="step", ylabel="cross-entropy of the ensemble, mean of 50 steps")
    right.set(xlabel="step", ylabel="exchanged channels, per cent")
    left.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.experiments.exchange", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("data", type=Path, help="NYUDv2 at 384x288")
    parser.add_argument("weights", type=Path, help="the encoder's ImageNet weights")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/exchange"))
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="trainings")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, help="validation images to measure on; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS / "exchange", help="without suffix")
    args = parser.parse_args(argv)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in args.only:
        for seed in args.seeds:
            run = args.folder / (name if seed == 0 else f"{name}_seed{seed}")
            settings = [f"data.root={args.data}", f"model.weights={args.weights}", f"run.output={run}"]
            settings += [f"run.seed={seed}", *BUDGET, *RUNS[name]]
            if code := train(RECIPE, settings, resume=(run / checkpoint.LAST).is_file()):
                return code
            found.setdefault(name, {})[seed] = measure(run, args.images)
    table = report(found)
    print(table)
    measured = "all" if args.images is None else f"the first {args.images}"
    shown = f"`python -m bench.experiments.exchange`: recipe {RECIPE}, {', '.join(BUDGET)}; "
    shown += f"seeds {args.seeds}; {measured} validation images\n\n"
    write(args.out.with_suffix(".md"), shown + table)
    everything = {"machine": machine(), "recipe": RECIPE, "budget": BUDGET, "runs": RUNS, "found": found}
    write(args.out.with_suffix(".json"), json.dumps(everything, indent=1) + "\n")
    write(args.out.with_suffix(".png"), plot(found))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UsageError, DataError) as error:
        sys.exit(f"error: {error}")
