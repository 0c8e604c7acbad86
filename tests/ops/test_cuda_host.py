"""The CUDA kernels, compiled for the host and run on a simulated device, against the definition.

Every plan, on devices so small that the corners of the plans show; see ``host_cuda/simulator.cpp``. And
random calls of all kinds against the formulas; ``python -m tests.ops.test_cuda_host CASES`` runs as many as
one likes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cen_ext.ops.norm_exchange.options import ACROSS_CHANNELS
from cen_ext.ops.norm_exchange.reference import Options, statistics_dtype, statistics_shape
from cen_ext.ops.pixel_shift.functional import run_reference as shift_reference
from tests.helpers import host_device
from tests.helpers.cases import SMALL, Shape, make_inputs, make_route, reaching_six
from tests.helpers.tolerance import (
    Call,
    Results,
    assert_within,
    bounds,
    rounding_unit,
    rows_of,
    run_definition,
    without_kinks,
)
from tests.ops import test_fuzz

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # run.cpp's kTypes
KINDS = ("automatic", "two_pass", "cluster", "grid")
REGIONS, CRITERIA = ("own", "all"), ("abs", "signed")
ORDERS = ("modality", "sample")
# As problem.h lists them.
EVERY_NORM = ("batch", "instance", "group", "layer")
NORMS = EVERY_NORM[:3]  # those with plans to choose from
# As csrc/cpu/activation.h lists them.
FURTHER = ("relu6", "silu", "gelu", "gelu_tanh", "hardswish")
ACTIVATIONS = ("identity", "relu", "leaky_relu", *FURTHER)
THRESHOLD = 2.0**-6
MOMENTUM = 0.3


class Device(NamedTuple):
    """The properties that plans are made from, ``Device`` of ``csrc/cuda/kernels.h``."""

    multiprocessors: int = 4
    capability: int = 90
    shared_bytes: int = 227 << 10
    threads: int = 16
    refuses: bool = False  # blocks that have to run at once


DEVICE = Device()


class Case(NamedTuple):
    """A call with the gradient of its result, and how it is to be run."""

    call: Call
    dy: Tensor
    kind: str = "automatic"
    device: Device = DEVICE
    channels_last: bool = False
    running: tuple[Tensor, Tensor] | None = None  # mean and variance [M, C]
    moved: int = 0  # bits: which tensors of x's size begin one value after an aligned address

    def __str__(self) -> str:
        x, given = self.call.x, self.call.mean is not None
        return (
            f"{tuple(x.shape)} {x.dtype} channels_last={self.channels_last} M={len(self.call.weight)} "
            f"{given=} residual={self.call.residual is not None} running={self.running is not None} "
            f"route={self.call.route is not None} {self.call.options} {self.kind} {self.device} "
            f"moved={self.moved:06b}"
        )


class Found(NamedTuple):
    """The outcome of a case; whether forward and backward refused the plan and were run in two passes."""

    results: Results
    running: tuple[Tensor, Tensor] | None
    refused: tuple[bool, bool]


# --- running cases ---

TYPES = ("float", "double", "half", "bfloat16")
PARTS = [("run.cpp",), *((f"../../csrc/cuda/kernels_{name}.cu", "-x", "c++") for name in TYPES)]


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> Path:
    """Under the address and undefined-behaviour sanitizers."""
    return host_device.build(tmp_path_factory.mktemp("checked"), PARTS)


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    """Watched for races."""
    return host_device.build(tmp_path_factory.mktemp("watched"), PARTS, races=True)


def run_program(program: Path, folder: Path, cases: Sequence[bytes], seed: int = 0) -> tuple[Unpacked, str]:
    """The results, which end where the program did, and what it wrote to stderr, if it failed."""
    given, results = folder / "cases", folder / "results"
    given.write_bytes(b"".join(cases))
    done = host_device.run(program, str(given), str(results), seed=seed)
    return Unpacked(results.read_bytes()), done.stderr if done.returncode else ""


def run_cases(program: Path, folder: Path, cases: Sequence[Case], seed: int = 0) -> list[Found]:
    data, failure = run_program(program, folder, list(map(packed, cases)), seed)
    found: list[Found] = []
    for case in cases:
        if not data.has_more():
            raise AssertionError(f"{failure}\n{case}")
        found.append(data.found(case))
    assert not failure, failure
    return found


def packed(case: Case) -> bytes:
    """As ``run_case`` of run.cpp reads it."""
    call, o = case.call, case.call.options
    m, c = call.weight.shape
    n = call.x.shape[0] // m
    groups, samples = (1, n) if o.norm == "batch" else (n, 1)
    joined = c // o.num_groups if o.norm == "group" else 1
    whole = header(
        *(DTYPES.index(call.x.dtype), KINDS.index(case.kind), *case.device, case.moved),
        *(call.residual is not None, case.running is not None, call.route is not None),
        *(EVERY_NORM.index(o.norm), joined),
        *(m, groups, samples, c, math.prod(call.x.shape[2:])),
        *(ORDERS.index(o.order), case.channels_last, call.mean is None),
        *(REGIONS.index(o.region), CRITERIA.index(o.criterion), ACTIVATIONS.index(o.activation)),
        real=(o.threshold, o.eps, o.negative_slope, MOMENTUM),
    )
    large = [t for t in (call.x, case.dy, call.residual) if t is not None]
    # Kernels are given one row of statistics a unit.
    statistics = [t.repeat_interleave(groups, 0) for t in (call.mean, call.var) if t is not None]
    small = [call.weight, call.bias, *statistics, *(case.running or ())]
    small += [] if call.route is None else [call.route]
    return b"".join(
        [
            whole,
            *(raw(t.movedim(1, -1) if case.channels_last else t) for t in large),
            *map(raw, small),
        ]
    )


def header(
    *whole: int, columns: int = 0, adjoint: bool = False, real: tuple[float, ...] = (0.0,) * 4
) -> bytes:
    """The ``Header`` of run.cpp."""
    return struct.pack(f"={len(whole) + 2}q{len(real)}d", *whole, columns, adjoint, *real)


def raw(t: Tensor) -> bytes:
    return t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()


class Unpacked:
    """Takes results apart, in the order in which ``run_case`` writes them."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(bytearray(data))
        self.at = 0

    def has_more(self) -> bool:
        return self.at < len(self.data)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        t = torch.frombuffer(self.data, dtype=dtype, count=count, offset=self.at)
        self.at += count * dtype.itemsize
        return t.view(tuple(shape))

    def found(self, case: Case) -> Found:
        call = case.call
        dtype, table = statistics_dtype(call.x.dtype), call.weight.shape
        rows = statistics_shape(call.x, table[0], call.options)

        def as_x() -> Tensor:
            if not case.channels_last:
                return self.take(call.x.shape, call.x.dtype)
            return self.take(call.x.movedim(1, -1).shape, call.x.dtype).movedim(-1, 1)

        forward_refused = self.take((), torch.int64)
        y = as_x()
        mean, var = call.mean, call.var
        if mean is None:
            mean, var = (self.take(rows, dtype) for _ in range(2))
        running = None
        if case.running is not None:
            running = (self.take(table, dtype), self.take(table, dtype))
        backward_refused = self.take((), torch.int64)
        dx = as_x()
        dweight, dbias = (self.take(table, dtype) for _ in range(2))
        dresidual = None
        if call.residual is not None:
            dresidual = case.dy if call.options.activation == "identity" else as_x()
        results = Results(y, mean, var, dx, dweight, dbias, dresidual)
        return Found(results, running, (bool(forward_refused), bool(backward_refused)))


