"""How scales moved in training: whether those that came near 0 stayed, by a run's records of them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.text import aligned

LAGS = (1, 10, 50)  # records after a scale has come below the threshold
EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, math.inf)  # of |γ| / θ
_PERCENTILE = 3  # the released code's
_STAYS = 0.95
_HOW = (
    "below: share of scales with |γ| < θ at the first and at the last record; signed: with γ < θ, the "
    "released code's share. entered, left: how often a scale came below θ and rose to it again, between two "
    "records. "
    "stays 1, 10, 50: of those that entered, the share that was below in each of so many records after it. "
    "p3: the 3rd percentile of γ."
)
_ABSORBING = (
    "with exchange and region=own, a channel below θ lends nothing and its own values are replaced: its γ "
    "gets no task gradient, and the penalty alone moves it. Staying below is then no evidence for Theorem 1, "
    "which speaks of runs without exchange"
)
_HEAD = [
    *("modality", "", "scales", "below", "", "signed", "entered", "left", "p3"),
    *(f"stays {lag}" for lag in LAGS),
]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Half:
    """Scales of one modality under the penalty, or of one that are not: of a layer, or of all.

    Attributes:
        relative: ``[records, scales]`` γ / θ.
        scales: the same γ.
    """

    relative: Numbers
    scales: Numbers

    @cached_property
    def below(self) -> NDArray[np.bool_]:
        """``[records, scales]``."""
        found: NDArray[np.bool_] = np.abs(self.relative) < 1
        return found

    @property
    def share(self) -> Numbers:
        """``[records]``, as the next three."""
        return _numbers(self.below.mean(1))

    @property
    def signed(self) -> Numbers:
        return _numbers((self.relative < 1).mean(1))

    @property
    def percentile(self) -> Numbers:
        return _numbers(np.percentile(self.scales, _PERCENTILE, axis=1))

    @property
    def histogram(self) -> NDArray[np.int64]:
        """``[records, bins]`` of |γ| / θ between ``EDGES``."""
        rows = [np.histogram(row, EDGES)[0] for row in np.abs(self.relative)]
        return np.array(rows, dtype=np.int64)

    @cached_property
    def entries(self) -> NDArray[np.bool_]:
        """``[records - 1, scales]``: below at a record, and not at the one before."""
        found: NDArray[np.bool_] = self.below[1:] & ~self.below[:-1]
        return found

    @cached_property
    def exits(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self.below[:-1] & ~self.below[1:]
        return found

    @cached_property
    def _stays(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each entry: records after it, and how many of them from it on the scale was below in."""
        last = len(self.below) - 1
        lengths = np.zeros(self.below.shape, dtype=np.int64)  # of the stretch below that goes on from here
        for record in range(last, -1, -1):
            following = lengths[record + 1] if record < last else 0
            lengths[record] = np.where(self.below[record], following + 1, 0)
        records, scales = np.nonzero(self.entries)
        return last - (records + 1), lengths[records + 1, scales] - 1

    def survival(self, lag: int) -> tuple[int, float]:
        """Of the scales that entered at least ``lag`` records before the last one: how many, and the share
        that was below in all of the ``lag`` records after; NaN of none.
        """
        after, stayed = self._stays
        known = after >= lag
        return int(known.sum()), float((stayed[known] >= lag).mean()) if known.any() else math.nan


@dataclass(frozen=True)
class Dynamics:
    """The records of one run.

    Attributes:
        name: of the run.
        steps: of the records.
        modalities: their names.
        exchanged: whether channels were exchanged by the threshold.
        penalty: λ as set, 0 where nothing is penalized.
        tables: by layer ``[records, M, C]`` scales.
        thresholds: θ of each layer.
        penalized: by layer ``[M, C]`` bool.
    """

    name: str
    steps: Sequence[int]
    modalities: Sequence[str]
    exchanged: bool
    penalty: float
    tables: Mapping[str, Numbers]
    thresholds: Mapping[str, float]
    penalized: Mapping[str, NDArray[np.bool_]]

    @cached_property
    def halves(self) -> dict[tuple[str, bool, str], Half]:
        """By modality, whether penalized, and layer, ``""`` being all; those without scales are left out."""
        found = {}
        for m, modality in enumerate(self.modalities):
            for wanted in (True, False):
                parts = {}
                for layer, table in self.tables.items():
                    chosen = self.penalized[layer][m] == wanted
                    if chosen.any():
                        scales = table[:, m, chosen]
                        parts[layer] = Half(scales / self.thresholds[layer], scales)
                if parts:
                    found[modality, wanted, ""] = Half(
                        np.concatenate([half.relative for half in parts.values()], 1),
                        np.concatenate([half.scales for half in parts.values()], 1),
                    )
                    found |= {(modality, wanted, layer): half for layer, half in parts.items()}
        return found

    def whole(self, wanted: bool) -> Half | None:
        """All modalities' and layers' scales that are, or are not, penalized; None of none."""
        parts = [half for (_, kind, layer), half in self.halves.items() if kind == wanted and not layer]
        if not parts:
            return None
        return Half(
            np.concatenate([half.relative for half in parts], 1),
            np.concatenate([half.scales for half in parts], 1),
        )

    def verdicts(self) -> list[str]:
        """What the theorem would have these records show, and whether they do."""
        half = self.whole(True)
        if half is None or self.penalty == 0:
            control = half or self.whole(False)
            assert control is not None  # there are scales
            first, last = control.share[0], control.share[-1]
            return [f"control, nothing is penalized: {first:.1%} are below θ at first and {last:.1%} at last"]
        if self.exchanged:
            return [_ABSORBING]
        found = []
        for lag in LAGS:
            entered, share = half.survival(lag)
            if entered:
                mark = "pass" if share >= _STAYS else "FAIL"
                found.append(
                    f"{mark}: {share:.3f} of {entered} entries of penalized scales stay below for {lag} "
                    f"record{'s' * (lag > 1)}; {_STAYS} is expected at least"
                )
        return found or ["no penalized scale came below θ between two records"]

    def plain(self) -> dict[str, Any]:
        """For JSON; histograms at each record of all layers together, at the first and last of each."""
        return {
            "run": self.name,
            "steps": list(self.steps),
            "trained_with_exchange": self.exchanged,
            "penalty": self.penalty,
            "thresholds": dict(self.thresholds),
            "histogram_edges": [edge if math.isfinite(edge) else None for edge in EDGES],
            "halves": [
                {
                    "modality": modality,
                    "penalized": wanted,
                    "layer": layer or None,
                    "scales": half.scales.shape[1],
                    "share_below": half.share.tolist(),
                    "share_signed": half.signed.tolist(),
                    "percentile_3": half.percentile.tolist(),
                    "entered": half.entries.sum(1).tolist(),
                    "left": half.exits.sum(1).tolist(),
                    "histogram": (half.histogram if not layer else half.histogram[[0, -1]]).tolist(),
                    "survival": {
                        str(lag): {"entered": number, "share": None if math.isnan(share) else share}
                        for lag in LAGS
                        for number, share in [half.survival(lag)]
                    },
                }
                for (modality, wanted, layer), half in self.halves.items()
            ],
            "verdicts": self.verdicts(),
        }


