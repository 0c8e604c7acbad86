"""The predict command: image files or video in, label maps, coloured maps and overlays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from models.data import IMAGE_SUFFIXES
from models.messages import suggest
from models.segmentation.build import output_names
from models.segmentation.inference import predict_labels
from models.segmentation.load import load
from models.segmentation.network import SegmentationNetwork
from models.segmentation.pictures import (
    Picture,
    colour,
    contact_sheet,
    overlay,
    scene_pictures,
    show_input,
    write_picture,
)
from models.segmentation.settings import SegmentationRecipe
from models.training.errors import UsageError, existing

LABELS, COLOURED, OVERLAYS = FOLDERS = ("labels", "coloured", "overlays")


def predict_files(
    checkpoint: Path, inputs: Mapping[str, Path], output: Path, which: str, overrides: Sequence[str]
) -> list[str]:
    """Label images; write ``labels/``, ``coloured/`` and ``overlays/<name>.png`` for every scene.

    ``sheet.png`` shows the inputs and what every output says, of ``eval.sheet`` scenes spread evenly.

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
    trained = load(checkpoint, overrides)
    net, recipe = trained.net, trained.recipe
    names = output_names(recipe)
    if which not in names:
        raise UsageError(f"--which must be one of {', '.join(names)}, got {which!r}{suggest(which, names)}")
    scenes = match_files(inputs, trained.reader.kinds())
    _make_folders(output)
    sheet = np.linspace(0, len(scenes) - 1, min(recipe.eval.sheet, len(scenes))).astype(int).tolist()
    shown = {}
    for index, (name, paths) in enumerate(tqdm(scenes.items(), desc="predict", disable=None)):
        prediction = predict(net, recipe, trained.read(**paths))
        prediction.write(output, name, which)
        if index in sheet:
            shown[name] = prediction.pictures()
    if shown:
        write_picture(output / "sheet.png", contact_sheet(shown))
    return list(scenes)


@dataclass(frozen=True)
class Prediction:
    """What a network says of one scene.

    Attributes:
        recipe: the network's.
        images: ``[M, 3, H, W]`` its inputs, on the CPU.
        labels: by output ``[H, W]`` classes.
    """

    recipe: SegmentationRecipe
    images: Tensor
    labels: dict[str, Tensor]

    def classes(self, which: str) -> NDArray[np.uint8]:
        """An output's label map."""
        return self.labels[which].cpu().numpy().astype(np.uint8)

    def overlay(self, which: str) -> Picture:
        """An output's coloured label map laid over the colour picture, or the first input without one."""
        modalities = self.recipe.data.modalities
        shown = modalities.index("rgb") if "rgb" in modalities else 0
        picture = show_input(self.images[shown].numpy(), modalities[shown])
        return overlay(picture, colour(self.classes(which), self.recipe.data.num_classes))

    def pictures(self) -> dict[str, Picture]:
        """Every ``input <modality>`` and every output's coloured label map."""
        data = self.recipe.data
        return scene_pictures(self.images, self.labels, data.modalities, data.num_classes)

    def write(self, folder: Path, name: str, which: str) -> None:
        """Write an output's label map, coloured map and overlay below ``FOLDERS``, as ``<name>.png``."""
        classes = self.classes(which)
        write_picture(folder / LABELS / f"{name}.png", classes)
        write_picture(folder / COLOURED / f"{name}.png", colour(classes, self.recipe.data.num_classes))
        write_picture(folder / OVERLAYS / f"{name}.png", self.overlay(which))


def predict(net: SegmentationNetwork, recipe: SegmentationRecipe, images: Tensor) -> Prediction:
    """What a network in evaluation mode says of one scene's inputs ``[M, 3, H, W]``."""
    found = predict_labels(
        net,
        images.to(next(net.parameters()).device),
        images.shape[-2:],
        recipe.data.modalities,
        recipe.eval,
    )
    labels = {name: each[0] for name, each in zip(output_names(recipe), found, strict=True)}
    return Prediction(recipe, images.cpu(), labels)


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


def _make_folders(output: Path) -> None:
    try:
        for folder in FOLDERS:
            (output / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: cannot make {output}: {error.strerror}") from None
