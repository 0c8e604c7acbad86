"""Taskonomy's layout, encodings and splits; augmentation and batches of translation."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models.data import (
    DOMAINS,
    DataError,
    Jitter,
    Square,
    TranslationSample,
    TranslationSet,
    collate_translation,
    eval_loader,
    train_loader,
)
from tests.helpers.trees import write

SIZE = (20, 24)
INPUTS, TARGET = ("normal", "depth_zbuffer"), "rgb"


def stored(domain: str, seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    rng = np.random.default_rng((sum(domain.encode()), seed))
    if DOMAINS[domain].bits == 16:
        return rng.integers(0, 2**16, size, np.uint16)
    return rng.integers(0, 256, (*size, 3), np.uint8)


def tree(root: Path, points: int = 12, views: int = 2, place: str = "{domain}") -> Path:
    for point in range(points):
        for view in range(views):
            for domain in (*INPUTS, TARGET, "edge_texture"):
                name = f"point_{point}_view_{view}_domain_{domain}.png"
                write(root / place.format(domain=domain) / name, stored(domain, 10 * point + view))
    return root


def opened(root: Path, split: str = "train", **options) -> TranslationSet:
    return TranslationSet(root, split, **{"domains": INPUTS, "target": TARGET, **options})


@pytest.mark.parametrize(
    ("domain", "value", "encoded"),
    [
        ("rgb", 0, 0),
        ("reshading", 200, 200),
        ("principal_curvature", 127, 127),
        ("segment_unsup2d", 31, 31),
        ("depth_zbuffer", 0, 0),
        ("depth_zbuffer", 512, math.log(513) * 255 / 11.1),  # one metre
        ("depth_euclidean", 65535, math.log(65536) * 255 / 11.1),  # missing
        ("edge_texture", 11355, 255),
        ("edge_texture", 1000, 1000 * 255 / 11355),
        ("edge_texture", 60000, 255),
        ("edge_occlusion", 5792, 127.5),
        ("edge_occlusion", 12000, 255),
    ],
)
def test_encodings(domain: str, value: int, encoded: float) -> None:
    kind = np.uint16 if DOMAINS[domain].bits == 16 else np.uint8
    found = DOMAINS[domain].encode(np.full((2, 2, 1), value, kind))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, encoded / 127.5 - 1, atol=2e-6)


@pytest.mark.parametrize("domain", DOMAINS)
def test_decoding(domain: str) -> None:
    """Stored values come back, but for edges beyond what is encoded."""
    largest = {"edge_texture": 11355, "edge_occlusion": 11584}.get(domain, 2 ** DOMAINS[domain].bits - 1)
    values = np.arange(0, largest + 1, max(1, largest // 4000))
    kind = np.uint16 if DOMAINS[domain].bits == 16 else np.uint8
    found = DOMAINS[domain].decode(torch.from_numpy(DOMAINS[domain].encode(values.astype(kind))))
    np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-3)


def test_pictures(tmp_path: Path) -> None:
    """Red first; a single channel stays one."""
    for domain, image in (("rgb", stored("rgb", 0)), ("reshading", stored("rgb", 1)[:, :, 0])):
        write(tmp_path / "a.png", image)
        found = DOMAINS[domain].read(tmp_path / "a.png")
        np.testing.assert_allclose(found, image.reshape(*SIZE, -1) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("domain", "image", "message"),
    [
        (
            "rgb",
            stored("depth_zbuffer", 0),
            "expected rgb of 8 bits and 1 or 3 channels, found 16 bits and 1",
        ),
        (
            "depth_zbuffer",
            stored("rgb", 0),
            "expected depth_zbuffer of 16 bits and 1 channel, found 8 bits and 3",
        ),
        ("edge_texture", stored("rgb", 0)[:, :, 0], "of 16 bits and 1 channel, found 8 bits and 1 channel"),
        ("normal", np.zeros((*SIZE, 4), np.uint8), "1 or 3 channels, found 8 bits and 4 channels"),
    ],
)
def test_what_is_no_picture_of_the_domain(
    tmp_path: Path, domain: str, image: np.ndarray, message: str
) -> None:
    assert cv2.imwrite(str(tmp_path / "a.png"), image)
    with pytest.raises(DataError, match=rf"a\.png: .*{message}"):
        DOMAINS[domain].read(tmp_path / "a.png")


@pytest.mark.parametrize("place", ["{domain}", "{domain}/tiny/cauthron", "cauthron/{domain}", "a/b/{domain}"])
def test_layouts(tmp_path: Path, place: str) -> None:
    """Folders of buildings may lie above and below those of domains."""
    dataset = opened(tree(tmp_path, place=place))
    building = "_".join(part for part in place.split("/") if part != "{domain}")
    prefix = building + "_" if building else ""
    sample = dataset[0]
    _, point, _, view = sample.name.removeprefix(prefix).split("_")
    seed = 10 * int(point) + int(view)
    for image, domain in zip((*sample.images, sample.target), (*INPUTS, TARGET), strict=True):
        expected = DOMAINS[domain].encode(stored(domain, seed).reshape(*SIZE, -1))
        np.testing.assert_array_equal(image, expected)
    assert [domain.name for domain in sample.domains] == [*INPUTS, TARGET]
    assert sample.name.startswith(prefix + "point_")


def test_split_by_names(tmp_path: Path) -> None:
    """Complete, disjoint, a point's views together, and told from its name alone."""
    root = tree(tmp_path, points=30)
    names = {split: [view.name for view in opened(root, split)._views] for split in ("train", "val")}
    expected = {f"point_{point}_view_{view}" for point in range(30) for view in range(2)}
    assert set(names["train"]) | set(names["val"]) == expected
    assert len(names["train"]) + len(names["val"]) == 60
    validated = {point for point in range(30) if zlib.crc32(f"point_{point}".encode()) % 3 == 0}
    assert {int(name.split("_")[1]) for name in names["val"]} == validated
    assert 6 <= len(validated) <= 14
    assert names["val"] == sorted(names["val"])
    buildings = tree(tmp_path / "more", points=30, place="{domain}/building")
    assert {view.name for view in opened(buildings, "val")._views} != {f"building_{n}" for n in names["val"]}


