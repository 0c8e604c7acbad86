"""Validation images that the networks do worst and best on."""

from __future__ import annotations

from models.data import palette
from models.report.blocks import Block, Gallery, Picture, Scene, Section, Swatches
from models.report.examined import ERRORS, Drawn
from models.report.gathered import Gathered
from models.report.images import data_uri

_PHOTO = "input"  # begins the names of pictures that are no maps of a few colors


def pictures(gathered: Gathered) -> Section | None:
    """The worst and the best scenes of each group's first run; None where no run was looked at."""
    blocks: list[Block] = []
    labels = gathered.comparison.per_cent
    for group in gathered.groups:
        found = gathered.first(group).examined
        if found is None or not (found.worst or found.best):
            continue
        of = (
            f"{group.name}, seed {group.runs[0].recipe.run.seed}: "
            if len(group.runs) > 1
            else f"{group.name}: "
        )
        for word, scenes in (("worst", found.worst), ("best", found.best)):
            if scenes:
                caption = (
                    f"{of}the {len(scenes)} {word} of {found.count} validation images, by the ensemble's "
                    f"{found.score}."
                )
                blocks.append(Gallery(caption, [_scene(drawn, labels) for drawn in scenes]))
    if not blocks:
        return None
    if labels:
        blocks.insert(0, _classes(gathered))
    lead = "What the networks see and answer, where they do worst and where they do best." + (
        " Each picture has its own mean IoU, over the classes in the image. In the last one wrong pixels are "
        "dark; pixels that do not count are gray."
        if labels
        else " Each picture has its own mean absolute difference from the target (L1), from 0 to 2."
    )
    return Section("pictures", "Pictures", lead, blocks)


def _classes(gathered: Gathered) -> Swatches:
    examined = next(each.examined for each in gathered.subjects.values() if each.examined)
    names = list(examined.classes or ())
    colors = palette(len(names)) if examined.palette is None else examined.palette
    hexes = {name: "#{:02x}{:02x}{:02x}".format(*color) for name, color in zip(names, colors, strict=False)}
    return Swatches("The colors of the classes; black is no class.", hexes)


def _scene(drawn: Drawn, labels: bool) -> Scene:
    return Scene(drawn.name, [_picture(drawn, what, labels) for what in drawn.images])


def _picture(drawn: Drawn, what: str, labels: bool) -> Picture:
    score = drawn.scores.get(what)
    label = what
    if what == ERRORS:
        label = "wrong pixels of the ensemble"
    if score is not None:
        label += f": {100 * score:.1f} %" if labels else f": {score:.3f}"
    uri = data_uri(drawn.images[what], photo=what.startswith(_PHOTO) or not labels)
    return Picture(uri, label, f"{drawn.name}, {label}")


def features(gathered: Gathered) -> Section | None:
    """A figure for each group that has one; None where no group has."""
    scenes = [
        Scene(group.name, [picture])
        for group in gathered.groups
        if (picture := gathered.first(group).features) is not None
    ]
    if not scenes:
        return None
    caption = "Maps of one layer's channels for a few validation images."
    lead = "What the channels show that one modality alone uses, that both use, and that none uses."
    return Section("features", "Feature maps", lead, [Gallery(caption, scenes, wide=True)])
