"""``cen recipes [RECIPE]``."""

from __future__ import annotations

import argparse

from models.cli.arguments import Commands, add_command, add_overrides, add_recipe
from models.training import config, registry


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "recipes", help="list the recipes, or a recipe's fields and values")
    add_recipe(parser, nargs="?")
    add_overrides(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.recipe is None:
        lines = registry.listing()
    else:
        lines = config.describe(config.override(registry.find(arguments.recipe), arguments.overrides))
    print("\n".join(lines))
