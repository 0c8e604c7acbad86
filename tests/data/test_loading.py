"""Batches: what is in them, and that their order follows from (seed, epoch, step) alone."""

import os
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from models.data import Batch, DataError, Sample, TrainTransform, collate, eval_loader, train_loader
from models.data.loading import Loader, on_device
from tests.helpers.paths import ROOT


class Rooms:
    """Samples made of their index; as small as can be."""

    def __init__(self, count: int, broken: int = -1, sizes: tuple[int, ...] = (8,)) -> None:
        self.count, self.broken, self.sizes = count, broken, sizes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index == self.broken:
            raise DataError(f"rgb/{index}.png: broken")
        height = self.sizes[index % len(self.sizes)]
        rng = np.random.default_rng(index)
        images = tuple(rng.normal(size=(height, 6, c)).astype(np.float32) for c in (3, 1))
        return Sample(images, rng.integers(0, 9, (height, 6), np.uint8), str(index), ("rgb", "depth"))


TRANSFORM = TrainTransform(crop=7, shorter_side=7)


def training(rooms: Rooms | None = None, **options) -> Loader:
    return train_loader(rooms or Rooms(11), TRANSFORM, **{"batch_size": 3, "seed": 5, **options})


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        x.names == y.names and torch.equal(x.images, y.images) and torch.equal(x.target, y.target)
        for x, y in zip(a, b, strict=True)
    )


def test_parts_of_batches_make_up_the_batches() -> None:
    """Of processes that each get one, from any step on, and of a batch that is computed in parts."""
    whole = list(training(batch_size=4, start_step=1))
    first, second = (list(training(batch_size=4, start_step=1, part=(i, 2))) for i in range(2))
    assert same(first, [batch.split(2)[0] for batch in whole])
    assert same(second, [batch.split(2)[1] for batch in whole])
    for batch in whole:
        halves = batch.split(2)
        assert [name for half in halves for name in half.names] == batch.names
        assert torch.equal(torch.cat([half.target for half in halves]), batch.target)
        for half, rows in zip(halves, ([0, 1, 4, 5], [2, 3, 6, 7]), strict=True):
            assert torch.equal(half.images, batch.images[rows])
            assert half.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.split(1) == [batch]
        with pytest.raises(ValueError, match="parts=3 does not divide the 4 samples"):
            batch.split(3)


@pytest.mark.parametrize("options", [{"batch_size": 5, "part": (0, 2)}, {"drop_last": False, "part": (0, 3)}])
def test_parts_that_do_not_divide_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"batch_size=\d must be divisible by \d, and every batch complete"):
        training(**options)


def test_batches_on_a_device_are_those_of_the_loader() -> None:
    assert same(list(on_device(training(), torch.device("cpu"))), list(training()))
    moved = next(iter(on_device(training(), torch.device("meta"))))
    assert moved.images.device.type == moved.target.device.type == "meta"


def test_collate() -> None:
    samples = [Rooms(3)[index] for index in range(3)]
    batch = collate(samples)
    assert (batch.images.shape, batch.images.dtype) == ((2 * 3, 3, 8, 6), torch.float32)
    assert (batch.target.dtype, batch.names) == (torch.int64, ["0", "1", "2"])
    for n, sample in enumerate(samples):
        np.testing.assert_array_equal(batch.images[n].permute(1, 2, 0), sample.images[0])
        for channel in range(3):
            np.testing.assert_array_equal(batch.images[3 + n, channel], sample.images[1][:, :, 0])
        np.testing.assert_array_equal(batch.target[n], sample.target)


def test_single_depth_is_three_channels_wide() -> None:
    sample = Rooms(1)[0]
    batch = collate([sample._replace(images=sample.images[1:], modalities=("depth",))])
    assert batch.images.shape == (1, 3, 8, 6)
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])


def test_collate_needs_one_size() -> None:
    with pytest.raises(DataError, match=r"1 is 6x9 and 0 6x8: .*batch_size=1"):
        collate([Rooms(2, sizes=(8, 9))[index] for index in range(2)])


def test_to() -> None:
    batch = collate([Rooms(1)[0]])
    moved = batch.to("meta")
    assert (moved.images.device.type, moved.target.device.type, moved.names) == ("meta", "meta", ["0"])
    assert batch.images.device.type == "cpu"


