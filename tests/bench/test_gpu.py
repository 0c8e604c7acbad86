"""The benchmark on GPUs, as far as a machine without one can tell: on a device that is pretended."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cen_ext
from bench import operator
from bench.harness import capture, devices, providers, shapes
from bench.harness.shapes import GROUPS
from tests.helpers.made_up import case

L2 = 1000


class Pretended:
    """``torch.cuda`` without a GPU: work is done at once, and noted in order."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.waiting = "default"
        self.stream = "default"

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self
        properties = SimpleNamespace(
            name="Pretended 1",
            major=9,
            minor=0,
            multi_processor_count=3,
            L2_cache_size=L2,
            total_memory=2**31,
        )

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                device.notes.append("record")
                self.at = time.perf_counter()

            def synchronize(self) -> None:
                device.notes.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            def pool(self) -> str:
                return "pool"

            def replay(self) -> None:
                device.notes.append("replay")

        @contextmanager
        def graph(which: CUDAGraph, stream: str, pool: str | None = None) -> Iterator[None]:
            before, device.stream = device.stream, stream
            yield
            device.stream = before

        fakes = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_name": lambda: properties.name,
            "get_device_properties": lambda index: properties,
            "synchronize": lambda: self.notes.append("synchronize"),
            "_sleep": lambda cycles: self.notes.append("sleep"),
            "empty_cache": lambda: None,
            "memory_allocated": lambda: 100,
            "reset_peak_memory_stats": lambda: None,
            "max_memory_allocated": lambda: 1100,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "Stream": lambda: "capture",
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "get_sync_debug_mode": lambda: self.waiting,
            "set_sync_debug_mode": lambda mode: setattr(self, "waiting", mode),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.compiler, "reset", lambda: None)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)
        monkeypatch.setattr(devices.Gpu, "name", "cpu")
        exchange = providers.usual.exchange

        def waits(*arguments: object) -> object:
            if self.waiting == "error":
                raise RuntimeError("called a synchronizing CUDA operation\nwith more to say")
            return exchange(*arguments)

        monkeypatch.setattr(providers.usual, "exchange", waits)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    device = Pretended()
    device.patch(monkeypatch)
    return device


# --- timing ---


