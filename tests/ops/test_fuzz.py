"""Random calls of all kinds against the formulas in float64, within ``tests.helpers.tolerance``.

The suite runs some. ``python -m tests.ops.test_fuzz BACKEND CASES`` runs as many as one likes, and prints the
seeds of those that fail; ``python -m tests.ops.test_fuzz BACKEND --seed SEED`` repeats one.
"""

from __future__ import annotations

import argparse
import random
import sys

import pytest
import torch
from torch import Tensor

from cen_ext.ops.activation import NAMES as ACTIVATIONS
from cen_ext.ops.norm_exchange.options import NORMS, Options
from cen_ext.ops.norm_exchange.reference import DTYPES, replaced_channels
from tests.helpers import formulas, tolerance
from tests.helpers.cases import Shape, in_order, make_inputs, modality_major
from tests.helpers.covered import BACKENDS, refusal
from tests.helpers.tolerance import Call, Results


def draw(seed: int) -> tuple[Call, Tensor]:
    """A call and the gradient of its result; norm ``"none"`` as what it is, statistics of zeros and ones."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    norm = draw.choice(NORMS)
    groups = draw.choice((1, 2, 3, 4)) if norm == "group" else 1
    m, channels = draw.randint(1, 8), groups * draw.choice((1, 2, 3, 5, 8, 16, 17, 24, 33))
    spatial = tuple(draw.randint(1, 7) for _ in range(draw.randint(0, 3)))
    if norm == "instance" and torch.Size(spatial).numel() == 1:
        spatial = (3, 2)
    shape = Shape(m, draw.randint(1 + (norm in ("batch", "group")), 4), channels, spatial)
    dtype = draw.choice(DTYPES)
    i = make_inputs(shape, dtype, channels_last=draw.random() < 0.5, small_scales=draw.choice((0, 0.4, 1)))
    routed = m > 1 and draw.random() < 0.5
    options = Options(
        threshold=0.0 if routed else draw.choice((0.0, 0.02, 0.7)),
        region="own" if routed else draw.choice(("own", "all")),
        criterion="abs" if routed else draw.choice(("abs", "signed")),
        norm=norm,
        activation=draw.choice(ACTIVATIONS),
        negative_slope=0.2,
        order=draw.choice(("modality", "sample")),
        num_groups=groups,
    )
    mean = var = None
    if norm == "batch" and draw.random() < 0.4:
        mean, var = i.mean, i.var
    if norm == "none":
        options = options._replace(norm="batch", eps=0.0)
        mean, var = torch.zeros_like(i.mean), torch.ones_like(i.var)
    route = None
    if routed:
        lender = (torch.arange(m)[:, None] + torch.randint(1, m, (m, channels))) % m
        stays = torch.rand(m, channels) < 0.4
        route = torch.where(stays, -2, torch.where(torch.rand(m, channels) < 0.5, -1, lender)).to(torch.int32)
    residual = i.residual if draw.random() < 0.5 else None
    x, residual, dy = (None if t is None else in_order(t, m, options.order) for t in (i.x, residual, i.dy))
    return Call(x, i.weight, i.bias, mean, var, residual, options, route), dy


def expected(call: Call, dy: Tensor) -> Results:
    """The results by the formulas."""
    m, order = len(call.weight), call.options.order
    exact = call.double()
    given = dy.double(), exact.x, exact.residual
    dy64, x, residual = (None if t is None else modality_major(t, m, order) for t in given)
    mask, lender = replaced_channels(exact.weight, call.options), None
    if call.route is not None:
        mask, lender = call.route > -2, call.route.clamp(min=-1)
    options = call.options._asdict()
    for name in ("order", "threshold", "region", "criterion"):
        del options[name]
    tables = exact.weight, exact.bias, exact.mean, exact.var
    options |= dict(replaced=mask, lender=lender)
    y, _ = formulas.forward(x, *tables, residual, **options)
    dx, dweight, dbias, dresidual = formulas.backward(dy64, x, *tables, residual, **options)
    y, dx, dresidual = (in_order(t, m, order) for t in (y, dx, dresidual))
    statistics = tolerance.run_definition(call, dy)[1:3]
    return Results(y, *statistics, dx, dweight, dbias, None if call.residual is None else dresidual)


def check(backend: str, seed: int) -> str | None:
    """What is wrong with a case, if anything."""
    call, dy = draw(seed)
    if refusal(backend, call.x, **call.options._asdict()) is not None:
        return None
    dy = tolerance.without_kinks(call, dy)
    try:
        tolerance.assert_within(
            tolerance.run(backend, call, dy), expected(call, dy), tolerance.bounds(call, dy)
        )
    except AssertionError as error:
        return (
            f"seed {seed}: {error}: {call.options} {call.x.dtype} {tuple(call.x.shape)} M={len(call.weight)}"
        )
    return None


@pytest.mark.parametrize("seed", range(150))
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_random_calls(backend, seed):
    assert check(backend, seed) is None


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled part is missing")
@pytest.mark.parametrize("seed", range(150, 180))
def test_random_calls_shared_by_threads(seed):
    """Tests side by side have a thread each."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert check("cpu", seed) is None
    finally:
        torch.set_num_threads(threads)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.ops.test_fuzz", description=__doc__)
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("cases", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, help="of a single case")
    args = parser.parse_args()
    seeds = range(args.cases) if args.seed is None else [args.seed]
    wrong = [message for seed in seeds if (message := check(args.backend, seed)) is not None]
    print("\n".join(wrong) or f"{len(seeds)} cases agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
