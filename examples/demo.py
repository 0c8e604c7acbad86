"""Channel exchanging against single modalities, in minutes on a CPU: ``python examples/demo.py [FOLDER]``.

Makes the procedural rooms, trains the recipe ``synthetic_demo`` with RGB and depth, with RGB alone and with
depth alone for the same number of steps, prints one table and writes one image. Started again, it takes up
where it stopped.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import models.segmentation.recipes  # noqa: F401 - fills the registry
from models.data import DataError, prepare_synthetic
from models.segmentation.build import open_split
from models.segmentation.evaluate import evaluate, example_images
from models.segmentation.load import load
from models.segmentation.metrics import table
from models.training import checkpoint
from models.training.errors import UsageError
from models.training.train import train
from models.visualize import Image, below, beside, captioned, save_image

RUNS = {
    "rgb alone": "rgb",
    "depth alone": "depth",
    "exchanging": "rgb,depth",
}  # modalities by the table's names
SCENES = 6


def main(folder: Path) -> int:
    """Train ``RUNS`` below ``folder`` and compare them; the exit code."""
    start = time.perf_counter()
    root = prepare_synthetic(folder / "data")
    for name, modalities in RUNS.items():
        output = folder / name.replace(" ", "_")
        settings = [f"data.root={root}", f"data.modalities={modalities}", f"run.output={output}"]
        code = train("synthetic_demo", settings, resume=(output / checkpoint.LAST).is_file())
        if code:
            return code
    metrics: dict[str, float] = {}
    columns: dict[str, list[Image]] = {"input rgb": [], "input depth": [], "target": []}
    for name in RUNS:
        _measure(name, folder / name.replace(" ", "_"), metrics, columns)
    constant = {key: metrics.pop(key) for key in list(metrics) if key.startswith("constant/")}
    print(f"\nvalidation images, in per cent, after {time.perf_counter() - start:.0f} s")
    print(table(metrics | constant))
    image = folder / "demo.png"
    for name, column in columns.items():
        column[0] = captioned(column[0], name)
    save_image(image, below([beside(row) for row in zip(*columns.values(), strict=True)]))
    print(f"image: {image}")
    return 0


def _measure(name: str, run: Path, metrics: dict[str, float], columns: dict[str, list[Image]]) -> None:
    """Add a run's scores and images: all of its outputs, or the ensemble alone for a single modality's."""
    trained = load(run / checkpoint.LAST, [f"eval.pictures={SCENES}"])
    net, recipe = trained.net, trained.recipe
    dataset = open_split(recipe.data, "val")
    alone = len(recipe.data.modalities) == 1
    for key, value in evaluate(net, dataset, recipe).compute().items():
        output, score = key.split("/")
        if output == "constant":
            metrics[key] = value
        elif output == "ensemble" or not alone:
            metrics[f"{name}/{score}" if alone else f"{name}: {output}/{score}"] = value
    scenes = example_images(net, dataset, recipe).values()
    columns[name] = [scene["ensemble"] for scene in scenes]
    for key in ("target", *(f"input {modality}" for modality in recipe.data.modalities)):
        columns[key] = [scene[key] for scene in scenes]


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")))
    except (UsageError, DataError) as error:
        sys.exit(f"error: {error}")
