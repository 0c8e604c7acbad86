"""One training: its settings, and its result in a file of its own."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path

import cv2

import models.recipes  # noqa: F401 - fills the registry
from bench.fusion.budgets import HELD_OUT, LONG, MOMENTUM, RECIPE, SCENES_AT_ONCE, SEARCH_PART, Budget
from bench.fusion.methods import CORRUPTED, METHODS
from bench.fusion.plans import SCORE, Plan, Result, expert_plans
from bench.harness.files import write
from bench.harness.machine import machine
from cen_ext import exchanging_layers
from models.data import find_layout
from models.networks.counting import count_multiply_adds, count_parameters
from models.segmentation import robustness
from models.segmentation.build import open_validation, output_names
from models.segmentation.evaluate import evaluate, example_images
from models.segmentation.load import TrainedNetwork, load
from models.training import checkpoint, config, registry
from models.training.errors import UsageError
from models.training.loop import Diverged
from models.training.scales import travel_by_stage
from models.training.train import train
from models.visualize import Image, beside

SHOWN = 4  # validation scenes of the picture
CORRUPTED_IMAGES = 100  # validation images that are corrupted, spread evenly


@dataclass(frozen=True)
class Place:
    """Where things are: data, weights, folders of runs and of results; and the budget."""

    data: Path
    weights: Path
    runs: Path
    results: Path
    budget: Budget

    def steps(self, phase: str) -> int:
        steps = self.budget.steps
        return {"search": steps // SEARCH_PART, "table": steps, "long": steps * LONG}[phase]

    def settings(self, plan: Plan) -> list[str]:
        """Of the recipe, in the order in which later ones count."""
        budget, method, choice = self.budget, METHODS[plan.method], plan.choice
        steps = self.steps(plan.phase)
        encoder, decoder = (choice.factor * rate for rate in budget.rates)
        settings = [
            *budget.settings,
            *(f"optim.stages.0.steps={steps}", "optim.stages.1.steps=0", "optim.stages.2.steps=0"),
            *(f"optim.stages.0.encoder_lr={encoder:g}", f"optim.stages.0.decoder_lr={decoder:g}"),
            # The scores are found afterwards, of all images.
            *(f"run.evaluate_steps={steps}", "eval.limit=8", "eval.pictures=0", f"run.seed={plan.seed}"),
            *method.settings,
        ]
        if method.travel is None:
            return [*settings, "loss.sparsity=0"]
        settings.append(f"fusion.threshold={choice.threshold}")
        optim = config.override(registry.find(RECIPE), settings).optim
        (way, *_) = travel_by_stage(optim, [steps], steps, MOMENTUM)
        return [*settings, f"loss.sparsity={method.travel / (encoder * way):.4g}"]

    def inputs(self, plan: Plan) -> list[str]:
        """Further settings, which say where things lie here."""
        found = [f"data.root={self.data}"]
        experts = list(expert_plans(self.budget, plan, self.read))
        if experts:
            found.append(f"model.experts={','.join(str(self.last(expert)) for expert in experts)}")
        elif METHODS[plan.method].pretrained:
            found.append(f"model.weights={self.weights}")
        if plan.phase == "search":
            found.append(f"data.lists={','.join(map(str, held_out_lists(self.data, self.runs)))}")
        return found

    def last(self, plan: Plan) -> Path:
        """A training's last checkpoint."""
        return self.runs / plan.name / checkpoint.LAST

    def read(self, plan: Plan) -> Result | None:
        """A training's result; None where there is none yet.

        Raises:
            UsageError: it is of other settings.
        """
        file = result_file(self, plan)
        if not file.is_file():
            return None
        kept: Result = json.loads(file.read_text())
        before, now = set(kept["settings"]), set(self.settings(plan))
        if before != now:
            raise UsageError(
                f"{file} is of other settings, {sorted(before - now)} for {sorted(now - before)}: "
                "choose another --results, or remove it"
            )
        return kept


