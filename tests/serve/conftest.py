"""A small trained run, and what serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.__main__ import main
from tests.helpers.training_runs import command, prepare_rooms


@pytest.fixture(scope="session")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_rooms(tmp_path_factory.mktemp("data") / "rooms")


@pytest.fixture(scope="session")
def run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(command(rooms, folder, "run.steps=1", "model.encoder=resnet18")) == 0
    return folder


@pytest.fixture(scope="session")
def head_run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose fusion has a head in place of the weights, and needs all modalities."""
    folder = tmp_path_factory.mktemp("runs") / "head"
    assert main(command(rooms, folder, "run.steps=1", "fusion=late_concat")) == 0
    return folder


@pytest.fixture
def scenes(run: Path) -> Any:
    pytest.importorskip("starlette", reason="the extra serve is not installed")
    from models.serve.scenes import Scenes

    made = Scenes.open(run, ["run.device=cpu"], 10**6)
    spread_scales(made.trained)
    return made


@pytest.fixture
def service(scenes: Any) -> Iterator[Any]:
    from models.serve.app import Limits, Service

    made = Service(scenes, Limits(upload_mb=1.0, megapixels=1.0, queue=4))
    yield made
    made.worker.close()


@pytest.fixture
def files(rooms: Path) -> dict[str, Path]:
    return {kind: rooms / kind / "000002.png" for kind in ("rgb", "depth")}


def spread_scales(trained: Any) -> None:
    """Give the layers scales from 0 to 0.1, on both sides of thresholds, and the outputs several classes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in trained.net.modules():
            if getattr(layer, "exchanges", False):
                layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) / 10)
        *_, last = (each for each in trained.net.decoder.modules() if isinstance(each, torch.nn.Conv2d))
        last.weight.normal_(generator=generator)
        trained.net.alpha.copy_(torch.tensor([0.5, 0.0]))