def dynamics_of(
    name: str,
    records: Sequence[tuple[int, Mapping[str, Tensor]]],
    modalities: Sequence[str],
    *,
    exchanged: bool,
    penalty: float,
    thresholds: Mapping[str, float],
    penalized: Mapping[str, Tensor],
) -> Dynamics:
    """Stack a run's records, of which there must be two, over the layers that have a threshold."""
    tables = {
        layer: np.stack([scales[layer].double().numpy() for _, scales in records]) for layer in thresholds
    }
    if tables and next(iter(tables.values())).shape[1] != len(modalities):
        modalities = ("all",)  # one norm for all modalities
    return Dynamics(
        name,
        [step for step, _ in records],
        modalities,
        exchanged,
        penalty,
        tables,
        dict(thresholds),
        {layer: penalized[layer].numpy() for layer in thresholds},
    )


def text(runs: Sequence[Dynamics]) -> str:
    """Runs side by side, and the layers of a single one, for a terminal."""
    cells = [["run", *_HEAD]]
    for run in runs:
        for (modality, wanted, layer), half in run.halves.items():
            if not layer:
                cells.append([run.name, modality, "penalized" if wanted else "not penalized", *_shown(half)])
    parts = [_title(runs), "\n".join(textwrap.wrap(_HOW, 110)), aligned(cells)]
    if len(runs) == 1:
        parts.append(aligned(_layer_cells(runs[0])))
    marks = [
        line
        for run in runs
        for verdict in run.verdicts()
        for line in textwrap.wrap(f"{run.name}: {verdict}", 110)
    ]
    return "\n\n".join([*parts, "\n".join(marks)])


def _title(runs: Sequence[Dynamics]) -> str:
    spans = [
        f"{run.name}: {len(run.steps)} records from step {run.steps[0]} to {run.steps[-1]}, λ "
        f"{run.penalty:.3g}, trained with{'' if run.exchanged else 'out'} exchange, θ "
        + _span(list(run.thresholds.values()))
        for run in runs
    ]
    return "\n".join(["Scales in training", *spans])


def _layer_cells(run: Dynamics) -> list[list[str]]:
    """Of the penalized scales of each layer: how many, and by modality the last share below and the exits."""
    cells = [
        ["layer", "penalized", *(f"{name} {what}" for name in run.modalities for what in ("below", "left"))]
    ]
    for layer in run.tables:
        halves = [run.halves.get((modality, True, layer)) for modality in run.modalities]
        total = sum(half.scales.shape[1] for half in halves if half is not None)
        shown = [
            ("-", "-") if half is None else (f"{half.share[-1]:.1%}", str(half.exits.sum()))
            for half in halves
        ]
        cells.append([layer, str(total), *(cell for pair in shown for cell in pair)])
    return cells


def _shown(half: Half) -> list[str]:
    stays = [half.survival(lag)[1] for lag in LAGS]
    return [
        str(half.scales.shape[1]),
        f"{half.share[0]:.1%}",
        f"{half.share[-1]:.1%}",
        f"{half.signed[-1]:.1%}",
        str(half.entries.sum()),
        str(half.exits.sum()),
        f"{half.percentile[-1]:.2g}",
        *("-" if math.isnan(share) else f"{share:.3f}" for share in stays),
    ]


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _numbers(values: Any) -> Numbers:
    found: Numbers = np.asarray(values, dtype=np.float64)
    return found
