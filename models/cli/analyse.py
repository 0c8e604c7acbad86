"""``cen analyse RUN ...``, or ``cen analyze``."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.cli.arguments import Commands, add_command
from models.training.errors import UsageError

_BATCHES, _CHANNELS = 64, 4
_STEPS, _SEEDS = 200, (0, 1, 2)
_SCENES = 3


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "analyse",
        help="test the paper's theory on trained networks, and draw their feature maps",
        aliases=["analyze"],
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder (its last.pt) or a checkpoint in it; field=value changes a setting, as data.root",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where to write results; default: the run's folder"
    )
    parser.add_argument(
        "--threshold",
        type=_threshold,
        metavar="θ",
        help="what scales are compared with, a number or 0.05*median; default: what a run exchanges by",
    )
    for add_analysis in _ANALYSES:
        add_analysis(parser)
    parser.set_defaults(run=_run, overrides=[])


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.analyses:
        raise UsageError("analyse: say what to analyze: --theorem, --corollary, --features")
    _check_options(arguments)
    arguments.overrides = [each for each in arguments.runs if "=" in each] + arguments.overrides
    arguments.runs = [Path(each) for each in arguments.runs if "=" not in each]
    if not arguments.runs:
        raise UsageError("analyse: give a run's folder")
    codes: list[int] = [analysis(arguments) for analysis in dict.fromkeys(arguments.analyses)]
    return max(codes)


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse options of analyses that are not asked for, which would have no effect."""
    for option, analyses in _OPTIONS.items():
        if getattr(arguments, option) is not None and not {*analyses} & {*arguments.analyses}:
            flags = " or ".join(f"--{analysis.__name__.removeprefix('_')}" for analysis in analyses)
            raise UsageError(f"analyse: --{option} is of {flags}, which is not asked for")


def _add_theorem(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--theorem", "Theorem 1: scales that come near 0 stay there")
    group.add_argument(
        "--theorem",
        dest="analyses",
        action="append_const",
        const=_theorem,
        help="its probability, predicted and observed, and how scales moved in training",
    )
    group.add_argument(
        "--batches",
        type=_count,
        metavar="N",
        help=f"training batches to look at; 0: the records of scales alone; default: {_BATCHES}",
    )
    group.add_argument(
        "--channels",
        type=_positive,
        metavar="N",
        help=f"channels of every layer and modality, each a pass of every batch; default: {_CHANNELS}",
    )


def _add_corollary(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--corollary", "Corollary 1: exchange does not raise the training loss")
    group.add_argument(
        "--corollary",
        dest="analyses",
        action="append_const",
        const=_corollary,
        help="train a run's network on, convolutions unshared, with and without exchange of what is below θ",
    )
    group.add_argument("--steps", type=_positive, metavar="N", help=f"of each training; default: {_STEPS}")
    group.add_argument(
        "--seeds",
        type=_counts,
        metavar="N,N,...",
        help="of the pairs of trainings; default: 0,1,2",
    )


def _add_features(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--features", "Figure 3: what the channels of one modality alone show")
    group.add_argument(
        "--features",
        dest="analyses",
        action="append_const",
        const=_features,
        help="draw the feature maps of channels that one modality alone uses, and correlate them with "
        "texture and boundaries, over eval.limit validation images",
    )
    group.add_argument(
        "--layer", metavar="NAME", help="of the norm; default: that of stages 1 and 2 with the largest sets"
    )
    scenes = group.add_mutually_exclusive_group()
    scenes.add_argument("--images", type=_positive, metavar="N", help=f"scenes to draw; default: {_SCENES}")
    scenes.add_argument("--scene", action="append", metavar="NAME", help="draw this one; may be repeated")


def _theorem(arguments: argparse.Namespace) -> int:
    from models.analysis.analyze import analyze_theorem

    return analyze_theorem(
        arguments.runs,
        arguments.overrides,
        output=arguments.output,
        batches=_BATCHES if arguments.batches is None else arguments.batches,
        channels=arguments.channels or _CHANNELS,
        threshold=arguments.threshold,
    )


def _corollary(arguments: argparse.Namespace) -> int:
    from models.analysis.analyze import analyze_corollary

    return analyze_corollary(
        arguments.runs,
        arguments.overrides,
        output=arguments.output,
        steps=arguments.steps or _STEPS,
        seeds=arguments.seeds or _SEEDS,
        threshold=arguments.threshold,
    )


def _features(arguments: argparse.Namespace) -> int:
    from models.analysis.features import write_features

    if arguments.output is not None and len(arguments.runs) > 1:
        raise UsageError("--output: --features writes files of the same names for every run; give one run")
    for run in arguments.runs:
        write_features(
            run,
            arguments.overrides,
            arguments.output,
            layer=arguments.layer,
            images=arguments.images or _SCENES,
            scenes=arguments.scene or [],
        )
    return 0


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number from 0 on, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if (number := _count(text)) == 0:
        raise argparse.ArgumentTypeError("expected a number from 1 on, got 0")
    return number


def _threshold(text: str) -> float | str:
    from cen_ext.modules.thresholds import parse_median

    try:
        if "median" in text:
            parse_median(text)
            return text
        if (number := float(text)) > 0:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number above 0 or 0.05*median, got {text!r}")


_ANALYSES = (_add_theorem, _add_corollary, _add_features)
_OPTIONS = {  # what each is of
    "threshold": (_theorem, _corollary),
    "batches": (_theorem,),
    "channels": (_theorem,),
    "steps": (_corollary,),
    "seeds": (_corollary,),
    "layer": (_features,),
    "images": (_features,),
    "scene": (_features,),
}
