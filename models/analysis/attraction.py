"""Theorem 1 on a trained network: how often γ = 0 is a local minimum, against what the formula says.

Channels are sampled from every exchange point and modality. With their scales set to 0 and all others as
trained, each of many training batches gives the task gradient d and the deviation that the formula takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from models.analysis import theorem
from models.analysis.observation import ObservedNorm, Seen
from models.training.interrupt import Interrupt
from models.training.loop import Task
from models.training.rng import seed_all

ALONE = 4  # channels that are looked at with no other scale set to 0 as well
ALONE_BATCHES = 8
_SEED = 1
Numbers = NDArray[np.float64]


@dataclass
class Channel:
    """A channel of one modality, and what was seen of it.

    Attributes:
        layer, modality, index: which one.
        scale, threshold: γ as trained, and θ.
        penalized: whether the run's penalty is on γ.
        normalized: whether x̂ has mean 0 and variance 1 in every batch.
        seen: ``[fields of Seen]`` for each batch.
    """

    layer: str
    modality: int
    index: int
    scale: float
    threshold: float
    penalized: bool
    normalized: bool
    seen: list[Tensor] = field(default_factory=list)

    @property
    def below(self) -> bool:
        return abs(self.scale) < self.threshold

    def of(self, name: str) -> Numbers:
        """A field of ``Seen`` in every batch."""
        values: Numbers = torch.stack(self.seen)[:, Seen._fields.index(name)].numpy()
        return values


def sample_channels(
    layers: Mapping[str, ObservedNorm],
    thresholds: Mapping[str, float],
    penalized: Mapping[str, Tensor],
    number: int,
) -> list[Channel]:
    """Draw ``number`` channels of every layer and modality, the same whenever asked.

    As many as there are of each of four kinds, penalized or not and below the threshold or not, in turns: the
    few below would hardly be drawn otherwise.
    """
    generator = torch.Generator().manual_seed(_SEED)
    found = []
    for name, observed in layers.items():
        table = observed.layer.weight.detach().cpu()
        for m, scales in enumerate(table):
            own = penalized[name][m].cpu()
            order = torch.randperm(len(scales), generator=generator).tolist()
            kinds: dict[tuple[bool, bool], list[Channel]] = {}
            for c in order:
                channel = Channel(
                    *(name, m, c, float(scales[c]), thresholds[name]),
                    bool(own[c]),
                    observed.normalizes_itself,
                )
                kinds.setdefault((channel.penalized, channel.below), []).append(channel)
            turns = (kind[turn] for turn in range(len(scales)) for kind in kinds.values() if turn < len(kind))
            found += list(islice(turns, number))
    return found


@dataclass(frozen=True)
class Apart:
    """A channel whose scale alone was 0, against the same one among others.

    Attributes:
        channel: with what was seen of it among others.
        seen: as there, of the first batches.
    """

    channel: Channel
    seen: list[Tensor]

    def differences(self, penalty: float) -> tuple[float, float]:
        """Mean distance of d in its deviations, and of the probability, over the batches."""
        alone = torch.stack(self.seen).numpy()
        among = torch.stack(self.channel.seen[: len(alone)]).numpy()
        d, deviation = Seen._fields.index("gradient"), Seen._fields.index("centered")
        distance = np.abs(alone[:, d] - among[:, d]) / np.maximum(among[:, deviation], np.finfo(float).tiny)
        chances = [
            theorem.attraction_probability(penalty, torch.from_numpy(each[:, deviation].copy())).numpy()
            for each in (alone, among)
        ]
        return float(distance.mean()), float(np.abs(chances[0] - chances[1]).mean())


def look_at(
    task: Task,
    layers: Mapping[str, ObservedNorm],
    channels: Sequence[Channel],
    batches: int,
    interrupt: Interrupt,
) -> tuple[list[Apart], int]:
    """Fill the channels' ``seen`` with training batches.

    A pass has one channel of each layer and modality at 0. Dropout draws the same in all passes of a batch.

    Args:
        task: with the networks as trained, in training mode.
        layers: of its network, observed.
        channels: drawn from them.
        batches: how many.
        interrupt: stops between two batches.

    Returns:
        Some channels alone; and the batches that were looked at.
    """
    rounds = _rounds(channels)
    chosen = torch.randperm(len(rounds[0]), generator=torch.Generator().manual_seed(_SEED))[:ALONE].tolist()
    alone = [Apart(rounds[0][i], []) for i in chosen]
    done = 0
    passes = batches * len(rounds) + min(batches, ALONE_BATCHES) * len(alone)
    with tqdm(total=passes, unit="pass", disable=None, dynamic_ncols=True) as bar:
        for number, batch in enumerate(islice(_batches(task), batches)):
            if interrupt:
                break
            for turn, together in enumerate(rounds):
                rows = _pass(task, layers, together, batch, (number, turn))
                for channel, seen in zip(together, rows, strict=True):
                    channel.seen.append(seen)
                bar.update()
            for apart in alone if number < ALONE_BATCHES else ():
                apart.seen.extend(_pass(task, layers, [apart.channel], batch, (number, 0)))
                bar.update()
            done += 1
    return alone, done


def _rounds(channels: Sequence[Channel]) -> list[list[Channel]]:
    """Channels that can be at 0 together: one of each layer and modality."""
    rounds: list[list[Channel]] = []
    taken: dict[tuple[str, int], int] = {}
    for channel in channels:
        place = channel.layer, channel.modality
        turn = taken[place] = taken.get(place, -1) + 1
        rounds += [[]] * (turn == len(rounds))
        rounds[turn] = [*rounds[turn], channel]
    return rounds


def _batches(task: Task) -> Iterator[Any]:
    for epoch in count():
        yield from task.batches(epoch, 0)


def _pass(
    task: Task,
    layers: Mapping[str, ObservedNorm],
    together: Sequence[Channel],
    batch: Any,
    place: tuple[int, int],
) -> list[Tensor]:
    """What is seen of channels whose scales are 0 together, on the CPU.

    Args:
        place: the numbers of the batch, by which dropout draws, and of the turn, by which x̂ is shuffled, too.
    """
    for observed in layers.values():
        observed.zeroed = {}
    for channel in together:
        layers[channel.layer].zeroed[channel.modality] = channel.index
    number, turn = place
    seed_all(number)
    loss = task.loss(batch)
    seed_all((turn + 1 << 16) + number)
    loss.backward()
    rows = [torch.stack(layers[channel.layer].seen[channel.modality]) for channel in together]
    return list(torch.stack(rows).cpu())