def test_lists(tmp_path: Path) -> None:
    root = tree(tmp_path, points=3)
    line = "{{domain}}/point_{}_view_{}_domain_{{domain}}.png\n"
    (root / "train_domain.txt").write_text(line.format(2, 1) + line.format(0, 0))
    (root / "val_domain.txt").write_text(line.format(1, 0))
    names = [[view.name for view in opened(root, split)._views] for split in ("train", "val")]
    assert names == [["point_2_view_1", "point_0_view_0"], ["point_1_view_0"]]
    (root / "mine.txt").write_text("\n" + line.format(1, 1))
    chosen = opened(root, lists=("mine.txt", "val_domain.txt"))
    assert [view.name for view in chosen._views] == ["point_1_view_1"]
    np.testing.assert_array_equal(chosen[0].target, DOMAINS["rgb"].encode(stored("rgb", 11)))


def test_missing_files_are_named_at_once(tmp_path: Path) -> None:
    root = tree(tmp_path, points=6)
    for view in opened(root)._views[:2]:
        view.path(root, "normal").unlink()
    name = rf"normal/{opened(root, domains=('depth_zbuffer',))._views[0].name}_domain_normal\.png"
    with pytest.raises(
        DataError,
        match=rf"{name}: no such file, but point_\w+ is to have normal, depth_zbuffer, rgb \(and 1 more",
    ):
        opened(root)
    with pytest.raises(DataError, match=r"reshading/point_\w+\.png: no such file"):
        opened(root, domains=("reshading",))


