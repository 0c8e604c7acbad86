"""Goals of the operator on GPUs, and tables that hold a run's figures against them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from bench.harness.report import Row, Table, by_mode, mean

PAST_L2, WITHIN_L2, SMALL = "past L2", "within L2", "small"
SMALL_SIDE = 16
BASELINES = ("compile", "compile_max", "straightforward")

# By statistics and phase. Shares are of copy speed by the floor's bytes, which batch statistics exceed by
# half forward and by two thirds backward where x does not stay on chip and is read in two passes.
GOALS = {
    ("given", "forward"): "share 0.92",
    ("given", "backward"): "share 0.92",
    ("batch", "forward"): "share 0.85 (two passes 0.60), × compile 1.5, × straightforward 6",
    ("batch", "backward"): "share 0.80 (two passes 0.51), × compile 2, × straightforward 6",
}
SMALL_GOAL = "× compile 1"


def goal_tables(rows: Sequence[Row], l2_bytes: int) -> dict[str, Table]:
    """By title, a table for each mode: means over all shapes and groups of a reach, beside the goal."""
    ours = [r for r in rows if (r.provider, r.phase) == ("cen_ext", "forward")]
    reaches = {(r.key, r.size): reach(r, l2_bytes) for r in ours}

    def table(of_mode: Sequence[Row]) -> Table:
        members: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for r in of_mode:
            if (r.statistics, r.phase) in GOALS:
                kind = (reaches[r.key, r.size], r.statistics, r.phase, r.dtype, r.layout)
                members[kind].append(r)
        kinds = sorted(members, key=lambda kind: (PAST_L2, WITHIN_L2, SMALL).index(kind[0]))
        header = ["tensors", "statistics", "phase", "dtype", "layout", "shapes", "share of copy"]
        header += [*(f"× {name}" for name in BASELINES), "goal"]
        return [header, *(_line(kind, members[kind]) for kind in kinds)]

    return by_mode("Goals: geometric mean (lowest) over the shapes, and of how many if not all", table, rows)


def reach(forward: Row, l2_bytes: int) -> str:
    """Size class of a case relative to the L2, by the bytes that its forward pass must move."""
    if 1e6 * forward.floor_mb > l2_bytes:
        return PAST_L2
    side = int(forward.size.rpartition("x")[2])
    return SMALL if side <= SMALL_SIDE else WITHIN_L2


def goal(kind: tuple[str, ...]) -> str:
    """Goal for tensors of a kind (reach, statistics, phase, ...); empty where there is none."""
    tensors, statistics, phase, *_ = kind
    if tensors == SMALL:
        return SMALL_GOAL
    if (tensors, statistics) == (WITHIN_L2, "given"):
        return ""
    return GOALS[statistics, phase]


def _line(kind: tuple[str, ...], members: Sequence[Row]) -> list[str]:
    shares = [r.share_of_copy for r in members if r.provider == "cen_ext"]
    cells = [str(len(shares)), mean(shares, min)]
    for name in BASELINES:
        speedups = [r.speedup for r in members if r.provider == name]
        some = 0 < len(speedups) < len(shares)
        cells.append(mean(speedups, min) + (f" of {len(speedups)}" if some else ""))
    return [*kind, *cells, goal(kind)]
