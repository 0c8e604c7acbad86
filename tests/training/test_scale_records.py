"""Records of the scales: when they are written, what they hold, and what resuming leaves of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.networks.fusion import Exchange, NoFusion, exchange_points
from models.networks.systems.unet import unet
from models.training.errors import UsageError
from models.training.scale_records import read_scales, scales_of, write_scales
from models.training.settings import RunSettings
from tests.helpers.same import assert_same
from tests.training.test_loop import RUN, Toy, run


def steps_of(folder: Path) -> list[int]:
    return [step for step, _ in read_scales(folder)]


@pytest.mark.parametrize(
    ("every", "steps"), [(None, [0, 4, 8, 12, 14]), (5, [0, 5, 10, 14]), (7, [0, 7, 14]), (99, [0, 14])]
)
def test_steps_that_are_recorded(tmp_path: Path, every: int | None, steps: list[int]) -> None:
    """14 steps in epochs of 4."""
    task = Toy()
    run(tmp_path, task, RunSettings(evaluate_epochs=9, scales_steps=every))
    assert steps_of(tmp_path) == steps
    (_, first), *_, (_, last) = read_scales(tmp_path)
    assert_same(first, {"point": torch.zeros(1, 3)})
    assert_same(last, {"point": task.value.detach()[None]})


def test_resuming_goes_back_to_the_checkpoint(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = RunSettings(checkpoint_steps=5, evaluate_epochs=9, scales_steps=2)
    run(whole, Toy(), settings)
    run(killed, Toy(stop_at=6), settings)
    # It was killed once more after it had recorded steps, but before it had saved.
    write_scales(killed, 8, {"point": torch.full((1, 3), 7.0)})
    write_scales(killed, 9, {"point": torch.full((1, 3), 7.0)})
    (killed / "scales" / ".77-step_000010.safetensors").write_bytes(b"half written")
    run(killed, Toy(), settings, resume=True)
    assert_same(read_scales(killed), read_scales(whole))
    assert not list((killed / "scales").glob(".*"))


def test_a_run_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    run(tmp_path, Toy(stop_at=6), RUN)
    for path in (tmp_path / "scales").iterdir():
        path.unlink()
    (tmp_path / "scales").rmdir()
    assert read_scales(tmp_path) == []
    run(tmp_path, Toy(), RUN, resume=True)
    assert steps_of(tmp_path) == [8, 12, 14]


@pytest.mark.parametrize("fusion", [Exchange(), NoFusion(), NoFusion(norms="shared")])
def test_each_exchange_point_is_recorded(tmp_path: Path, fusion: Exchange | NoFusion) -> None:
    net = unet(num_modalities=2, size=32, base_width=4, fusion=fusion)
    points = list(exchange_points(net))
    for number, point in enumerate(points):
        torch.nn.init.constant_(point.weight, number)
    write_scales(tmp_path, 3, scales_of(net))
    ((step, scales),) = read_scales(tmp_path)
    assert step == 3
    assert points
    modules, rows = dict(net.named_modules()), 1 if fusion == NoFusion(norms="shared") else 2
    assert [modules[name] for name in scales] == sorted(points, key=points.index)
    for number, point in enumerate(points):
        (table,) = [table for name, table in scales.items() if modules[name] is point]
        assert_same(table, torch.full((rows, point.table_shape()[1]), float(number)))


def test_mistakes(tmp_path: Path) -> None:
    tables: dict[str, Tensor] = {"point": torch.zeros(2, 3)}
    (tmp_path / "scales").write_text("in the way")
    with pytest.raises(UsageError, match=r"^cannot write .*step_000003\.safetensors"):
        write_scales(tmp_path, 3, tables)
    (tmp_path / "scales").unlink()
    write_scales(tmp_path, 3, {})  # of a network without exchange points
    assert read_scales(tmp_path) == []
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales" / "step_000004.safetensors").write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"step_000004\.safetensors is broken or no record of scales"):
        read_scales(tmp_path)
