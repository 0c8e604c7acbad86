"""Theorem 1 on a trained network: the shares that were observed against those predicted, as text and data."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.analysis import theorem
from models.analysis.attraction import Apart, Channel
from models.analysis.observation import Seen
from models.text import aligned

BINS = 10  # of the predicted probability
_HALF = 0.6744897501960817  # 2Φ(x) - 1 = 1/2
_SIGMAS = 3.0  # standard errors within which two shares agree
Numbers = NDArray[np.float64]

_HOW = (
    "γ is set to 0 in the sampled channels, all else is as trained. predicted: Theorem 1, 2Φ(λ/s) - 1, with "
    "s the ℓ2 norm of ∂L/∂x' over the channel's elements, centered where the norm centers x̂. shuffled: share "
    "of batches with |d| <= λ when x̂ is permuted over the elements, which leaves of the theorem its normal "
    "variable alone. observed: share of batches with |d| <= λ. minima: channels with |mean d| <= λ, where "
    "γ = 0 is a local minimum of the loss over all batches. at 1/2: both shares at that λ of each batch for "
    "which the formula says 1/2, where it is tested hardest. What is not penalized is shown at the λ of what "
    "is; its own is 0, and so is the probability."
)


class Shares(NamedTuple):
    """Of one channel, or means over several, at one λ.

    Attributes:
        predicted: the theorem's probability; ``of_shuffle`` that of a permuted x̂, exact but for the central
            limit, and the same where x̂ is normalized by itself.
        shuffled, observed: shares of batches; ``shuffled_half`` and ``observed_half`` at the λ of each batch
            that makes the probability 1/2.
        minimum: whether |mean d| <= λ, or the share of channels of which that is true.
    """

    predicted: float
    of_shuffle: float
    shuffled: float
    observed: float
    shuffled_half: float
    observed_half: float
    minimum: float


@dataclass(frozen=True)
class Verdict:
    """Whether two shares agree, or one is not above the other: their difference, also in standard errors."""

    name: str
    difference: float
    errors: float
    passed: bool


@dataclass
class Attraction:
    """What ``look_at`` saw of one run.

    Attributes:
        name, step: of the run and its checkpoint.
        penalty: λ, times how often the loss has the penalty.
        exchanged: whether the run was trained with exchange, which is off here.
        modalities: their names.
        channels, alone, batches: as from there.
    """

    name: str
    step: int
    penalty: float
    exchanged: bool
    modalities: Sequence[str]
    channels: Sequence[Channel]
    alone: Sequence[Apart]
    batches: int

    @cached_property
    def by_batch(self) -> dict[str, Numbers]:
        """``[channels, batches]``: the probabilities, and 0 or 1 for what was seen."""
        rows = [_by_batch(channel, self.penalty) for channel in self.channels]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    @cached_property
    def shares(self) -> list[Shares]:
        """Of each channel."""
        means = [_mean(self.by_batch[name], 1).tolist() for name in Shares._fields[:-1]]
        minima = [float(abs(channel.of("gradient").mean()) <= self.penalty) for channel in self.channels]
        return [Shares(*row) for row in zip(*means, minima, strict=True)]

    def chosen(self, which: Which) -> NDArray[np.bool_]:
        return np.array([which(channel) for channel in self.channels])

    def mean(self, rows: NDArray[np.bool_]) -> Shares:
        """Over channels, of which there must be some."""
        return Shares(*_mean(np.array(self.shares)[rows], 0).tolist())

    def bins(self, rows: NDArray[np.bool_]) -> list[tuple[int, Shares]]:
        """Batches of channels by their predicted probability, in ten bins: how many, and the means."""
        values = {name: table[rows].ravel() for name, table in self.by_batch.items()}
        place = np.minimum((values["predicted"] * BINS).astype(int), BINS - 1)
        found = []
        for number in range(BINS):
            here = place == number
            means = [float(_mean(values[name][here])) for name in values]
            found.append((int(here.sum()), Shares._make([*means, math.nan])))
        return found

    def verdicts(self) -> list[Verdict]:
        """The criteria: shuffled shares are those predicted, observed ones are not above them."""
        values = self.by_batch
        found = [
            _agreement("shuffled as predicted", values["shuffled"], values["of_shuffle"]),
        ]
        half = values["shuffled_half"][np.isfinite(values["shuffled_half"])]
        if len(half):
            found.append(_agreement("shuffled 1/2 at the λ for 1/2", half, np.full_like(half, 0.5)))
        for name, which in KINDS.items():
            rows = self.chosen(which)
            if not rows.any():
                continue
            shares = np.array(self.shares)[rows].T
            own = dict(zip(Shares._fields, shares, strict=True))
            asked = f"observed at most as predicted, {name}"
            found.append(_at_most(asked, own["observed"], own["predicted"], self.batches))
            half = own["observed_half"][np.isfinite(own["observed_half"])]
            if len(half):
                asked = f"observed at most 1/2 there, {name}"
                found.append(_at_most(asked, half, np.full_like(half, 0.5), self.batches))
        return found

    def notes(self) -> list[str]:
        """What a reader has to know beside the numbers."""
        found = [
            "the run was trained with exchange; it is switched off here, as the theorem's condition says, so "
            "that channels which were replaced act otherwise than in training"
            if self.exchanged
            else "the run was trained without exchange, as the theorem's condition says"
        ]
        if not all(channel.normalized for channel in self.channels):
            found.append(
                "norms with running statistics, or over several channels, leave x̂ a mean and another "
                "variance: s is not centered, and the column of shuffle is what a permutation of this x̂ obeys"
            )
        silent = np.stack([channel.of("norm") for channel in self.channels]) == 0
        if silent.any():
            found.append(
                f"in {silent.mean():.1%} of all channels' batches ∂L/∂x' is 0: with γ = 0 the channel is β, "
                "which relu silences where it is negative. The formula then says 1, and "
                "the shares at 1/2 leave these out"
            )
        if self.alone:
            distances, chances = zip(*(each.differences(self.penalty) for each in self.alone), strict=True)
            found.append(
                f"one channel of every layer and modality is at 0 at a time; with {len(self.alone)} of them "
                f"alone at 0, d differs by {np.mean(distances):.2g} of its deviation s, the predicted "
                f"probability by {np.mean(chances):.2g}"
            )
        return found

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": self.name,
            "step": self.step,
            "penalty": self.penalty,
            "trained_with_exchange": self.exchanged,
            "batches": self.batches,
            "channels": [
                {
                    **{key: value for key, value in vars(channel).items() if key != "seen"},
                    "below": channel.below,
                    **_plain(share),
                    "mean_gradient": float(channel.of("gradient").mean()),
                    "deviation_of_gradient": float(channel.of("gradient").std()),
                    "norm": float(channel.of("norm").mean()),
                    "centered": float(channel.of("centered").mean()),
                }
                for channel, share in zip(self.channels, self.shares, strict=True)
            ],
            "kinds": {
                name: _plain(self.mean(rows))
                for name, which in KINDS.items()
                if (rows := self.chosen(which)).any()
            },
            "bins": {
                side: [{"count": number, **_plain(shares)} for number, shares in self.bins(rows)]
                for side, which in SIDES.items()
                if (rows := self.chosen(which)).any()
            },
            "verdicts": [asdict(verdict) for verdict in self.verdicts()],
            "notes": self.notes(),
        }

    def text(self) -> str:
        """For a terminal."""
        layers = len({channel.layer for channel in self.channels})
        title = (
            f"Theorem 1 in {self.name}, step {self.step}: {len(self.channels)} channels of {layers} layers, "
            f"{self.batches} training batches, λ {self.penalty:.3g}"
        )
        marks = [
            f"{'pass' if verdict.passed else 'FAIL'}: {verdict.name}: {verdict.difference:+.3f}, "
            f"{verdict.errors:+.1f} standard errors"
            for verdict in self.verdicts()
        ]
        notes = [line for note in self.notes() for line in textwrap.wrap(f"- {note}", 110)]
        tables = [aligned(self._kind_cells()), aligned(self._bin_cells())]
        how = "\n".join(textwrap.wrap(_HOW, 110))
        return "\n\n".join([title, how, *tables, "\n".join(marks), "\n".join(notes)])

    def _kind_cells(self) -> list[list[str]]:
        cells = [["", "modality", "channels", *_HEAD, "minima"]]
        for name, which in KINDS.items():
            for m in sorted({channel.modality for channel in self.channels}):
                rows = self.chosen(which) & self.chosen(_of(m))
                if rows.any():
                    mean, least = self.mean(rows), f"{self.mean(rows).minimum:.2f}"
                    cells.append([name, self.modalities[m], str(rows.sum()), *_shown(mean), least])
        return cells

    def _bin_cells(self) -> list[list[str]]:
        cells = [["predicted", "", "batches", *_HEAD]]
        for number in range(BINS):
            for side, which in SIDES.items():
                rows = self.chosen(which)
                if not rows.any():
                    continue
                total, shares = self.bins(rows)[number]
                if total:
                    span = f"{number / BINS:.1f} to {(number + 1) / BINS:.1f}"
                    cells.append([span, side, str(total), *_shown(shares)])
        return cells


_HEAD = ["predicted", "of shuffle", "shuffled", "observed", "shuffled at 1/2", "observed at 1/2"]
Which = Callable[[Channel], bool]
SIDES: dict[str, Which] = {
    "below θ": lambda channel: channel.below,
    "above θ": lambda channel: not channel.below,
}


def _kind(penalized: bool, side: str) -> Which:
    return lambda channel: channel.penalized == penalized and SIDES[side](channel)


KINDS: dict[str, Which] = {
    f"{'' if penalized else 'not '}penalized, {side}": _kind(penalized, side)
    for penalized in (True, False)
    for side in SIDES
}


def _agreement(name: str, seen: Numbers, chances: Numbers) -> Verdict:
    """Whether what was seen, 0 or 1, came up as often as its chances say, ``[channels, batches]`` both."""
    deviation, excess = math.sqrt((chances * (1 - chances)).sum()), float((seen - chances).sum())
    # Where all chances are 0 or 1 to the last digits, rounding decides.
    errors = excess / deviation if deviation > 1e-6 else (0.0 if abs(excess) < 0.5 else math.inf)
    return Verdict(name, float((seen - chances).mean()), errors, abs(errors) <= _SIGMAS)


def _at_most(name: str, shares: Numbers, chances: Numbers, batches: int) -> Verdict:
    """Whether shares of so many batches are not above the chances, ``[channels]`` both.

    Batches of a channel have what x̂ stands for in common: the error is that of a mean over channels, but not
    less than that of drawing batches.
    """
    differences, number = shares - chances, len(shares)
    excess = float(differences.mean())
    drawing = math.sqrt((chances * (1 - chances)).mean() / batches / number)
    between = float(differences.std(ddof=1)) / math.sqrt(number) if number > 1 else 0.0
    error = max(drawing, between)
    errors = excess / error if error > 0 else (0.0 if excess == 0 else math.copysign(math.inf, excess))
    return Verdict(name, excess, errors, errors <= _SIGMAS)


def _of(modality: int) -> Which:
    return lambda channel: channel.modality == modality


def _by_batch(channel: Channel, penalty: float) -> dict[str, Numbers]:
    values = {name: torch.from_numpy(channel.of(name)) for name in Seen._fields}
    deviation = values["centered" if channel.normalized else "norm"]
    of_shuffle = theorem.interval_probability(penalty, values["mean"], values["deviation"])
    return {
        "predicted": theorem.attraction_probability(penalty, deviation).numpy(),
        "of_shuffle": of_shuffle.numpy(),
        "shuffled": _within(values["shuffled"], penalty),
        "observed": _within(values["gradient"], penalty),
        "shuffled_half": _half(values["shuffled"] - values["mean"], values["deviation"]),
        "observed_half": _half(values["gradient"], deviation),
    }


def _within(values: Tensor, limit: Tensor | float) -> Numbers:
    """0 or 1."""
    found: Numbers = (values.abs() <= limit).double().numpy()
    return found


def _half(values: Tensor, deviation: Tensor) -> Numbers:
    """0 or 1: whether they are in the middle half of their distribution; NaN where all of that is 0."""
    return np.where(deviation.numpy() > 0, _within(values, _HALF * deviation), np.nan)


def _mean(values: Numbers, axis: int | None = None) -> Any:
    """The mean of those that are numbers; NaN where none is."""
    numbers = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(numbers, values, 0).sum(axis) / numbers.sum(axis)


def _plain(shares: Shares) -> dict[str, float | None]:
    """For JSON, which has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in shares._asdict().items()}


def _shown(shares: Shares) -> list[str]:
    return [f"{value:.3f}" if math.isfinite(value) else "-" for value in shares[: len(_HEAD)]]
