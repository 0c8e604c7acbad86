"""What a network is fed, in words and numbers that go with its weights and are checked where it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from models.data.geometry import Camera
from models.data.images import IMAGENET_MEAN, IMAGENET_STD
from models.data.layouts import Layout
from models.data.modalities import Reader


@dataclass(frozen=True)
class InputSpec:
    """What the numbers of one modality mean; its channels are tiled to as many as the network takes.

    Attributes:
        name: the modality.
        unit: what 1 means.
        channels: before they are tiled; None: as many as the files have.
        order: of the colours, ``"rgb"``; None where there are none.
        mean, std: by channel, what is taken off a value of ``unit`` and what the rest is divided by.
    """

    name: str
    unit: str
    channels: int | None = 1
    order: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def input_specs(reader: Reader) -> tuple[InputSpec, ...]:
    """What a reader makes of files, by modality in their order."""
    return tuple(_spec(reader, modality) for modality in reader.modalities)


def _spec(reader: Reader, modality: str) -> InputSpec:
    layout = reader.layout
    colour: dict[str, Any] = {"order": "rgb", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if modality == "rgb":
        return InputSpec("rgb", "full brightness", 3, **colour)
    if modality == "hha":
        return InputSpec("hha", "255 of HHA's encoding", 3, **colour)
    if modality == "normals":
        return InputSpec("normals", "length of the normal", 3)
    if modality == "disparity":
        return InputSpec("disparity", "64 pixels" if "disparity" in layout.files else "1/metre")
    if modality in ("depth", "depth_raw"):
        metric = modality not in layout.files or layout.depth_scale is not None
        return InputSpec(modality, "metre" if metric else "largest stored value")
    low, high = layout.ranges.get(modality, (0, "the largest"))
    return InputSpec(modality, f"full brightness, or one channel from {low} to {high}", None, **colour)


def differing_inputs(trained: Sequence[InputSpec], here: Sequence[InputSpec]) -> list[str]:
    """In words, in what a network would be fed otherwise than it was in training; empty where in nothing."""
    names = [tuple(spec.name for spec in specs) for specs in (trained, here)]
    if names[0] != names[1]:
        return [f"modalities {','.join(names[0])} in training, {','.join(names[1])} here"]
    return [
        f"{old.name}: {field.name} {before!r} in training, {now!r} here"
        for old, new in zip(trained, here, strict=True)
        for field in fields(InputSpec)
        if (before := getattr(old, field.name)) != (now := getattr(new, field.name))
    ]


def to_plain(record: InputSpec | Layout) -> dict[str, Any]:
    """As JSON holds it."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(record)))
    return plain


def input_from_plain(plain: Mapping[str, Any]) -> InputSpec:
    """A spec of what ``to_plain`` returned."""
    return InputSpec(**_with_tuples(plain))


def layout_from_plain(plain: Mapping[str, Any]) -> Layout:
    """A layout of what ``to_plain`` returned."""
    found = _with_tuples(plain)
    if found["camera"] is not None:
        camera = Camera(*found["camera"])
        found["camera"] = camera._replace(size=camera.size and tuple(camera.size))
    found["ranges"] = _with_tuples(found["ranges"])
    return Layout(**found)


def _with_tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
