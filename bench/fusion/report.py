"""What the trainings found: tables as Markdown, curves, and scenes with every method's labels."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from statistics import mean, stdev

import cv2
import numpy as np
from matplotlib.figure import Figure

from bench.fusion.budgets import HELD_OUT, LONG, RECIPE, SEARCH_PART
from bench.fusion.methods import METHODS
from bench.fusion.plans import SCORE, Plan, Result, chosen, long_plans, search_plans, table_plans
from bench.fusion.runs import CORRUPTED_IMAGES, SHOWN, Place, picture_file, png
from bench.harness import files
from models.data.loading import eval_loader, subset
from models.segmentation.build import open_split
from models.segmentation.evaluate import example_scenes
from models.segmentation.visualize import scene_images
from models.training import config, registry
from models.visualize import Image, below, beside, captioned

REPORT, CURVES, SCENES = "report.md", "curves.png", "scenes.png"
SMOOTH = 5  # logged losses that a curve averages

Found = dict[str, dict[int, Result]]  # by method and seed


def write(place: Place) -> None:
    """Write the report of all results that there are."""
    table = _found(place, table_plans(place.budget, place.read))
    parts = [_head(place), *_search(place)]
    if table:
        parts += [
            "## Table",
            "",
            *_scores(table),
            "",
            *_differences(table),
            *_shares(table),
            *_corrupted(table),
        ]
        files.write(place.results / CURVES, _curves(table))
        if (scenes := _scenes(place)) is not None:
            files.write(place.results / SCENES, png(scenes))
    if long := _found(place, long_plans(place.budget, place.read)):
        parts += [f"## {LONG} times as long", "", *_scores(long), "", *_differences(long)]
    files.write(place.results / REPORT, "\n".join(parts) + "\n")


def _found(place: Place, plans: Iterable[Plan]) -> Found:
    found: Found = {}
    for plan in plans:
        if (result := place.read(plan)) is not None:
            found.setdefault(plan.method, {})[plan.seed] = result
    return found


def _head(place: Place) -> str:
    budget = place.budget
    return (
        f"`python -m bench.fusion`: recipe {RECIPE} with {', '.join(budget.settings)}. {budget.steps} steps, "
        f"seeds {', '.join(map(str, budget.seeds))}; scores of all validation images in per cent, the "
        "mean over seeds ± their standard deviation.\n"
    )


def _search(place: Place) -> list[str]:
    """The search: the held-out score of everything that was tried, the choice in bold."""
    budget = place.budget
    rows = []
    for method in budget.methods:
        choice = chosen(budget, method, place.read)
        cells = []
        for plan in search_plans(budget, method, place.read):
            if (result := place.read(plan)) is None:
                continue
            rates = " / ".join(f"{plan.choice.factor * rate:g}" for rate in budget.rates)
            setting = f"{rates}, θ {plan.choice.threshold}" if plan.choice.threshold else rates
            score = "diverged" if "diverged" in result else f"{100 * result['metrics'][SCORE]:.1f}"
            cells.append(f"{setting}: " + (f"**{score}**" if plan.choice == choice else score))
        if cells:
            rows.append(f"| {METHODS[method].title} | {'; '.join(cells)} |")
    if not rows:
        return []
    return [
        "## Search",
        "",
        f"Ensemble's mean IoU on the held-out {HELD_OUT}th of the training list after 1/{SEARCH_PART} of the "
        "steps, by learning rates of encoder / decoder and threshold; what goes on is bold.",
        "",
        "| method | tried |",
        "|---|---|",
        *rows,
        "",
    ]


def _scores(found: Found) -> list[str]:
    head = (
        *("method", "seeds", "RGB mIoU", "depth mIoU", "ensemble mIoU", "pixel accuracy", "α of RGB"),
        *("exchanged", "parameters", "multiply-adds", "training time"),
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method, seeds in found.items():
        results = list(seeds.values())
        shares = [share for result in results for share in result["exchanged"].values()]
        alphas = [result["alpha"][0] for result in results if len(result["alpha"]) > 1]
        cells = [
            METHODS[method].title,
            str(len(results)),
            *(_spread(results, f"{name}/mean_iou") for name in ("rgb", "depth", "ensemble")),
            _spread(results, "ensemble/pixel_accuracy"),
            f"{mean(alphas):.2f}" if alphas else "",
            f"{100 * mean(shares):.1f} %" if shares else "",
            f"{results[0]['parameters'] / 1e6:.2f} M",
            f"{results[0]['multiply_adds'] / 1e9:.1f} G",
            f"{mean(result['training_seconds'] for result in results) / 60:.0f} min",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    machines = {f"{r['machine']['cpu']}, {r['machine']['date']}" for s in found.values() for r in s.values()}
    return [*lines, "", f"Trained on {'; '.join(sorted(machines))}."]


def _spread(results: Sequence[Result], key: str) -> str:
    values = [100 * result["metrics"][key] for result in results if key in result["metrics"]]
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _differences(found: Found) -> list[str]:
    """Each CEN against each other fusion, seed by seed: where a gain is beyond the spread and where not."""
    lines = []
    for method in (name for name in found if METHODS[name].exchanges):
        for other in (name for name in found if name != method and name not in ("rgb", "depth")):
            pairs = [
                100 * (found[method][seed]["metrics"][SCORE] - found[other][seed]["metrics"][SCORE])
                for seed in found[method].keys() & found[other].keys()
            ]
            if len(pairs) > 1:
                error = stdev(pairs) / len(pairs) ** 0.5
                verdict = "beyond" if abs(mean(pairs)) > 2 * error else "within"
                lines.append(
                    f"| {METHODS[method].title} | {METHODS[other].title} | {mean(pairs):+.2f} | {error:.2f} "
                    f"| {verdict} |"
                )
    if not lines:
        return []
    return [
        "Ensemble's mean IoU, difference of the same seeds, and whether it is beyond two standard errors:",
        "",
        "| method | against | difference | standard error | |",
        "|---|---|---|---|---|",
        *lines,
        "",
    ]


def _shares(found: Found) -> list[str]:
    exchanging = {name: _first(seeds) for name, seeds in found.items() if METHODS[name].exchanges}
    if not exchanging:
        return []
    layers = next(iter(exchanging.values()))["exchanged"]
    rows = []
    for layer in layers:
        values = (f"{100 * each['exchanged'][layer]:.1f}" for each in exchanging.values())
        rows.append(f"| {layer} | {' | '.join(values)} |")
    titles = " | ".join(METHODS[name].title for name in exchanging)
    return [
        "Channels exchanged by layer, in per cent of both modalities' channels, first seed:",
        "",
        *(f"| layer | {titles} |", "|---" * (len(exchanging) + 1) + "|"),
        *rows,
        "",
    ]


def _corrupted(found: Found) -> list[str]:
    results = {name: _first(seeds) for name, seeds in found.items() if "corrupted" in _first(seeds)}
    if not results:
        return []
    clean = {name: result["corrupted"][""] for name, result in results.items()}
    rows = []
    for corruption in next(iter(results.values()))["corrupted"]:
        cells = [corruption or "clean"]
        for name, result in results.items():
            score = result["corrupted"][corruption]
            change = f" ({100 * (score - clean[name]):+.1f})" if corruption else ""
            cells.append(f"{100 * score:.1f}{change}")
        rows.append(f"| {' | '.join(cells)} |")
    titles = " | ".join(METHODS[name].title for name in results)
    return [
        f"Ensemble's mean IoU on {CORRUPTED_IMAGES} validation images with one modality corrupted "
        "(docs/robustness.md), and the difference to clean ones, first seed:",
        "",
        *(f"| corruption | {titles} |", "|---" * (len(results) + 1) + "|"),
        *rows,
        "",
    ]


def _first(seeds: dict[int, Result]) -> Result:
    return seeds[min(seeds)]


def _curves(found: Found) -> bytes:
    """The ensemble's cross-entropy in training and the exchanged share, of the first seed, as PNG."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, seeds in found.items():
        curve = _first(seeds)["curve"]
        losses = curve["loss/ensemble"]
        smooth = [mean(losses[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(losses))]
        (line,) = left.plot(curve["step"], smooth, label=METHODS[name].title)
        if METHODS[name].exchanges:
            shares = [100 * share for share in curve["exchanged"]]
            right.plot(curve["step"], shares, color=line.get_color(), label=METHODS[name].title)
    left.set(xlabel="step", ylabel=f"cross-entropy of the ensemble, mean of {SMOOTH} logs")
    right.set(xlabel="step", ylabel="exchanged channels, per cent", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _scenes(place: Place) -> Image | None:
    """A row for each input, the target and every method, a column for each scene; None without pictures."""
    rows = []
    for plan in table_plans(place.budget, place.read):
        if (file := picture_file(place, plan)).is_file():
            labels = cv2.imread(str(file))
            assert labels is not None, file
            rows.append(captioned(np.ascontiguousarray(labels[..., ::-1]), METHODS[plan.method].title))
    return below([*_inputs(place), *rows]) if rows else None


def _inputs(place: Place) -> list[Image]:
    settings = [*place.budget.settings, f"data.root={place.data}"]
    data = config.override(registry.find(RECIPE), settings).data
    dataset = open_split(data, "val")
    scenes = [
        scene_images(batch.images, {"target": batch.target[0]}, data)
        for batch in eval_loader(subset(dataset, example_scenes(dataset, SHOWN)))
    ]
    return [captioned(beside([scene[name] for scene in scenes]), name) for name in scenes[0]]
