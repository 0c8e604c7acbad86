"""The convolutions' benchmark: what it measures agrees with PyTorch's, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cen_ext
from bench import convolution

pytestmark = pytest.mark.skipif(cen_ext.available_backends()["cpu"] != "ok", reason="no compiled part")
SHAPE = (2, 32, 64, 12, 2)


def test_both_are_near_float64() -> None:
    rows = convolution.measure(SHAPE, 1)
    assert [row["pass"] for row in rows] == ["forward", "gradient of x", "gradient of weight"]
    assert all(0 < error < 1e-5 for row in rows for error in row["errors"].values())


def test_results_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "SHAPES", [SHAPE])
    assert convolution.main(["--repetitions", "2", "--out", str(tmp_path / "c")]) == 0
    written = (tmp_path / "c.md").read_text()
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert written.endswith(convolution.table(rows))
    ratio = rows[0]["torch"] / rows[0]["cen_ext"]
    assert (
        f"| 2×32→64, 12, 2 | forward | {rows[0]['cen_ext']:.2f} | {rows[0]['torch']:.2f} | {ratio:.2f} |"
        in written
    )
    assert f"| geometric mean | forward | | | {ratio:.2f} | | |" in written


def test_no_repetitions_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convolution.main(["--repetitions", "0"])
    assert "--repetitions must be at least 1, got 0" in capsys.readouterr().err
