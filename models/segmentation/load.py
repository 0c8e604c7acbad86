"""Trained networks from files, with what they are to be fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.arrays import Buffers, Given, advising, as_sources
from models.data import (
    InputSpec,
    Layout,
    Reader,
    SegmentationSet,
    differing_inputs,
    input_from_plain,
    input_specs,
    layout_from_plain,
    to_plain,
)
from models.data.images import Frame
from models.data.inputs import once_color
from models.data.layouts import CAMERA
from models.networks.branches import running_with
from models.networks.segmentor import SegmentationNetwork
from models.segmentation.build import build_network, build_reader, output_names, with_normalization
from models.segmentation.inference import Scores, scores
from models.segmentation.prediction import Prediction
from models.segmentation.settings import SegmentationRecipe
from models.sources import check_complete, check_some
from models.training import checkpoint, config
from models.training.devices import device_of
from models.training.errors import UsageError
from models.training.importable import naming_missing

_CHANNELS = 3  # of each input, whatever its modality: one channel is repeated


@dataclass(frozen=True)
class TrainedNetwork:
    """A network and what was known where it was trained; ``load`` makes one.

    Attributes:
        net: in evaluation mode, on the device of ``recipe.run.device``.
        recipe: the settings of its training, changed by those given to ``load``.
        changed: what in ``recipe`` differs from the settings of the training, as ``path: old -> new``.
        path: the file.
        inputs: what it was fed, by modality in their order.
        layout: of the files of the training.
        reader: makes the images that it takes of a scene's files, as in training.
        class_names: of its outputs' channels.
        palette: ``[K, 3]`` uint8, the classes' colors where the label maps of its training had a palette.
        buffers: the memory of inputs.
    """

    net: SegmentationNetwork
    recipe: SegmentationRecipe
    changed: tuple[str, ...]
    path: Path
    inputs: tuple[InputSpec, ...]
    layout: Layout
    reader: Reader
    class_names: tuple[str, ...]
    palette: NDArray[np.uint8] | None = None
    buffers: Buffers = field(default_factory=Buffers, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Of the network."""
        return next(self.net.parameters()).device

    def read(self, **files: Given) -> Tensor:
        """The network's input for one scene, ``[M, 3, H, W]``, of its files: ``read(rgb=..., depth=...)``.

        Args:
            files: by what they hold, paths or ``models.arrays.as_sources``'s arrays.

        Raises:
            UsageError: a modality's file is missing, or is of none of them; an array for a camera's file.
            DataError: a broken image, one that is not what the layout says, or of a size it may not have.
        """
        check_complete(files, self.reader.files())
        return self.read_some(files)[0]

    def read_some(self, files: Mapping[str, Given]) -> tuple[Tensor, tuple[int, ...] | None]:
        """As ``read`` of a scene that may lack modalities, whose inputs are 0; and those that it has.

        Returns:
            ``[M, 3, H, W]``; and the numbers of the modalities that are there, None for all of them.
        """
        sources = as_sources(files)
        if isinstance(sources.get(CAMERA), Frame):
            raise UsageError(f"{CAMERA}: expected the path of a camera's file, got an array")
        with advising(sources):
            made = self.reader.read(sources)
        # The order in memory that convolutions are fastest in.
        stacked = self.buffers.take((len(made), *made[0].shape[:2], _CHANNELS))
        for image, place in zip(made, stacked, strict=True):
            place[:] = image
        absent = self.reader.absent(sources)
        there = tuple(m for m in range(len(made)) if m not in absent)
        images = torch.from_numpy(stacked).permute(0, 3, 1, 2).to(self.device)
        return images, there if absent else None

    def scores(self, images: Tensor, present: Sequence[int] | None = None) -> Scores:
        """Run the network on ``read``'s return: the logits of every branch and, last, of the ensemble.

        Args:
            images: ``[M, 3, H, W]``.
            present: the modalities to do it by, without a look at the others; None: all.

        Raises:
            ValueError: the fusion needs all modalities.
        """
        size, kinds = images.shape[-2:], self.reader.kinds()
        if present is not None:
            images, kinds = images[list(present)], tuple(kinds[m] for m in present)
        with running_with(self.net, present):
            return scores(self.net, images, size, self.recipe, kinds)

    def label(self, images: Tensor, present: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Label ``read``'s return by every branch, named after its modality, and by the ``ensemble``.

        Takes and raises as ``scores``.

        Returns:
            Classes ``[H, W]`` uint8, on the network's device.
        """
        found = self.scores(images, present)
        names = output_names(self.recipe, present)
        return {name: found.labels(index)[0].to(torch.uint8) for index, name in enumerate(names)}

    def predict(self, **files: Given) -> Prediction:
        """Label one scene: ``predict(rgb=array, depth=array)["ensemble"]`` is ``[H, W]`` uint8.

        Takes and raises as ``read``. With ``data.missing=fill`` files of some modalities are enough, and
        there are outputs of these alone.

        In a camera's loop arrays need no files, the input's memory is used again, and only what is asked of
        the result is computed; ``warm_up`` pays the first frame's costs ahead. Results stay valid as long as
        they are kept. Scenes may differ in size. That colors are red first cannot be checked: what OpenCV
        captures is blue first, and needs ``cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)``, or labels will be wrong.
        ``torch.set_num_threads`` tells how many of the CPU's cores it takes.
        """
        if self.recipe.data.missing != "fill":
            check_complete(files, self.reader.files())
        else:
            check_some(files, self.reader.files())
        return self.predict_some(files)

    def predict_some(self, files: Mapping[str, Given]) -> Prediction:
        """As ``predict`` of a scene that may lack modalities, whatever ``data.missing`` says.

        Raises:
            DataError: as ``read``.
            ValueError: a modality is absent, and the fusion needs all.
        """
        images, present = self.read_some(files)
        return Prediction(self.recipe, images, self.scores(images, present), self.palette, present)

    def warm_up(self, size: Sequence[int], present: Sequence[int] | None = None) -> None:
        """Label an empty scene, so that the first one of its size takes no longer than the others.

        Libraries choose and compile kernels when they first see a size.

        Args:
            size: height and width of the images.
            present: as for ``scores``.
        """
        empty = torch.zeros(len(self.inputs), *size, _CHANNELS, device=self.device)
        self.label(empty.permute(0, 3, 1, 2), present)

    def check(self, dataset: SegmentationSet) -> None:
        """Refuse a data set that would feed the network otherwise than its training did, or in whose labels
        the classes have another order.

        Raises:
            UsageError: it would; the message says in what.
        """
        _check(self.path, self.inputs, dataset.reader)
        if problem := once_color(self.inputs, dataset.gray_in_color):
            raise UsageError(f"{self.path} {problem}")
        # Other words for the same classes are common: only the same words in other places are surely wrong.
        names = dataset.class_names
        if names != self.class_names and sorted(names) == sorted(self.class_names):
            raise UsageError(
                f"{self.path} was trained on the classes in another order: "
                f"{differing_names(self.class_names, names)}"
            )

    def changes(self, dataset: SegmentationSet) -> list[str]:
        """List settings and fields of the layout that differ from training, as ``path: old -> new``."""
        layout = config.changes(self.layout, dataset.reader.layout, "layout")
        return [*self.changed, *layout.values()]


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainedNetwork:
    """A trained network: of a run's best checkpoint, of the checkpoint given, or of an exported file.

    Args:
        path: run folder, checkpoint, or what ``export`` and ``import`` wrote.
        overrides: ``field=value`` assignments, such as ``run.device=cpu`` (without: ``auto``, wherever it was
            trained), or ``data.layout`` and ``data.depth_scale`` for files that are stored otherwise than
            those of the training.

    Raises:
        UsageError: no such file there; an override is wrong, does not fit the weights, or would feed the
            network otherwise than its training did.
    """
    path, contents = checkpoint.load(Path(path), checkpoint.BEST)
    trained = checkpoint.settings(contents)
    recipe, changed = checkpoint.settings_here(contents, overrides)
    if recipe.data.modalities != trained.data.modalities:
        names = ",".join(trained.data.modalities)
        raise UsageError(
            f"data.modalities must stay {names}, the inputs that {path} was trained on in their order, got "
            f"{','.join(recipe.data.modalities)}"
        )
    recipe = with_normalization(recipe)
    with naming_missing(contents):
        net = build_network(recipe)
    inputs = tuple(map(input_from_plain, contents["inputs"]))
    told = any(getattr(recipe.data, name) != getattr(trained.data, name) for name in ("root", "layout"))
    layout = layout_from_plain(contents["layout"])
    reader = build_reader(recipe.data, None if told else layout)
    _check(path, inputs, reader)
    checkpoint.fill(net, path, contents)
    net = net.to(device_of(recipe.run.device)).eval()
    classes = tuple(contents["classes"])
    colors = contents.get("palette")
    palette = None if colors is None else np.array(colors, np.uint8)
    return TrainedNetwork(net, recipe, tuple(changed), path, inputs, layout, reader, classes, palette)


def differing_names(before: Sequence[str], now: Sequence[str]) -> str:
    """The first class that has two names, in words."""
    label = next(label for label, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
    return f"class {label} was {before[label]}, here it is {now[label]}"


def describe(
    reader: Reader, class_names: Sequence[str], palette: NDArray[np.uint8] | None = None
) -> dict[str, Any]:
    """A checkpoint's record of a network beside its settings: inputs, layout, classes and their palette."""
    return {
        "inputs": [to_plain(spec) for spec in input_specs(reader)],
        "layout": to_plain(reader.layout),
        "classes": list(class_names),
        "palette": None if palette is None else palette.tolist(),
    }


def _check(path: Path, inputs: Sequence[InputSpec], reader: Reader) -> None:
    differences = differing_inputs(inputs, input_specs(reader))
    if differences:
        raise UsageError(
            f"{path} was trained on other inputs than the layout {reader.layout.name} gives: "
            f"{'; '.join(differences)}. Set data.depth_scale, data.layout or data.root to what tells them, or"
            " give a modality its kind in layout.json"
        )
