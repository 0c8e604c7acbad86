"""The page's answer: which run did best, and what was trained on what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from models.comparison.groups import Group, Value, differences
from models.comparison.runs import outputs
from models.report.blocks import NOTHING, Block, Cell, Section, Table, Terms, Text
from models.report.gathered import Gathered, less_is_better, over_seeds, score_name
from models.report.subject import Subject
from models.segmentation import networks
from models.training.config import show

_NETWORKS = {
    "refinenet": "RefineNet",
    "pspnet": "PSPNet",
    "deeplabv3plus": "DeepLabv3+",
    "segformer": "SegFormer",
    "esanet": "ESANet",
    "fcn32s": "FCN-32s",
    "fusenet": "FuseNet",
    "acnet": "ACNet",
    "adapnetpp": "AdapNet++",
    "ssma": "SSMA",
    "rdfnet": "RDFNet",
    "gnn3d": "3DGNN",
}
_FUSIONS = {
    "exchange": "fused by exchange",
    "none": "without fusion before the ensemble",
}
_SHORT_COMMIT = 10


def summary(gathered: Gathered) -> Section:
    """A sentence on who is best, one for each group, and a table of the ensembles."""
    texts: list[Block] = [Text(_sentence(gathered, group), group.name) for group in gathered.groups]
    return Section("summary", "In short", headline(gathered), [_table(gathered), *texts])


def headline(gathered: Gathered) -> str:
    """The page's answer in a sentence or two."""
    lead, name = gathered.lead, score_name(gathered.lead)
    values = {group.name: gathered.comparison.shown(f"ensemble/{lead}", group) for group in gathered.groups}
    known = {group: value for group, value in values.items() if value is not None}
    if not known:
        return "No run has been evaluated yet, so there is no score to show."
    sign = 1 if less_is_better(lead) else -1
    (best, value), *others = sorted(known.items(), key=lambda item: sign * item[1].mean)
    unit = gathered.unit
    if not others:
        return f"The ensemble of {best} reaches {_a(name)} of {gathered.text(value)}{unit}."
    second, behind = others[0]
    gap = abs(value.mean - behind.mean)
    points = f"{gap:.{gathered.decimals}f}" + (" points" if unit else "")
    ahead = f"is ahead of {second} ({gathered.text(behind)}{unit}) by {points}" if gap else f"equals {second}"
    text = f"The ensemble of {best} has the best {name}, {gathered.text(value)}{unit}, and {ahead}."
    unfinished = [group.name for group in gathered.groups if not group.finished]
    early = f" Not yet finished: {', '.join(unfinished)}." if unfinished else ""
    return f"{text} {_caution(value, behind, gap)}{early}"


def _caution(value: Value, behind: Value, gap: float) -> str:
    """What the spread over seeds says of a difference."""
    if value.spread is None or behind.spread is None:
        return "At least one of the two has been trained with one seed only, so part of this may be chance."
    spread = max(value.spread, behind.spread)
    if gap <= 2 * spread:
        return "That is within twice the standard deviation over seeds: it may well be chance."
    return "That is more than twice the standard deviation over seeds."


def _sentence(gathered: Gathered, group: Group) -> str:
    """A group in words."""
    subject, lead, unit = gathered.first(group), gathered.lead, gathered.unit
    run = subject.run
    seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
    text = f"{_network(run.recipe)} on {_listed(subject.modalities)}, {_fusion(run.recipe)}, "
    text += f"trained for {run.step} steps on {_data_name(run.recipe)}{seeds}."
    names = outputs(run)[:-1]
    found = {name: gathered.comparison.shown(f"{name}/{lead}", group) for name in names}
    branches = {name: value for name, value in found.items() if value is not None}
    ensemble = gathered.comparison.shown(f"ensemble/{lead}", group)
    if ensemble is None:
        text += " It has not been evaluated yet."
    elif _is_system(run.recipe):
        text += f" It reaches {gathered.text(ensemble)}{unit} {score_name(lead)}."
    elif branches:
        choose = min if less_is_better(lead) else max
        best = choose(branches, key=lambda name: branches[name].mean)
        text += (
            f" Its ensemble reaches {gathered.text(ensemble)}{unit} {score_name(lead)}, "
            f"the best branch alone ({best}) {gathered.text(branches[best])}{unit}."
        )
    share = over_seeds(gathered.of(group), last_share)
    if share is not None and not _is_system(run.recipe):
        text += (
            f" {100 * share.mean:.1f} % of the channels are exchanged where the network may exchange."
            if share.mean
            else " No channel is exchanged."
        )
    return text


