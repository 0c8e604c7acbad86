"""A trained network's answers to scenes that come as bytes, in plain data for JSON."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import models.segmentation.system
from cen_ext.version import __version__
from models.data import DataError, palette
from models.data.images import Frame, frame_of
from models.data.layouts import CAMERA, LABELS
from models.data.stored import declared_size
from models.networks.branches import running_with
from models.networks.fusion.base import name_of
from models.networks.messages import suggest
from models.segmentation.build import branch_names, open_validation, output_names
from models.segmentation.load import TrainedNetwork, load
from models.segmentation.visualize import colorize, overlay, show_input
from models.serve.pictures import BRANCHES, CONFIDENCE, indexed, photo
from models.serve.refusals import Refused
from models.serve.reliance import relied_on
from models.serve.thresholds import ExchangingLayers
from models.sources import check_complete, check_some, why_all
from models.training import checkpoint, registry
from models.training.errors import UsageError
from models.visualize import thumbnail

EXAMPLES = 4
_LOG = logging.getLogger(__name__)
_PROBABILITY = 255  # the step of confidence maps is a 255th
Files = Mapping[str, Path | Frame]


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        uploads: by what they hold (``Reader.files``) the name and the bytes of files.
        example: the number of a scene of the data set in place of uploads.
        theta: the threshold in place of the trained one; None: the trained one.
        unplugged: modalities to do without.
        images: whether the answer has images.
    """

    uploads: Mapping[str, tuple[str, bytes]] = field(default_factory=dict)
    example: int | None = None
    theta: float | None = None
    unplugged: tuple[str, ...] = ()
    images: bool = True


