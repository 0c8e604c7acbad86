"""``cen prepare DATASET FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.cli.arguments import Commands, add_command
from models.data import (
    SUN37,
    DataError,
    prepare_domains,
    prepare_nyudv2,
    prepare_sunrgbd,
    prepare_synthetic,
    prepare_synthetic_domains,
)
from models.training.errors import UsageError


def add(commands: Commands) -> None:
    """Add the command's parser, with one for every data set."""
    parser = add_command(commands, "prepare", help="make a data set")
    datasets = parser.add_subparsers(required=True, metavar="DATASET")
    for add_dataset in (_add_synthetic, _add_domains, _add_nyudv2, _add_sunrgbd):
        add_dataset(datasets)


def _add_synthetic(datasets: Commands) -> None:
    parser = add_command(
        datasets,
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
    parser.add_argument(
        "--domains", action="store_true", help="for translation: exact depth, normals, shading and edges"
    )
    parser.set_defaults(run=_synthetic)


def _synthetic(arguments: argparse.Namespace) -> None:
    make = prepare_synthetic_domains if arguments.domains else prepare_synthetic
    try:
        out = make(
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


def _add_domains(datasets: Commands) -> None:
    parser = add_command(
        datasets, "domains", help="normals, reshading, depth and edges of any RGB-D data set, for translation"
    )
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--source", type=Path, required=True, help="the RGB-D data set", metavar="FOLDER")
    parser.add_argument("--layout", help="nyu_cen, sun_handa, ...; default: told from the folder")
    parser.add_argument("--depth-scale", type=float, help="stored units per meter; default: the layout's")
    parser.add_argument("--bit-shift", type=int, help="bits that depth is rotated to the right by")
    parser.add_argument(
        "--camera", type=_numbers, default=(), help="fx,fy,cx,cy in pixels; default: the layout's"
    )
    parser.set_defaults(run=_domains)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _domains(arguments: argparse.Namespace) -> None:
    try:
        out = prepare_domains(
            arguments.out,
            arguments.source,
            layout=arguments.layout,
            depth_scale=arguments.depth_scale,
            bit_shift=arguments.bit_shift,
            camera=arguments.camera,
        )
    except DataError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(f"data.root={out}")


def _add_nyudv2(datasets: Commands) -> None:
    parser = add_command(datasets, "nyudv2", help="NYUDv2, 40 classes, from its official archive")
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
    parser = add_command(datasets, "sunrgbd", help="SUN RGB-D, 37 classes, from its official release")
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
