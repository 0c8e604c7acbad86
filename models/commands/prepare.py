"""``python -m models prepare DATASET FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.commands.arguments import Commands
from models.data import SUN37, DataError, prepare_nyudv2, prepare_sunrgbd, prepare_synthetic
from models.training.errors import UsageError


def add(commands: Commands) -> None:
    """Add the command's parser, with one for every data set."""
    parser = commands.add_parser("prepare", help="make a data set")
    datasets = parser.add_subparsers(required=True, metavar="DATASET")
    for add_dataset in (_add_synthetic, _add_nyudv2, _add_sunrgbd):
        add_dataset(datasets)


def _add_synthetic(datasets: Commands) -> None:
    parser = datasets.add_parser(
        "synthetic",
        help="procedural rooms in RGB and depth",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="FOLDER")
    for name, default, meaning in (
        ("train", 400, "training images"),
        ("val", 100, "validation images"),
        ("height", 96, "of the images, in pixels"),
        ("width", 128, "of the images, in pixels"),
        ("seed", 0, "another one gives other rooms"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    parser.set_defaults(run=_synthetic)


def _synthetic(arguments: argparse.Namespace) -> None:
    try:
        out = prepare_synthetic(
            arguments.out,
            train=arguments.train,
            val=arguments.val,
            size=(arguments.height, arguments.width),
            seed=arguments.seed,
        )
    except DataError:
        raise
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    print(f"data.root={out}")


def _add_nyudv2(datasets: Commands) -> None:
    parser = datasets.add_parser("nyudv2", help="NYUDv2, 40 classes, from its official archive")
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--archive", type=Path, required=True, help="nyu_depth_v2_labeled.mat", metavar="FILE"
    )
    parser.add_argument("--splits", type=Path, help="splits.mat; default: beside the archive", metavar="FILE")
    parser.add_argument(
        "--classes", type=Path, help="classMapping40.mat; default: beside the archive", metavar="FILE"
    )
    parser.set_defaults(run=_nyudv2)


def _nyudv2(arguments: argparse.Namespace) -> None:
    out = prepare_nyudv2(arguments.out, arguments.archive, arguments.splits, arguments.classes)
    print(f"data.root={out}")


def _add_sunrgbd(datasets: Commands) -> None:
    parser = datasets.add_parser("sunrgbd", help="SUN RGB-D, 37 classes, from its official release")
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--archive", type=Path, required=True, help="SUNRGBD.zip, or where it was unpacked", metavar="PATH"
    )
    parser.add_argument(
        "--toolbox", type=Path, required=True, help="the folder SUNRGBDtoolbox", metavar="FOLDER"
    )
    parser.set_defaults(run=_sunrgbd)


def _sunrgbd(arguments: argparse.Namespace) -> None:
    out = prepare_sunrgbd(arguments.out, arguments.archive, arguments.toolbox)
    print(f"data.root={out} data.num_classes={len(SUN37)}")
