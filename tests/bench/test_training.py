"""The benchmark of training steps: what it writes, and that all its networks train alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import training
from bench.harness import segmentation_providers, translation_providers
from bench.harness.configs import CONFIGS

TINY = ["--encoder", "resnet18", "--crop", "48", "--batch", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def thin_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full decoders take minutes in bfloat16 where PyTorch's convolutions of it are slow (no AVX-512)."""
    for network, decoder in segmentation_providers.DECODERS.items():
        monkeypatch.setitem(segmentation_providers.DECODERS, network, {**decoder, "width": 32})


def networks(made: training.Provider) -> list[nn.Module]:
    if isinstance(made, translation_providers.Ours):
        return [made.nets.generator, made.nets.discriminator]
    if isinstance(made, translation_providers.Eager):
        return [made.generator, made.discriminator]
    return [made.net]


@pytest.mark.parametrize("network", ["refinenet", "pspnet", "unet"])
def test_every_config_computes_the_same_loss(network: str) -> None:
    """In float64 the first losses, and after an update the second ones, agree to rounding."""
    tiny = ["--crop", "32", "--device", "cpu"] if network == "unet" else TINY
    args, system = training.parse(["--network", network, *tiny]), training.SYSTEMS[network]
    state = system.initial_state(system.recipe_of(args, CONFIGS["ours"], dropout=0.0))
    stream = system.batches(system.recipe_of(args, CONFIGS["ours"]), 2)
    for batch in stream:
        batch.images = batch.images.double()
        if network == "unet":
            batch.target = batch.target.double()
    losses = []
    for name in ("ours", "straightforward"):
        made = system.make_provider(system.recipe_of(args, CONFIGS[name], dropout=0.0), CONFIGS[name], state)
        for net in networks(made):
            net.double()
        losses.append([float(made.step(batch)) for batch in stream])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert losses[0][1] < losses[0][0]


def test_writes_table_figures_and_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result"
    configs = ["straightforward", "ours", "ours, bf16"]
    arguments = [*TINY, "--steps", "2", "--curve", "2", "--out", str(out), "--configs", *configs]
    assert training.main(arguments) == 0
    written = json.loads(out.with_suffix(".json").read_text())
    assert list(written["results"]) == configs
    for name in configs:
        assert len(written["results"][name]["steps"]) == 2
        assert written["results"][name]["peak"] > 0
        # Batch norms over two images of 2x2 values magnify rounding.
        assert written["losses"][name] == pytest.approx(written["losses"]["straightforward"], rel=0.05)
    assert written["results"]["ours"]["peak"] < written["results"]["straightforward"]["peak"]
    table = out.with_suffix(".md").read_text()
    assert all(f"| {name} |" in table for name in configs)
    assert table.split("\n\n", 1)[1].strip() in capsys.readouterr().out
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_config_that_fails_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    out = tmp_path / "result"
    configs = ["straightforward", "straightforward, compile"]
    # The option by its earlier name.
    arguments = [*TINY, "--steps", "1", "--curve", "0", "--out", str(out), "--ways", *configs]
    assert training.main(arguments) == 0
    assert "straightforward, compile: no compiler here" in capsys.readouterr().err
    assert "| straightforward, compile | failed: no compiler here |" in out.with_suffix(".md").read_text()
