"""The record of a network's inputs: made from a layout, kept as JSON, compared."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from models.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LAYOUTS,
    InputSpec,
    Reader,
    configured,
    differing_inputs,
    input_from_plain,
    input_specs,
    layout_from_plain,
    to_plain,
)
from models.data.geometry import Camera

COLOUR = {"order": "rgb", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def spec_of(layout: str, modality: str) -> InputSpec:
    (spec,) = input_specs(Reader(LAYOUTS[layout], (modality,)))
    return spec


@pytest.mark.parametrize(
    ("layout", "modality", "expected"),
    [
        ("nyu_cen", "rgb", InputSpec("rgb", "full brightness", 3, **COLOUR)),
        ("nyu_cen", "depth", InputSpec("depth", "metre")),
        ("nyu_cen", "disparity", InputSpec("disparity", "1/metre")),
        ("nyu_cen", "normals", InputSpec("normals", "length of the normal", 3)),
        ("nyu_cen", "points", InputSpec("points", "metre", 3)),
        ("nyu_rgbx", "hha", InputSpec("hha", "255 of HHA's encoding", 3, **COLOUR)),
        ("nyu_rgbx", "depth", InputSpec("depth", "largest stored value")),
        ("nyu_esanet", "depth_raw", InputSpec("depth_raw", "metre")),
        ("cityscapes", "disparity", InputSpec("disparity", "64 pixels")),
        ("cityscapes", "depth", InputSpec("depth", "metre")),
    ],
)
def test_what_a_modality_means(layout: str, modality: str, expected: InputSpec) -> None:
    assert spec_of(layout, modality) == expected


def test_what_a_modality_of_ones_own_means() -> None:
    files = {**LAYOUTS["nyu_cen"].files, "thermal": "thermal/{name}.png"}
    layout = replace(LAYOUTS["nyu_cen"], files=files, ranges={"thermal": (7000, 9000)})
    (spec,) = input_specs(Reader(layout, ("thermal",)))
    assert spec == InputSpec("thermal", "full brightness, or one channel from 7000 to 9000", None, **COLOUR)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_and_inputs_survive_json(name: str) -> None:
    layout = configured(LAYOUTS[name], depth_scale=2500.0, camera=(60.0, 61.0, 40.0, 32.0))
    layout = replace(layout, ranges={"thermal": (0.0, 255.0)}, label_shift={"train": 5})
    for each in (LAYOUTS[name], layout, replace(layout, camera=Camera(1, 2, 3, 4, (640, 480), 0.2))):
        assert layout_from_plain(json.loads(json.dumps(to_plain(each)))) == each
    for modality in Reader(LAYOUTS[name], ("rgb",)).available():
        spec = spec_of(name, modality)
        assert input_from_plain(json.loads(json.dumps(to_plain(spec)))) == spec


def test_differences() -> None:
    specs = input_specs(Reader(LAYOUTS["nyu_cen"], ("rgb", "depth")))
    scaled = Reader(configured(LAYOUTS["nyu_cen"], depth_scale=6528.0), ("rgb", "depth"))
    assert differing_inputs(specs, input_specs(scaled)) == []
    turned = input_specs(Reader(LAYOUTS["nyu_cen"], ("depth", "rgb")))
    assert differing_inputs(specs, turned) == ["modalities rgb,depth in training, depth,rgb here"]
    other = (replace(specs[0], order="bgr", std=(1.0, 1.0, 1.0)), replace(specs[1], unit="millimetre"))
    assert differing_inputs(specs, other) == [
        "rgb: order 'rgb' in training, 'bgr' here",
        "rgb: std (0.229, 0.224, 0.225) in training, (1.0, 1.0, 1.0) here",
        "depth: unit 'metre' in training, 'millimetre' here",
    ]
