"""Tables of a GPU's figures in two modes, goals and plots."""

from __future__ import annotations

import pytest

from bench.harness import goals, plot, providers, report
from tests.helpers.made_up import case, made_up_rows


def both_modes() -> list[report.Row]:
    """Two shapes; "where" could not be captured, "norm" failed on the second shape."""
    rows = []
    for size, factor in (((2, 20, 5), 1), ((2, 20, 20), 4)):
        eager = {"cen_ext": 2, "where": 4 * factor, "norm": 1, "copy": 1}
        graph = {"cen_ext": 1, "norm": 0.5, "copy": 0.5}
        if factor == 4:
            del eager["norm"], graph["norm"]
        rows += made_up_rows(case(size=size), "eager", eager) + made_up_rows(case(size=size), "graph", graph)
    return rows


def test_tables_name_the_mode_and_bear_gaps() -> None:
    tables = report.means(both_modes())
    eager, graph, memory = tables.values()
    starts = [title.partition(":")[0] for title in tables]
    assert starts == ["Eager calls", "Replays of CUDA graphs", "Peak memory over the others'"]
    assert eager[0][-3:] == ["share of copy", "× where", "× norm alone"]
    assert eager[1][-3:] == ["0.50 (0.50)", "4.00 (2.00)", "0.50 (0.50)"]
    assert graph[0][-2:] == ["share of copy", "× norm alone"]
    assert memory[1][-2:] == ["1.00 (1.00)", "1.00 (1.00)"]

    text = report.as_text(both_modes(), {"gpu": "Pretended"}, {"Summary": [["header"], ["value"]]})
    assert text.endswith("Summary\nheader\nvalue")
    (line,) = [x for x in text.splitlines() if "2x20x20x20  forward" in x and "8.00" in x]
    assert line.endswith("8.00     –")
    markdown = report.as_markdown(both_modes(), {"gpu": "Pretended"}, {"Summary": [["header"], ["value"]]})
    assert markdown.index("Summary.") < markdown.index("Eager calls: share") < markdown.index("Replays of")


def test_the_norm_alone_has_its_own_floor() -> None:
    rows = {
        (r.provider, r.phase): r
        for r in made_up_rows(case("wide"), "eager", {"cen_ext": 3, "norm": 2, "copy": 2})
    }
    assert rows["cen_ext", "forward"].share_of_copy == pytest.approx(1)  # the residual makes it 3 tensors
    assert rows["norm", "forward"].share_of_copy == pytest.approx(1)
    assert rows["norm", "backward"].floor_mb == pytest.approx(1.5 * rows["copy", "forward"].floor_mb)


def test_reaches_and_their_goals() -> None:
    def reach(size: tuple[int, int, int], **changes: object) -> str:
        rows = made_up_rows(case(size=size, **changes), "eager", {"cen_ext": 1, "copy": 1})
        (ours,) = [r for r in rows if (r.provider, r.phase) == ("cen_ext", "forward")]
        return goals.reach(ours, 50 * 2**20)

    assert reach((6, 64, 125)) == goals.PAST_L2  # 96 MB
    assert reach((6, 64, 125), dtype="bfloat16") == goals.WITHIN_L2  # 48 MB
    assert reach((6, 512, 16)) == goals.SMALL
    assert reach((60, 512, 16)) == goals.PAST_L2

    assert goals.goal((goals.PAST_L2, "given", "backward", "float32")) == "share 0.92"
    assert goals.goal((goals.WITHIN_L2, "given", "forward", "float32")) == ""
    assert goals.goal((goals.WITHIN_L2, "batch", "forward", "float32")).startswith("share 0.85")
    assert goals.goal((goals.SMALL, "batch", "forward", "float32")) == "× compile 1"


def test_goals_average_over_groups_and_say_over_how_many() -> None:
    rows = []
    for one, compiled in ((case(size=(2, 20, 20)), 2.0), (case("wide", size=(2, 20, 20)), 8.0)):
        times = {"cen_ext": 1.0, "compile": compiled, "copy": 0.5}
        if one.group == "wide":
            times["compile_max"] = 3.0
        rows += made_up_rows(one, "graph", times)
    rows += made_up_rows(case(size=(1, 4, 2)), "graph", {"cen_ext": 1, "compile": 0.5, "copy": 1})
    ((title, (header, *lines)),) = goals.goal_tables(rows, 100_000).items()
    assert title.startswith("Goals")
    assert header[5:] == [
        "shapes",
        "share of copy",
        "× compile",
        "× compile_max",
        "× straightforward",
        "goal",
    ]
    assert [line[:3] for line in lines] == [
        [reach, "batch", phase] for reach in (goals.PAST_L2, goals.SMALL) for phase in ("forward", "backward")
    ]
    # Shares: 2 and 3 tensors in 1 ms where a copy takes 0.5 ms for 2.
    assert lines[0][5:-1] == ["2", "0.61 (0.50)", "4.00 (2.00)", "3.00 (3.00) of 1", "–"]
    assert lines[2][5:-1] == ["1", "1.00 (1.00)", "0.50 (0.50)", "–", "–"]


def test_the_picture_is_of_the_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn = []
    draw = plot._draw
    monkeypatch.setattr(plot, "_draw", lambda rows: drawn.append(rows) or draw(rows))
    rows = both_modes()
    pictures = plot.plot(rows)
    assert pictures["contiguous"].startswith(b"\x89PNG")
    assert drawn == [[r for r in rows if r.mode == "graph"]]
    assert set(plot.COLORS) >= set(providers.MAKERS) - {"copy"}
