"""examples/timm_network.py with timm's smallest residual network."""

import re
from pathlib import Path

import pytest

from tests.helpers import vision
from tests.helpers.scripts import command, run


def test_branches_know_what_the_other_modality_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vision.timm()
    assert run(monkeypatch, tmp_path, command("timm_network.py")) is None
    plain, exchanging, _, *layers = capsys.readouterr().out.splitlines()
    (*alone, _), (*together, both) = (
        [float(number) for number in re.findall(r"([\d.]+) %", line)] for line in (plain, exchanging)
    )
    # A branch without exchange can tell the classes in pairs; 256 crops have a deviation of 3 %.
    assert max(alone) < 60
    assert min(together) > 70
    assert both > 70
    counts = [[int(number) for number in line.split()[1:] if number != "of"] for line in layers]
    assert len(counts) > 5
    assert all(max(rgb, depth) <= most for rgb, depth, most in counts)
    assert sum(rgb + depth for rgb, depth, _ in counts) > 0
