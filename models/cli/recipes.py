"""``cen recipes [RECIPE]`` and ``cen recipes --table NAME``."""

from __future__ import annotations

import argparse
import json

from models import tables
from models.cli.arguments import Commands, add_command, add_overrides, add_recipe
from models.tables import listing
from models.training import config, registry
from models.training.errors import UsageError


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands, "recipes", help="list the recipes, a recipe's fields and values, or a paper's table"
    )
    add_recipe(parser, nargs="?")
    add_overrides(parser)
    parser.add_argument(
        "--table",
        metavar="NAME",
        help="print the rows of a table of the papers, their parameters as printed and as counted, and the "
        f"command that trains each, with the field=value given here: {', '.join(tables.TABLES)}",
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.table is not None:
        _print_table(arguments)
    elif arguments.json:
        raise UsageError("--json prints a table: give --table as well")
    elif arguments.recipe is None:
        print("\n".join(registry.listing()))
    else:
        recipe = config.override(registry.find(arguments.recipe), arguments.overrides)
        print("\n".join(config.describe(recipe)))


def _print_table(arguments: argparse.Namespace) -> None:
    # With --table there is no recipe: the first assignment takes its place on the command line.
    overrides = [*filter(None, [arguments.recipe]), *arguments.overrides]
    table = tables.find(arguments.table)
    found = listing.entries(table, overrides)
    if arguments.json:
        print(json.dumps(listing.plain(table, found), indent=2))
    else:
        print("\n".join(listing.lines(table, found, overrides)))