def last_share(subject: Subject) -> float | None:
    """The share of channels that were replaced when the losses were last logged."""
    logged = [row["exchanged"] for row in subject.losses if "exchanged" in row]
    return logged[-1] if logged else None


def _table(gathered: Gathered) -> Table:
    scores = gathered.comparison.scores
    columns = [
        gathered.cells(
            [gathered.comparison.shown(f"ensemble/{score}", group) for group in gathered.groups],
            less=less_is_better(score),
        )
        for score in scores
    ]
    branches = [_branch_cells(gathered, column) for column in _branch_columns(gathered)]
    head = ["", "runs", *(score_name(score) for score in scores), *_branch_columns(gathered)]
    rows: list[Sequence[Cell | str]] = [
        [_row_name(group), str(len(group.runs)), *(column[i] for column in (*columns, *branches))]
        for i, group in enumerate(gathered.groups)
    ]
    unit = ", in per cent" if gathered.comparison.per_cent else ""
    return Table(
        f"Scores of the ensemble at the last evaluation{unit}, and the {score_name(gathered.lead)} of each "
        "branch alone. The best value of a column is marked.",
        head,
        rows,
    )


def _branch_columns(gathered: Gathered) -> list[str]:
    names = (name for group in gathered.groups for name in outputs(group.runs[0])[:-1])
    return [f"{name} alone" for name in dict.fromkeys(names)]


def _branch_cells(gathered: Gathered, column: str) -> list[Cell]:
    key = f"{column.removesuffix(' alone')}/{gathered.lead}"
    values = [gathered.comparison.shown(key, group) for group in gathered.groups]
    return gathered.cells(values, less=less_is_better(gathered.lead))


def glossary(gathered: Gathered) -> Section:
    """What the words mean."""
    meanings = {
        "modality": "One kind of image of the scene, such as color (RGB) or depth. All images of a "
        "scene show it from the same place.",
        "branch": "The path of one modality through the network, with an output of its own. Unless the "
        "fusion says otherwise, the branches share their convolutions, and each has private normalization "
        "layers.",
        "exchange": "Where a channel of one branch has a scale γ near zero, that channel says little; it is "
        "replaced by the mean of the other branches' channels.",
        "γ (gamma)": "The factor that a normalization layer multiplies a channel by. Each branch has its "
        "own, which training sets.",
        "θ (theta)": "The threshold of the exchange: a channel is replaced while |γ| is below it. With the "
        "region own, each branch gives up channels of its own share alone: of two branches, half of them.",
        "λ (lambda)": "The weight of a penalty on |γ| in the training loss, which drives the scales of "
        "channels of little use below θ.",
        "ensemble": "The output that counts in the end: the weighted mean of the branches' outputs.",
        "α (alpha)": "The weights of that mean, which are learned; they add up to 1.",
    }
    if gathered.comparison.per_cent:
        meanings["IoU"] = (
            "Intersection over union, of the pixels that belong to a class and those that were taken for it: "
            "1 where they are the same, 0 where they have none in common."
        )
    if any(len(group.runs) > 1 for group in gathered.groups):
        meanings["±"] = "The standard deviation over runs that differ in the random seed alone."
    return Section("words", "Words", "The terms of this page, in a sentence each.", [Terms(meanings)])


def training(gathered: Gathered) -> Section:
    """What was trained on what, and what differs."""
    facts = [_facts(gathered, group) for group in gathered.groups]
    head = ["", *(group.name for group in gathered.groups)]
    rows = [[name, *(fact[name] for fact in facts)] for name in facts[0]]
    blocks: list[Block] = [Table("What was trained, on what, where and when.", head, rows, wordy=True)]
    found = differences(gathered.groups)
    if len(gathered.groups) > 1:
        blocks.append(
            Table(
                "Settings that differ between the runs, as the command line writes them.",
                head,
                [[path, *values] for path, values in found.items()],
                wordy=True,
            )
        )
    known = [
        {path: show(value) for path, value in group.runs[0].settings.items()} for group in gathered.groups
    ]
    paths = dict.fromkeys(path for each in known for path in each)
    blocks.append(
        Table(
            "All settings that the training depends on",
            head,
            [[path, *(each.get(path, NOTHING) for each in known)] for path in paths],
            wordy=True,
            folded=True,
        )
    )
    count = len(found)
    lead = "One training." if len(gathered.groups) == 1 else f"{count} settings differ between the runs."
    return Section("training", "What was trained", lead, blocks)


