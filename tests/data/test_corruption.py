"""Corruptions of samples against their definitions, of a data set without files."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from models.data import DataError, Layout, Reader, Sample, eval_loader
from models.data.corruption import (
    KINDS,
    CorruptedSet,
    Corruption,
    blobs,
    noisy,
    parse,
    shifted,
    standard,
    with_holes,
)
from models.data.geometry import Camera
from models.data.inputs import InputSpec, input_specs
from models.data.kinds import SPARSE, Modality

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOR = InputSpec("rgb", "full brightness", 3, "rgb", MEAN, STD)
DEPTH = InputSpec("depth", "metre")
NAMES = ("rgb", "depth", "hha", "thermal", "parts")
SIZE = (60, 80)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def colors(level: float = 0.5, size: tuple[int, int] = (120, 160)) -> np.ndarray:
    """A gray image, normalized."""
    return ((np.full((*size, 3), level) - MEAN) / STD).astype(np.float32)


def depth(size: tuple[int, int] = (120, 160)) -> np.ndarray:
    """Meters, a quarter of them missing."""
    image = rng(1).uniform(1, 5, (*size, 1)).astype(np.float32)
    image[: size[0] // 2, : size[1] // 2] = 0
    return image


class Scenes:
    """What corruption needs of a data set: five scenes of five kinds of modality."""

    def __init__(self, names: tuple[str, ...] = NAMES) -> None:
        files = {name: f"{name}/{{name}}" for name in ("rgb", "depth", "thermal", "parts", "labels")}
        told = {
            "thermal": Modality(kind="intensity", missing=(0,)),
            "parts": Modality(kind="categorical", range=(0, 9)),
        }
        layout = Layout("own", files, depth_scale=1000, modalities=told, camera=Camera(60, 60, 40, 30))
        self.reader = Reader(layout, names)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Sample:
        random = rng(index)
        made = {
            "rgb": ((random.integers(0, 256, (*SIZE, 3)) / 255 - MEAN) / STD).astype(np.float32),
            "depth": depth(SIZE),
            "hha": colors(0.4, SIZE) * (depth(SIZE) > 0),
            "thermal": random.uniform(0.2, 0.8, (*SIZE, 1)).astype(np.float32) * (depth(SIZE) > 0),
            "parts": random.integers(0, 4, (*SIZE, 1)).astype(np.float32) / 9,
        }
        names = self.reader.modalities
        images = tuple(made[name] for name in names)
        target = np.zeros(SIZE, np.uint8)
        return Sample(images, target, f"room/{index}", names, self.reader.kinds())


def corrupted(modality: str, kind: str, level: float | None = None) -> CorruptedSet:
    return CorruptedSet(Scenes(), Corruption(modality, kind, level))


def test_noise_has_its_moments_in_the_modality_s_unit() -> None:
    sigma, image = 0.05, colors()
    added = (noisy(image, sigma, COLOR, "color", rng()).astype(np.float64) - image) * STD
    count = added.size
    assert abs(added.mean()) < 4 * sigma / count**0.5
    assert abs(added.std() / sigma - 1) < 4 / (2 * count) ** 0.5
    assert abs((added**4).mean() / sigma**4 - 3) < 4 * (96 / count) ** 0.5  # Gaussian
    flat = added.reshape(-1, 3)
    between = np.corrcoef([*flat.T, np.roll(flat[:, 0], 1), np.roll(flat[:, 0], 160)])
    assert np.abs(between - np.eye(5)).max() < 4 / len(flat) ** 0.5  # channels and neighbors independent
    meters = depth()
    known = meters > 0
    added = noisy(meters, sigma, DEPTH, "depth", rng())[known].astype(np.float64) - meters[known]
    assert abs(added.mean()) < 4 * sigma / added.size**0.5
    assert abs(added.std() / sigma - 1) < 4 / (2 * added.size) ** 0.5


@pytest.mark.parametrize(("kind", "holes"), [("color", False), (SPARSE, True), ("hha", True)])
def test_noise_on_colors_is_cut_off(kind: str, holes: bool) -> None:
    image = colors(0.9, (20, 30))
    image[:5] = 0
    z = rng(3).standard_normal(image.shape)
    values = (image.astype(np.float64) * STD + MEAN + 0.2 * z).clip(0, 1)
    expected = (values - MEAN) / STD
    if holes:
        expected[:5] = 0
    found = noisy(image, 0.2, COLOR, kind, rng(3))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (values == 1).mean() > 0.1
    assert (found[:5] == 0).all() == holes


def test_noise_on_depth_spares_what_is_missing_and_has_no_upper_limit() -> None:
    image = depth((20, 30))
    found = noisy(image, 3.0, DEPTH, "depth", rng(3))
    expected = np.maximum(image + 3.0 * rng(3).standard_normal(image.shape), 0) * (image > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found[image == 0] == 0).all()
    assert (found[image > 0] == 0).any()
    assert found.max() > 5


def test_noisy_normals_are_unit_vectors() -> None:
    image = np.zeros((20, 30, 3), np.float32)
    image[5:, :, 2] = -1
    found = noisy(image, 0.1, InputSpec("normals", "length of the normal", 3), "normals", rng())
    length = np.linalg.norm(found.astype(np.float64), axis=-1)
    np.testing.assert_allclose(length[5:], 1, atol=1e-6)
    assert not found[:5].any()
    assert np.abs(found[5:, :, 0]).max() > 0.1
    raw = image[5:] + 0.1 * rng().standard_normal(image.shape)[5:]
    np.testing.assert_allclose(found[5:], raw / np.linalg.norm(raw, axis=-1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("share", [0.001, 0.1, 1 / 3, 0.9, 1.0])
def test_holes_have_their_share_of_the_pixels(share: float) -> None:
    mask = blobs((120, 160), share, rng())
    assert mask.sum() == round(share * 120 * 160)
    for other in (0.05, 0.5):
        small, large = sorted((mask, blobs((120, 160), other, rng())), key=np.sum)
        assert not (small & ~large).any()


def test_holes_are_blobs_and_anywhere() -> None:
    mask = blobs((120, 160), 0.3, rng())
    scattered = rng().random((120, 160)) < 0.3
    # Whether neighbors share a pixel's fate: independent pixels do with 0.58.
    alike = [(each[:, 1:] == each[:, :-1]).mean() for each in (mask, scattered)]
    assert alike[0] > 0.9 > 0.6 > alike[1]
    assert 5 < cv2.connectedComponents(mask.astype(np.uint8))[0] < 100
    shares = np.mean([blobs((24, 32), 0.3, rng(seed)) for seed in range(200)], axis=0)
    assert abs(shares.mean() - 0.3) < 1e-3
    assert np.abs(shares - 0.3).max() < 5 * (0.3 * 0.7 / 200) ** 0.5


@pytest.mark.parametrize("kind", ["color", "hha", "depth"])
def test_holes_are_black_or_without_measurement(kind: str) -> None:
    image, spec = (depth(), DEPTH) if kind == "depth" else (colors(), COLOR)
    found, mask = with_holes(image, 0.25, spec, kind, rng()), blobs(image.shape[:2], 0.25, rng())
    np.testing.assert_array_equal(found[~mask], image[~mask])
    if kind == "color":
        np.testing.assert_allclose(found[mask].astype(np.float64) * STD + MEAN, 0, atol=1e-7)
    else:
        assert not found[mask].any()
    assert image[mask].any()  # the image given is left alone


@pytest.mark.parametrize("pixels", [1, 3, -2, 11])
@pytest.mark.parametrize("holes", [False, True])
def test_a_shift_moves_to_the_right_and_down(pixels: int, holes: bool) -> None:
    image = rng().uniform(1, 2, (12, 17, 2)).astype(np.float32)
    found = shifted(image, pixels, holes)
    for y in range(12):
        for x in range(17):
            row, column = y - pixels, x - pixels
            if 0 <= row < 12 and 0 <= column < 17:
                expected = image[row, column]
            else:
                expected = 0 if holes else image[min(max(row, 0), 11), min(max(column, 0), 16)]
            np.testing.assert_array_equal(found[y, x], expected)


def test_each_kind_of_modality_is_corrupted_as_its_values_are() -> None:
    clean = Scenes()[2]
    for m, name in enumerate(NAMES):
        whole, image = clean.images[m], corrupted(name, "shift", 7)[2].images[m]
        np.testing.assert_array_equal(image[7:, 7:], whole[:-7, :-7])
        edge = 0 if name in ("depth", "hha", "thermal") else whole[:1]
        np.testing.assert_array_equal(image[:7, 7:], np.broadcast_to(edge, whole[:7].shape)[:, :-7])
        holed = corrupted(name, "holes", 0.4)[2].images[m]
        dark = np.array([-mean / std for mean, std in zip(MEAN, STD, strict=True)], np.float32)
        expected = dark if name == "rgb" else 0
        mask = (holed == expected).all(axis=-1)
        assert mask.mean() >= 0.4
        np.testing.assert_array_equal(holed[~mask], whole[~mask])
        blank = corrupted(name, "blank")[2]
        assert (blank.images[m].shape, blank.images[m].any(), blank.absent) == (whole.shape, False, ())
        missing = corrupted(name, "missing")[2]
        assert (missing.images[m].shape, missing.images[m].any()) == ((*SIZE, 1), False)
        assert missing.absent == (m,)
        for other in range(len(NAMES)):
            if other != m:
                np.testing.assert_array_equal(missing.images[other], clean.images[other])
        np.testing.assert_array_equal(missing.target, clean.target)
    thermal = corrupted("thermal", "noise", 0.5)[2].images[3]
    assert ((thermal >= 0) & (thermal <= 1)).all()
    assert not thermal[clean.images[3] == 0].any()


@pytest.mark.parametrize(("kind", "level"), [("noise", 0.1), ("holes", 0.3)])
def test_what_is_drawn_follows_from_the_name_alone(kind: str, level: float) -> None:
    data = corrupted("depth", kind, level)
    first = [data[index].images[1] for index in range(5)]
    again = {index: corrupted("depth", kind, level)[index].images[1] for index in (3, 0, 4, 1, 2)}
    for batch_size, workers in ((1, 0), (3, 0), (2, 1)):
        batches = list(
            eval_loader(CorruptedSet(Scenes(("rgb", "depth")), data.corruption), batch_size, workers)
        )
        loaded = np.concatenate([batch.images[len(batch.names) :, 0].numpy() for batch in batches])
        np.testing.assert_array_equal(loaded, np.stack(first)[..., 0])
    for index in range(5):
        np.testing.assert_array_equal(again[index], first[index])
    holes = [image == 0 for image in first] if kind == "holes" else first
    assert not np.array_equal(holes[0], holes[1])  # the scenes' depth is the same
    sample = data.dataset[0]
    renamed = data.corrupted(sample._replace(name="room/1")).images[1]
    np.testing.assert_array_equal(renamed, first[1])
    # Neither have modalities or kinds the same draw.
    masks = [
        corrupted(name, "holes", 0.3)[0].images[m][..., 0] == 0 for m, name in ((1, "depth"), (3, "thermal"))
    ]
    assert (masks[0] != masks[1]).any()


def test_levels_share_their_draw() -> None:
    clean = Scenes()[0].images[1].astype(np.float64)
    small, large = (corrupted("depth", "noise", sigma)[0].images[1] - clean for sigma in (0.01, 0.03))
    np.testing.assert_allclose(large, 3 * small, atol=1e-5)
    small, large = (corrupted("depth", "holes", share)[0].images[1] == 0 for share in (0.1, 0.4))
    assert not (small & ~large).any()


def test_what_is_absent_stays_so() -> None:
    for kind, level in (("missing", None), ("blank", None), ("noise", 0.1), ("holes", 0.1), ("shift", 2)):
        data = corrupted("depth", kind, level)
        sample = data.dataset[0]._replace(absent=(1, 3))
        assert data.corrupted(sample) is sample
        if kind == "missing":
            assert data.corrupted(sample._replace(absent=(3,))).absent == (1, 3)


def shown(found: list[Corruption]) -> str:
    return " ".join(map(str, found))


def test_arguments() -> None:
    reader = Scenes(("rgb", "depth", "parts")).reader
    for text, expected in (
        ("depth=missing", "depth=missing"),
        ("depth=noise:.1", "depth=noise:0.1"),
        ("depth=shift:-3", "depth=shift:-3"),
        (
            "depth=missing,holes:0.25,rgb=noise:0.1,blank",
            "depth=missing depth=holes:0.25 rgb=noise:0.1 rgb=blank",
        ),
        (
            "rgb=noise,depth=holes",
            "rgb=noise:0.05 rgb=noise:0.1 rgb=noise:0.2 depth=holes:0.1 depth=holes:0.3 depth=holes:0.5",
        ),
        ("all=blank", "rgb=blank depth=blank parts=blank"),
    ):
        assert shown(parse(text, reader)) == expected
    levels = {"noise": (0.05, 0.1, 0.2), "holes": (0.1, 0.3, 0.5), "shift": (4, 8, 16)}
    each = [f"{kind}:{level}" for kind, chosen in levels.items() for level in chosen]
    listed = " ".join(f"depth={what}" for what in ("missing", "blank", *each))
    assert shown(parse("depth", reader)) == shown(standard(reader, "depth")) == listed
    assert shown(parse("depth,parts=shift:1", reader)) == f"{listed} parts=shift:1"
    whole = parse("all", reader)
    assert shown(whole) == shown([each for name in reader.modalities for each in parse(name, reader)])
    assert not [each for each in whole if each.modality == "parts" and each.kind == "noise"]
    kinds = [kind for kind in KINDS if kind != "missing"]
    assert shown(parse("depth", reader, kinds)) == listed.partition(" ")[2]
    left = Reader(reader.layout, reader.modalities, without=("rgb",))
    assert {each.modality for each in parse("all", left)} == {"depth", "parts"}


def test_noise_is_finer_where_rooms_lie_within_some_tenths() -> None:
    layout = Layout("own", {"depth": "d/{name}", "labels": "l/{name}"}, depth_scale=None)
    coarse = Reader(Scenes().reader.layout, ("disparity", "depth"))
    units = [spec.unit for spec in (*input_specs(Reader(layout, ("depth",))), *input_specs(coarse))]
    assert units == ["largest stored value", "1/metre", "metre"]
    assert shown(parse("depth=noise", Reader(layout, ("depth",)))).startswith(
        "depth=noise:0.01 depth=noise:0.02"
    )
    assert shown(parse("disparity=noise", coarse)).endswith("disparity=noise:0.05")
    assert shown(parse("depth=noise", coarse)).endswith("depth=noise:0.2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "dept=missing",
            r"^dept=missing: .*with the modality rgb, depth or all, got 'dept=missing'; did you mean 'depth'",
        ),
        ("noise:0.1", r"got 'noise:0\.1'"),
        ("", r"got ''"),
        (
            "depth=noize:0.1",
            r"depth=noize: unknown kind 'noize': expected one of missing, .*did you mean 'noise'",
        ),
        ("depth=missing,", r"unknown kind ''"),
        ("depth=missing:0.5", r"^depth=missing:0\.5: missing has no level; leave out the number"),
        ("depth=noise:0", r"^depth=noise:0: the level of noise must be a standard deviation above 0"),
        ("depth=noise:inf", r"must be a standard deviation above 0"),
        ("depth=noise:much", r"^depth=noise:much: expected a number after the colon, got 'much'"),
        ("depth=noise:nan", r"must be a standard deviation above 0"),
        (
            "depth=holes:30",
            r"^depth=holes:30: the level of holes must be a share of the pixels above 0, at most 1",
        ),
        ("depth=shift:1.5", r"^depth=shift:1\.5: the level of shift must be a whole number of pixels, not 0"),
        ("depth=shift:0", r"not 0"),
        ("depth=shift:inf", r"a whole number"),
    ],
)
def test_wrong_arguments_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text, Scenes(("rgb", "depth")).reader)


def test_what_a_data_set_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parts=noise:0\.1: the values of parts are categories"):
        corrupted("parts", "noise", 0.1)
    with pytest.raises(
        ValueError, match=r"unknown modality 'dep': expected one of rgb, .*did you mean 'depth'"
    ):
        corrupted("dep", "blank")
    with pytest.raises(ValueError, match="the level of noise must be"):
        Corruption("depth", "noise")
    assert corrupted("thermal", "shift", -59)[0].images[3].any()
    message = r"depth=shift:-60: room/0 is 80x60; a shift must be of fewer pixels than either side"
    with pytest.raises(DataError, match=message):
        corrupted("depth", "shift", -60)[0]
