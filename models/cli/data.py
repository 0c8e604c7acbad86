"""``cen data RECIPE``."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.cli.arguments import Commands, add_command, add_overrides, add_recipe
from models.training import config, registry


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands, "data", help="show what a recipe's data set holds and how it is augmented, without training"
    )
    add_recipe(parser)
    add_overrides(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("data_sheet.png"),
        metavar="FILE",
        help="contact sheet of eval.sheet augmented training samples; default: %(default)s",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    recipe = config.override(registry.find(arguments.recipe), arguments.overrides)
    registry.system_of(recipe).show_data(recipe, arguments.output)