class Scenes:
    """A trained network that answers questions, one at a time.

    Args:
        trained: the network.
        name: its recipe's.
        most_pixels: of an image.

    Raises:
        UsageError: its scenes need a camera's file each.
    """

    def __init__(self, trained: TrainedNetwork, name: str, most_pixels: int) -> None:
        self.trained, self.recipe_name, self.most_pixels = trained, name, most_pixels
        self.kinds = trained.reader.files()
        if CAMERA in self.kinds:
            raise UsageError(
                f"{trained.path}: every scene comes with a camera's file, which is not served; give one "
                "camera for all, data.camera=fx,fy,cx,cy"
            )
        self.layers = ExchangingLayers(trained.net)
        self.why_all = (why_all(trained.recipe.fusion) or "").removeprefix("; ") or None
        colors = palette(len(trained.class_names)) if trained.palette is None else trained.palette
        self.colors: NDArray[np.uint8] = colors
        self.why_not_relied = self._why_not_relied()
        self.examples = self._find_examples()

    @classmethod
    def open(cls, path: Path, overrides: Sequence[str], most_pixels: int) -> Scenes:
        """Those of a run folder, a checkpoint or an exported file.

        Raises:
            UsageError: as ``models.segmentation.load.load``; it is no segmentation's.
        """
        contents = checkpoint.load(path, checkpoint.BEST)[1]
        recipe = contents["recipe"]
        if registry.system_of(checkpoint.settings(contents)) is not models.segmentation.system:
            raise UsageError(f"{path}: a network of {recipe} translates images; serve shows segmentations")
        return cls(load(path, overrides), recipe, most_pixels)

    def describe(self) -> dict[str, Any]:
        """What the network is and takes."""
        trained, modalities = self.trained, self.trained.recipe.data.modalities
        weights = trained.net.branch_weights()
        return {
            "version": __version__,
            "recipe": self.recipe_name,
            "network": trained.recipe.model.network,
            "encoder": trained.recipe.model.encoder,
            "fusion": name_of(trained.recipe.fusion),
            "device": str(next(trained.net.parameters()).device),
            "files": list(self.kinds),
            "modalities": list(modalities),
            "outputs": list(output_names(trained.recipe)),
            "why_all": self.why_all,
            "alpha": dict(zip(branch_names(trained.recipe), weights, strict=False)) or None,
            "classes": self._legend(),
            "theta": {
                "trained": self.layers.trained,
                "largest": self.layers.largest(),
                "why_fixed": self.layers.why_fixed(),
            },
            "layers": [
                {key: layer[key] for key in ("name", "channels", "threshold")}
                for layer in self.layers.shares()
            ],
            "relied_on": {"why_not": self.why_not_relied},
            "colors": self._branch_colors(),
        }

    def thumbnails(self) -> list[dict[str, Any]]:
        """The examples' names, and a small image of each modality."""
        found = []
        data = self.trained.recipe.data
        for name, files in self.examples:
            images, there = self.trained.read_some(files)
            shown = {
                modality: photo(thumbnail(show_input(image, modality, data)))
                for m, (modality, image) in enumerate(zip(data.modalities, images.cpu().numpy(), strict=True))
                if there is None or m in there
            }
            found.append({"name": name, "images": shown})
        return found

    def answer(self, question: Question) -> dict[str, Any]:
        """What the network says of a scene; the network is as before afterwards.

        Raises:
            Refused: 413 too many pixels; 422 files that the network cannot take, or settings.
        """
        clock = _Clock()
        files = self._files(question)
        try:
            check = check_some if self.why_all is None else check_complete
            check(files, self.kinds)
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always", UserWarning)
                images, there = self.trained.read_some(files)
        except (DataError, UsageError) as error:
            raise Refused(422, str(error)) from None
        present = self._present(there, question.unplugged)
        clock.lap("decode")
        with self._threshold(question.theta), torch.no_grad():
            found = self._run(images, present)
        clock.lap("network")
        answer = self._describe(question, images, present, found)
        answer["exchanged"] = [layer | {"shares": self._shares(layer, present)} for layer in found["layers"]]
        answer["warnings"] = [str(each.message) for each in warned]
        clock.lap("images")
        return answer | {"seconds": clock.seconds}

    def _threshold(self, theta: float | None) -> AbstractContextManager[None]:
        if theta is not None and (why := self.layers.why_fixed()):
            raise Refused(422, f"theta cannot be given: {why}")
        if theta is not None and not (math.isfinite(theta) and theta >= 0):
            raise Refused(422, f"theta must be finite and not negative, got {theta}")
        return self.layers.at(theta)

    def _files(self, question: Question) -> Files:
        if question.example is not None:
            if question.uploads:
                raise Refused(422, "expected files or an example, got both")
            if not 0 <= question.example < len(self.examples):
                raise Refused(422, f"example must be below {len(self.examples)}, got {question.example}")
            return self.examples[question.example][1]
        return {kind: self._frame(kind, name, data) for kind, (name, data) in question.uploads.items()}

    def _frame(self, kind: str, name: str, data: bytes) -> Frame:
        """A file of the form, decoded as from disk."""
        modality = self.trained.reader.layout.modality(kind)
        try:
            size = declared_size(name, data)
            if math.prod(size) > self.most_pixels * (3 if len(size) == 3 else 1):
                dimensions = "x".join(map(str, size[1::-1]))
                raise Refused(
                    413, f"{name}: {dimensions} pixels are more than the {self.most_pixels:,} that are taken"
                )
            values = modality.kind == "categorical" and not modality.channels
            return frame_of(name, data, values=values)
        except DataError as error:
            raise Refused(422, str(error)) from None

    def _present(self, there: Sequence[int] | None, unplugged: Sequence[str]) -> tuple[int, ...] | None:
        """The numbers of the modalities to run with; None: all."""
        modalities = self.trained.recipe.data.modalities
        for name in unplugged:
            if name not in modalities:
                hint = suggest(name, modalities)
                raise Refused(422, f"unplug: expected some of {', '.join(modalities)}, got {name!r}{hint}")
        given = range(len(modalities)) if there is None else there
        present = tuple(m for m in given if modalities[m] not in unplugged)
        if len(present) == len(modalities):
            return None
        if not present:
            raise Refused(422, "no modality is left: leave one plugged in")
        if self.why_all is not None:
            raise Refused(422, self.why_all)
        return present

    def _run(self, images: Tensor, present: Sequence[int] | None) -> dict[str, Any]:
        """Labels by output, the ensemble's confidence, whom it relied on if it can be told, and layers."""
        names = output_names(self.trained.recipe, present)
        logits = self.trained.scores(images, present)
        scores = {name: each[0] for name, each in zip(names, logits, strict=True)}
        labels = {name: each.argmax(0).to(torch.uint8) for name, each in scores.items()}
        ensemble = scores.pop("ensemble")
        found: dict[str, Any] = {"labels": {name: each.cpu() for name, each in labels.items()}}
        found["confidence"] = ensemble.softmax(0).amax(0).cpu()
        with running_with(self.trained.net, present):
            weights = self.trained.net.branch_weights()
            found["layers"] = self.layers.shares()
        found["alpha"] = dict(zip(scores, weights, strict=False)) or None
        found["relied_on"] = None
        if self.why_not_relied is None and len(scores) > 1:
            branches = torch.stack(list(scores.values()))
            weight = torch.tensor(weights, device=branches.device, dtype=branches.dtype)
            found["relied_on"] = relied_on(branches, weight, labels["ensemble"]).cpu()
        return found

    def _describe(
        self,
        question: Question,
        images: Tensor,
        present: Sequence[int] | None,
        found: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The answer but for layers and times."""
        recipe, labels = self.trained.recipe, found["labels"]
        modalities = recipe.data.modalities
        there = list(range(len(modalities)) if present is None else present)
        branches = [name for name in labels if name != "ensemble"]
        height, width = labels["ensemble"].shape
        counts = {
            name: torch.bincount(each.flatten().long(), minlength=len(self.colors))
            for name, each in labels.items()
        }
        shares = {name: (count / (height * width)).tolist() for name, count in counts.items()}
        relied = found["relied_on"]
        answer: dict[str, Any] = {
            "size": {"width": width, "height": height},
            "theta": self.layers.trained if question.theta is None else question.theta,
            "present": [modalities[m] for m in there],
            "outputs": list(labels),
            "alpha": found["alpha"],
            "classes": [
                each | {"shares": {name: share[label] for name, share in shares.items()}}
                for label, each in enumerate(self._legend())
            ],
            "confidence": float(found["confidence"].mean()),
            "relied_on": {
                "why_not": self.why_not_relied or ("one modality is left" if relied is None else None),
                "shares": None
                if relied is None
                else {name: float((relied == b).float().mean()) for b, name in enumerate(branches)},
            },
        }
        if not question.images:
            return answer
        inputs = {
            modalities[m]: show_input(images[m].cpu().numpy(), modalities[m], recipe.data) for m in there
        }
        shown = inputs["rgb" if "rgb" in inputs else modalities[there[0]]]
        colored = colorize(labels["ensemble"].numpy(), recipe.data.num_classes, self.trained.palette)
        colors = np.array([_rgb(self._branch_colors()[name]) for name in branches], np.uint8)
        answer["images"] = {
            "inputs": {name: photo(image) for name, image in inputs.items()},
            "overlay": photo(overlay(shown, colored)),
            "labels": {name: indexed(each.numpy(), self.colors) for name, each in labels.items()},
            "confidence": indexed(
                (found["confidence"] * _PROBABILITY).round().to(torch.uint8).numpy(), CONFIDENCE
            ),
            "relied_on": None if relied is None else indexed(relied.to(torch.uint8).numpy(), colors),
        }
        return answer

    def _shares(self, layer: Mapping[str, Any], present: Sequence[int] | None) -> dict[str, float]:
        """A layer's shares by modality, of those that are present."""
        modalities, shares = self.trained.recipe.data.modalities, layer["shares"]
        there = range(len(modalities)) if present is None else present
        if len(shares) != len(modalities):  # streams that several modalities share
            return {f"stream {number}": share for number, share in enumerate(shares, 1)}
        return {modalities[m]: shares[m] for m in there}

    def _why_not_relied(self) -> str | None:
        recipe = self.trained.recipe
        if self.trained.net.alpha is None:
            return "a learned head joins the branches, so that no sum tells their parts"
        if branch_names(recipe) != recipe.data.modalities:
            return "the fusion leaves one stream, which has no branch for each modality"
        return None if len(recipe.data.modalities) > 1 else "the network has one modality"

    def _legend(self) -> list[dict[str, str]]:
        return [
            {"name": name, "color": "#{:02x}{:02x}{:02x}".format(*color)}
            for name, color in zip(self.trained.class_names, self.colors.tolist(), strict=True)
        ]

    def _branch_colors(self) -> dict[str, str]:
        names = branch_names(self.trained.recipe)
        return {name: BRANCHES[number % len(BRANCHES)] for number, name in enumerate(names)}

    def _find_examples(self) -> list[tuple[str, Files]]:
        """The first scenes of the validation set, where it lies on this machine as it was trained on."""
        try:
            dataset = open_validation(self.trained.recipe)
            self.trained.check(dataset)
        except (UsageError, DataError) as error:
            _LOG.info("no examples: %s", error)
            return []
        found: list[tuple[str, Files]] = []
        for index, scene in enumerate(dataset.scenes[:EXAMPLES]):
            files = {kind: path for kind, path in scene.items() if kind != LABELS and kind in self.kinds}
            found.append((dataset.name(index), files))
        return found


class _Clock:
    """The seconds of the phases of a piece of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now


def _rgb(color: str) -> list[int]:
    return list(bytes.fromhex(color.removeprefix("#")))
