"""Write the old files, with the version whose files they are to be.

In a checkout of commit cb86a0c whose extension is built, with this folder's path for FOLDER:

    OMP_NUM_THREADS=1 PYTHONPATH=$PWD:$PWD/tests python FOLDER/write.py [CASE ...]

Every case is trained for a few steps on generated scenes, its large tensors are drawn anew (``skeleton.py``),
and the version's own results on the files so made are recorded beside them. Existing scenes are kept.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import observe
import skeleton
import torch

import models
from models.__main__ import main

HERE = Path(__file__).resolve().parent
SMALL = [
    *["data.batch_size=2", "data.crop=32", "eval.pictures=0", "run.device=cpu", "run.workers=0"],
    *[
        "run.log_steps=2",
        "run.evaluate_epochs=9",
        "run.evaluate_steps=none",
        f"run.steps={observe.STEPS}",
    ],
]
# Two steps an epoch: the file lies within the second epoch, between two logs of the losses; what follows
# crosses the ends of epochs and stages.
SEGMENTATION = [
    *SMALL,
    *["data.shorter_side=32", "model.width=4", "model.decoder_init=kaiming", "optim.method=sgd"],
    *["model.initial_scale=none", "model.threshold=0.2"],
    *["optim.stages.0.steps=4", "optim.stages.1.steps=1", "optim.stages.2.steps=1"],
]
TRANSLATION = [
    *SMALL,
    *["data.resize=36", "model.size=32", "model.base_width=4", "model.discriminator_width=4"],
    *["model.initial_scale=none", "model.threshold=0.2", f"optim.stages.0.steps={observe.END}"],
]
PSPNET = ["model.network=pspnet", "model.decoder_init=torch"]


@dataclass(frozen=True)
class Case:
    """A run. ``exports``: the suffixes of the network's files that are made of it."""

    overrides: Sequence[str] = ()
    recipe: str = "synthetic_demo"
    exports: Sequence[str] = ()

    @property
    def scenes(self) -> str:
        return "rooms" if self.recipe == "synthetic_demo" else "views"

    def settings(self) -> list[str]:
        small = SEGMENTATION if self.scenes == "rooms" else TRANSLATION
        return [*small, *self.overrides]


def cases() -> dict[str, Case]:
    """By name."""
    variants = {
        "none": "exchange=none",
        "private_convolutions": "convolutions=private exchange=none",
        "shared_norms": "norms=shared exchange=none",
        "penalty_without_exchange": "exchange=none penalty=own",
        "penalty_all": "penalty=all",
        "portion": "exchange=portion",
        "smallest_downsampling": "exchange=smallest exchange_at=downsampling portion=0.2",
        "random": "exchange=random",
        "discard": "exchange=discard",
        "sum": "exchange=sum",
        "gated_sum": "exchange=gated_sum",
        "concat": "fusion=concat",
    }
    of_pspnet = ("private_convolutions", "shared_norms", "portion", "random", "gated_sum", "concat")
    made = {
        "refinenet": Case(exports=[".safetensors", ".pt"]),
        "refinenet_signed": Case(["model.criterion=signed", "model.region=all", "loss.per_output=true"]),
        "refinenet_average": Case(["optim.method=adamw", "optim.ema=0.9"], exports=[".safetensors"]),
        "refinenet_rgb": Case(["data.modalities=rgb"]),
        "pspnet": Case(PSPNET, exports=[".safetensors"]),
    }
    for name, assignments in variants.items():
        overrides = [f"variant.{each}" for each in assignments.split()]
        region = ["model.region=all"] * (name == "penalty_all")
        made[f"refinenet_{name}"] = Case([*overrides, *region])
        if name in of_pspnet:
            made[f"pspnet_{name}"] = Case([*PSPNET, *overrides])
    unet = "synthetic_translation_demo"
    released = ["model.region=all", "model.decoder_norms=private", "optim.passes=2", "loss.per_output=true"]
    return {
        **made,
        "unet": Case((), unet, [".safetensors", ".pt"]),
        "unet_no_exchange": Case(["model.threshold=0"], unet, [".safetensors"]),
        "unet_released": Case([*released, "optim.ema=none"], unet),
        "unet_one_domain": Case(["data.domains=normal"], unet),
    }


