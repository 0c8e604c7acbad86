"""The operator's benchmark: what it counts, that it times nothing wrong, and a tiny run from end to end."""

from __future__ import annotations

import csv
import math
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cen_ext
from bench import operator
from bench.harness import devices, plot, providers, report, run, shapes
from bench.harness.files import write
from bench.harness.machine import cache_sizes
from bench.harness.memory import tensor_bytes
from bench.harness.shapes import GROUPS, Case
from cen_ext.ops.norm_exchange.reference import Options
from tests.helpers.cases import Shape
from tests.helpers.paths import ROOT

EAGER = ["cen_ext", "reference", "straightforward", "where"]


def case(group: str = "resnet", *, m: int = 2, channels: int = 20, **changes: object) -> Case:
    kind = GROUPS[group]
    made = Case(
        group, Shape(m, 2, channels, (3, 5)), kind.options, kind.residual, "batch", "float32", "contiguous"
    )
    return replace(made, **changes)


# --- the byte model ---


@pytest.mark.parametrize(
    ("group", "forward", "backward"),
    [("resnet", 2, 3), ("unet", 2, 3), ("wide", 3, 5), ("transformer", 2, 3)],
)
def test_floor_counts_whole_tensors(group: str, forward: int, backward: int) -> None:
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        tensor = 3 * 2 * 20 * 3 * 5 * itemsize
        one = case(group, m=3, dtype=dtype)
        assert shapes.floor_bytes(one, "forward") == forward * tensor
        assert shapes.floor_bytes(one, "backward") == backward * tensor
        assert shapes.floor_bytes(one, "both") == (forward + backward) * tensor


def test_a_residual_without_activation_is_not_read_backward() -> None:
    one = case("wide", options=Options())
    assert shapes.floor_bytes(one, "forward") == 3 * one.x_bytes
    assert shapes.floor_bytes(one, "backward") == 3 * one.x_bytes


def test_the_full_run_names_every_case_once_and_holds_the_quick_one() -> None:
    full, quick = list(shapes.full_run()), list(shapes.quick_run())
    assert len(full) == len(set(full))
    assert set(quick) < set(full)
    stages = {c.shape.full for c in full if c.group == "resnet" and c.shape.num_modalities == 2}
    assert stages == {(12, 64, 125, 125), (12, 128, 63, 63), (12, 256, 32, 32), (12, 512, 16, 16)}
    assert {c.statistics for c in full if c.group == "unet"} == {"batch"}


