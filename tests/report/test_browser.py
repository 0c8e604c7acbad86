"""The page in a browser: nothing is wider than the window, be it a phone's."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from models.report.blocks import (
    Cell,
    Chart,
    Charts,
    Gallery,
    Matrix,
    Note,
    Picture,
    Scene,
    Section,
    Table,
    Terms,
)
from models.report.charts import Series, line_chart
from models.report.page import Page
from models.report.page import html as html_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LONG = "an_unbroken_name_" * 12
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
# A frame of its own width, because a browser's window has a least one. What it holds is of this page's origin
# as ``srcdoc``, so that the script may look into it.
FRAME = """<!DOCTYPE html><title>-</title>
<iframe width={width} height=800 style="border:0" srcdoc="{page}"></iframe>
<script>
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement;
  document.title = JSON.stringify({{
    width: root.clientWidth,
    scrolls: root.scrollWidth,
    boxes: [...page.querySelectorAll(".scroll")].map(box => [box.clientWidth, box.scrollWidth]),
    charts: [...page.querySelectorAll(".chart svg")].map(chart => chart.getBoundingClientRect().width),
  }});
}};
</script>"""


def made_up(charts: list[Chart]) -> str:
    """A page of all kinds of parts, some wider than any window."""
    wide = [f"column {number}" for number in range(40)]
    blocks = [
        Table(LONG, wide, [[LONG, *(Cell("12.34 ± 0.56", best=True, bar=0.5) for _ in wide[1:])]] * 3),
        Table("settings", ["", LONG], [[LONG, LONG]], wordy=True),
        Matrix("40 classes", wide, [[1 / 40] * 40] * 40),
        Charts(LONG, charts, {LONG: 0}),
        Gallery("scenes", [Scene(LONG, [Picture(PIXEL, LONG, "a picture")] * 7)]),
        Terms({LONG: LONG}),
    ]
    return html_of(
        Page(LONG, LONG, [Note(LONG, LONG)], [LONG], [Section("summary", LONG, LONG, blocks)], LONG)
    )


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; Debian's package is named so")
@pytest.mark.parametrize("width", [360, 1400])
def test_only_tables_scroll(width: int, tmp_path: Path) -> None:
    charts = [line_chart("a loss", "a loss", [Series([1, 2, 3], [3, 2, 1], 0)])] * 3
    file = tmp_path / "frame.html"
    file.write_text(FRAME.format(width=width, page=html.escape(made_up(charts))))
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
    command = [CHROMIUM, *flags, "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search(r"<title>(.*?)</title>", dumped, re.S)
    assert title is not None
    found = json.loads(html.unescape(title[1]))
    assert found["width"] == width
    assert found["scrolls"] <= width
    assert all(inside <= width for inside, _ in found["boxes"])
    assert any(outside > inside for inside, outside in found["boxes"]), "a wide table scrolls in its box"
    assert len(found["charts"]) == 3
    assert all(0.4 * min(width, 500) < chart < width for chart in found["charts"])
