"""``cen compare RUN RUN ...``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from models.cli.arguments import Commands, add_command
from models.training.errors import writable


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands, "compare", help="compare runs: metrics over seeds, parameters, speed, memory"
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure how many images per second each network answers to, here; takes seconds for each",
    )
    parser.add_argument(
        "--output",
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write compare.md, compare.csv, compare.json and compare.png as well",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from models.comparison import report
    from models.comparison.compare import compare

    folder: Path | None = arguments.output
    if folder is not None:
        writable(folder / f"{report.NAME}.png", "--output")
    comparison = compare(arguments.runs, measure=arguments.measure)
    for warning in comparison.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if folder is not None:
        report.write(folder, comparison)
    print(report.text(comparison))
    if folder is not None:
        print(f"written: {folder / report.NAME}.md, .csv, .json, .png")
