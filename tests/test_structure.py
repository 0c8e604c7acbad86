"""The shape of ``models``: its two systems have the same files but for a few, and no file is long."""

from __future__ import annotations

from pathlib import Path

import pytest

import cen_ext
import models

ROOTS = [Path(cen_ext.__file__).parent, Path(models.__file__).parent]
MODULES = [path for root in ROOTS for path in sorted(root.rglob("*.py"))]
MOST_LINES = 420

# What a file of a system holds; the same name stands for the same thing in both.
NAMES = {
    "build": "a recipe's networks and data",
    "evaluate": "the evaluate command",
    "deployment": "what the export command needs to know",
    "importing": "the import command",
    "inference": "the network's answer to images",
    "initial": "the weights that a training starts from",
    "load": "trained networks from files",
    "losses": "functions of tensors",
    "metrics": "scores, and their tables",
    "overview": "what the data sets hold",
    "predict": "the predict command",
    "prediction": "the answer to one scene",
    "recipes": "functions that return settings",
    "settings": "dataclasses",
    "step": "networks with their losses as modules, and their updates",
    "system": "what the commands call",
    "task": "what the training loop calls",
    "visualize": "images to look at",
}
# What the other system has nothing like.
OWN = {
    "segmentation": {
        "class_weights": "weights from how frequent classes are",
        "criteria": "losses of pixels and their gradients, image by image",
        "live": "the predict command on cameras and streams",
        "networks": "decoders and systems by name; translation has one network",
        "recipes_systems": "the systems of segmentation's tables",
        "robustness": "the evaluate command with corrupted inputs",
    },
    "translation": {
        "holes": "targets of which some pixels were not measured",
        "windows": "images of any size in overlapping windows",
    },
}
# A folder where the other system has a file: FID and its network are files of their own.
FOLDERS = {"translation": {"metrics": {"fid", "inception"}}}


def names(folder: Path) -> set[str]:
    """The modules and packages of a folder."""
    files = {path.stem for path in folder.glob("*.py")}
    return (files | {path.parent.name for path in folder.glob("*/__init__.py")}) - {"__init__"}


@pytest.mark.parametrize("system", ["segmentation", "translation"])
def test_both_systems_have_the_same_files(system):
    root = Path(models.__file__).parent / system
    assert names(root) == NAMES.keys() | OWN[system].keys()
    folders = {path.parent.name: names(path.parent) for path in root.glob("*/__init__.py")}
    assert folders == FOLDERS.get(system, {})


def test_the_modules_are_found():
    assert len(MODULES) > 100


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOTS[0].parent)))
def test_a_file_is_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES
