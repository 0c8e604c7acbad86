"""From a run to a program: ``python examples/deploy.py RUN [MODALITY=PICTURE ...]``.

RUN is a segmentation run's folder, a checkpoint or an exported network. Prunes it, exports it to ONNX, labels
a picture with it in ONNX Runtime, and compares that with the network: files such as ``rgb=photo.png
depth=depth.png``, or else the first validation scene. docs/deployment.md has the other formats, and shows how
a program feeds the file where this toolkit is not installed. Results are in ``runs/deployed``.
``pip install '.[models,onnx]'`` brings what it needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import torch

import models
from models.cli import main as cen
from models.data import DataError
from models.deployment import prune
from models.segmentation.build import open_split
from models.segmentation.load import TrainedNetwork
from models.training.errors import UsageError

OUTPUT = Path("runs/deployed")


@torch.no_grad()
def main(run: Path, files: dict[str, Path]) -> int:
    """Export, run and compare a network; the exit code."""
    trained = models.load(run, ["run.device=cpu"])
    if not isinstance(trained, TrainedNetwork):
        raise UsageError(f"{run} translates; this example labels, so name a segmentation network")
    if not files:
        scene = open_split(trained.recipe.data, "val").scenes[0]
        files = {kind: scene[kind] for kind in trained.reader.files()}
    images = trained.read(**files)  # [M, 3, H, W]
    for name, (kept, channels) in prune(trained.net, images).channels.items():
        print(f"{name}: {', '.join(map(str, kept))} of {channels} channels are computed")

    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name in ("net.safetensors", "net.onnx"):  # the network itself; and the program, pruned
        if code := cen(["export", str(run), "--output", str(OUTPUT / name)]):
            return code

    session = onnxruntime.InferenceSession(OUTPUT / "net.onnx", providers=["CPUExecutionProvider"])
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["cen_ext.json"])
    names = metadata["interface"]["modalities"]
    inputs = {name: image[None].numpy() for name, image in zip(names, images, strict=True)}
    (logits,) = session.run(None, inputs)  # [1, K, h, w], coarser than the picture
    expected = trained.net(images).ensemble.numpy()

    width_height = images.shape[:1:-1]
    enlarged = cv2.resize(logits[0].transpose(1, 2, 0), width_height, interpolation=cv2.INTER_LINEAR)
    labels = enlarged.argmax(-1).astype(np.uint8)
    cv2.imwrite(str(OUTPUT / "labels.png"), labels)
    for label, count in enumerate(np.bincount(labels.ravel(), minlength=len(metadata["classes"]))):
        print(f"{metadata['classes'][label]}: {100 * count / labels.size:.1f} % of the picture")

    for path in sorted(OUTPUT.iterdir()):
        print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB")
    difference, largest = np.abs(logits - expected).max(), np.abs(expected).max()
    same = 100 * (logits.argmax(1) == expected.argmax(1)).mean()
    print(f"largest difference of logits {difference:.1e} of {largest:.2g}")
    print(f"same class on {same:.2f} % of pixels")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        pairs = (word.split("=", 1) for word in sys.argv[2:])
        sys.exit(main(Path(sys.argv[1]), {kind: Path(path) for kind, path in pairs}))
    except (DataError, UsageError) as error:
        sys.exit(f"error: {error}")
