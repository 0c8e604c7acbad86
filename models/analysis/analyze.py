"""The analyses of the paper's theory, from runs to what is printed and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import nn

from cen_ext.modules.thresholds import median_threshold, parse_median
from models.analysis import dynamics
from models.analysis.attraction import look_at, sample_channels
from models.analysis.attraction_report import Attraction
from models.analysis.corollary import compare_arms
from models.analysis.dynamics import Dynamics, dynamics_of
from models.analysis.figures import attraction_figure, corollary_figure, dynamics_figure
from models.analysis.observation import observe
from models.analysis.runs import (
    COMMAND,
    Run,
    load_task,
    network_of,
    penalized_channels,
    read_run,
    thresholds_of,
)
from models.networks.fusion import named_exchange_points
from models.training.errors import UsageError, writable
from models.training.files import replacing, write_json
from models.training.interrupt import Interrupt
from models.training.scale_records import read_scales

LEAST_BATCHES = 64  # of which shares of batches tell something
THEOREM, DYNAMICS, COROLLARY = "theorem", "dynamics", "corollary"


def analyze_theorem(
    paths: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    output: Path | None = None,
    batches: int = LEAST_BATCHES,
    channels: int = 4,
    threshold: float | str | None = None,
) -> int:
    """Test Theorem 1 on trained networks, and on how their scales moved; print and write what is found.

    Args:
        paths: runs, or checkpoints in them.
        overrides: ``field=value`` assignments for all of them.
        output: a folder for ``theorem.json``, ``theorem.png``, ``dynamics.json`` and ``dynamics.png``; None:
            that of the run, if it is one.
        batches: training batches to look at; 0: the records alone.
        channels: of every layer and modality.
        threshold: θ, or a factor of the median of each layer's scales at the start; None: what the run
            exchanged by, or else the first of the other runs did.

    Returns:
        The exit code: 0, or 128 + the signal's number when interrupted.

    Raises:
        UsageError: a run, setting, number or folder is wrong; there is nothing to look at.
        DataError: the data set is not whole.
    """
    runs = [read_run(path, overrides) for path in paths]
    folder = _folder(runs, output)
    for name in (THEOREM, DYNAMICS):
        writable(folder / f"{name}.json", "--output")
    networks = [network_of(run) for run in runs]
    thresholds = _thresholds(runs, networks, threshold)
    moved = [
        found
        for run, net, each in zip(runs, networks, thresholds, strict=True)
        if (found := _dynamics(run, net, each)) is not None
    ]
    if moved:
        print(dynamics.text(moved))
        _write(folder / DYNAMICS, {"runs": [each.plain() for each in moved]}, dynamics_figure(moved))
    del networks
    if batches == 0:
        return 0
    if batches < LEAST_BATCHES:
        print(f"warning: --batches {batches}: shares of fewer than {LEAST_BATCHES} batches are coarse")
    results: list[Attraction] = []
    with Interrupt() as interrupt:
        for run, each in zip(runs, thresholds, strict=True):
            result = None if interrupt else _attraction(run, each, batches, channels, interrupt)
            if result is not None:
                print(f"\n{result.text()}", flush=True)
                results.append(result)
    if results:
        plain = {"runs": [result.plain() for result in results]}
        _write(folder / THEOREM, plain, attraction_figure(results))
    return _code(interrupt)


def analyze_corollary(
    paths: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    output: Path | None = None,
    steps: int,
    seeds: Sequence[int],
    threshold: float | str | None = None,
) -> int:
    """Test Corollary 1 on one trained network; print and write what is found.

    Args:
        paths: a run, or a checkpoint in it.
        overrides, threshold: as for ``analyze_theorem``.
        output: a folder for ``corollary.json`` and ``corollary.png``; None: the run's.
        steps: to train on for, with and without exchange.
        seeds: of each pair of trainings.

    Returns:
        The exit code, as there.

    Raises:
        UsageError: a run, setting, number or folder is wrong; no scale is below the threshold.
        DataError: the data set is not whole.
    """
    if len(paths) > 1:
        raise UsageError(f"{COMMAND}: --corollary takes one run, got {len(paths)}")
    run = read_run(paths[0], overrides)
    folder = _folder([run], output)
    writable(folder / f"{COROLLARY}.json", "--output")
    (thresholds,) = _thresholds([run], [network_of(run)], threshold)
    with Interrupt() as interrupt:
        result = compare_arms(run, thresholds, steps, seeds, interrupt)
    if result is not None:
        print(result.text())
        _write(folder / COROLLARY, result.plain(), corollary_figure(result))
    return _code(interrupt)


def _code(interrupt: Interrupt) -> int:
    """The exit code."""
    if interrupt.received is None:
        return 0
    print("interrupted: what is shown and written is what was done before that")
    return 128 + interrupt.received


def _folder(runs: Sequence[Run], output: Path | None) -> Path:
    if output is not None:
        return output
    if len(runs) > 1:
        raise UsageError(f"{COMMAND}: several runs need --output FOLDER")
    return runs[0].folder


def _thresholds(
    runs: Sequence[Run], networks: Sequence[nn.Module], given: float | str | None
) -> list[dict[str, float]]:
    """θ of every exchange point of each run."""
    own = [thresholds_of(net) for net in networks]
    found = []
    for run, net, mine in zip(runs, networks, own, strict=True):
        points = list(named_exchange_points(net))
        if not points:
            raise UsageError(
                f"{COMMAND}: {run.path} has a network without norms at which the paper's exchanges"
            )
        if given is not None:
            found.append(_given(run, points, given))
            continue
        fitting = [each for each in (mine, *own) if set(points) <= each.keys()]
        if not fitting:
            raise UsageError(
                f"{COMMAND}: {run.path} was trained without a threshold: give --threshold, the number or "
                "the 0.05*median that scales are to be compared with"
            )
        found.append({name: fitting[0][name] for name in points})
    return found


def _given(run: Run, points: Sequence[str], threshold: float | str) -> dict[str, float]:
    if not isinstance(threshold, str):
        return dict.fromkeys(points, threshold)
    factor, records = parse_median(threshold), read_scales(run.folder)
    if not records or records[0][0] != 0:
        raise UsageError(
            f"--threshold {threshold}: {run.folder} has no record of the scales that training began with; "
            "give a number"
        )
    try:
        return {name: median_threshold(factor, records[0][1][name]) for name in points}
    except ValueError as error:
        raise UsageError(f"--threshold {threshold}: a layer {error}") from None


def _dynamics(run: Run, net: nn.Module, thresholds: Mapping[str, float]) -> Dynamics | None:
    records = read_scales(run.folder)
    if len(records) < 2:
        print(f"warning: {run.folder} has {len(records)} records of scales, and so nothing of how they moved")
        return None
    if missing := [name for name in thresholds if any(name not in scales for _, scales in records)]:
        raise UsageError(f"{run.folder}: its records of scales lack {missing[0]}: these settings are others")
    penalized = penalized_channels(net)
    under = any(bool(each.any()) for each in penalized.values())
    return dynamics_of(
        run.name,
        records,
        run.modalities,
        exchanged=bool(thresholds_of(net)),
        penalty=run.recipe.loss.sparsity if under else 0.0,
        thresholds=thresholds,
        penalized=penalized,
    )


def _attraction(
    run: Run, thresholds: Mapping[str, float], batches: int, channels: int, interrupt: Interrupt
) -> Attraction | None:
    """Look at a run's network; None if interrupted before the first batch was done."""
    task, step = load_task(run)
    net = task.network
    penalized = penalized_channels(net)
    if task.penalty_strength == 0:
        raise UsageError(
            f"{COMMAND}: loss.sparsity of {run.path} is 0, and so the probability of Theorem 1: give "
            "loss.sparsity=..., the λ to ask for"
        )
    exchanged = bool(thresholds_of(net))
    layers = observe(net)
    drawn = sample_channels(layers, thresholds, penalized, channels)
    alone, done = look_at(task, layers, drawn, batches, interrupt)
    if done == 0:
        return None
    names = run.modalities if len(next(iter(penalized.values()))) == len(run.modalities) else ("all",)
    return Attraction(run.name, step, task.penalty_strength, exchanged, names, drawn, alone, done)


def _write(path: Path, plain: object, figure: Figure) -> None:
    """Write ``path`` with ``.json`` and ``.png``."""
    write_json(path.with_suffix(".json"), plain)
    with replacing(path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=120)
    print(f"written: {path}.json, .png")
