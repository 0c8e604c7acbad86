"""The weights that a training starts from: ImageNet weights in the encoder, or a trained network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.data import IMAGENET_STD, differing_inputs, input_from_plain
from models.networks.encoders import Backbone, load_imagenet
from models.networks.encoders.weights import misfits, misfits_of, some
from models.networks.segmentor import SegmentationNetwork
from models.networks.systems import System
from models.segmentation.load import differing_names
from models.segmentation.settings import ModelSettings
from models.training import checkpoint, config
from models.training.errors import UsageError, existing

# Settings of the part that a system takes over from its experts, which shapes need not tell.
_OF_EXPERTS = ("encoder", "ssma_dilations", "aspp_rates")
# Entries whose shape follows the number of classes.
_CLASSIFIER = re.compile(r"\bclassifier\.|^head\.")


def load_weights(net: SegmentationNetwork, model: ModelSettings, here: Mapping[str, Any]) -> list[str]:
    """Load ``model.weights`` into the encoder, or ``model.start`` or ``model.experts`` into the network.

    Args:
        net: changed in place.
        model: its settings.
        here: what the task describes of its inputs and classes.

    Returns:
        What did not match, in words.

    Raises:
        UsageError: there is no such file, it does not fit, several are given, or none though statistics are
            frozen.
    """
    if model.experts:
        if model.start is not None or model.weights is not None:
            raise UsageError("model.start and model.weights must be none with model.experts")
        return _start_from_experts(net, model, here)
    if model.start is not None:
        if model.weights is not None:
            raise UsageError("model.weights must be none with model.start, which sets the encoder as well")
        return _start_from(net, model.start, here)
    if model.weights is not None:
        colors = (tuple(spec["std"]) for spec in here["inputs"] if len(spec["std"]) == 3)
        return _load_encoder(net, model.weights, model.weights_input, next(colors, IMAGENET_STD))
    if model.frozen_statistics:
        raise UsageError(
            "model.weights must be set to a file of the encoder's ImageNet weights: with "
            "model.frozen_statistics=true the norms would keep meaningless statistics. "
            "To train from random weights set model.frozen_statistics=false"
        )
    return []


def _load_encoder(
    net: SegmentationNetwork, path: Path, trained_on: str, deviations: Sequence[float]
) -> list[str]:
    # Caffe's are from 0 to 255 less the mean, but not divided by the deviations.
    scale = [255 * std if trained_on == "caffe" else 1.0 for std in deviations]
    existing(path, "model.weights")
    if not isinstance(net.encoder, Backbone):
        raise UsageError(
            "model.weights must be none: the network's encoder is none that weights of files are loaded into"
        )
    try:
        report = load_imagenet(net.encoder, path, bgr=trained_on != "rgb", scale=scale)
    except ValueError as error:
        raise UsageError(f"model.weights: {error}") from None
    notes = []
    if trained_on != "rgb":
        notes.append(f"{path} expects blue first: the stem is turned to take red first")
    if trained_on == "caffe":
        notes.append(
            f"{path} expects inputs up to 255: the stem is scaled to that. Caffe's ResNets have a "
            "bottleneck's stride in its first convolution, as resnet50_v1 to resnet152_v1 have it here"
        )
    if report.missing:
        what = f"{len(report.missing)} of the encoder's entries, which start as they were made"
        notes.append(f"{path} lacks {what}: {some(report.missing)}")
    if report.unexpected:
        notes.append(f"{path} holds entries that the encoder has not: {some(report.unexpected)}")
    return notes


def _start_from_experts(net: SegmentationNetwork, model: ModelSettings, here: Mapping[str, Any]) -> list[str]:
    """Start a system from networks of one modality each."""
    paths, modalities = model.experts, [spec["name"] for spec in here["inputs"]]
    if len(paths) != len(modalities):
        raise UsageError(
            f"model.experts must be one for each of {','.join(modalities)}, got {len(paths)} of them"
        )
    states, notes = [], []
    for m, (path, modality) in enumerate(zip(paths, modalities, strict=True)):
        existing(path, "model.experts")
        path, contents = checkpoint.load(path, checkpoint.BEST)
        trained = [spec["name"] for spec in contents["inputs"]]
        if trained != [modality]:
            raise UsageError(f"model.experts: {path} is of {','.join(trained)}, expected one of {modality}")
        for name in _OF_EXPERTS:
            theirs, ours = contents["config"]["model"][name], getattr(model, name)
            if theirs != config.to_plain(ours):
                theirs = tuple(theirs) if isinstance(theirs, list) else theirs
                raise UsageError(
                    f"model.experts: {path} was trained with model.{name}={config.show(theirs)}, expected "
                    f"{config.show(ours)}"
                )
        inputs = [[input_from_plain(each["inputs"][n])] for each, n in ((contents, 0), (here, m))]
        if differences := differing_inputs(*inputs):
            notes.append(f"{path} was trained on other inputs: {'; '.join(differences)}")
        states.append(checkpoint.weights(contents))
    own = net.state_dict()
    try:
        if not isinstance(net, System):
            raise ValueError("an encoder with a decoder does not start from experts; model.start does")
        found = net.from_experts(states)
        if problems := misfits({key: own[key].shape for key in found if key in own}, found):
            raise ValueError(f"they do not fit this network: {problems}")
    except ValueError as error:
        raise UsageError(f"model.experts: {error}") from None
    net.load_state_dict(found, strict=False)
    rest = [key for key in own if key not in found and not key.endswith(".num_batches_tracked")]
    begins = f"starts from {', '.join(map(str, paths))}; {len(rest)} entries as they were made: {some(rest)}"
    return [begins, *notes]


def _start_from(net: SegmentationNetwork, path: Path, here: Mapping[str, Any]) -> list[str]:
    """Load a whole network but for classifiers of another number of classes."""
    existing(path, "model.start")
    path, contents = checkpoint.load(path, checkpoint.BEST)
    state, own = checkpoint.weights(contents), net.state_dict()
    kept = {
        key: value
        for key, value in own.items()
        if _CLASSIFIER.search(key) and key in state and state[key].shape != value.shape
    }
    state = {**state, **kept}
    if problems := misfits_of(net, state):
        raise UsageError(f"model.start: {path} does not fit these settings: {problems}")
    net.load_state_dict(state)
    notes = [f"starts from {path}, of the recipe {contents['recipe']}"]
    if kept:
        notes.append(
            f"{path} tells {len(contents['classes'])} classes apart, this network {len(here['classes'])}: "
            f"classifiers start as they were made: {some(kept)}"
        )
    elif contents["classes"] != here["classes"]:
        notes.append(
            f"{path} names its classes otherwise: {differing_names(contents['classes'], here['classes'])}"
        )
    inputs = [[input_from_plain(plain) for plain in each["inputs"]] for each in (contents, here)]
    if differences := differing_inputs(*inputs):
        notes.append(f"{path} was trained on other inputs: {'; '.join(differences)}")
    return notes