def held_out_lists(data: Path, folder: Path) -> tuple[Path, Path]:
    """Write the training list in two parts, of which the second, a fifth, takes the validation list's place.

    Returns:
        Their absolute paths.
    """
    listed = (data / find_layout(data).list_file("train")).read_text().splitlines()
    held_out = [i // SCENES_AT_ONCE % HELD_OUT == HELD_OUT - 1 for i in range(len(listed))]
    paths = (folder / "search_train.txt", folder / "search_held_out.txt")
    for path, wanted in zip(paths, (False, True), strict=True):
        lines = [line for line, held in zip(listed, held_out, strict=True) if held == wanted]
        write(path, "\n".join(lines) + "\n")
    first, second = (path.resolve() for path in paths)
    return first, second


def carry_out(place: Place, plan: Plan) -> None:
    """Train and measure, unless that was done before.

    Raises:
        UsageError: the result that is there is of other settings; as ``train``.
        SystemExit: the training was interrupted; the same command goes on.
    """
    if place.read(plan) is not None:
        return
    run = place.runs / plan.name
    for expert in expert_plans(place.budget, plan, place.read):
        _train(place, expert)  # its result may be from another machine, where its checkpoint is
    try:
        _train(place, plan)
    except Diverged:
        if plan.phase != "search":
            raise
        # The search has learned something: this is no choice.
        _keep(place, plan, {"diverged": True, "metrics": {SCORE: 0.0}})
        return
    trained = load(place.last(plan), ["eval.limit=none", "eval.batch_size=4"])
    found = measure(trained, run)
    if plan.phase == "table" and plan.seed == place.budget.seeds[0]:
        write(picture_file(place, plan), png(labels_of_scenes(trained)))
        if plan.method in CORRUPTED:
            found["corrupted"] = measure_corrupted(trained)
    _keep(place, plan, found)


def _train(place: Place, plan: Plan) -> None:
    """Train to the end, from where an earlier attempt came to, if it is not done.

    Raises:
        Diverged, UsageError, SystemExit: as ``carry_out``.
    """
    settings = [*place.settings(plan), *place.inputs(plan), f"run.output={place.runs / plan.name}"]
    if code := train(RECIPE, settings, resume=place.last(plan).is_file()):
        raise SystemExit(code)


def _keep(place: Place, plan: Plan, found: Result) -> None:
    result = {"settings": place.settings(plan), "machine": machine(), **found}
    write(result_file(place, plan), json.dumps(result) + "\n")


def result_file(place: Place, plan: Plan) -> Path:
    return place.results / f"{plan.name}.json"


def picture_file(place: Place, plan: Plan) -> Path:
    return place.results / f"{plan.name}.png"


def measure(trained: TrainedNetwork, run: Path) -> Result:
    """Scores of all validation images, costs, and the course of the training."""
    counts = evaluate(trained.net, open_validation(trained.recipe), trained.recipe)
    assert counts is not None  # nothing stops it
    names = output_names(trained.recipe)
    shares = {
        name: float(layer.replaced().float().mean()) for name, layer in exchanging_layers(trained.net).items()
    }
    losses, speed = (_rows(run / name) for name in ("losses.csv", "speed.csv"))
    data = trained.recipe.data
    images = data.batch_size * trained.recipe.run.log_steps
    shape = (len(data.modalities), 3, data.crop, data.crop)
    return {
        "metrics": {name: round(value, 5) for name, value in counts.compute().items()},
        "class_iou": {name: [round(value, 4) for value in counts.class_iou(name)] for name in names},
        "alpha": [round(weight, 4) for weight in trained.net.branch_weights()],
        "exchanged": {name: round(share, 4) for name, share in shares.items()},
        "curve": {
            name: [round(row[name], 5) for row in losses] for name in ("step", "loss/ensemble", "exchanged")
        },
        "parameters": count_parameters(trained.net),
        "multiply_adds": count_multiply_adds(trained.net, shape),
        "training_seconds": round(sum(images / row["images_per_second"] for row in speed)),
    }


def measure_corrupted(trained: TrainedNetwork) -> dict[str, float]:
    """The ensemble's mean IoU with each corruption of the standard list, "" for none, on some images."""
    recipe = replace(trained.recipe, eval=replace(trained.recipe.eval, limit=CORRUPTED_IMAGES))
    dataset = open_validation(recipe)
    clean = evaluate(trained.net, dataset, recipe)
    assert clean is not None  # nothing stops it
    rows = robustness.measure(trained.net, dataset, recipe, robustness.plan(dataset, recipe, ["all"]))
    scores = {str(row.corruption): row.metrics for row in rows}
    return {name: round(metrics[SCORE], 5) for name, metrics in {"": clean.compute(), **scores}.items()}


def _rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def labels_of_scenes(trained: TrainedNetwork) -> Image:
    """The ensemble's labels of a few validation scenes, in color and beside each other."""
    dataset = open_validation(trained.recipe)
    scenes = example_images(trained.net, dataset, trained.recipe, SHOWN, trained.palette)
    return beside([images["ensemble"] for images in scenes.values()])


def png(image: Image) -> bytes:
    """An image as a PNG file's content."""
    _, encoded = cv2.imencode(".png", image[..., ::-1])  # blue first, as OpenCV has it
    return bytes(encoded)
