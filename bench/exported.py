"""How far exported files agree with the network they were made of, on real images and in fresh processes.

    python -m bench.exported ../shared/data/nyudv2_384

A Light-Weight RefineNet-18 of random weights, a third of whose own channels is exchanged, is exported in
every format. Each file labels 20 validation images of the folder by the program of docs/deployment.md, in a
process that cannot import this toolkit: each by itself, one cut to odd sides, and three at once.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.__main__ import main as cen
from models.segmentation import deployment
from models.segmentation.build import build_network, build_reader, with_normalization
from models.segmentation.load import describe, load
from models.training import checkpoint, config, registry
from tests.helpers.isolated import RUNTIMES, answers, is_installed
from tests.helpers.networks import randomise_norms

CLASSES = 40


def write_network(path: Path, root: Path) -> None:
    """The network's file."""
    torch.manual_seed(0)
    settings = [f"data.root={root}", "data.depth_scale=6528", "model.network=light_refinenet"]
    settings += ["model.encoder=resnet18", "model.weights=none", "run.device=cpu"]
    recipe = with_normalization(config.override(registry.find("nyudv2_384_cen_refinenet18"), settings))
    net = build_network(recipe)
    randomise_norms(net, 1 / 3)
    record = describe(build_reader(recipe.data), [f"class {label}" for label in range(CLASSES)])
    header = checkpoint.header("nyudv2_384_cen_refinenet18", recipe)
    checkpoint.save_network(path, {**header, **record, "task": {"net": net.state_dict()}})


def batches(scenes: Sequence[Tensor]) -> list[Tensor]:
    """Scenes ``[2, 3, H, W]`` as inputs ``[2*N, 3, H, W]``."""
    three = torch.stack(list(scenes[:3]), 1).flatten(0, 1)
    return [*scenes, scenes[0][..., 2:-1, 4:-1], three]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Agreement of exported files with their network.")
    parser.add_argument("root", type=Path, help="folder of NYUDv2 at 288x384")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--size", type=int, nargs=2, default=[144, 192], help="of the inputs")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        network = folder / "net.safetensors"
        write_network(network, options.root.resolve())
        trained = load(network, ["run.device=cpu"])
        scenes = [
            F.interpolate(scene, options.size, mode="nearest-exact")
            for scene in deployment.scenes(trained, options.images)
        ]
        files: dict[tuple[str, ...], Path] = {}
        for runtime, (_, format, name) in RUNTIMES.items():
            if not is_installed(runtime):
                print(f"{runtime}: not installed")
                continue
            if format not in files:
                files[format] = folder / name
                command = ["export", str(network), "--format", *format, "--output", str(folder / name)]
                assert cen([*command, "--scenes", "1"]) == 0
            inputs = batches(scenes)
            (folder / runtime).mkdir()
            pairs = [[x.numpy() for x in image.chunk(2)] for image in inputs]
            found, _, errors = answers(runtime, files[format], folder / runtime, pairs)
            assert not errors, errors
            print(f"{runtime}: {_agreement(trained.net, inputs, found)}", flush=True)


@torch.no_grad()
def _agreement(net: torch.nn.Module, inputs: Sequence[Tensor], found: Sequence[np.ndarray | None]) -> str:
    same, pixels = 0, 0
    gaps, sizes = list[Tensor](), list[Tensor]()
    for images, logits in zip(inputs, found, strict=True):
        expected = net(images.contiguous()).ensemble
        assert logits is not None
        answer = torch.from_numpy(logits)
        gaps.append((answer - expected).abs().max())
        sizes.append(expected.abs().max())
        same += int((answer.argmax(1) == expected.argmax(1)).sum())
        pixels += expected[:, 0].numel()
    difference, largest = (torch.stack(each).max().item() for each in (gaps, sizes))
    return (
        f"{len(inputs)} inputs: largest difference {difference:.1e} of {largest:.3g}, "
        f"{pixels - same} of {pixels} pixels with another class"
    )


if __name__ == "__main__":
    main()
