"""``make gpu`` without a GPU: its steps, other commands in their place, and what is recorded of a machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu
from bench.gpu import Task
from bench.harness import machine

OUT = Path("results")


def task(name: str, script: str, limit: float = 20, **changes: object) -> Task:
    return Task(name, f"{name}.txt", [sys.executable, "-c", script], limit)._replace(**changes)


def program(folder: Path, name: str, script: str) -> None:
    """A command on the PATH."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# --- one task ---


def test_a_task_is_timed_and_its_output_kept() -> None:
    script = """
import os, sys, time
print(os.environ["MARK"], os.getcwd())
print("3 passed in 1.00s", file=sys.stderr)
time.sleep(0.3)
"""
    outcome, output = gpu.run(task("tests", script, environment={"MARK": "set"}))
    assert output == f"set {gpu.ROOT}\n3 passed in 1.00s\n"
    assert (outcome.name, outcome.state, outcome.summary) == ("tests", "ok", "3 passed in 1.00s")
    assert outcome.seconds >= 0.3


def test_a_task_that_fails_is_told() -> None:
    outcome, output = gpu.run(task("build", "print('half'); raise SystemExit(3)"))
    assert (outcome.state, outcome.summary, output) == ("exit status 3", "half", "half\n")


def test_a_task_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    script = f"""
import pathlib, subprocess, time
child = subprocess.Popen(["sleep", "60"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
print("begun")
time.sleep(60)
"""
    outcome, output = gpu.run(task("bench", script, limit=2))
    assert (outcome.state, output) == ("stopped after 2 s", "begun\n")
    assert outcome.seconds < 20
    child = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    end = time.monotonic() + 10
    while child.exists() and " Z " not in child.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert not child.exists() or " Z " in child.read_text()


@pytest.mark.parametrize(
    ("told", "state"),
    [("1 failed, 2 passed in 1s", "ok"), ("3 skipped in 1s", "nothing passed"), ("", "nothing passed")],
)
def test_tests_that_are_all_skipped_are_no_success(told: str, state: str) -> None:
    outcome, _ = gpu.run(task("tests", f"print({told!r})", proof=gpu.SOME_PASSED))
    assert outcome.state == state


def test_a_missing_program_is_no_failure() -> None:
    outcome, output = gpu.run(Task("memcheck", "sanitizer.txt", None, 1))
    assert (outcome.state, output) == (gpu.MISSING, "")
    assert "compute-sanitizer" in outcome.summary


@pytest.mark.parametrize(
    ("output", "summary"),
    [
        ("...\n12 passed, 3 skipped in 4.5s\n", "12 passed, 3 skipped in 4.5s"),
        (
            "=========\n1 passed in 9.0s\n========= ERROR SUMMARY: 0 errors\n",
            "1 passed in 9.0s; ERROR SUMMARY: 0 errors",
        ),
        ("no tests ran in 0.01s\n", "no tests ran in 0.01s"),
        ("copying\nlast line\n\n", "last line"),
        ("", ""),
    ],
)
def test_summary(output: str, summary: str) -> None:
    assert gpu.summary(output) == summary


def test_results_do_not_name_this_machines_folders() -> None:
    text = f"File {gpu.ROOT}/bench/gpu.py, {sys.prefix}/lib"
    assert gpu.portable(text) == "File bench/gpu.py, <python>/lib"


# --- all of them ---


def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    kept = {"log": "sanitizer.txt", "kept": "^===|passed"}
    todo = [
        task("build", "raise SystemExit(1)"),
        task("memcheck", "print('=== fine'); print('noise'); print('1 passed in 1s')", **kept),
        task("racecheck", "print('=== hazard'); print('noise'); raise SystemExit(86)", **kept),
        Task("synccheck", "sanitizer.txt", None, 1),
    ]
    outcomes = gpu.run_all(todo, tmp_path)
    assert [outcome.state for outcome in outcomes] == ["exit status 1", "ok", "exit status 86", "missing"]
    assert (tmp_path / "sanitizer.txt").read_text().splitlines() == [
        *("--- memcheck: ok", "=== fine", "1 passed in 1s"),
        *("--- racecheck: exit status 86", "=== hazard", "noise"),
        "--- synccheck: missing",
    ]
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert [step["name"] for step in steps] == [outcome.name for outcome in outcomes]
    assert all(step["seconds"] >= 0 for step in steps)


