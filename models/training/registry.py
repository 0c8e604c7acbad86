"""The one list of recipes, plain functions that return the settings of a whole training, and of systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from models.messages import suggest
from models.training.errors import UsageError
from models.training.settings import RunSettings


class System(Protocol):
    """What the commands do for one kind of recipes; a module, such as ``models.segmentation.system``.

    All of them raise UsageError and DataError for what the caller can mend.
    """

    def task(self, recipe: Any, /) -> Any:
        """Build a training's networks, data and optimizers: a ``models.training.loop.Task``."""

    def evaluate(self, checkpoint: Path, overrides: Sequence[str], output: Path | None) -> Any:
        """Print the metrics on the validation images; write them to a folder, or beside the checkpoint."""

    def load(self, checkpoint: Path, overrides: Sequence[str]) -> Any:
        """The network, and what it is to be fed, for use in Python."""

    def import_released(self, released: Path, name: str, overrides: Sequence[str], output: Path) -> Any:
        """Make a network's file of one that the paper's authors released, by the recipe of that name."""

    def show_data(self, recipe: Any, output: Path, /) -> Any:
        """Print what the recipe's data sets hold, and write a contact sheet of augmented training samples."""

    def predict(
        self,
        checkpoint: Path,
        inputs: Mapping[str, Path],
        output: Path,
        which: str | None,
        overrides: Sequence[str],
    ) -> Any:
        """Run the network on files, or folders of them, by modality; write the results to a folder.

        ``which`` output they are of is up to the system where it is None.
        """


class Recipe(Protocol):
    """What the command line and the loop ask of a recipe; each system's dataclass adds its own groups."""

    @property
    def run(self) -> RunSettings: ...


F = TypeVar("F", bound=Callable[[], Any])
RECIPES: dict[str, Callable[[], Any]] = {}
SYSTEMS: dict[type, System] = {}  # by the class of their recipes' settings


def recipe(function: F) -> F:
    """Decorator: list a function without arguments as the recipe of its name; its docstring describes it."""
    if function.__name__ in RECIPES:
        raise ValueError(f"there are two recipes named {function.__name__!r}")
    RECIPES[function.__name__] = function
    return function


def find(name: str) -> Any:
    """The recipe's settings.

    Raises:
        UsageError: no recipe has that name; the nearest is suggested.
    """
    if name not in RECIPES:
        raise UsageError(
            f"unknown recipe {name!r}{suggest(name, RECIPES)} (python -m models recipes lists them)"
        )
    return RECIPES[name]()


def system_of(recipe: Recipe) -> System:
    """The system whose kind of settings these are."""
    return SYSTEMS[type(recipe)]


def listing() -> list[str]:
    """One line a recipe: its name and what it is."""
    width = max(map(len, RECIPES))
    return [f"{name:<{width}}  {(make.__doc__ or '').splitlines()[0]}" for name, make in RECIPES.items()]
