"""Real NYUDv2 images through the whole chain, where they lie beside the checkout."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NYU40,
    SegmentationSet,
    TrainTransform,
    eval_loader,
    train_loader,
)

# folder, depth scale, size, images in train and val
SETS = {
    "nyudv2_sample": (5000.0, (480, 640), {"train": 24, "val": 16}),
    "nyudv2_384": (6528.0, (288, 384), {"train": 795, "val": 654}),
}


@pytest.fixture(params=SETS)
def name(request: pytest.FixtureRequest, shared: Path) -> str:
    if not (shared / "data" / request.param).is_dir():
        pytest.skip(f"needs the real images {request.param} beside the checkout")
    return request.param


def opened(shared: Path, name: str, split: str) -> SegmentationSet:
    return SegmentationSet(shared / "data" / name, split, depth_scale=SETS[name][0])


@pytest.mark.parametrize("split", ["train", "val"])
def test_images(shared: Path, name: str, split: str) -> None:
    dataset, (_, size, counts) = opened(shared, name, split), SETS[name]
    assert len(dataset) == counts[split]
    assert dataset.class_names == NYU40
    labels, depths, colours = set(), [], []
    for index in range(0, len(dataset), 10 if len(dataset) < 100 else 40):
        (rgb, depth), target, *_ = dataset[index]
        assert (rgb.shape, depth.shape, target.shape) == ((*size, 3), (*size, 1), size)
        labels.update(np.unique(target))
        depths.append(np.median(depth))
        colours.append(rgb.mean((0, 1)))
    assert labels <= {*range(40), 255}
    assert {0, 1, 255} <= labels  # wall, floor, void
    assert 1.5 < np.mean(depths) < 4  # metres, in rooms
    assert np.abs(np.mean(colours, axis=0)).max() < 0.7  # near ImageNet's mean


def test_geometry_of_rooms(shared: Path, name: str) -> None:
    """Of what people labelled: floors lie at the ground and face up, walls stand, ceilings are above."""
    folder, scale = shared / "data" / name, SETS[name][0]
    dataset = SegmentationSet(folder, "train", modalities=("hha",), depth_scale=scale)
    found: dict[str, list[np.ndarray]] = {"floor": [], "wall": [], "ceiling": []}
    for index in range(0, len(dataset), 2 if len(dataset) < 100 else 60):
        (image,), target, *_ = dataset[index]
        encoded = 255 * (image * IMAGENET_STD + IMAGENET_MEAN)
        for kind, those in found.items():
            pixels = encoded[(target == NYU40.index(kind)) & image.any(axis=-1)]
            if len(pixels) > target.size // 50:
                those.append(np.median(pixels, axis=0))
    floor, wall, ceiling = (np.array(those) for those in found.values())
    assert min(map(len, (floor, wall, ceiling))) >= 2
    assert np.median(floor[:, 1]) < 10  # centimetres
    # Degrees + 38; the steps of measured depth tilt normals, those of the small copy are 4 cm.
    assert np.abs(np.median(floor[:, 2]) - 38) < 10
    assert np.abs(np.median(wall[:, 2]) - 128) < 6
    # The depth of ceilings is mostly filled in, and so tilted: above walls, seldom at 218.
    assert np.median(ceiling[:, 2]) > np.median(wall[:, 2]) + 5
    assert np.median(ceiling[:, 1]) > 150


def test_the_two_sets_agree(shared: Path) -> None:
    """The same scene in both resolutions: depth in metres within the 8-bit copy's error."""
    for folder in SETS:
        if not (shared / "data" / folder).is_dir():
            pytest.skip(f"needs the real images {folder} beside the checkout")
    full, small = (opened(shared, folder, "train") for folder in SETS)
    positions = {entry["labels"].stem: index for index, entry in enumerate(small.scenes)}
    for index in range(3):
        large = full[index]
        other = small[positions[large.name]]
        # Three pixels are as wide as five: these centres coincide.
        assert np.median(np.abs(large.images[1][2::5, 2::5] - other.images[1][1::3, 1::3])) < 0.03


def test_training_batches(shared: Path, name: str) -> None:
    loader = train_loader(
        opened(shared, name, "train"),
        TrainTransform(crop=512, shorter_side=256, scales=(0.75, 1.25)),  # at most 427x320: always padded
        batch_size=3,
        seed=0,
        workers=1,
    )
    batch = next(iter(loader))
    assert batch.images.shape == (2 * 3, 3, 512, 512)
    rgb, depth = batch.images.split(3)
    assert torch.isfinite(batch.images).all()
    assert -2.2 < rgb.min() < rgb.max() < 2.7
    assert 0 <= depth.min() < depth.max() < 11
    padded = (rgb == 0).all(1)  # the mean colour, which no 8-bit pixel has
    assert (padded.sum((1, 2)) > 512 * (512 - 320)).all()
    assert (depth[:, 0][padded] == 0).all()
    assert (batch.target[padded] == 255).all()
    assert (batch.target[~padded] != 255).any()


def test_evaluation_batches(shared: Path, name: str) -> None:
    dataset = opened(shared, name, "val")
    batch = next(iter(eval_loader(dataset)))
    assert batch.images.shape == (2, 3, *SETS[name][1])
    np.testing.assert_array_equal(batch.target[0], dataset[0].target)