# --- judging them ---


def assert_right(case: Case, found: Found) -> None:
    call, dy = case.call, case.dy
    try:
        allowed = bounds(call, dy)
        assert_within(found.results, run_definition(call, dy), allowed)
        if case.running is not None:
            assert_running(case, found, allowed)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{case}") from error


def assert_running(case: Case, found: Found, allowed: Results) -> None:
    """``torch.nn.BatchNorm2d``'s update, ``torch.nn.InstanceNorm2d``'s with the average over the rows."""
    m, c = case.call.weight.shape
    x = rows_of(case.call.x, case.call)
    over = (1, 3) if case.call.options.norm == "batch" else (3,)
    wanted = (x.mean(over, keepdim=True), x.var(over, keepdim=True))
    unit = rounding_unit(case.call.weight.dtype)
    for name, before, after, now, error in zip(
        ("mean", "var"), case.running, found.running, wanted, (allowed.mean, allowed.var), strict=True
    ):
        now = now.mean((1, 3))
        expected = (1 - MOMENTUM) * before.double() + MOMENTUM * now
        # An unbiased variance, of two values or more, is at most twice the biased one.
        bound = MOMENTUM * 2 * error.view(m, -1, c).mean(1) + 8 * unit * (before.abs() + now.abs())
        worst = ((after - expected).abs() / bound).nan_to_num(nan=math.inf).max().item()
        assert worst <= 1, f"running {name} is off by {worst:.3g} times what is allowed"