def test_input_sets_flush_the_cache_within_their_limits() -> None:
    one = case(channels=1000)  # 240 kB
    assert devices.count_sets(one, cache=0) == 1
    assert devices.count_sets(one, cache=one.x_bytes * 5 // 2) == 5
    assert devices.count_sets(one, cache=one.x_bytes // 100) == 1
    assert devices.count_sets(one, cache=one.x_bytes * 100) == devices.MOST_SETS
    huge = replace(one, shape=Shape(2, 6, 2048, (50, 50)))  # 246 MB
    assert devices.count_sets(huge, cache=10 * huge.x_bytes) == 1


# --- figures ---


def test_geometric_mean() -> None:
    assert report.geometric_mean([1, 4]) == pytest.approx(2)
    assert report.geometric_mean([2, 2, 16]) == pytest.approx(4)
    assert math.isnan(report.geometric_mean([]))


def test_quartiles() -> None:
    assert report.quartiles([3.0]) == (3, 3, 3)
    assert report.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2, 3, 4)


def rows_of(one: Case, ours: float, theirs: float, copy: float, backend: str = "cpu") -> list[report.Row]:
    """Rows from seconds of every phase; x takes one GB in this arithmetic, whatever its size."""
    times = {
        (name, phase): [t] for name, t in (("cen_ext", ours), ("where", theirs)) for phase in shapes.PHASES
    }
    times["copy", "forward"] = [copy]
    return report.make_rows(one, "eager", times, {"cen_ext": 10, "where": 40}, {"cen_ext": backend})


def test_rows_compare_with_copy_and_with_cen_ext() -> None:
    one = case("wide")
    rows = {(r.provider, r.phase): r for r in rows_of(one, ours=0.002, theirs=0.005, copy=0.001)}
    assert len(rows) == 7
    ours, theirs = rows["cen_ext", "backward"], rows["where", "backward"]
    assert ours.share_of_copy == pytest.approx((5 / 0.002) / (2 / 0.001))
    assert theirs.speedup == pytest.approx(2.5)
    assert ours.speedup == 1
    assert ours.gb_per_s == pytest.approx(5 * one.x_bytes / 0.002 / 1e9)
    assert (ours.backend, theirs.backend) == ("cpu", "")
    assert rows["copy", "forward"].share_of_copy == pytest.approx(1)


def test_tables_average_over_shapes_but_not_over_kinds() -> None:
    rows = [
        *rows_of(case(channels=20), ours=1, theirs=2, copy=0.5),
        *rows_of(case(channels=40), ours=1, theirs=8, copy=0.125),
        *rows_of(case(channels=20, dtype="bfloat16"), ours=1, theirs=3, copy=1),
    ]
    header, *body = report.speed(rows)
    assert header[-3:] == ["phase", "share of copy", "× where"]
    assert [row[-3:] for row in body if row[-3] == "forward"] == [
        ["forward", "0.25 (0.12)", "4.00 (2.00)"],
        ["forward", "1.00 (1.00)", "3.00 (3.00)"],
    ]
    assert [row[-1] for row in report.memory(rows)] == ["÷ where", "0.25 (0.25)", "0.25 (0.25)"]


# --- the providers ---


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("dtype", shapes.DTYPES)
@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_providers_agree(group: str, m: int, dtype: str, layout: str) -> None:
    for statistics in GROUPS[group].statistics:
        one = case(group, m=m, dtype=dtype, layout=layout, statistics=statistics)
        sets = providers.make_sets(one, 1)
        expected = providers.results(providers.make_provider("reference", one, sets))
        assert expected.keys() == {"y", "dx", "dweight", "dbias", *(["dresidual"] if one.residual else [])}
        for name in EAGER:
            provider = providers.make_provider(name, one, sets)
            assert providers.results(provider).keys() == expected.keys()
            providers.check_agreement(one, provider, expected)


def test_a_tenth_of_the_scales_is_below_the_threshold() -> None:
    for group in ("resnet", "unet"):
        one = case(group, channels=50)
        weight = providers.make_sets(one, 1)[0].weight
        assert (weight.abs() < one.options.threshold).sum() == 10


def test_running_statistics_move_with_batch_statistics_alone() -> None:
    for statistics in shapes.STATISTICS:
        one = case(statistics=statistics)
        tensors = providers.make_sets(one, 1)[0]
        for name in EAGER:
            provider = providers.make_provider(name, one, [tensors])
            provider.step()
            running = provider.calls[0].arguments[3]
            moved = torch.stack(running) if isinstance(running, list) else running
            assert torch.equal(moved, tensors.mean) == (statistics == "given"), name


class Halved(torch.autograd.Function):
    """The identity with half its gradient."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
        return dy / 2


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda y: y + 0.01 * (torch.arange(len(y)) == 1).view(-1, 1, 1, 1), "y of"),
        (Halved.apply, "dx of"),
        (lambda y: y * torch.nan, "y of"),
    ],
)
def test_what_is_wrong_is_not_timed(spoil: object, names: str) -> None:
    one = case()
    sets = providers.make_sets(one, 1)
    right = providers.make_provider("straightforward", one, sets)
    wrong = right._replace(name="wrong", function=lambda *xs: [spoil(y) for y in right.function(*xs)])
    expected = providers.results(right)
    with pytest.raises(AssertionError, match=f"wrong: {names}"):
        providers.check_agreement(one, wrong, expected)


def test_what_fails_is_named_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    function, call = providers.MAKERS["where"]
    spoilt = (lambda one: lambda *xs: [y + 1 for y in function(one)(*xs)], call)
    monkeypatch.setitem(providers.MAKERS, "where", spoilt)
    one = run.Run(devices.Cpu(cold=False, kept=False), repetitions=1)
    rows = one.measure(case(), ["cen_ext", "where", "straightforward", "copy"])
    assert {r.provider for r in rows} == {"cen_ext", "straightforward", "copy"}
    assert one.failed
    (missing,) = one.missing
    assert missing.startswith("where: AssertionError: where: y of resnet batch contiguous float32 M=2")
    assert "Traceback" in capsys.readouterr().err

    monkeypatch.setitem(providers.MAKERS, "cen_ext", spoilt)  # what everybody is compared with
    assert one.measure(case(), ["cen_ext", "straightforward", "copy"]) == []


def test_a_provider_whose_preparation_takes_too_long_is_left_out() -> None:
    one = run.Run(devices.Cpu(cold=False, kept=False), repetitions=1, budget=1e-9)
    names = ["cen_ext", "where", "copy"]
    providers_of = [{r.provider for r in one.measure(case(), names)} for _ in range(2)]
    assert providers_of == [set(names), {"cen_ext", "copy"}]
    assert not one.failed
    assert list(one.missing) == ["where: preparing it had taken 33% of the time"]


def test_the_backend_that_ran_is_named() -> None:
    one = case()
    chosen = providers.chosen_backend(one, providers.make_sets(one, 1)[0])
    available = cen_ext.available_backends()
    assert chosen == next(name for name in ("cpu", "reference") if available[name] == "ok")


# --- machine and memory ---


def test_cache_sizes(tmp_path: Path) -> None:
    for i, (level, kind, size) in enumerate(
        [(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "1024K"), (3, "Unified", "32M")]
    ):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert cache_sizes(tmp_path) == {1: 48 * 2**10, 2: 2**20, 3: 32 * 2**20}
    assert cache_sizes(tmp_path / "missing") == {}


def test_tensor_bytes_counts_what_is_left_and_the_most() -> None:
    def run() -> torch.Tensor:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        return second

    assert tensor_bytes(run) == (2000, 6000)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a way of glibc's")
def test_tensors_take_no_new_memory_from_the_system() -> None:
    script = """
import resource, torch
from bench.harness.memory import keep_freed_memory, populate
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)  # 40 MB, which glibc takes from the system and returns each time
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = [faults() for _ in range(3)]
assert keep_freed_memory()
populate(10 * 40_000_000)
after = [faults() for _ in range(5)]
assert max(after) * 20 < min(before), (before, after)
"""
    root = ROOT
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=60)


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    write(path, "first")
    write(path, b"second")
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


# --- end to end ---


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny shapes, and this process's allocator left alone."""
    for name in ("resnet", "wide", "unet"):
        monkeypatch.setitem(GROUPS, name, replace(GROUPS[name], sizes=((1, 10, 4), (2, 6, 3))))
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(devices, "last_level_cache", lambda: 4000)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("command", "kept", "setting"),
    [
        ([], True, "keeps freed memory (mallopt)"),
        (["--allocator", "kept"], True, "keeps freed memory (mallopt)"),
        (["--allocator", "default"], False, "the C library's, as it is"),
    ],
)
def test_the_allocator_is_told_or_left_alone(
    command: list[str], kept: bool, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: called.append("kept") or True)
    monkeypatch.setattr(devices, "populate", lambda size: called.append("populated"))
    small = ["--groups", "wide", "--statistics", "given", "--repetitions", "1", "--providers", "reference"]
    assert operator.main([*small, *command, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    assert called == (["kept", "populated", "populated"] if kept else [])
    assert f"# allocator: {setting}\n" in (tmp_path / "run.csv").read_text()


@pytest.mark.usefixtures("tiny")
def test_a_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "run.1"
    command = ["--groups", "resnet", "unet", "--layouts", "contiguous", "channels_last", "--repetitions", "1"]
    command += ["--device", "cpu", "--providers", "straightforward", "where", "cuda"]
    assert operator.main([*command, "--out", str(out)]) == 0

    text = (tmp_path / "results" / "run.1.csv").read_text().splitlines()
    comments = [line for line in text if line.startswith("# ")]
    assert f"# torch: {torch.__version__}" in comments
    assert "# skipped: cuda it runs on GPUs" in comments
    assert not any(line.startswith(("# left out", "# missing")) for line in comments)
    rows = list(csv.DictReader(line for line in text if not line.startswith("# ")))
    # resnet with 2 statistics and unet with 1, 2 layouts, 2 shapes; 3 phases of 3 providers, and the copy.
    assert len(rows) == 3 * 2 * 2 * (3 * 3 + 1)
    assert {row["mode"] for row in rows} == {"eager"}
    assert {row["provider"] for row in rows} == {"cen_ext", "straightforward", "where", "copy"}
    assert all(float(row["median_ms"]) > 0 and float(row["share_of_copy"]) > 0 for row in rows)
    assert all(int(row["samples"]) >= 2 for row in rows)

    assert (
        "| resnet | given | channels_last | float32 | 2 |" in (tmp_path / "results" / "run.1.md").read_text()
    )
    printed = capsys.readouterr()
    assert "× straightforward" in printed.out
    assert "[12/12] unet batch channels_last float32 M=2 2x6x3x3" in printed.err
    pictures = {"run.1_contiguous.png", "run.1_channels_last.png"}
    assert {path.name for path in out.parent.iterdir()} == {"run.1.csv", "run.1.md", *pictures}
    assert all((out.parent / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_is_plotted(group: str) -> None:
    pictures = plot.plot(rows_of(case(group), ours=1, theirs=2, copy=0.5))
    assert pictures.keys() == {"contiguous"}
    assert pictures["contiguous"].startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_plot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert plot.plot(rows_of(case(), ours=1, theirs=2, copy=0.5)) == {}
    assert "matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--quick", "--groups", "wide"], "--quick runs a fixed list"),
        (["--repetitions", "0"], "must be at least 1"),
        (["--providers", "magic"], "invalid choice"),
        (["--budget-seconds", "0"], "must be at least 1"),
    ],
)
def test_mistakes_are_told(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        operator.main(command)
    assert message in capsys.readouterr().err
