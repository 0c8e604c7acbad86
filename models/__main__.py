"""``python -m models``: train, evaluate, predict, prepare, recipes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import models.segmentation.recipes  # noqa: F401 - fills the registry
from models.data import SUN37, DataError, prepare_nyudv2, prepare_sunrgbd, prepare_synthetic
from models.training import config, registry
from models.training.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. Mistakes of the caller's are printed in one line and give 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if flags := [argument for argument in rest if argument.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    arguments.overrides = [*arguments.overrides, *rest]  # assignments after a flag end up in rest
    try:
        return int(arguments.command(arguments))
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _train(arguments: argparse.Namespace) -> int:
    from models.training.train import train

    resume, overrides = arguments.resume, arguments.overrides
    if isinstance(resume, str):
        if "=" in resume and not Path(resume).exists():  # `--resume field=value` names no path
            overrides, resume = [resume, *overrides], True
        else:
            resume = Path(resume)
    return train(arguments.recipe, overrides, resume)


def _evaluate(arguments: argparse.Namespace) -> int:
    from models.segmentation.evaluate import evaluate_checkpoint

    evaluate_checkpoint(arguments.checkpoint, arguments.overrides, arguments.output)
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from models.segmentation.predict import predict_files

    inputs = {name: path for name in ("rgb", "depth") if (path := getattr(arguments, name)) is not None}
    for assignment in arguments.input:
        name, equals, path = assignment.partition("=")
        if not equals:
            raise UsageError(f"--input: expected MODALITY=PATH, got {assignment!r}")
        inputs[name] = Path(path)
    predict_files(arguments.checkpoint, inputs, arguments.output, arguments.which, arguments.overrides)
    return 0


def _prepare_synthetic(arguments: argparse.Namespace) -> int:
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
    return 0


def _prepare_nyudv2(arguments: argparse.Namespace) -> int:
    out = prepare_nyudv2(arguments.out, arguments.archive, arguments.splits, arguments.classes)
    print(f"data.root={out}")
    return 0


def _prepare_sunrgbd(arguments: argparse.Namespace) -> int:
    out = prepare_sunrgbd(arguments.out, arguments.archive, arguments.toolbox)
    print(f"data.root={out} data.num_classes={len(SUN37)}")
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    if arguments.recipe is None:
        lines = registry.listing()
    else:
        lines = config.describe(config.override(registry.find(arguments.recipe), arguments.overrides))
    print("\n".join(lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a recipe")
    train.add_argument("recipe", metavar="RECIPE")
    _add_overrides(train)
    train.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="RUN",
        help="continue a run: its folder or a checkpoint of it; without RUN, the one in run.output",
    )
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", help="measure a checkpoint on the validation images")
    _add_checkpoint(evaluate)
    _add_overrides(evaluate)
    evaluate.add_argument(
        "--output", type=Path, help="JSON file of the metrics; default: beside the checkpoint"
    )
    evaluate.set_defaults(command=_evaluate)

    predict = commands.add_parser("predict", help="label images: label maps, coloured maps, overlays")
    _add_checkpoint(predict)
    _add_overrides(predict)
    predict.add_argument("--rgb", type=Path, help="image, or folder of images")
    predict.add_argument("--depth", type=Path, help="depth image, or folder; matched to --rgb by name")
    predict.add_argument(
        "--input", action="append", default=[], metavar="MODALITY=PATH", help="the same of any other modality"
    )
    predict.add_argument("--output", type=Path, required=True, help="folder to write to")
    predict.add_argument("--which", default="ensemble", help="ensemble, or a modality's branch (%(default)s)")
    predict.set_defaults(command=_predict)

    prepare = commands.add_parser("prepare", help="make a data set")
    kinds = prepare.add_subparsers(required=True, metavar="DATASET")
    synthetic = kinds.add_parser(
        "synthetic",
        help="procedural rooms in RGB and depth",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    synthetic.add_argument("out", type=Path, metavar="FOLDER")
    for name, default, meaning in (
        ("train", 400, "training images"),
        ("val", 100, "validation images"),
        ("height", 96, "of the images, in pixels"),
        ("width", 128, "of the images, in pixels"),
        ("seed", 0, "another one gives other rooms"),
    ):
        synthetic.add_argument(f"--{name}", type=int, default=default, help=meaning)
    synthetic.set_defaults(command=_prepare_synthetic, overrides=[])

    nyudv2 = kinds.add_parser("nyudv2", help="NYUDv2, 40 classes, from its official archive")
    nyudv2.add_argument("out", type=Path, metavar="FOLDER")
    nyudv2.add_argument(
        "--archive", type=Path, required=True, help="nyu_depth_v2_labeled.mat", metavar="FILE"
    )
    nyudv2.add_argument("--splits", type=Path, help="splits.mat; default: beside the archive", metavar="FILE")
    nyudv2.add_argument(
        "--classes", type=Path, help="classMapping40.mat; default: beside the archive", metavar="FILE"
    )
    nyudv2.set_defaults(command=_prepare_nyudv2, overrides=[])

    sunrgbd = kinds.add_parser("sunrgbd", help="SUN RGB-D, 37 classes, from its official release")
    sunrgbd.add_argument("out", type=Path, metavar="FOLDER")
    sunrgbd.add_argument(
        "--archive", type=Path, required=True, help="SUNRGBD.zip, or where it was unpacked", metavar="PATH"
    )
    sunrgbd.add_argument(
        "--toolbox", type=Path, required=True, help="the folder SUNRGBDtoolbox", metavar="FOLDER"
    )
    sunrgbd.set_defaults(command=_prepare_sunrgbd, overrides=[])

    recipes = commands.add_parser("recipes", help="list the recipes, or a recipe's fields and values")
    recipes.add_argument("recipe", nargs="?", metavar="RECIPE")
    _add_overrides(recipes)
    recipes.set_defaults(command=_recipes)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, metavar="RUN", help="run folder (its best.pt), or a checkpoint"
    )


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="settings to change")


if __name__ == "__main__":
    sys.exit(main())