# --- the cases ---

# Without the largest; some whose lines, or rows of channels, are of whole vectors.
SHAPES = [
    *SMALL[:-1],
    *(Shape(2, 2, 12, (17, 19)), Shape(2, 2, 8, (4, 4)), Shape(2, 1, 32, (8, 8))),
    *(Shape(3, 4, 24, (2, 2)), Shape(2, 5, 16, (3,))),
]
FORCED = [kind for kind in KINDS if kind != "automatic"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_layouts = pytest.mark.parametrize("channels_last", [False, True])


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def make_case(
    rng: random.Random, shape: Shape, dtype: torch.dtype, channels_last: bool, given: bool, norm: str
) -> Case:
    """A random case; only what is not asked for is drawn."""
    i = make_inputs(shape, dtype)
    drawn = (rng.choice(values) for values in (REGIONS, CRITERIA, ACTIVATIONS, [1e-5, 0.5], ORDERS))
    region, criterion, activation, eps, order = drawn
    num_groups = rng.choice(divisors(shape.channels)) if norm == "group" else 1
    options = Options(THRESHOLD, region, criterion, norm, eps, activation, 0.2, order, num_groups)
    residual = i.residual if rng.random() < 0.6 else None
    statistics = (i.mean, i.var) if given else (None, None)
    route = make_route(shape) if shape.num_modalities > 1 and rng.random() < 0.4 else None
    call = Call(i.x, i.weight, i.bias, *statistics, residual, options, route)
    values = math.prod(shape.spatial) * (shape.batch if norm == "batch" else 1)
    updates = not given and norm not in ACROSS_CHANNELS and values > 1 and rng.random() < 0.5
    return Case(
        call,
        without_kinks(call, i.dy),
        channels_last=channels_last,
        running=(i.mean, i.var) if updates else None,
        moved=rng.choice([0, 0, 0, 63, 1 << rng.randrange(6)]),
    )


def sweep(dtype: torch.dtype, channels_last: bool) -> Iterator[Case]:
    """Every shape, norm and plan, each on a device that is drawn."""
    rng = random.Random(0)
    plans = [("automatic", True), *((kind, False) for kind in KINDS)]
    for norm, (kind, given), shape in itertools.product(NORMS, plans, SHAPES):
        if given and norm in ACROSS_CHANNELS:
            continue
        device = Device(
            multiprocessors=rng.choice([1, 3, 8, 24]),
            capability=rng.choice([80, 90, 90]),
            shared_bytes=rng.choice([3000, 9000, 227 << 10]),
            threads=rng.choice([8, 16, 32, 64]),
            refuses=rng.random() < 0.1,
        )
        yield make_case(rng, shape, dtype, channels_last, given, norm)._replace(kind=kind, device=device)


@every_dtype
@both_layouts
def test_every_plan(checked, watched, tmp_path, dtype, channels_last):
    assert_right_in_any_order(checked, watched, tmp_path, list(sweep(dtype, channels_last)))


def assert_right_in_any_order(checked: Path, watched: Path, tmp_path: Path, cases: list[Case]) -> None:
    """Right values without a wrong access, and the same bits without a race in another order of threads."""
    found = run_cases(checked, tmp_path, cases, seed=1)
    for case, of_case in zip(cases, found, strict=True):
        assert_right(case, of_case)
    for case, one, other in zip(cases, found, run_cases(watched, tmp_path, cases, seed=2), strict=True):
        assert raw_results(one) == raw_results(other), f"depends on the order of threads: {case}"


# Vectors that are whole and not, of channels and of positions; teams of one and of more threads than add up
# in one step; places of several samples in one tile; tiles that no shared memory keeps.
LAYER_SHAPES = [
    *SHAPES,
    *(Shape(2, 3, 1, (5,)), Shape(2, 33, 24, ()), Shape(4, 2, 40, (1, 1)), Shape(3, 2, 96, (2, 8))),
    *(Shape(5, 1, 34, (3, 7)), Shape(2, 1, 770, (3,)), Shape(2, 1, 1536, (2, 2)), Shape(2, 1, 3072, (3,))),
]


def layer_sweep(dtype: torch.dtype, channels_last: bool) -> Iterator[Case]:
    rng = random.Random(f"{dtype} {channels_last}")  # so that each kind meets other devices
    for shape in LAYER_SHAPES:
        device = Device(
            multiprocessors=rng.choice([1, 2, 8]),
            shared_bytes=rng.choice([3000, 40 << 10, 227 << 10]),
            threads=rng.choice([8, 16, 64] if shape.channels < 700 else [64, 128, 256]),
        )
        yield make_case(rng, shape, dtype, channels_last, False, "layer")._replace(device=device)


@every_dtype
@both_layouts
def test_layer_norm(checked, watched, tmp_path, dtype, channels_last):
    assert_right_in_any_order(checked, watched, tmp_path, list(layer_sweep(dtype, channels_last)))


def groups_of(norm: str) -> int:
    """A number of groups for 20 channels."""
    return 4 if norm == "group" else 1


@every_dtype
def test_further_activations(checked, tmp_path, dtype):
    """In turns, in every layout, norm and plan, with a residual and with given statistics, too."""
    cases = []
    plans = [*itertools.product(NORMS, FORCED), *3 * [("layer", "automatic")]]
    kinds = itertools.product([False, True], plans, [False, True], [False, True])
    for (channels_last, (norm, kind), given, with_residual), activation in zip(
        kinds, itertools.cycle(FURTHER), strict=False
    ):
        torch.manual_seed(0)
        i = reaching_six(make_inputs(Shape(3, 2, 20, (6, 5)), dtype))
        options = Options(THRESHOLD, norm=norm, activation=activation, num_groups=groups_of(norm))
        statistics = (i.mean, i.var) if given and norm not in ACROSS_CHANNELS else (None, None)
        call = Call(i.x, i.weight, i.bias, *statistics, i.residual if with_residual else None, options)
        cases.append(Case(call, without_kinks(call, i.dy), kind, channels_last=channels_last))
    for case, found in zip(cases, run_cases(checked, tmp_path, cases), strict=True):
        assert_right(case, found)


def drawn(seed: int) -> Case:
    """A call of the fuzz, on a device and by a plan that are drawn as well."""
    call, dy = test_fuzz.draw(seed)
    rng = random.Random(seed)
    planned = call.mean is None and call.options.norm in NORMS
    batch = call.options.norm == "batch" and planned and rng.random() < 0.5
    # In a unit of one value torch refuses to update running statistics.
    updates = batch and call.x[:, 0].numel() > len(call.weight)
    return Case(
        call,
        without_kinks(call, dy),
        kind=rng.choice(KINDS) if planned else "automatic",
        device=Device(
            multiprocessors=rng.choice([1, 3, 8, 24]),
            capability=rng.choice([80, 90]),
            shared_bytes=rng.choice([3000, 9000, 227 << 10]),
            threads=rng.choice([8, 16, 32, 64]),
            refuses=rng.random() < 0.1,
        ),
        channels_last=rng.random() < 0.5,
        running=(torch.randn_like(call.weight), torch.rand_like(call.weight)) if updates else None,
        moved=rng.choice([0, 0, 63, 1 << rng.randrange(6)]),
    )


def wrong_of(program: Path, folder: Path, seeds: Sequence[int]) -> list[str]:
    """What is wrong with the cases of the seeds."""
    cases, wrong = list(map(drawn, seeds)), []
    for seed, case, found in zip(seeds, cases, run_cases(program, folder, cases, seed=1), strict=True):
        allowed = bounds(case.call, case.dy)
        try:
            assert_within(found.results, test_fuzz.expected(case.call, case.dy), allowed)
            if case.running is not None:
                assert_running(case, found, allowed)
        except AssertionError as error:
            wrong.append(f"seed {seed}: {error}: {case}")
    return wrong


def test_random_calls(checked, tmp_path):
    assert wrong_of(checked, tmp_path, range(150)) == []


def packed_shift(
    x: Tensor, base: Tensor | None, modalities: int, adjoint: bool, channels_last: bool, moved: int
) -> bytes:
    """As ``run_shift`` of run.cpp reads it."""
    rows, channels, height, width = x.shape
    start = header(
        *(DTYPES.index(x.dtype), 0, *DEVICE, moved, base is not None, False, False),
        *(0, 1, modalities, 1, rows // modalities, channels, height * width, 0, channels_last, False),
        *(0, 0, 0),
        columns=width,
        adjoint=adjoint,
    )
    tensors = [x] if base is None else [x, base]
    return start + b"".join(raw(t.movedim(1, -1) if channels_last else t) for t in tensors)


@every_dtype
def test_pixel_shift(checked, watched, tmp_path, dtype):
    """Every direction and its adjoint: a block and more of values, images of one row or column, no groups."""
    shapes = [
        (2, 4, 11, 5, 7),
        (1, 2, 10, 4, 3),
        (3, 3, 6, 1, 9),
        (2, 2, 4, 3, 3),
        (2, 2, 7, 6, 1),
        (2, 2, 5, 17, 31),
    ]
    calls = []
    for (modalities, *shape), adjoint, last in itertools.product(shapes, [False, True], [False, True]):
        torch.manual_seed(len(calls))
        x, base = torch.randn(2, *shape).to(dtype)
        calls.append((x, base if len(calls) % 3 else None, modalities, adjoint, last, len(calls) % 8))
    for program in (checked, watched):
        data, failure = run_program(program, tmp_path, [packed_shift(*call) for call in calls])
        assert not failure, failure
        for x, base, modalities, adjoint, last, _ in calls:
            shape = x.movedim(1, -1).shape if last else x.shape
            y = data.take(shape, dtype)
            wanted = shift_reference(x, base, modalities, x.shape[1] // 5, adjoint)
            assert torch.equal(y.movedim(-1, 1) if last else y, wanted), (shape, modalities, adjoint, last)


def raw_results(found: Found) -> list[bytes]:
    return [raw(t) for t in (*found.results, *(found.running or ())) if t is not None]


def plain_cases(kinds: Iterable[str] = FORCED, device: Device = DEVICE) -> Iterator[Case]:
    """Calls with the statistics of x, 60 values per line, for every layout, norm and kind of plan."""
    plans = [*itertools.product(NORMS, kinds), ("layer", "automatic")]
    for channels_last, (norm, kind) in itertools.product([False, True], plans):
        torch.manual_seed(0)
        i = make_inputs(Shape(3, 3, 20, (6, 10)), torch.float32, small_scales=0.0)
        options = Options(THRESHOLD, norm=norm, num_groups=groups_of(norm))
        call = Call(i.x, i.weight.abs(), i.bias, options=options)
        yield Case(call, i.dy, kind, device, channels_last)


LARGE = Device(multiprocessors=64)


@pytest.mark.parametrize(
    ("device", "runs", "refuses"),
    [
        (LARGE, FORCED, []),
        (LARGE._replace(capability=80), FORCED, []),  # clusters of one block
        (LARGE._replace(refuses=True), ["two_pass"], ["grid"]),
        (LARGE._replace(shared_bytes=2000), ["two_pass"], ["cluster", "grid"]),
    ],
    ids=["9.0", "8.0", "busy", "little memory"],
)
def test_plans_that_are_asked_for_run_or_are_refused(checked, tmp_path, device, runs, refuses):
    cases = list(plain_cases([*runs, *refuses], device))
    for case, found in zip(cases, run_cases(checked, tmp_path, cases), strict=True):
        assert found.refused == (case.kind in refuses,) * 2, str(case)
        assert_right(case, found)


def changed(cases: Iterable[Case], x: Callable[[Tensor], Tensor]) -> list[Case]:
    return [case._replace(call=case.call._replace(x=x(case.call.x))) for case in cases]


HARD = {
    "large mean": lambda x: 1e3 + 0.05 * x,
    "squares overflow": lambda x: 4e18 * x,
    "constant": lambda x: torch.full_like(x, -1e3),
    "constant with an infinite square": lambda x: torch.full_like(x, 1e30),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_numbers(checked, tmp_path, name):
    cases = changed(plain_cases(), HARD[name])
    for case, found in zip(cases, run_cases(checked, tmp_path, cases), strict=True):
        assert_right(case, found)


def test_nan_stays_in_its_channel_and_out_of_what_nobody_reads(checked, tmp_path):
    """Channel 2 of modality 0 is replaced by the others' mean; channel 3 of modality 1 is everybody's own."""

    def with_replaced(cases: Iterable[Case]) -> Iterator[Case]:
        for case in cases:
            case.call.weight[0, 2] = 0.5 * THRESHOLD
            yield case

    def poisoned(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, 2], x[4, 3, 1] = math.nan, math.nan
        return x

    clean = [c for c in with_replaced(plain_cases()) if c.call.options.norm not in ACROSS_CHANNELS]
    cases = changed(clean, poisoned)
    before, after = (run_cases(checked, tmp_path, these) for these in (clean, cases))
    other = torch.arange(20) != 3
    for case, one, two in zip(cases, before, after, strict=True):
        for name in ("y", "dx", "dweight", "dbias"):
            a, b = (getattr(found.results, name) for found in (one, two))
            assert torch.equal(a[:, other], b[:, other]), f"{name}: {case}"
        assert two.results.y[4, 3].isnan().all(), case

    shared = [c for c in with_replaced(plain_cases()) if c.call.options.norm in ACROSS_CHANNELS]
    cases = changed(shared, poisoned)
    for case, found in zip(cases, run_cases(checked, tmp_path, cases), strict=True):
        assert found.results.dweight[0].isnan().any(), case
        assert found.results.dweight[0, 2] == found.results.dbias[0, 2] == 0, case


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.ops.test_cuda_host")
    parser.add_argument("cases", type=int, nargs="?", default=10_000)
    cases = parser.parse_args().cases
    with tempfile.TemporaryDirectory() as folder:
        program = host_device.build(Path(folder), PARTS)
        parts = [range(start, min(start + 100, cases)) for start in range(0, cases, 100)]
        wrong = [message for part in parts for message in wrong_of(program, Path(folder), part)]
    print("\n".join(wrong) or f"{cases} cases agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
