"""Networks of random weights in files, and what ``cen export`` makes of them."""

from __future__ import annotations

import functools
from pathlib import Path

from models.__main__ import main
from models.training import checkpoint
from tests.helpers import training_runs, translation_runs

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "aot": ".pt2"}


class Exported:
    """A tiny segmentation network of rgb and depth that exchanges channels, and its exports, made once each.

    Args:
        folder: theirs; ``rooms`` in it are the network's images, of 40x48 pixels.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rooms = training_runs.prepare_rooms(folder / "rooms")
        self.network = folder / "net.safetensors"
        task = training_runs.tiny_task(self.rooms)
        record = {**checkpoint.header("synthetic_demo", task.recipe), **task.describe()}
        checkpoint.save_network(self.network, {**record, "task": task.networks()})

    @functools.cached_property
    def generator(self) -> Path:
        """A U-Net's file of weights."""
        path = self.folder / "generator.safetensors"
        views = translation_runs.prepare_views(self.folder / "views")
        task = translation_runs.tiny_task(views)
        record = {**checkpoint.header("synthetic_translation_demo", task.recipe), **task.describe()}
        checkpoint.save_network(path, {**record, "task": task.networks()})
        return path

    @functools.cache  # noqa: B019 - of the one or two of a test session
    def file(self, format: str, *options: str, network: str = "network") -> Path:
        """The path of an export, made by ``cen export``.

        Args:
            format: of ``models.deployment.formats``.
            options: of the command.
            network: ``"network"`` or ``"generator"``.
        """
        name = "_".join([network, format, *(option.strip("-") for option in options)])
        path = self.folder / f"{name}{SUFFIXES[format]}"
        root = self.folder / {"network": "rooms", "generator": "views"}[network]
        command = ["export", str(getattr(self, network)), f"data.root={root}", "--output", str(path)]
        assert main([*command, "--format", format, *options]) == 0
        return path
