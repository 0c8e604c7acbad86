"""The predict command: image files in, label maps, coloured maps and overlays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.data import Reader, broaden
from models.messages import suggest
from models.segmentation.build import build_reader, output_names
from models.segmentation.evaluate import predict_labels
from models.segmentation.load import load_network
from models.segmentation.pictures import colour, overlay, show_input, write_picture
from models.training.errors import UsageError, existing

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
FOLDERS = ("labels", "coloured", "overlays")


def predict_files(
    checkpoint: Path, inputs: Mapping[str, Path], output: Path, which: str, overrides: Sequence[str]
) -> list[str]:
    """Label images; write ``labels/``, ``coloured/`` and ``overlays/<name>.png`` for every scene.

    Args:
        checkpoint: run folder or checkpoint.
        inputs: by modality an image, or a folder of images that are matched by their names without suffix.
            Scenes may differ in size, the modalities of one may not.
        output: folder to write to.
        which: ``ensemble``, or the modality whose branch to take.
        overrides: ``field=value`` assignments, such as another ``data.depth_scale``.

    Returns:
        The scenes' names.

    Raises:
        UsageError: a path, modality or output that does not exist; images that do not pair up.
        DataError: a broken image, or modalities of different size; the message names the file.
    """
    net, recipe, _ = load_network(checkpoint, overrides)
    names = output_names(recipe)
    if which not in names:
        raise UsageError(f"--which must be one of {', '.join(names)}, got {which!r}{suggest(which, names)}")
    reader = build_reader(recipe.data)
    scenes = match_files(inputs, reader.kinds())
    try:
        for folder in FOLDERS:
            (output / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: cannot make {output}: {error.strerror}") from None
    device = next(net.parameters()).device
    for name, paths in tqdm(scenes.items(), desc="predict", disable=None):
        images = read_inputs(paths, reader)
        outputs = predict_labels(net, images.to(device), images.shape[-2:], recipe.eval.interpolation)
        labels = outputs[names.index(which)][0].cpu().numpy().astype(np.uint8)
        coloured = colour(labels, recipe.data.num_classes)
        picture = show_input(images[0].numpy(), recipe.data.modalities[0])
        for folder, result in zip(FOLDERS, (labels, coloured, overlay(picture, coloured)), strict=True):
            write_picture(output / folder / f"{name}.png", result)
    return list(scenes)


def match_files(inputs: Mapping[str, Path], modalities: Sequence[str]) -> dict[str, dict[str, Path]]:
    """By scene, in order of their names, the file of every modality.

    Raises:
        UsageError: a modality or its counterpart is missing; a folder without images, or with two of
            one name; a file beside a folder.
    """
    for modality in modalities:
        if modality not in inputs:
            raise UsageError(
                f"--{modality} is required: the network's modalities are {', '.join(modalities)}"
            )
    for modality in inputs:
        if modality not in modalities:
            raise UsageError(
                f"--{modality} is no input: the network's modalities are {', '.join(modalities)}"
            )
    paths = {modality: existing(inputs[modality], f"--{modality}") for modality in modalities}
    first = modalities[0]
    if not any(path.is_dir() for path in paths.values()):
        return {paths[first].stem: paths}
    for modality, path in paths.items():
        if not path.is_dir():
            raise UsageError(f"--{modality}: {path} is a file; give a folder for every modality, or for none")
    found = {modality: _images(path) for modality, path in paths.items()}
    for files in found.values():
        for stem, file in files.items():
            for other, others in found.items():
                if stem not in others:
                    raise UsageError(f"{file} has no counterpart in {paths[other]}{suggest(stem, others)}")
    return {stem: {modality: found[modality][stem] for modality in modalities} for stem in found[first]}


def read_inputs(paths: Mapping[str, Path], reader: Reader) -> Tensor:
    """The network's input for one scene, ``[M, 3, H, W]``.

    Raises:
        DataError: a broken image, or images of different size.
    """
    images = reader.read(paths)
    return torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image in broaden(images, 3)]))


def _images(folder: Path) -> dict[str, Path]:
    """The images of a folder by their names without suffix."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and (twin := files.setdefault(path.stem, path)) != path:
            raise UsageError(
                f"{twin} and {path} differ in the suffix only: which one is the scene's? Move the other away"
            )
    if not files:
        raise UsageError(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files