def kind(gathered: Gathered) -> str:
    """What the networks do, in a few words."""
    data = gathered.groups[0].runs[0].recipe.data
    if gathered.comparison.per_cent:
        return f"semantic segmentation, {data.num_classes} classes"
    return f"image translation to {data.target}"


def _facts(gathered: Gathered, group: Group) -> dict[str, str]:
    subjects = gathered.of(group)
    run, recipe = group.runs[0], group.runs[0].recipe
    data = recipe.data
    commits = dict.fromkeys(str(each.environment.get("git") or "") for each in subjects)
    versions = dict.fromkeys(str(each.environment.get("torch", "")) for each in subjects)
    facts = {
        "recipe": subjects[0].recipe_name,
        "data set": str(data.root or NOTHING),
        "modalities": ", ".join(subjects[0].modalities),
        "network": _network(recipe),
        "fusion": _fusion_options(recipe),
        "λ": show(recipe.loss.sparsity),
        "budget": _budget(run),
        "optimizer": _optimizer(recipe.optim),
        "seeds": ", ".join(str(each.recipe.run.seed) for each in group.runs),
        "folders": ", ".join(str(each.path) for each in group.runs),
        "machine": "; ".join(dict.fromkeys(each.machine for each in group.runs)),
        "trained": "; ".join(dict.fromkeys(_when(each) for each in subjects)),
        "git commit": ", ".join(_short(commit) for commit in commits if commit) or NOTHING,
        "PyTorch": ", ".join(version for version in versions if version) or NOTHING,
    }
    if gathered.comparison.per_cent:
        facts["modalities"] += f"; {data.num_classes} classes"
    else:
        facts["modalities"] += f" to {data.target}"
    return facts


def _budget(run: Any) -> str:
    of = f" of {run.total}" if not run.finished and run.total else ""
    side = run.recipe.data.crop
    return f"{run.step}{of} steps of {run.recipe.data.batch_size} images, crops of {side} x {side} pixels"


def _optimizer(optim: Any) -> str:
    stages = len(optim.stages)
    return f"{getattr(optim, 'method', 'adam')}, {stages} stage{'s' * (stages != 1)}"


def _short(commit: str) -> str:
    number, dirty, _ = commit.partition("-dirty")
    return number[:_SHORT_COMMIT] + (" with local changes" if dirty else "")


def _when(subject: Subject) -> str:
    if subject.started is None or subject.ended is None:
        return "not recorded"
    minutes = round((subject.ended - subject.started).total_seconds() / 60)
    length = f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    return f"{subject.started:%Y-%m-%d %H:%M}, {length}"


def _network(recipe: Any) -> str:
    model = recipe.model
    if not hasattr(model, "encoder"):
        return f"U-Net-{model.size}"
    return f"{_NETWORKS.get(model.network, model.network)} with {model.encoder}"


def _is_system(recipe: Any) -> bool:
    return hasattr(recipe.model, "encoder") and networks.is_system(recipe.model.network)


def _fusion(recipe: Any) -> str:
    if _is_system(recipe):
        return "a system that fuses in its own way"
    fusion = recipe.fusion
    text = _FUSIONS.get(fusion.name, f"fused by {fusion.name.replace('_', ' ')}")
    return f"{text} (θ = {fusion.threshold})" if hasattr(fusion, "threshold") else text


def _fusion_options(recipe: Any) -> str:
    options = [f"{field.name} {show(getattr(recipe.fusion, field.name))}" for field in fields(recipe.fusion)]
    return f"{recipe.fusion.name}: {', '.join(options)}" if options else recipe.fusion.name


def _data_name(recipe: Any) -> str:
    return recipe.data.root.name if recipe.data.root is not None else "an unknown data set"


def _row_name(group: Group) -> str:
    return group.name if group.finished else f"{group.name} (unfinished)"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _a(name: str) -> str:
    return f"an {name}" if name.startswith("RMSE") else f"a {name}"