def test_the_steps_in_their_order() -> None:
    names = [made.name for made in gpu.tasks(gpu.STEPS, OUT, 100)]
    assert names == ["build", "versions", "tests", *gpu.CHECKS, "bench", *gpu.NETWORKS]
    assert [made.name for made in gpu.tasks(["bench"], OUT, 100)] == ["versions", "bench"]
    proven = [made.name for made in gpu.tasks(gpu.STEPS, OUT, 100) if made.proof]
    assert proven == ["tests", *gpu.CHECKS]


def test_steps_share_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    limits = {}
    for made in gpu.tasks(gpu.USUAL_STEPS, OUT, 480):
        limits[made.name] = made.limit
        clock[0] += 70
    checks = dict.fromkeys(gpu.CHECKS, gpu.CHECK_SECONDS) | {"initcheck": 60}
    assert limits == {"build": 480, "versions": 60, "tests": 340, **checks, "bench": 1 + gpu.GRACE_SECONDS}


def test_the_benchmark_is_told_what_is_left() -> None:
    (bench,) = [made for made in gpu.tasks(["bench"], OUT, 300.9) if made.name == "bench"]
    assert bench.command is not None
    at = bench.command.index("--budget-seconds")
    assert bench.command[at + 1] == "300"
    assert bench.command[-2:] == ["--out", "results/operator"]
    assert bench.limit == 360


def test_the_trainings_have_what_is_left_and_places_of_their_own() -> None:
    _, *made = gpu.tasks(["training"], OUT, 300)
    for task_of_network, network in zip(made, gpu.NETWORKS, strict=True):
        assert 299 < task_of_network.limit <= 300
        assert task_of_network.command is not None
        assert task_of_network.command[-4:] == ["--network", network, "--out", f"results/training_{network}"]


def test_the_sanitizer_is_found_and_told_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert gpu.find_sanitizer() is None
    assert gpu.sanitizer_task(None, "memcheck", 5).command is None
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    program(tmp_path / "cuda" / "bin", "compute-sanitizer", "exit 0")
    found = gpu.find_sanitizer()
    assert found == str(tmp_path / "cuda" / "bin" / "compute-sanitizer")
    for check in gpu.CHECKS:
        made = gpu.sanitizer_task(found, check, 5)
        assert made.command is not None
        assert made.command[:3] == [found, "--tool", check]
        assert made.command[-2:] == ["-k", "sanitizer"]
        assert ("--report-api-errors" in made.command) == (check == "memcheck")


def test_the_gpu_marker_is_registered() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--markers"], cwd=gpu.ROOT, capture_output=True, text=True
    )
    assert "@pytest.mark.gpu: needs a GPU" in listed.stdout


# --- the command ---


@pytest.mark.parametrize(("state", "status"), [("ok", 0), ("missing", 0), ("exit status 1", 1)])
def test_the_exit_status_tells(
    state: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    asked = []

    def run_all(todo: object, out: Path) -> list[gpu.Outcome]:
        asked.append(out)
        return [gpu.Outcome("build", "ok", 1.0, ""), gpu.Outcome("bench", state, 2.0, "written")]

    monkeypatch.setattr(gpu, "run_all", run_all)
    assert gpu.main([]) == status
    assert asked == [tmp_path / "gpu_nvidia_h100_80gb_hbm3"]
    assert f"{state}; written" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "finds no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- the machine ---


def test_the_gpu_and_its_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="A", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 * 2**20, total_memory=2**36
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {name for name, value in machine.gpu().items() if value is None} >= {"driver", "nvcc"}
    program(tmp_path, "nvidia-smi", "echo 580.1; echo 580.1")
    program(tmp_path, "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    found = machine.gpu()
    assert (found["driver"], found["nvcc"]) == ("580.1", "13.0.88")
    assert (found["gpu"], found["multiprocessors"], found["gpu L2 MiB"]) == ("A", 132, 50)
    assert found["compute capability"] == "9.0"
    program(tmp_path, "nvidia-smi", "exit 9")
    assert machine.gpu()["driver"] is None


def test_versions_are_written_as_json(tmp_path: Path) -> None:
    path = tmp_path / "versions.json"
    subprocess.run(
        [sys.executable, "-m", "bench.harness.machine", str(path)], cwd=gpu.ROOT, check=True, env=os.environ
    )
    versions = json.loads(path.read_text())
    assert versions["torch"] == torch.__version__
    assert versions["backends"]["reference"] == "ok"