def test_wrong_lists(tmp_path: Path) -> None:
    root = tree(tmp_path, points=2)
    (root / "val.txt").write_text("rgb/point_0_view_0_domain_rgb.png\n")
    with pytest.raises(
        DataError,
        match=r"val\.txt, line 1: expected a path such as \{domain\}/point_0_view_0_domain_\{domain\}\.png",
    ):
        opened(root, "val")
    with pytest.raises(DataError, match=r"train\.txt: cannot be read as a list"):
        opened(root)
    (root / "train.txt").write_text("\n")
    with pytest.raises(DataError, match=r"train\.txt: the list is empty"):
        opened(root)
    (root / "train.txt").write_text("{domain}/point_7_view_0_domain_{domain}.png")
    with pytest.raises(DataError, match=r"normal/point_7_view_0_domain_normal\.png: no such file"):
        opened(root)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        opened(tmp_path / "nowhere")
    with pytest.raises(
        DataError, match=r"neither lists \(train\.txt, train_domain\.txt\) nor a file named like rgb/point_0"
    ):
        opened(tmp_path)
    tree(tmp_path, points=1)
    empty = "train" if zlib.crc32(b"point_0") % 3 == 0 else "val"
    with pytest.raises(DataError, match="too few points for a split by names; give train and val"):
        opened(tmp_path, empty)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": ("normals",)}, "unknown domain 'normals': expected rgb, .*; did you mean 'normal'"),
        ({"domains": ()}, "domains is empty"),
        ({"domains": ("rgb",)}, "domains and target must differ, got rgb and rgb"),
        ({"domains": ("normal", "normal")}, "domains and target must differ, got normal,normal and rgb"),
        ({"split": "test"}, "split must be train or val, got 'test'"),
        ({"lists": ("a.txt",)}, "lists must be two paths"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(tree(tmp_path, points=3), **{"split": "train", **options})


def test_broken_and_other_sized_files(tmp_path: Path) -> None:
    root = tree(tmp_path, points=6)
    dataset = opened(root)
    path = dataset._views[0].path(root, "normal")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{path.name}: broken or truncated"):
        dataset[0]
    write(path, stored("normal", 0, (20, 25)))
    with pytest.raises(DataError, match=rf"{path.name} is 25x20, but \S+_domain_rgb\.png is 24x20"):
        dataset[0]
    loader = train_loader(
        dataset, Jitter(16, 16), batch_size=len(dataset), seed=0, collate=collate_translation, workers=1
    )
    with pytest.raises(DataError, match=r"is 25x20, but"):
        next(iter(loader))


def located(height: int, width: int) -> TranslationSample:
    """Pictures whose values say where they come from: column, row, and both in a number."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    place = np.stack([columns / width * 2 - 1, rows / height * 2 - 1, np.zeros_like(rows)], -1)
    number = (rows * width + columns)[:, :, None] / (height * width) * 2 - 1
    domains = tuple(DOMAINS[name] for name in ("normal", "segment_unsup2d", "rgb"))
    return TranslationSample((place, number), place.copy(), "located", domains)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (90, 33)])
def test_jitter_is_the_same_for_all_domains(size: tuple[int, int]) -> None:
    sample, jitter = located(*size), Jitter(resize=40, crop=32)
    seen = set()
    for seed in range(24):
        result = jitter(sample, np.random.default_rng(seed))
        (normal, number), target = result.images, result.target
        assert (normal.shape, number.shape, target.shape) == ((32, 32, 3), (32, 32, 1), (32, 32, 3))
        index = np.rint((number[:, :, 0] + 1) / 2 * size[0] * size[1]).astype(int)
        row, column = np.divmod(index, size[1])
        # Where segments, never mixed, come from, colours do: to within a pixel of the smaller picture.
        pixel = min(size) / 40
        np.testing.assert_allclose((target[:, :, 0] + 1) / 2 * size[1], column, atol=pixel + 0.01)
        np.testing.assert_allclose((target[:, :, 1] + 1) / 2 * size[0], row, atol=pixel + 0.01)
        mirrored = bool(target[0, 0, 0] > target[0, -1, 0])
        np.testing.assert_array_equal(normal[:, :, 0], -target[:, :, 0] if mirrored else target[:, :, 0])
        np.testing.assert_array_equal(normal[:, :, 1:], target[:, :, 1:])
        seen.add((mirrored, round(float(row[0, 0]) / pixel)))
    assert {mirrored for mirrored, _ in seen} == {False, True}
    assert len({row for _, row in seen}) > 4


def test_jitter_written_out() -> None:
    """The paper's numbers, with the same draws in the same order. No pixel's centre falls between two."""
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (429, 429, 1)).astype(np.float32)
    domains = (DOMAINS["depth_zbuffer"], DOMAINS["reshading"])
    for seed in range(3):
        result = Jitter()(TranslationSample((image,), image, "a", domains), np.random.default_rng(seed))
        draws = np.random.default_rng(seed)
        top, left, mirror = int(draws.integers(31)), int(draws.integers(31)), draws.random() < 0.5
        nearest = (2 * np.arange(286) + 1) * 429 // (2 * 286)
        averaged = cv2.resize(image, (286, 286), interpolation=cv2.INTER_AREA)
        for found, whole in (
            (result.images[0], image[nearest][:, nearest, 0]),
            (result.target, averaged),
        ):
            expected = whole[top : top + 256, left : left + 256]
            np.testing.assert_array_equal(found[:, :, 0], expected[:, ::-1] if mirror else expected)


def test_without_mirror() -> None:
    for seed in range(8):
        target = Jitter(40, 32, mirror=False)(located(64, 64), np.random.default_rng(seed)).target
        assert target[0, 0, 0] < target[0, -1, 0]


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (90, 33), (20, 16)])
def test_square(size: tuple[int, int]) -> None:
    """The middle, not mirrored; of a square picture all of it."""
    result = Square(32)(located(*size))
    assert [image.shape for image in (*result.images, result.target)] == [
        (32, 32, 3),
        (32, 32, 1),
        (32, 32, 3),
    ]
    for axis, length in ((0, size[1]), (1, size[0])):
        line = result.target[16, :, 0] if axis == 0 else result.target[:, 16, 1]
        centre = (line.mean() + 1) / 2 * length + 0.5
        assert abs(centre - length / 2) < 0.6 * min(size) / 32
        assert np.all(np.diff(line) >= 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Jitter(200, 256), "crop must be from 1 to resize=200, got 256"),
        (lambda: Jitter(200, 0), "crop must be from 1"),
        (lambda: Square(0), "size must be positive, got 0"),
    ],
)
def test_wrong_sizes(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_batches(tmp_path: Path) -> None:
    dataset = opened(tree(tmp_path))
    samples = [Square(16)(dataset[index]) for index in range(3)]
    batch = collate_translation(samples)
    assert (batch.images.shape, batch.target.shape) == ((2 * 3, 3, 16, 16), (3, 3, 16, 16))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for n, sample in enumerate(samples):
        np.testing.assert_array_equal(batch.images[n].permute(1, 2, 0), sample.images[0])
        for channel in range(3):
            np.testing.assert_array_equal(batch.images[3 + n, channel], sample.images[1][:, :, 0])
        np.testing.assert_array_equal(batch.target[n].permute(1, 2, 0), sample.target)
    assert batch.names == [sample.name for sample in samples]
    moved = batch.to("meta")
    assert (moved.images.device.type, moved.target.device.type, moved.names) == ("meta", "meta", batch.names)
    assert -1 <= batch.images.min() < -0.8 < 0.8 < batch.images.max() <= 1


def test_batches_of_one_size() -> None:
    samples = [Square(size)(located(64, 64)) for size in (16, 17)]
    with pytest.raises(DataError, match="located is 17x17 and located 16x16: samples of one batch must be"):
        collate_translation(samples)


def test_a_single_channel_as_target(tmp_path: Path) -> None:
    dataset = opened(tree(tmp_path, points=4), domains=("rgb",), target="depth_zbuffer")
    batch = next(iter(eval_loader(dataset, 2, transform=Square(16), collate=collate_translation)))
    assert (batch.images.shape, batch.target.shape) == ((2, 3, 16, 16), (2, 3, 16, 16))
    assert torch.equal(batch.target[:, 0], batch.target[:, 2])


def test_order_and_augmentation_follow_from_the_seed_alone(tmp_path: Path) -> None:
    dataset = opened(tree(tmp_path))

    def epoch(**options) -> list[tuple[list[str], torch.Tensor]]:
        loader = train_loader(
            dataset, Jitter(18, 16), batch_size=2, collate=collate_translation, **{"seed": 1, **options}
        )
        return [(batch.names, batch.images) for batch in loader]

    whole = epoch(epoch=3)
    for same in (epoch(epoch=3, workers=2), [*whole[:2], *epoch(epoch=3, start_step=2)]):
        assert [names for names, _ in same] == [names for names, _ in whole]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(same, whole, strict=True))
    assert [names for names, _ in epoch(epoch=4)] != [names for names, _ in whole]
    assert [names for names, _ in epoch(epoch=3, seed=2)] != [names for names, _ in whole]
