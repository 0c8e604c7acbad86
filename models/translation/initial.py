"""The weights that a translation's training starts from, if not random ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.data import differing_inputs, input_from_plain
from models.networks.encoders.weights import misfits_of
from models.training import checkpoint
from models.training.errors import UsageError, existing
from models.translation.step import GANTrainer


def load_start(nets: GANTrainer, path: Path, here: Mapping[str, Any]) -> list[str]:
    """Load ``model.start`` into the generator and, of a run's checkpoint, into the discriminator.

    Args:
        nets: changed in place.
        path: run, checkpoint or exported network.
        here: what the task describes of its inputs and target.

    Returns:
        What did not match, in words.

    Raises:
        UsageError: there is no such file, or it does not fit.
    """
    existing(path, "model.start")
    path, contents = checkpoint.load(path, checkpoint.BEST)
    _load(nets.generator, path, checkpoint.weights(contents))
    notes = [f"starts from {path}, of the recipe {contents['recipe']}"]
    if "discriminator" in contents["task"]:
        _load(nets.discriminator, path, contents["task"]["discriminator"])
    else:
        notes.append(f"{path} holds no discriminator, which starts as it was made")
    if nets.ema is not None:
        nets.ema.restart(nets.generator)
    inputs = [[input_from_plain(plain) for plain in each["inputs"]] for each in (contents, here)]
    if differences := differing_inputs(*inputs):
        notes.append(f"{path} was trained on other inputs: {'; '.join(differences)}")
    before, now = (input_from_plain(each["target"]) for each in (contents, here))
    if before.name != now.name:
        notes.append(f"{path} was trained to make another target: {before.name} in training, {now.name} here")
    elif differences := differing_inputs([before], [now]):
        notes.append(f"{path} was trained on another encoding of the target: {'; '.join(differences)}")
    return notes


def _load(net: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
    if problems := misfits_of(net, state):
        raise UsageError(f"model.start: {path} does not fit these settings: {problems}")
    net.load_state_dict(state)
