"""A network's inputs, in words and numbers that go with its weights and are checked where it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from models.data.geometry import Camera
from models.data.kinds import Modality
from models.data.layouts import LAYOUTS, Layout
from models.data.modalities import FLOORS, Reader


@dataclass(frozen=True)
class InputSpec:
    """The meaning of one modality's numbers; its channels are tiled to as many as the network takes.

    Attributes:
        name: the modality.
        unit: what 1 means.
        channels: before they are tiled; None: as many as the files have.
        order: of the colors, ``"rgb"``; None where there are none.
        mean, std: by channel, what is taken off a value of ``unit`` and what the rest is divided by.
    """

    name: str
    unit: str
    channels: int | None = 1
    order: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


_HHA, _UPSIDE_DOWN = "255 of HHA's encoding", "255 of HHA's encoding, upside down with 218 for floors"
# The unit of modalities whose kind nobody told: color or one channel, as each file was.
_EITHER = "full brightness, or "


def input_specs(reader: Reader) -> tuple[InputSpec, ...]:
    """Specify the inputs that a reader makes of files, by modality in their order."""
    return tuple(_spec(reader, modality) for modality in reader.modalities)


def _spec(reader: Reader, modality: str) -> InputSpec:
    layout = reader.layout
    color: dict[str, Any] = {"order": "rgb", "mean": reader.mean, "std": reader.std}
    told = layout.modality(modality)
    is_file = modality in layout.files
    if modality == "rgb" and told.kind == "color":
        return InputSpec("rgb", "full brightness", 3, **color)
    if told.kind == "hha":
        upside_down = not is_file and layout.hha_floor == FLOORS[1]
        return InputSpec("hha", _UPSIDE_DOWN if upside_down else _HHA, 3, **color)
    if told.kind == "normals":
        return InputSpec(modality, "length of the normal", 3)
    if told.kind == "points":
        return InputSpec(modality, "metre", 3)
    if told.kind == "disparity":
        return InputSpec(modality, "64 pixels" if is_file else "1/metre")
    if told.kind == "depth":
        metric = not is_file or layout.depth_scale is not None
        plain = (reader.depth_mean, reader.depth_std) == (0, 1)
        by: dict[str, Any] = {} if plain else {"mean": (reader.depth_mean,), "std": (reader.depth_std,)}
        return InputSpec(modality, "metre" if metric else "largest stored value", **by)
    low, high = told.range or (0, "the largest")
    one_channel = f"one channel from {low} to {high}"
    if told.kind is None:
        return InputSpec(modality, f"{_EITHER}{one_channel}", None, **color)
    if told.kind == "color":
        return InputSpec(modality, "full brightness", 3, **color)
    return InputSpec(modality, one_channel)


def differing_inputs(trained: Sequence[InputSpec], here: Sequence[InputSpec]) -> list[str]:
    """Describe how a network would be fed otherwise than in training; empty where it would not."""
    names = [tuple(spec.name for spec in specs) for specs in (trained, here)]
    if names[0] != names[1]:
        return [f"modalities {','.join(names[0])} in training, {','.join(names[1])} here"]
    return [
        f"{old.name}: {field.name} {before!r} in training, {now!r} here"
        for old, new in zip(trained, here, strict=True)
        if not _told_since(old, new)
        for field in fields(InputSpec)
        if (before := getattr(old, field.name)) != (now := getattr(new, field.name))
    ]


def _told_since(old: InputSpec, new: InputSpec) -> bool:
    """Whether a modality's kind was merely not told in training, and is what its files were read as."""
    return old.unit == f"{_EITHER}{new.unit}" or (
        old.unit.startswith(_EITHER) and new.unit == "full brightness"
    )


def once_color(trained: Sequence[InputSpec], gray_in_color: Sequence[str]) -> str:
    """A reason why a network from before modalities had kinds would be fed otherwise; empty for none.

    Args:
        trained: what it was fed.
        gray_in_color: modalities of the data set at hand that are gray, stored in three channels.
    """
    for spec in trained:
        if spec.name in gray_in_color and spec.unit.startswith(_EITHER):
            return (
                f"was trained when {spec.name}, gray in three channels, was read as color: give it the kind"
                " color in layout.json"
            )
    return ""


def to_plain(record: InputSpec | Layout) -> dict[str, Any]:
    """Convert to what JSON holds."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(record)))
    return plain


def input_from_plain(plain: Mapping[str, Any]) -> InputSpec:
    """A spec of what ``to_plain`` returned."""
    return InputSpec(**_with_tuples(plain))


def upgrade(contents: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's contents as this version writes them.

    Early runs had settings go before ``layout.json`` in any case, a depth scale that nobody gave, and
    computed HHA with its third channel upside down, which networks trained on it need to this day.
    """
    data = contents.get("config", {}).get("data", {})
    if "layout" not in contents or "hha_floor" in data:
        return contents
    given = [name for name, value in data.items() if value is not None and value != []]
    data = {**data, "given": given, "hha_floor": FLOORS[0]}
    layout, inputs = contents["layout"], contents["inputs"]
    if layout["name"] in LAYOUTS:
        layout = {**layout, "crop_to_labels": LAYOUTS[layout["name"]].crop_to_labels}
    elif data["depth_scale"] is None:  # own layouts had one by default
        data["depth_scale"] = layout["depth_scale"]
        data["given"] = [*given, "depth_scale"]
    if "hha" in data["modalities"] and "hha" not in layout["files"]:
        data["hha_floor"] = FLOORS[1]
        layout = {**layout, "hha_floor": FLOORS[1]}
        inputs = [{**spec, "unit": _UPSIDE_DOWN} if spec["name"] == "hha" else spec for spec in inputs]
    return {**contents, "config": {**contents["config"], "data": data}, "layout": layout, "inputs": inputs}


def layout_from_plain(plain: Mapping[str, Any]) -> Layout:
    """A layout of what ``to_plain`` returned."""
    found = _with_tuples(plain)
    found["camera"] = _camera(found["camera"])
    found["ranges"] = _with_tuples(found["ranges"])
    modalities = found.get("modalities", {})
    found["modalities"] = {
        name: Modality(**{**_with_tuples(told), "camera": _camera(told.get("camera"))})
        for name, told in modalities.items()
    }
    return Layout(**found)


def _camera(plain: Sequence[Any] | None) -> Camera | None:
    if plain is None:
        return None
    camera = Camera(*plain)
    if camera.size is None:
        return camera
    width, height = camera.size
    return camera._replace(size=(width, height))


def _with_tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
