"""The check of a recipe that the import commands of all systems make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.training import config
from models.training.errors import UsageError
from models.training.thresholds import refuse_relative


def check_settings(released: Path, recipe: Any, expected: Mapping[str, Any], inputs: str) -> None:
    """Check that a recipe makes the network that a released file holds.

    Args:
        released: the file.
        recipe: the settings.
        expected: what they have to be, by their paths.
        inputs: the path of the inputs' names, of which only the number is expected.

    Raises:
        UsageError: they are others; the message says which to set. Or the threshold is a factor of a median.
    """
    refuse_relative(recipe.fusion, str(released))
    values = config.flatten(recipe)
    count = expected.get(inputs, len(values[inputs]))
    changes = [
        f"{field}={value}"
        for field, value in expected.items()
        if field != inputs and values.get(field) != value
    ]
    if count != len(values[inputs]):
        changes.append(f"{inputs} to the names of its {count} inputs in their order")
    if changes:
        raise UsageError(f"{released} is another network than the recipe's: set {', '.join(changes)}")
