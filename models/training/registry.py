"""The one list of recipes, plain functions that return the settings of a whole training, and of systems.

A recipe of this list has a short name, its function's. Any other one is named ``package.module:function``,
wherever a command takes a recipe.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from models.networks.messages import first_line, suggest
from models.training.errors import RecipeError, UsageError, program
from models.training.importable import MissingModule, function_at, module_at
from models.training.settings import RunSettings


class System(Protocol):
    """The commands' work for one kind of recipes; a module, such as ``models.segmentation.system``.

    All of them raise UsageError and DataError for what the caller can mend.

    Attributes:
        per_cent: whether metrics are fractions, which tables show in per cent.
    """

    per_cent: bool

    def task(self, recipe: Any, /) -> Any:
        """Build a training's networks, data and optimizers: a ``models.training.loop.Task``."""

    def network(self, recipe: Any, /) -> Any:
        """Build the network that a recipe trains, the generator in translation, with random weights."""

    def output_names(self, recipe: Any, /) -> Sequence[str]:
        """The network's outputs: its branches, and the ensemble."""

    def evaluate(self, checkpoint: Path, overrides: Sequence[str], output: Path | None) -> Any:
        """Print the metrics on the validation images; write them to a folder, or beside the checkpoint."""

    def evaluate_corrupted(
        self, checkpoint: Path, corruptions: Sequence[str], overrides: Sequence[str], output: Path | None
    ) -> Any:
        """``evaluate``; then measure, print and write what corrupted inputs cost, too."""

    def load(self, checkpoint: Path, overrides: Sequence[str]) -> Any:
        """The network, and what it is to be fed, for use in Python."""

    def answer(self, trained: Any, images: Any, /) -> Any:
        """Run what ``load`` returned on one scene's images ``[M, 3, H, W]``; every output by name."""

    def scenes(self, trained: Any, count: int, /) -> Any:
        """The network's inputs ``[M, 3, H, W]`` for so many of its validation scenes."""

    def answering(self, trained: Any, /) -> Any:
        """The context in which the network of what ``load`` returned answers as it is to be exported."""

    def description(self, trained: Any, /) -> dict[str, Any]:
        """What a program needs to know to feed the network and to read its outputs, as JSON holds it."""

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

    def watch(
        self,
        checkpoint: Path,
        folder: Path,
        inputs: Mapping[str, Path],
        output: Path,
        which: str | None,
        overrides: Sequence[str],
    ) -> Any:
        """``predict`` of scenes as they appear in a folder, until Ctrl-C or SIGTERM."""

    def predict_cameras(
        self,
        checkpoint: Path,
        cameras: Mapping[str, str],
        inputs: Mapping[str, Path],
        output: Path,
        which: str | None,
        overrides: Sequence[str],
        limit: int | None,
        /,
    ) -> Any:
        """``predict`` of live sources, by modality, of at most ``limit`` frames."""


class Recipe(Protocol):
    """The fields that the command line and the loop read; each system's dataclass adds its own groups."""

    @property
    def run(self) -> RunSettings: ...


F = TypeVar("F", bound=Callable[[], Any])
RECIPES: dict[str, Callable[[], Any]] = {}
SYSTEMS: dict[type, System] = {}  # keys: the classes of their recipes' settings
_LOG = logging.getLogger(__name__)
_MISSING: set[str] = set()  # modules that the log has named already


def register_recipe(function: F) -> F:
    """Decorator: list a function without arguments as the recipe of its name; its docstring describes it.

    Raises:
        ValueError: there is one of that name already; but one of a script or a notebook, ``__main__``, may
            be defined again, by a cell that runs twice or by an import of the script.
    """
    known = RECIPES.get(function.__name__)
    if known is not None and known.__module__ != "__main__":
        raise ValueError(
            f"there are two recipes named {function.__name__!r}, of {known.__module__} and "
            f"{function.__module__}: rename one"
        )
    RECIPES[function.__name__] = function
    return function


recipe = register_recipe  # the old name


def find(name: str) -> Any:
    """The settings of a recipe, by its short name or as ``package.module:function``.

    Raises:
        UsageError: there is none (the nearest is suggested), or its function returns something else.
        RecipeError: its function, or the import of its module, fails; chained to the error.
    """
    make = function_at(name) if ":" in name else RECIPES.get(name)
    if make is None:
        raise UsageError(
            f"unknown recipe {name!r}{suggest(name, RECIPES)} ({program()} recipes lists them; "
            "one of your own is package.module:function)"
        )
    try:
        made = make()
    except Exception as error:
        raise RecipeError(
            f"recipe {name!r}: its function fails with {type(error).__name__}: {first_line(error)}"
        ) from error
    if type(made) not in SYSTEMS:
        kinds = " or ".join(kind.__name__ for kind in SYSTEMS)
        got = f"the class {made.__name__}" if isinstance(made, type) else f"a {type(made).__name__}"
        raise UsageError(f"recipe {name!r}: its function must return a {kinds}, got {got}")
    return made


def record(name: str, made: Recipe) -> dict[str, str | None]:
    """A file's record of its recipe beside the settings, so that other processes can ``recall`` it.

    Returns:
        ``recipe``, its name; ``recipe_module``, which module to import for it, None where a script without
        such a name has registered it; ``recipe_kind``, the class of its settings.
    """
    module: str | None = _module(name)
    if module == "__main__":
        module = getattr(sys.modules[module].__spec__, "name", None)  # the module of python -m package.module
    return {"recipe": name, "recipe_module": module, "recipe_kind": type(made).__name__}


def is_recorded(name: str, recorded: Mapping[str, Any]) -> bool:
    """Whether ``record`` spoke of the recipe of that name, be it short or ``package.module:function``."""
    kept, module = recorded["recipe"], recorded.get("recipe_module")
    full = name if ":" in name else f"{_module(name)}:{name}"
    return kept in (name, full) or name == f"{module}:{kept}"


def _module(name: str) -> str | None:
    if ":" in name:
        return name.partition(":")[0]
    return RECIPES[name].__module__ if name in RECIPES else None


def recall(recorded: Mapping[str, Any]) -> Any:
    """Settings of the kind that ``record`` told, to be filled with those that the file holds.

    The module of an unknown recipe is imported for what it registers, such as an encoder; the recipe's
    function is not called. Where the module is missing, the log says so: settings that need nothing of it
    work without.

    Raises:
        UsageError: the file is from before ``record``, and there is no recipe of its name.
        RecipeError: the module's import fails; chained to the error.
    """
    name, module = recorded["recipe"], recorded.get("recipe_module")
    if name not in RECIPES and module is not None:
        try:
            module_at(module, f"recipe {name!r}")
        except MissingModule as error:
            if module not in _MISSING:
                _LOG.warning("warning: %s; going on without what it registers", error)
            _MISSING.add(module)
    kinds = {kind.__name__: kind for kind in SYSTEMS}
    kind = kinds.get(recorded.get("recipe_kind", ""))
    return find(name) if kind is None else kind()


def system_of(recipe: Recipe) -> System:
    """The system whose kind of settings these are."""
    return SYSTEMS[type(recipe)]


def listing() -> list[str]:
    """One line per recipe: its name and the first line of its docstring."""
    width = max(map(len, RECIPES))
    first = {name: (make.__doc__ or "").strip().partition("\n")[0] for name, make in RECIPES.items()}
    return [f"{name:<{width}}  {line}".rstrip() for name, line in first.items()]
