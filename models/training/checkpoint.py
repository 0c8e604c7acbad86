"""Files of runs and of networks: tensors and plain containers, loaded without running any code in them.

A run's checkpoint (``torch.save``) holds: ``format``; ``cen_ext``, the version; ``recipe``, ``recipe_module``
and ``recipe_kind``, where its recipe is found again (``registry.record``); ``imports``, the modules that its
training was given by ``--import``; ``config``, its settings (``config.to_plain``); what the task says of its
network, such as ``inputs``, and ``thresholds``, where those are factors of medians; ``loop``, the loop's
progress; ``task``, networks and optimizers; ``processes``, what differs between the run's processes. The best
one, ``best.pt``, is for use: it lacks ``processes`` and the optimizers.

A network's file holds the same without ``loop``, ``processes`` and optimizers, and the averaged weights where
there are such: as ``.safetensors``, whose header holds each entry but ``task`` as JSON, or as ``.pt``.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import cen_ext
from models.data.inputs import differing_inputs, input_from_plain, once_color, upgrade
from models.networks.encoders.weights import misfits_of
from models.networks.messages import first_line
from models.networks.segmentor import rename_old_keys
from models.training import config, importable, registry, thresholds
from models.training.errors import UsageError, existing, program, writable
from models.training.files import replacing

FORMAT = 2
LAST, BEST, CONFIG = "last.pt", "best.pt", "config.json"  # the names in a run folder
_SUFFIXES = (".safetensors", ".pt")
_NUMBERED = re.compile(r"step_(\d{6,})\.pt")
_OF_RUNS = ("loop", "processes", "task")


def save(path: Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint; the file at ``path`` is the old one or the new one, never a part.

    Raises:
        UsageError: it cannot be written.
    """
    with writing(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": FORMAT, "cen_ext": cen_ext.__version__, **contents}, file)


def link(source: Path, path: Path) -> None:
    """Give a checkpoint another name, under which it stays when the first one is replaced.

    A hard link, which writes and takes no data; a copy where the file system has none.

    Raises:
        UsageError: it cannot be written.
    """
    with writing(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def numbered_path(folder: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return folder / f"step_{step:06d}.pt"


def numbered(folder: Path) -> dict[int, Path]:
    """The checkpoints that a run has kept, by their steps, in that order."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name))}
    return dict(sorted(found.items()))


def step_of(path: Path) -> int | None:
    """The step of a run's checkpoint, whose tensors are not read; None where it is missing or broken."""
    try:
        step: int = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["loop"]["step"]
    except Exception:  # as in ``load``
        return None
    return step


def save_network(path: Path, contents: dict[str, Any]) -> None:
    """Write the network of a checkpoint alone.

    Args:
        path: its suffix says how, ``.safetensors`` or ``.pt``; its folder is made.
        contents: of a checkpoint; ``loop`` and ``processes`` may be missing.

    Raises:
        UsageError: another suffix; a run's checkpoint; no file can be written there.
    """
    known = {name: value for name, value in contents.items() if name not in _OF_RUNS}
    net = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in weights(contents).items()
    }
    if network_file(path).suffix == ".pt":
        save(path, {**known, "task": {"net": net}})
        return
    header = {"format": FORMAT, "cen_ext": cen_ext.__version__, **known}
    with writing(path) as temporary:
        save_file(net, temporary, {name: json.dumps(value) for name, value in header.items()})


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Replace a file as ``replacing``; what the caller can mend, such as a full disk, is a UsageError."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except (OSError, RuntimeError, SafetensorError) as error:
        # Torch puts an error of its own, which does not tell why, over the system's.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        reason = getattr(cause, "strerror", None) or first_line(cause)
        raise UsageError(f"cannot write {path}: {reason}") from None


def network_file(path: Path) -> Path:
    """The path that ``save_network`` is to write; to be asked for before work starts.

    Raises:
        UsageError: as there.
    """
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"--output must end in {' or '.join(_SUFFIXES)} for weights, got {path}")
    if is_of_run(path.parent) and (path.name in (LAST, BEST) or _NUMBERED.fullmatch(path.name)):
        raise UsageError(f"--output: {path} is a run's own checkpoint; choose another name")
    return writable(path, "--output")


def load(path: Path, prefer: str = LAST) -> tuple[Path, dict[str, Any]]:
    """Read a checkpoint or a network's file onto the CPU.

    Args:
        path: either, or a run folder.
        prefer: which checkpoint of a run folder; where this is missing, the next of the last one, the latest
            that was kept by its step, and the best one.

    Returns:
        The file's path and contents.

    Raises:
        UsageError: nothing there, or not a file of this project.
    """
    existing(path, "checkpoint")
    if path.is_dir():
        kept = [file.name for file in numbered(path).values()][::-1]
        found = [path / name for name in (prefer, LAST, *kept, BEST) if (path / name).is_file()]
        if not found:
            begun = "; its run had saved nothing yet: start it again, without --resume"
            raise UsageError(
                f"checkpoint: the folder {path} holds neither {LAST} nor {BEST}{begun * is_of_run(path)}"
            )
        path = found[0]
    try:
        contents = _read(path)
    except Exception as error:  # the unpickler's own errors on foreign bytes are of every kind
        # The unpickler's message advises to run the file's code.
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)})"
        raise UsageError(
            f"checkpoint: {path} is broken or no checkpoint of this project{reason}; {_hint()}"
        ) from None
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise UsageError(
            f"checkpoint: {path} was not written by `{program()} train`, or by another version; {_hint()}"
        )
    for name in ("net", "ema"):
        rename_old_keys(contents.get("task", {}).get(name, {}))
    return path, upgrade(contents)