def test_every_sample_once_an_epoch_in_a_new_order() -> None:
    loader = training(batch_size=2, drop_last=False)
    orders = []
    for epoch in range(3):
        loader.seek(epoch)
        batches = list(loader)
        assert [len(batch.names) for batch in batches] == [2, 2, 2, 2, 2, 1]
        orders.append([name for batch in batches for name in batch.names])
        assert sorted(orders[-1], key=int) == [str(index) for index in range(11)]
    assert len({tuple(order) for order in orders}) == 3


def test_drop_last() -> None:
    loader = training()
    assert (loader.steps_per_epoch, len(loader), len(list(loader))) == (3, 3, 3)
    loader = training(drop_last=False)
    assert (loader.steps_per_epoch, len(list(loader))) == (4, 4)


def test_augmentation_differs_between_samples_and_epochs_but_not_between_visits() -> None:
    """Three copies of one image: their crops differ, and differ again in the next epoch."""

    class Copies(Rooms):
        def __getitem__(self, index: int) -> Sample:
            return super().__getitem__(0)._replace(name=str(index))

    loader = training(Copies(3))
    crops = []
    for epoch in (0, 1, 0):
        loader.seek(epoch)
        batch = next(iter(loader))
        order = np.argsort(batch.names)
        crops.append(batch.images[:3][order])
    assert not any(torch.equal(crops[0][i], crops[0][j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert not any(torch.equal(crops[0][i], crops[1][i]) for i in range(3))
    assert torch.equal(crops[0], crops[2])


def test_seed_decides() -> None:
    assert same(list(training()), list(training()))
    assert not same(list(training()), list(training(seed=6)))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    """Persistent workers go on through epochs, also after an iteration that was given up."""
    alone, shared = training(), training(workers=workers)
    for epoch in range(2):
        alone.seek(epoch)
        shared.seek(epoch)
        assert same(list(alone), list(shared))
    next(iter(shared))
    alone.seek(4, 1)
    shared.seek(4, 1)
    assert same(list(alone), list(shared))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_at_any_step(workers: int) -> None:
    whole = list(training(epoch=2))
    for step in range(4):
        loader = training(epoch=2, start_step=step, workers=workers)
        assert len(loader) == 3 - step
        assert same(list(loader), whole[step:])


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_states_are_left_alone(workers: int) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(training(workers=workers))
    list(eval_loader(Rooms(3), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 2])
def test_data_error_keeps_its_message(workers: int) -> None:
    with pytest.raises(DataError, match=r"^rgb/4\.png: broken$"):
        list(training(Rooms(6, broken=4), workers=workers))


def test_workers_survive_ctrl_c() -> None:
    """A terminal sends Ctrl-C to the whole process group; only the trainer is to act on it."""

    class Interrupting(Rooms):
        def __getitem__(self, index: int) -> Sample:
            os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    assert same(list(training(Interrupting(6), workers=1)), list(training(Rooms(6))))


def test_a_process_whose_data_is_broken_ends() -> None:
    """Also where the error's traceback keeps the loader, and so its workers, alive until the end."""
    script = """
import sys
from tests.data.test_loading import Rooms, training
from models.data import DataError

loader = training(Rooms(6, broken=4), workers=1)
try:
    list(loader)
except DataError as error:
    kept = error
sys.exit(3)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert ended.returncode == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_shows_everything_in_order_unchanged(workers: int) -> None:
    rooms = Rooms(5, sizes=(8, 9))
    loader = eval_loader(rooms, workers=workers)
    assert len(loader) == 5
    for _ in range(2):
        for index, batch in enumerate(loader):
            assert batch.names == [str(index)]
            np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0), rooms[index].images[0])
            np.testing.assert_array_equal(batch.target[0], rooms[index].target)
        assert index == 4


def test_evaluation_in_batches() -> None:
    assert [batch.names for batch in eval_loader(Rooms(5), batch_size=2)] == [["0", "1"], ["2", "3"], ["4"]]
    with pytest.raises(DataError, match="batch_size=1"):
        list(eval_loader(Rooms(5, sizes=(8, 9)), batch_size=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"batch_size": 12}, "batch_size=12 is more than the 11 images"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"epoch": -1}, "epoch must not be negative, got -1"),
        ({"start_step": 4}, "start_step must be 0 to 3, the steps of an epoch, got 4"),
        ({"workers": -1}, "workers must not be negative, got -1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training(**options)