def write(name: str, case: Case) -> None:
    """Write the case's run, and the files made of it, with what this version makes of them."""
    print(f"---- {name}", flush=True)
    command = ["train", case.recipe, *case.settings(), f"data.root={case.scenes}", "run.output=trained"]
    assert main(command) == 0
    # The average and the best are in last.pt as in best.pt, which is of the same step.
    kept = ("config.json", "last.pt", "losses.csv", "metrics.csv")
    files = {f"run/{file}": skeleton.strip(Path("trained", file)) for file in kept}
    record(name, case, files)
    for suffix in case.exports:
        network = f"net{suffix}"
        assert main(["export", "trained", "--output", network]) == 0
        record(f"{name}_exported_{suffix[1:]}", case, {network: skeleton.strip(Path(network))})


def record(name: str, case: Case, files: dict[str, Any]) -> None:
    """Restore the skeletons, use what they make, and keep both."""
    for file, stripped in files.items():
        skeleton.restore(Path("old", file), stripped)
    made = Path("old", next(iter(files)).split("/")[0])
    found = observe.used(made, Path(case.scenes), Path("scratch"))
    if made.is_dir():
        found |= observe.resumed(made, Path(case.scenes))
    contents = {
        "scenes": case.scenes,
        "files": files,
        "machine": observe.machine(),
        "found": {key: skeleton.pack(np.asarray(value)) for key, value in found.items()},
    }
    skeleton.write(HERE / f"{name}.json.gz", contents)
    shutil.rmtree("old")
    shutil.rmtree("scratch")


def imported() -> None:
    """A network in the form that the authors released, imported."""
    from golden_numbers import released_form  # of the old checkout's tests
    from models.segmentation.released import released_names
    from networks import randomise_norms

    from models.segmentation.build import build_network
    from models.training import config, registry

    name = "nyudv2_released_refinenet101"
    overrides = [
        "model.encoder=resnet18",
        "model.width=4",
        "data.num_classes=11",
        "model.decoder_init=kaiming",
    ]
    net = build_network(config.override(registry.find(name), overrides))
    randomise_norms(net)
    torch.save({"segmenter": released_form(released_names(net), net.state_dict())}, "released.pth.tar")
    command = ["import", "released.pth.tar", "--recipe", name, *overrides, "--output", "net.safetensors"]
    assert main(command) == 0
    record("imported", Case(), {"net.safetensors": skeleton.strip(Path("net.safetensors"))})


def prepare() -> None:
    """Generate the scenes, or unpack those that are there."""
    archive = HERE / "scenes.zip"
    if archive.exists():
        shutil.unpack_archive(archive, ".")
        return
    size = ["--train", "4", "--val", "2", "--height", "32", "--width", "40"]
    assert main(["prepare", "synthetic", "scenes/rooms", *size]) == 0
    assert main(["prepare", "synthetic", "scenes/views", "--domains", *size]) == 0
    for unused in ("rgb", "depth_zbuffer", "depth_euclidean"):
        shutil.rmtree(Path("scenes/views", unused), ignore_errors=True)
    shutil.make_archive(str(archive.with_suffix("")), "zip", "scenes")
    shutil.unpack_archive(archive, ".")


if __name__ == "__main__":
    # Another version may be installed; the modules of this one have since moved.
    if Path(models.__file__).parent != Path.cwd() / "models" or not Path("models/encoders").is_dir():
        raise SystemExit(f"run this in a checkout of cb86a0c with PYTHONPATH=$PWD: found {models.__file__}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that the files name no folder of this machine
        prepare()
        for name, case in cases().items():
            if not sys.argv[1:] or name in sys.argv[1:]:
                write(name, case)
                shutil.rmtree("trained")
        if not sys.argv[1:] or "imported" in sys.argv[1:]:
            imported()
