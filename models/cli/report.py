"""``cen report RUN [RUN ...] --output FILE``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from models.cli.arguments import Commands, add_command, add_overrides
from models.training.errors import UsageError

_ASSIGNMENT = re.compile(r"[a-z_]+(\.\w+)+=")


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "report", help="make one page of runs that can be shown to anyone")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    add_overrides(parser)
    parser.add_argument(
        "--output", "--out", type=Path, required=True, metavar="FILE", help="the page, such as report.html"
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="run the checkpoints on so many validation images, spread evenly; default: eval.limit, or all",
    )
    parser.add_argument(
        "--no-evaluation",
        action="store_true",
        help="do not run the checkpoints: no scores by class, confusions and pictures",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure how many images per second each network answers to, here; takes seconds for each",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from models.report.report import write_report

    runs, overrides = _split([*arguments.runs, *arguments.overrides])
    if arguments.images is not None and arguments.images < 1:
        raise UsageError(f"--images must be at least 1, got {arguments.images}")
    gathered = write_report(
        runs,
        arguments.output,
        overrides,
        images=arguments.images,
        evaluation=not arguments.no_evaluation,
        measure=arguments.measure,
    )
    for warning in gathered.comparison.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for note in gathered.notes:
        print(f"note: {note.missing} {note.remedy}", file=sys.stderr)
    size = arguments.output.stat().st_size / 1e6
    print(f"written: {arguments.output}, {size:.1f} MB")


def _split(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Runs and assignments, which may stand in any order."""
    overrides = [text for text in arguments if _ASSIGNMENT.match(text)]
    return [Path(text) for text in arguments if not _ASSIGNMENT.match(text)], overrides
