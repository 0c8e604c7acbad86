"""Records of scales in numbers: shares, entries and exits, and how long those that entered stayed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models.analysis import dynamics
from models.analysis.dynamics import Dynamics, Half, dynamics_of

# By record, four scales of each of two modalities; θ = 1. The first half of the channels is rgb's.
RGB = [
    *[[2.0, 2.0, 3.0, 3.0], [0.5, 2.0, 3.0, 3.0], [0.5, -0.5, 3.0, 0.5]],
    *[[0.5, 2.0, 3.0, 3.0], [0.0, -2.0, 3.0, 3.0]],
]
DEPTH = [[0.1, 9.0, 9.0, 9.0]] * 5


def moved(*, exchanged: bool = False, penalty: float = 0.1) -> Dynamics:
    records: list[tuple[int, dict[str, Tensor]]] = [
        (10 * i, {"a": torch.tensor([rgb, depth]), "b": torch.full((2, 2), 5.0)})
        for i, (rgb, depth) in enumerate(zip(RGB, DEPTH, strict=True))
    ]
    own = {
        name: torch.tensor([[True] * half + [False] * half, [False] * half + [True] * half])
        for name, half in (("a", 2), ("b", 1))
    }
    return dynamics_of(
        "run",
        records,
        ["rgb", "depth"],
        exchanged=exchanged,
        penalty=penalty,
        thresholds={"a": 1.0, "b": 1.0},
        penalized=own,
    )


def test_halves() -> None:
    run = moved()
    assert [*run.halves] == [
        (modality, wanted, layer)
        for modality in ("rgb", "depth")
        for wanted in (True, False)
        for layer in ("", "a", "b")
    ]
    own = run.halves["rgb", True, "a"]
    assert own.share.tolist() == [0, 0.5, 1, 0.5, 0.5]
    assert own.signed.tolist() == [0, 0.5, 1, 0.5, 1]
    assert own.entries.sum(1).tolist() == [1, 1, 0, 0]
    assert own.exits.sum(1).tolist() == [0, 0, 1, 0]
    assert run.halves["rgb", False, "a"].share.tolist() == [0, 0, 0.5, 0, 0]
    assert run.halves["rgb", True, ""].share.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1 / 3, 1 / 3])
    assert run.halves["depth", False, "a"].share.tolist() == [0.5] * 5
    assert own.percentile[0] == 2
    assert own.histogram[0].tolist() == np.histogram([2, 2], dynamics.EDGES)[0].tolist()
    assert own.histogram.sum(1).tolist() == [2] * 5
    assert own.histogram[2].tolist() == [0, 0, 2, *[0] * 9]


def test_survival() -> None:
    """The first of two entries stayed to the end, for three records; the second left at once."""
    own = moved().halves["rgb", True, "a"]
    assert own.survival(1) == (2, 0.5)
    assert own.survival(2) == (2, 0.5)
    assert own.survival(3) == (1, 1.0)
    entered, share = own.survival(4)
    assert entered == 0
    assert math.isnan(share)


def test_survival_by_its_definition() -> None:
    rng = np.random.default_rng(0)
    below = rng.random((30, 50)) < 0.7
    half = Half(np.where(below, 0.5, 2.0), np.zeros((30, 50)))
    for lag in (1, 4, 12):
        stays = [
            below[record : record + lag + 1, scale].all()
            for record in range(1, 30 - lag)
            for scale in range(50)
            if below[record, scale] and not below[record - 1, scale]
        ]
        assert half.survival(lag) == (len(stays), pytest.approx(np.mean(stays)))


def test_verdicts() -> None:
    assert moved().verdicts() == [
        "FAIL: 0.500 of 2 entries of penalized scales stay below for 1 record; 0.95 is expected at least"
    ]
    (told,) = moved(exchanged=True).verdicts()
    assert "Staying below is then no evidence for Theorem 1" in told
    (told,) = moved(penalty=0.0).verdicts()
    assert told == "control, nothing is penalized: 0.0% are below θ at first and 16.7% at last"


def test_text_of_several_and_of_one() -> None:
    one, two = dynamics.text([moved()]), dynamics.text([moved(), moved(exchanged=True)])
    assert "layer  penalized  rgb below  rgb left" in one
    assert "layer  penalized" not in two
    assert "trained without exchange" in two
    assert "trained with exchange" in two
    plain = moved().plain()
    (own,) = [
        half
        for half in plain["halves"]
        if (half["modality"], half["penalized"], half["layer"]) == ("rgb", True, "a")
    ]
    assert own["survival"]["1"] == {"entered": 2, "share": 0.5}
    assert own["survival"]["50"] == {"entered": 0, "share": None}