@pytest.mark.parametrize("cold", [True, False])
def test_an_eager_call_starts_on_an_idle_device_and_a_graph_behind_other_work(
    pretended: Pretended, cold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = devices.Gpu(cold)
    monkeypatch.setattr(device, "_flush", lambda: pretended.notes.append("flush"))
    flush = ["flush"] if cold else []
    for mode, before in (("eager", [*flush, "synchronize"]), ("graph", [*flush, "sleep"])):
        pretended.notes.clear()
        result, seconds = device.timers[mode](lambda x: [time.sleep(0.01), x][1], "result")
        assert result == "result"
        assert 0.01 <= seconds < 1
        assert pretended.notes == [*before, "record", "record", "wait"]


@pytest.mark.usefixtures("pretended")
def test_flushing_goes_through_more_than_twice_the_cache() -> None:
    device = devices.Gpu(cold=True)
    assert device.buffer.nbytes > 2 * L2
    device.buffer.fill_(1)
    device._flush()
    assert not device.buffer.any()
    assert devices.Gpu(cold=False).buffer.nbytes == 0


def test_memory_is_what_was_added(pretended: Pretended) -> None:
    assert devices.Gpu(cold=False).peak_bytes(lambda: pretended.notes.append("run")) == 1000
    assert pretended.notes == ["synchronize", "run", "synchronize"]


# --- graphs ---


def test_replays_stand_in_for_calls(pretended: Pretended) -> None:
    one = case("wide")
    sets = providers.make_sets(one, 2)
    where = providers.make_provider("where", one, sets)
    expected = providers.results(where)
    graphs = capture.capture(where)
    providers.check_agreement(one, graphs, expected)
    assert not any(y.requires_grad for y in graphs.forward(1))
    pretended.notes.clear()
    assert (
        len(graphs.backward(1, graphs.forward(1))) == 2 * 4
    )  # x, weight, bias and residual of two modalities
    assert pretended.notes == ["replay", "replay"]
    assert pretended.waiting == "default"

    copied = capture.capture(providers.make_provider("copy", one, sets))
    assert torch.equal(copied.forward(1)[0], sets[1].x)


def test_what_waits_is_not_captured(pretended: Pretended) -> None:
    one = case()
    waits = providers.make_provider("straightforward", one, providers.make_sets(one, 1))
    with pytest.raises(capture.NotCaptured, match=r"^called a synchronizing CUDA operation$"):
        capture.capture(waits)
    assert (pretended.waiting, pretended.stream) == ("default", "default")


def test_a_failed_capture_leaves_the_stream_as_it_was(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def graph(which: object, stream: str) -> Iterator[None]:
        pretended.stream = stream
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    one = case()
    with pytest.raises(capture.NotCaptured, match="not permitted"):
        capture.capture(providers.make_provider("where", one, providers.make_sets(one, 1)))
    assert pretended.stream == "default"


# --- providers and cases ---


def test_who_cannot_run_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"cuda": "ok", "triton": "no triton", "cpu": "ok", "reference": "ok"}
    monkeypatch.setattr(cen_ext, "available_backends", lambda: states)
    names = ["cen_ext", "cuda", "triton", "compile_max", "norm", "copy"]
    assert providers.unavailable(names, "cuda") == {"triton": "no triton"}
    assert providers.unavailable(names, "cpu").keys() == {"cuda", "triton"}
    states.clear()
    assert providers.unavailable(names, "cuda").keys() == {"cuda", "triton"}


@pytest.mark.parametrize("group", GROUPS)
def test_the_librarys_norm_alone_exchanges_adds_and_activates_nothing(group: str) -> None:
    one = case(group)
    sets = providers.make_sets(one, 1)
    alone = providers.results(providers.make_provider("norm", one, sets))
    bare = providers.make_provider("reference", shapes.bare(one), [sets[0]._replace(residual=None)])
    providers.check_agreement(one, providers.make_provider("norm", one, sets), providers.results(bare))
    assert "dresidual" not in alone
    assert shapes.floor_bytes(shapes.bare(one), "forward") == 2 * one.x_bytes


def test_the_gpu_run_has_all_kinds_and_the_most_telling_first() -> None:
    run = list(shapes.gpu_run())
    assert len(run) == len(set(run)) == 160
    assert {(c.dtype, c.layout, c.statistics) for c in run if c.group == "wide"} == {
        (d, la, s) for d in shapes.DTYPES for la in shapes.LAYOUTS for s in shapes.STATISTICS
    }
    first = shapes.most_telling_first(run)
    assert sorted(map(str, first)) == sorted(map(str, run))
    norms = ["6x64x125x125"] * 2 + ["6x256x125x125"] * 2 + ["1x512x2x2", "6x96x56x56"]
    assert [c.size for c in first[:24:4]] == norms
    norms = ["6x512x16x16"] * 2 + ["6x2048x16x16"] * 2 + ["8x128x64x64", "6x768x7x7"]
    assert [c.size for c in first[24:48:4]] == norms
    assert all(c.shape.num_modalities == 4 for c in first[-32:])


# --- the whole benchmark on the pretended device ---


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GROUPS:
        monkeypatch.setitem(GROUPS, name, replace(GROUPS[name], sizes=((1, 10, 4), (2, 6, 3))))
    states = {"cuda": "no kernels", "triton": "no triton", "cpu": "ok", "reference": "ok"}
    monkeypatch.setattr(cen_ext, "available_backends", lambda: states)


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    lines = path.read_text().splitlines()
    comments = [line for line in lines if line.startswith("# ")]
    return comments, list(csv.DictReader(line for line in lines if not line.startswith("# ")))


@pytest.mark.usefixtures("tiny", "pretended")
def test_a_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "operator"
    command = ["--groups", "resnet", "wide", "--statistics", "given", "--repetitions", "2", "--out", str(out)]
    names = ["cuda", "triton", "reference", "straightforward", "where", "norm"]
    assert operator.main([*command, "--providers", *names]) == 0

    comments, rows = read(tmp_path / "operator.csv")
    assert "# gpu: Pretended 1" in comments
    assert "# multiprocessors: 3" in comments
    assert "# skipped: cuda no kernels, triton no triton" in comments
    waits = "straightforward: not captured, called a synchronizing CUDA operation"
    assert f"# missing: {waits} (2 cases)" in comments
    measured = {(row["group"], row["mode"], row["provider"]) for row in rows}
    everybody = {"cen_ext", "reference", "straightforward", "where", "norm", "copy"}
    assert {(mode, name) for group, mode, name in measured if group == "resnet"} == {
        *(("eager", name) for name in everybody),
        *(("graph", name) for name in everybody - {"straightforward"}),
    }
    assert ("wide", "graph", "straightforward") in measured  # it exchanges nothing there
    assert {row["samples"] for row in rows} == {"2"}
    assert {row["peak_mb"] for row in rows if row["provider"] != "copy"} == {"0.001"}

    printed = capsys.readouterr()
    assert printed.out.index("Eager calls: goals") < printed.out.index("Replays of CUDA graphs: goals")
    assert "[4/4] wide given contiguous float32 M=2 2x6x3x3" in printed.err
    files = {path.name for path in tmp_path.iterdir()}
    assert files >= {"operator.csv", "operator.md"}


@pytest.mark.usefixtures("tiny", "pretended")
def test_a_budget_ends_the_run_and_what_is_left_out_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elapsed = iter(range(0, 1000, 30))
    monkeypatch.setattr(operator, "time", SimpleNamespace(perf_counter=lambda: next(elapsed)))
    command = ["--groups", "resnet", "--providers", "where", "--repetitions", "1", "--budget-seconds", "100"]
    assert operator.main([*command, "--out", str(tmp_path / "operator")]) == 0
    comments, rows = read(tmp_path / "operator.csv")
    assert {(row["statistics"], row["size"]) for row in rows} == {
        ("batch", "1x10x4x4"),
        ("given", "1x10x4x4"),
    }
    left_out = comments[-1].removeprefix("# left out for time: ").split("; ")
    assert left_out == [f"resnet {kind} contiguous float32 M=2 2x6x3x3" for kind in ("batch", "given")]


@pytest.mark.parametrize(
    ("command", "available", "message"),
    [
        (["--device", "cuda"], False, "--device cuda: PyTorch finds no GPU here"),
        (["--device", "cuda", "--allocator", "kept"], True, "--allocator is about CPUs"),
        (["--device", "tpu"], True, "invalid choice"),
    ],
)
def test_mistakes_are_told(
    command: list[str],
    available: bool,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    with pytest.raises(SystemExit):
        operator.main(command)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("available", "device", "run"), [(True, "cuda", 160), (False, "cpu", 80)])
def test_the_device_is_the_gpu_where_there_is_one(
    available: bool, device: str, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    args = operator.parse([])
    assert args.device == device
    assert len(operator.choose_cases(args)[1]) == run
    assert operator.default_out("full", "cuda").name == "operator_full_cuda"
