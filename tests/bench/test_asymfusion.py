"""``bench.asymfusion`` measures networks that agree, and writes its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import asymfusion


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_the_networks_agree_and_the_table_is_written(tmp_path: Path, statistics: str) -> None:
    """Networks that compute something else are refused before anything is timed."""
    file = tmp_path / "asymfusion.md"
    # Batch statistics of few values would magnify the rounding.
    crop = "32" if statistics == "frozen" else "96"
    asymfusion.main(
        ["--crop", crop, "--batch", "1", "--rounds", "1", "--statistics", statistics, "--output", str(file)]
    )
    rows = [line for line in file.read_text().splitlines() if ", AsymFusion" in line]
    assert len(rows) == 3
    assert all(float(row.split("|")[3]) > 0 for row in rows)
