"""CEN's Figure 3: the feature maps of the channels that one modality alone uses, and what they follow.

Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020, Figure 3, shows for RGB and depth
the maps of the channels whose scales are near 0 in one modality or in neither. The paper tells neither the
layer nor the scaling of colors; ``channel_sets.choose`` and ``feature_drawing.draw`` hold ours.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import models.trained
from models.analysis.channel_sets import SETS, Layer, choose, find_layers
from models.analysis.correlations import DRAWS, Correlation, Correlator, boundaries, in_cells, texture
from models.analysis.feature_drawing import DPI, Scene, draw
from models.analysis.feature_maps import FeatureMaps, feature_maps, input_of
from models.data import Batch, DataError, SegmentationSet, eval_loader
from models.data.layouts import LABELS
from models.data.loading import subset
from models.data.survey import spread
from models.networks.fusion import NoFusion
from models.networks.fusion.base import name_of
from models.networks.messages import suggest
from models.networks.systems import System
from models.segmentation.build import open_validation
from models.segmentation.evaluate import chosen_images, evaluating
from models.segmentation.load import TrainedNetwork
from models.segmentation.visualize import show_input
from models.training.errors import UsageError, writable
from models.training.files import replacing, write_json
from models.visualize import Image

NAME = "features"  # of the files
_IMAGES = 3


@dataclass(frozen=True)
class Features:
    """What ``feature_figure`` has drawn and measured.

    Attributes:
        layer: whose maps they are.
        layers: all layers that exchange.
        modalities: their names.
        scenes: those drawn.
        images: how many the correlations are of.
        correlations: none where neither target can be had of the data set.
        notes: what is to be said of it.
    """

    layer: Layer
    layers: Sequence[Layer]
    modalities: tuple[str, ...]
    scenes: Sequence[Scene]
    images: int
    correlations: Sequence[Correlation]
    notes: Sequence[str]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layer": self.layer.name,
            "stage": self.layer.stage,
            "threshold": self.layer.threshold,
            "criterion": self.layer.criterion,
            "layers": [self._plain(layer, other) for layer in self.layers for other in layer.others],
            "scenes": [scene.name for scene in self.scenes],
            "images": self.images,
            "correlations": [each.plain() for each in self.correlations],
            "notes": list(self.notes),
        }

    def _plain(self, layer: Layer, other: int) -> dict[str, Any]:
        replaced = layer.norm.replaced().sum(1).tolist()
        return {
            "layer": layer.name,
            "stage": layer.stage,
            "threshold": layer.threshold,
            "pair": [self.modalities[0], self.modalities[other]],
            "sizes": layer.sizes(other),
            "replaced": {self.modalities[m]: replaced[m] for m in (0, other)},
        }

    def lines(self) -> list[str]:
        """The sets of every layer and the correlations, for a terminal."""
        return [*self._size_lines(), "", *self._correlation_lines()]

    def _size_lines(self) -> list[str]:
        first = self.modalities[0]
        width = max(len(layer.name) for layer in self.layers)
        lines = []
        for other in self.layer.others:
            second = self.modalities[other]
            lines.append(
                f"channels used (|γ| not below θ) by {second} alone: S01, by {first} alone: S10, by both: "
                "S11, by neither: S00"
            )
            head = "".join(f"{name:>6}" for name in SETS)
            lines.append(f"  {'':{width}}  stage       θ{head}  replaced in {first}, {second}")
            for layer in self.layers:
                sizes = "".join(f"{size:>6}" for size in layer.sizes(other).values())
                replaced = layer.norm.replaced().sum(1).tolist()
                mark = "*" if layer.name == self.layer.name else " "
                stage = "-" if layer.stage is None else layer.stage
                lines.append(
                    f"{mark} {layer.name:{width}}  {stage:>5}  {layer.threshold:>6.3g}{sizes}  "
                    f"{replaced[0]}, {replaced[other]}"
                )
        return [*lines, f"* drawn: {', '.join(scene.name for scene in self.scenes)}"]

    def _correlation_lines(self) -> list[str]:
        if not self.correlations:
            return []
        targets = list(dict.fromkeys(each.target for each in self.correlations))
        lines = [
            f"correlation of the sets' mean maps over {self.images} images; in parentheses that of random "
            "sets of as many channels, mean ± standard deviation",
        ]
        rows: dict[str, list[str]] = {"": targets}
        order = self.modalities.index
        alone = [each for each in self.correlations if each.alone]
        for each in sorted(alone, key=lambda each: order(each.modality)):
            rows.setdefault(f"{each.of}, {each.quantity}", []).append(_cell(each))
        width = max(map(len, rows))
        for name, cells in rows.items():
            lines.append(f"{name:{width}}  {''.join(f'{cell:24}' for cell in cells)}".rstrip())
        return lines


def _cell(each: Correlation) -> str:
    if each.value is None:
        return "-"
    drawn = "-" if each.random_mean is None else f"{each.random_mean:.2f} ± {each.random_spread or 0:.2f}"
    return f"{each.value:5.2f} ({drawn})"


def feature_figure(
    trained: TrainedNetwork,
    dataset: SegmentationSet,
    *,
    layer: str | None = None,
    images: int = _IMAGES,
    scenes: Sequence[str] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[Figure, Features]:
    """Draw Figure 3 of a network, with evaluation statistics and the exchange as it is.

    The network computes in float32, whatever it was trained in, and sees whole images of their own size.

    Args:
        trained: a network of two or more modalities whose batch norms exchange by their scales.
        dataset: the scenes; correlations are measured over those of ``chosen_images`` that have all
            modalities.
        layer: the name of the norm to draw; None: ``channel_sets.choose``'s.
        images: how many scenes to draw, spread evenly.
        scenes: the names of those to draw instead.
        draws, seed: of the random sets of channels.

    Returns:
        The figure; and what it shows, in numbers.

    Raises:
        UsageError: the network has one modality, or no layers that exchange by scales; no such layer or
            scene; no layer has channels that either modality alone uses.
        DataError: no scene has all modalities; a file is broken.
    """
    layers = _layers(trained, dataset)
    chosen, notes = choose(layers, layer)
    looked_at = chosen_images(dataset, trained.recipe)
    measured = _complete(dataset, looked_at)
    if not measured:
        raise DataError(f"{dataset.root}: of {len(looked_at)} validation images none has all modalities")
    shown = _shown(dataset, images, scenes)
    correlator = Correlator(chosen, dataset.modalities, draws, seed)
    for index, batch, maps in _maps(trained, dataset, chosen, measured):
        correlator.add(maps, _targets(dataset, index, batch, (maps.z.shape[-2], maps.z.shape[-1])))
    found = [
        Scene(batch.names[0], _inputs(trained, batch), maps.over(chosen.means()))
        for _, batch, maps in _maps(trained, dataset, chosen, shown)
    ]
    correlations = correlator.compute()
    notes += _notes(dataset, len(looked_at) - len(measured), {each.target for each in correlations})
    features = Features(chosen, layers, dataset.modalities, found, len(measured), correlations, notes)
    return draw(chosen, dataset.modalities, found, correlations), features


def write_features(
    path: Path,
    overrides: Sequence[str],
    output: Path | None,
    *,
    layer: str | None = None,
    images: int = _IMAGES,
    scenes: Sequence[str] = (),
) -> None:
    """The work of ``analyse --features``: draw, print the numbers, write ``features.png`` and ``.json``.

    Args:
        path: run folder or checkpoint.
        overrides: ``field=value`` assignments.
        output: folder to write to; None: that of the checkpoint.
        layer, images, scenes: as ``feature_figure``.

    Raises:
        UsageError, DataError: as ``feature_figure``, ``models.load`` and ``open_validation``; it is a network
            for translation; ``output`` cannot be written.
    """
    trained = models.trained.load(path, overrides)
    if not isinstance(trained, TrainedNetwork):
        raise UsageError(
            f"--features: {path} translates images, by instance norms that have other statistics in every "
            "image; the figure is of segmentation networks"
        )
    dataset = open_validation(trained.recipe)
    trained.check(dataset)
    file = writable((output or trained.path.parent) / f"{NAME}.png", "--output")
    figure, features = feature_figure(trained, dataset, layer=layer, images=images, scenes=scenes)
    changed = trained.changes(dataset)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=DPI)
    write_json(
        file.with_suffix(".json"),
        {"checkpoint": str(trained.path), "changed": changed, **features.plain()},
    )
    for note in features.notes:
        print(f"warning: {note}", file=sys.stderr)
    print(trained.path)
    for change in changed:
        print(f"other than in training: {change}")
    print("\n".join(features.lines()))
    print(f"written: {file.with_suffix('')}.png, .json")


def _layers(trained: TrainedNetwork, dataset: SegmentationSet) -> list[Layer]:
    """The layers of a network that the figure can be of.

    Raises:
        UsageError: there are none.
    """
    if len(dataset.modalities) == 1:
        raise UsageError(
            f"--features compares modalities, and {trained.path} has one, {dataset.modalities[0]}"
        )
    if without := dataset.absences.without:
        raise UsageError(
            f"--features compares all modalities: leave out eval.without, which is {','.join(without)}"
        )
    layers = find_layers(trained.net)
    if layers:
        return layers
    fusion = trained.recipe.fusion
    private = isinstance(fusion, NoFusion) and fusion.norms == "private"
    private = private and not isinstance(trained.net, System)
    remedy = "; fusion=exchange fusion.threshold=0.02 draws it as if it exchanged" * private
    raise UsageError(
        f"--features: {trained.path}, of fusion={name_of(fusion)}, has no batch norm that exchanges channels "
        f"by a threshold on its scales, by which the figure's sets of channels are made{remedy}"
    )


def _maps(
    trained: TrainedNetwork, dataset: SegmentationSet, layer: Layer, indices: Sequence[int]
) -> Iterator[tuple[int, Batch, FeatureMaps]]:
    """The maps of the images of these numbers, one by one."""
    device = next(trained.net.parameters()).device
    loader = eval_loader(subset(dataset, indices), 1, trained.recipe.run.workers)
    with evaluating(trained.net):
        for index, batch in zip(indices, tqdm(loader, desc=NAME, leave=False, disable=None), strict=True):
            x = input_of(trained.net, layer.norm, batch.images.to(device))
            yield index, batch, feature_maps(layer.norm, x)


def _complete(dataset: SegmentationSet, indices: Iterable[int]) -> list[int]:
    """Those of some images that have all modalities."""
    return [index for index in indices if not dataset.reader.absent(dataset.scenes[index])]


def _shown(dataset: SegmentationSet, images: int, scenes: Sequence[str]) -> list[int]:
    """The numbers of the scenes to draw.

    Raises:
        UsageError: no scene with all modalities has one of the names.
    """
    complete = _complete(dataset, range(len(dataset)))
    if not scenes:
        return [complete[i] for i in spread(len(complete), images)]
    names = {dataset.name(index): index for index in complete}
    for scene in scenes:
        if scene not in names:
            raise UsageError(
                f"--scene: {scene} is none of the {len(names)} validation images of {dataset.root} that have "
                f"all modalities; their names are like {next(iter(names))}{suggest(scene, names)}"
            )
    return [names[scene] for scene in scenes]


def _targets(dataset: SegmentationSet, index: int, batch: Batch, size: tuple[int, int]) -> dict[str, Tensor]:
    """What the maps of an image are correlated with, on the grid of the maps."""
    found = {}
    color, depth = (_image(dataset, index, batch, kinds) for kinds in (("color",), ("depth", "disparity")))
    if color is not None:
        found["texture"] = in_cells(texture(color, dataset.reader.std), size)
    if depth is not None:
        found["boundaries"] = in_cells(boundaries(depth[0]), size)
    return found


def _image(dataset: SegmentationSet, index: int, batch: Batch, kinds: Sequence[str]) -> Tensor | None:
    """A scene's image ``[C, H, W]`` of one of some kinds: of the inputs, or else of files beside them."""
    for m, kind in enumerate(dataset.reader.kinds()):
        if kind in kinds:
            return batch.images[m]
    scene = dataset.scenes[index]
    for name in scene:
        if name != LABELS and dataset.layout.modality(name).kind in kinds:
            reader = replace(dataset.reader, modalities=(name,))
            (image,) = reader.read(scene, batch.target.shape[-2:])
            return torch.from_numpy(image).permute(2, 0, 1)
    return None


def _inputs(trained: TrainedNetwork, batch: Batch) -> list[Image]:
    """A scene's inputs as images, by modality."""
    data = trained.recipe.data
    inputs = zip(batch.images.numpy(), data.modalities, strict=True)
    return [show_input(image, name, data) for image, name in inputs]


def _notes(dataset: SegmentationSet, missing: int, measured: Collection[str]) -> list[str]:
    """What the data set lacks for the figure."""
    notes = []
    if missing:
        notes.append(f"{missing} validation images lack a modality and are left out")
    for target, what in (("texture", "color images"), ("boundaries", "depth")):
        if target not in measured:
            notes.append(f"{dataset.root} has no {what}, so that no correlation with {target} is measured")
    return notes
