"""Layouts of data sets on disk: which files make up a sample, and what is stored in them.

A layout is a description, not a loader. People's own folders are described in the same terms by a file
``layout.json`` in the data set's root: see ``layout_file`` and docs/data.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from models.data.classes import CITYSCAPES, CITYSCAPES_IDS, NYU40, SUN37
from models.data.geometry import Camera
from models.data.images import UNKNOWN_SCALE, DepthScale
from models.data.kinds import Modality, kind_by_name

SPLITS = ("train", "val")
LABELS, CAMERA = "labels", "camera"

_TEST = ("train", "test")  # for data sets whose test set serves validation

# The color camera that NYUDv2's depth is projected to (camera_params.m of its toolbox, which counts pixels
# from 1).
KINECT = Camera(518.85790, 519.46961, 324.58245, 252.73617, (640, 480))


@dataclass(frozen=True)
class Layout:
    """The files of a data set's folder, and what they store.

    Paths are relative to the root. In them ``{name}`` is the sample's name, ``{split}`` the split's in this
    layout, ``{number}`` the name as a number to which ``label_shift`` is added in those of labels (with a
    format: ``{number:06d}``), and an ending ``.*`` any suffix.

    Attributes:
        name: of the layout.
        files: the path of every kind of file: of modalities (``rgb depth disparity hha normals points``, or
            any name), of ``labels``, and of ``camera`` where every image has its own.
        lists: path of a split's list; with ``{file}`` there is one for every kind of file. Empty: a split
            has a sample for every file of the first kind.
        lines: what a list's line holds: ``paths`` of all kinds, told apart by their folders; a ``path``, of
            which the file's name without suffix counts; or the ``name``.
        splits: what the layout calls ``train`` and ``val``.
        label_offset: what stored labels add to the class; those below it are void.
        ignore_index: stored value of void pixels.
        label_map: the class of each stored one, in place of itself; -1 is void.
        label_shift: what the number of a split's labels adds to its images'.
        classes: their names, if they are fixed.
        depth_scale: stored units per meter of integers; None: brightness without a metric scale;
            ``UNKNOWN_SCALE``: to be given.
        bit_shift: by how many bits stored depth is rotated to the right before it is scaled.
        modalities: what is known of a modality beside its files.
        ranges: by modality ``Modality.range``, the older place for it.
        camera: of the depth or, where that has a camera and a pose of its own, of the images beside it; None:
            unknown.
        crop_to_labels: label maps may be smaller than images: each image is cropped to the middle, by itself
            (the paper's archive, whose RGB and labels lack the white border of the frame).
        hha_floor: the third channel of computed HHA on floors: 38, or 218 where it is upside down, for
            networks that were trained on it so.
        stated: the fields that a ``layout.json`` gives itself; a recipe's do not take their place.
    """

    name: str
    files: Mapping[str, str]
    lists: str = "{split}.txt"
    lines: Literal["paths", "path", "name"] = "name"
    splits: tuple[str, str] = SPLITS
    label_offset: int = 0
    ignore_index: int = 255
    label_map: tuple[int, ...] = ()
    label_shift: Mapping[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    depth_scale: DepthScale = UNKNOWN_SCALE
    bit_shift: int = 0
    modalities: Mapping[str, Modality] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    camera: Camera | None = None
    crop_to_labels: bool = False
    hha_floor: int = 38
    stated: tuple[str, ...] = field(default=(), compare=False, metadata={"recorded": True})

    def modality(self, name: str) -> Modality:
        """Look up what is known of a modality: told of it, or by its name."""
        told = self.modalities.get(name, Modality())
        return replace(told, kind=told.kind or kind_by_name(name), range=told.range or self.ranges.get(name))

    def registered(self, name: str) -> str | None:
        """The depth by whose camera's pose a modality comes into the reference's view; None: it is in it."""
        told = self.modalities.get(name, Modality())
        return name if told.pose else told.registered_with

    def split(self, name: str) -> str:
        """The layout's name for ``train`` or ``val``; other names are its own."""
        return dict(zip(SPLITS, self.splits, strict=True)).get(name, name)

    def folder(self, kind: str, split: str) -> str:
        """The part of a kind's path that all samples of a split share."""
        shared = re.split(r"\{(?:name|number|rgb)", self.files[kind])[0].rpartition("/")[0]
        return shared.format(split=self.split(split))

    def list_file(self, split: str, kind: str = LABELS) -> str:
        """The path of a split's list; empty where there is none."""
        return self.lists.format(split=self.split(split), file={LABELS: "label"}.get(kind, kind))


def _layouts(*layouts: Layout) -> dict[str, Layout]:
    return {layout.name: layout for layout in layouts}


LAYOUTS = _layouts(
    Layout(
        "nyu_cen",
        {"rgb": "rgb/{name}.*", LABELS: "masks/{name}.*", "depth": "depth/{name}.*"},
        lines="paths",
        depth_scale=5000.0,
        camera=KINECT,
        crop_to_labels=True,
    ),
    Layout(
        "nyu_lwrf",
        {"rgb": "{split}_images/{name}.*", LABELS: "{split}_labels/{name}.*"},
        lists="{split}.nyu",
        lines="paths",
    ),
    Layout(
        "nyu_rgbx",
        {
            "rgb": "RGB/{name}.*",
            "hha": "HHA/{name}.*",
            "depth": "Depth/{name}.*",
            LABELS: "Label/{name}.*",
        },
        splits=_TEST,
        label_offset=1,
        depth_scale=None,
        camera=KINECT,
    ),
    Layout(
        "nyu_dformer",
        {"rgb": "RGB/{name}.*", "depth": "Depth/{name}.*", LABELS: "Label/{name}.*"},
        lines="path",
        splits=_TEST,
        label_offset=1,
        depth_scale=None,
        camera=KINECT,
    ),
    Layout(
        "sun_dformer",
        {"rgb": "RGB/{name}.*", "depth": "Depth/{name}.*", LABELS: "labels/{name}.*"},
        lines="path",
        splits=_TEST,
        label_offset=1,
        classes=SUN37,
        depth_scale=None,
    ),
    Layout(
        "nyu_esanet",
        {
            "rgb": "{split}/rgb/{name}.*",
            "depth": "{split}/depth/{name}.*",
            "depth_raw": "{split}/depth_raw/{name}.*",
            LABELS: "{split}/labels_40/{name}.*",
        },
        splits=_TEST,
        label_offset=1,
        classes=NYU40,
        depth_scale=1000.0,
        camera=KINECT,
    ),
    Layout(
        "sun_handa",
        {
            "rgb": "SUNRGBD-{split}_images/img-{number:06d}.*",
            "depth": "sunrgbd_{split}_depth/{number}.*",
            LABELS: "sunrgbd_train_test_labels/img-{number:06d}.*",
        },
        lists="",
        splits=_TEST,
        label_offset=1,
        label_shift={"train": 5050},
        classes=SUN37,
        depth_scale=10000.0,
    ),
    Layout(
        "sun_original",
        {
            "rgb": "SUNRGBD/{name}",
            "depth": "SUNRGBD/{name}",
            LABELS: "SUNRGBD/{name}",
            CAMERA: "{rgb}/../../intrinsics.txt",
        },
        lists="{split}_{file}.txt",
        splits=_TEST,
        label_offset=1,
        classes=SUN37,
        depth_scale=1000.0,
        bit_shift=3,
    ),
    Layout(
        "cityscapes",
        {
            "rgb": "leftImg8bit/{split}/{name}_leftImg8bit.png",
            "disparity": "disparity/{split}/{name}_disparity.png",
            LABELS: "gtFine/{split}/{name}_gtFine_labelIds.png",
            CAMERA: "camera/{split}/{name}_camera.json",
        },
        lists="",
        label_map=CITYSCAPES_IDS,
        classes=CITYSCAPES,
    ),
)