def _hint() -> str:
    return f"`{program()} import` reads the networks that the paper's authors released"


def is_of_run(folder: Path) -> bool:
    """Whether a folder is one of a run's, finished or not."""
    return (folder / CONFIG).is_file()


def _read(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True)
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        if "format" not in header:
            return None
        known = {name: json.loads(value) for name, value in header.items()}
        return {**known, "task": {"net": {name: file.get_tensor(name) for name in file.keys()}}}  # noqa: SIM118


def weights(contents: dict[str, Any]) -> dict[str, Tensor]:
    """The weights to use a network with: their average over the training, where the run kept one."""
    task = contents["task"]
    found: dict[str, Tensor] = task.get("ema") or task["net"]
    return found


def fill(net: nn.Module, path: Path, contents: dict[str, Any]) -> None:
    """Load the weights of a file into the network that its settings make.

    Raises:
        UsageError: they do not fit, because settings were changed; its thresholds are not those of the
            settings (``thresholds.restore``).
    """
    state = weights(contents)
    if problems := misfits_of(net, state):
        raise UsageError(f"{path} does not fit these settings: {problems}")
    net.load_state_dict(state)
    thresholds.restore(net, str(path), contents)


def check_inputs(path: Path, contents: dict[str, Any], now: dict[str, Any], what: str = "--resume") -> None:
    """Refuse to go on where the network would be fed otherwise, or where its classes have other names.

    Args:
        path: the checkpoint.
        contents: its.
        now: ``inputs``, and ``target`` or ``classes`` where there are such, as the task at hand describes it.
        what: that goes on, for the error.

    Raises:
        UsageError: they are others than in the checkpoint.
    """
    plains = [[*each["inputs"], *([each["target"]] if "target" in each else [])] for each in (contents, now)]
    specs = [[input_from_plain(plain) for plain in each] for each in plains]
    if differences := differing_inputs(*specs):
        raise UsageError(f"{what}: {path} was trained on other inputs: {'; '.join(differences)}")
    if problem := once_color(specs[0], now.get("gray_in_color", ())):
        raise UsageError(f"{what}: {path} {problem}")
    if contents.get("classes") != now.get("classes"):
        raise UsageError(f"{what}: {path} was trained on classes of other names than data.root has")


def header(name: str, recipe: Any, imports: Sequence[str] = ()) -> dict[str, Any]:
    """A file's record of its recipe, by that name, of the modules that were imported for it, those named here
    and before, and of the settings: the part that ``settings`` reads.
    """
    modules = importable.imported(before=imports)
    return {**registry.record(name, recipe), "imports": modules, "config": config.to_plain(recipe)}


def settings(contents: dict[str, Any]) -> Any:
    """The recipe's settings as the checkpoint's run had them.

    Raises:
        UsageError: they hold what no module that is imported here registers.
    """
    with importable.naming_missing(contents):
        return config.from_plain(registry.recall(contents), contents["config"])


def settings_here(contents: dict[str, Any], overrides: Sequence[str]) -> tuple[Any, list[str]]:
    """The settings to use a checkpoint's network with, and in what they differ from those of its training.

    The device of the training is one of another machine, or taken: without ``run.device=...`` it is ``auto``.

    Args:
        contents: of the checkpoint.
        overrides: ``field=value`` assignments.

    Returns:
        The settings; and, as ``path: old -> new``, those that differ, but for where it runs and writes.

    Raises:
        UsageError: as ``config.override``.
    """
    trained = settings(contents)
    here = replace(trained, run=replace(trained.run, device="auto"))
    if any(assignment.startswith(("data.root=", "data.layout=")) for assignment in overrides):
        here = config.forget_given(here)  # the training's command line spoke of other files
    recipe = config.override(here, overrides)
    changes = config.changes(trained, recipe)
    return recipe, [change for path, change in changes.items() if path not in ("run.device", "run.output")]


def system(path: Path) -> registry.System:
    """Find the system of the network in a file or run folder.

    Raises:
        UsageError: as ``load``.
    """
    return registry.system_of(settings(load(path, BEST)[1]))
