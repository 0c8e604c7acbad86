"""What the runs' networks cost: parameters, multiply-adds, and on request the time of an answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from models.comparison.groups import Group
from models.comparison.runs import on_cpu
from models.networks.counting import count_multiply_adds, count_parameters
from models.training import registry
from models.training.errors import UsageError
from models.training.importable import naming_missing

_CHANNELS = 3  # of every modality, as the systems' networks take it
_SECONDS = 1.0  # that a measurement takes at the least


@dataclass(frozen=True)
class Costs:
    """Of the network of a group's runs.

    Attributes:
        shape: of the input that the rest is of, ``(modalities, 3, side, side)``, the side training's crop.
        parameters: trainable numbers.
        multiply_adds: of one scene's forward pass.
        images_per_second: scenes that the trained network answers to in a second, one at a time, resizing to
            the image included; None where not measured.
        measured_on: device and number of threads, in words.
    """

    shape: tuple[int, int, int, int]
    parameters: int
    multiply_adds: int
    images_per_second: float | None = None
    measured_on: str = ""


def costs(group: Group, *, measure: bool, command: str = "compare") -> Costs:
    """Count, and if asked measure the first run's best checkpoint.

    Raises:
        UsageError: the settings' network cannot be built here, as the message says of which run; as the
            system's ``load``.
    """
    run = group.runs[0]
    system = registry.system_of(run.recipe)
    try:
        with torch.device("meta"), naming_missing({"imports": run.imports}):
            net = system.network(run.recipe)
    except UsageError as error:  # an encoder whose module is missing here, say
        raise UsageError(f"{command}: {run.path}: {error}") from None
    side = run.recipe.data.crop
    shape = (net.num_modalities, _CHANNELS, side, side)
    found = Costs(shape, count_parameters(net), count_multiply_adds(net, shape))
    if not measure:
        return found
    trained = system.load(run.path, ())
    device = next(trained.net.parameters()).device
    images = torch.rand(shape, device=device)
    timer = Timer(
        "answer(trained, images)",
        globals={"answer": system.answer, "trained": trained, "images": images},
        num_threads=torch.get_num_threads(),
    )
    seconds = timer.blocked_autorange(min_run_time=_SECONDS).median
    return Costs(shape, found.parameters, found.multiply_adds, 1 / seconds, _words(device))


def _words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return on_cpu(torch.get_num_threads())
