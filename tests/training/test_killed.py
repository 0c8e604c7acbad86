"""A run that is killed at random moments ends with the weights of one that was not."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest

from models.__main__ import main
from models.training import checkpoint
from tests.helpers.training_runs import STEPS, assert_same_runs, command, prepare_rooms, start

KILLS = 10
# A save after every step: half of the time is spent writing, so that many a kill comes in between.
OFTEN = [
    *["model.encoder=resnet18", "run.checkpoint_steps=1", "run.log_steps=2", "run.evaluate_epochs=1"],
    "run.keep=2",
]
ALL = [
    *["optim.ema=0.9", "optim.accumulate=2", "optim.clip=1", "optim.schedule=polynomial"],
    *["optim.warmup_steps=1", "run.precision=bf16", "optim.method=adamw"],
]


@pytest.mark.usefixtures("one_thread")
def test_killed_ten_times(tmp_path: Path) -> None:
    rooms = prepare_rooms(tmp_path / "rooms")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    undisturbed = start(main, command(rooms, whole, *OFTEN, *ALL))
    undisturbed.join()
    assert undisturbed.exitcode == 0
    duration = time.monotonic() - began

    moments, kills = random.Random(6), 0
    while kills < KILLS:
        resume = ["--resume"] if (killed / "last.pt").exists() else []
        process = start(main, [*command(rooms, killed, *OFTEN, *ALL), *resume])
        process.join(duration * moments.uniform(0.02, 0.25))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:  # it got to the end in between: the next one starts from the beginning
            assert process.exitcode == 0
            assert_same_runs(whole, killed)
            shutil.rmtree(killed)
    resume = ["--resume"] if (killed / "last.pt").exists() else []
    assert main([*command(rooms, killed, *OFTEN, *ALL), *resume]) == 0
    assert_same_runs(whole, killed)
    assert not list(killed.glob(".[0-9]*")), "what the killed ones left half written"
    assert [*checkpoint.numbered(killed)] == [*checkpoint.numbered(whole)] == [STEPS - 1, STEPS]
