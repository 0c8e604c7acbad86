"""Train every fusion on one budget, after one search, and write the table.

    python -m bench.fusion DATA WEIGHTS [FOLDER] [--budget cpu] [--phases search table long] [--methods ...]

DATA is NYUDv2 at 384x288 (``nyu_cen``), WEIGHTS a complete ImageNet ResNet-50 in its first form (stride in
the 1x1 convolutions). Three phases, each of which needs the one before:

    search  each method's learning rate, and an exchange's threshold, at a fifth of the steps; trained on four
            fifths of the training list and measured on the last, never on the validation images
    table   all methods with what the search found, on the whole list, seeds interleaved
    long    the best two fusions and no exchange, three times as long

Every finished training leaves a small file in ``--results``, and is not repeated. One that is interrupted
(Ctrl-C, SIGTERM) goes on where it stopped when the command is given again. Whatever is there by then stands
in the report beside those files: report.md, curves.png, scenes.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench.fusion import report
from bench.fusion.budgets import BUDGETS
from bench.fusion.methods import METHODS
from bench.fusion.plans import PHASES, Plan, chosen, long_plans, search_plans, table_plans
from bench.fusion.runs import Place, carry_out
from bench.harness.files import RESULTS
from models.data import DataError
from models.training.errors import UsageError


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    budget = BUDGETS[arguments.budget]
    if arguments.steps:
        budget = replace(budget, steps=arguments.steps)
    if arguments.seeds:
        budget = replace(budget, seeds=tuple(arguments.seeds))
    if arguments.methods:
        budget = replace(budget, methods=tuple(arguments.methods))
    place = Place(
        arguments.data,
        arguments.weights,
        arguments.folder / arguments.budget,
        arguments.results / arguments.budget,
        budget,
    )
    try:
        for plan in _plans(place, arguments.phases):
            carry_out(place, plan)
    finally:
        report.write(place)
    print((place.results / report.REPORT).read_text())
    return 0


def _plans(place: Place, phases: list[str]) -> Iterator[Plan]:
    """The trainings to do, each asked for once those before it are done."""
    budget = place.budget
    if "search" in phases:
        for method in budget.methods:
            yield from search_plans(budget, method, place.read)
    waiting = [method for method in budget.methods if chosen(budget, method, place.read) is None]
    if waiting and {"table", "long"} & {*phases}:
        print(f"left out, their search is not complete: {', '.join(waiting)}", file=sys.stderr)
    if "table" in phases:
        yield from table_plans(budget, place.read)
    if "long" in phases:
        yield from long_plans(budget, place.read)


def _parser() -> argparse.ArgumentParser:
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="bench.fusion",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, help="NYUDv2 at 384x288")
    parser.add_argument("weights", type=Path, help="the encoder's ImageNet weights")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/fusion"), help="of the runs")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu", help="size and length of the trainings")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--steps", type=int, help="of a training of the table, instead of the budget's")
    parser.add_argument("--results", type=Path, default=RESULTS / "fusion", help="folder of the results")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UsageError, DataError) as error:
        sys.exit(f"error: {error}")
