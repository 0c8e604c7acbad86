"""Batches in an order that depends on nothing but (seed, epoch, step)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from models.data.dataset import Sample
from models.data.images import DataError, size_of
from models.data.transforms import broaden
from models.data.workers import start_worker

# Functions of samples and batches of any task; those of segmentation are the default.
Transform = Callable[[Any, np.random.Generator], Any]
Collate = Callable[[list[Any]], Any]
Key = tuple[int, int]  # epoch, index of a sample

_STEM_CHANNELS = 3  # encoders take three channels, so that ImageNet weights fit


class Movable(Protocol):
    """The part of a batch that ``on_device`` needs."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Any: ...


OnDevice = TypeVar("OnDevice", bound=Movable)


class SampleSet(Protocol):
    """The part of a data set that loaders need."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def subset(dataset: SampleSet, indices: Sequence[int]) -> SampleSet:
    """The samples at these indices, in this order."""
    return Subset(dataset, indices)  # type: ignore[arg-type]  # it uses of a Dataset what a SampleSet has


@dataclass
class Batch:
    """N samples of M modalities, stacked modality-major: rows ``m*N .. m*N+N-1`` are modality m."""

    images: Tensor  # [M*N, C, H, W] float32, channels_last
    target: Tensor  # [N, H, W] int64
    names: list[str]  # N
    kinds: tuple[str | None, ...] = ()  # M, as ``Sample.kinds``
    absent: tuple[tuple[int, ...], ...] = ()  # N, as ``Sample.absent``; empty: none is

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        images, target = (
            tensor.to(device, non_blocking=non_blocking) for tensor in (self.images, self.target)
        )
        return replace(self, images=images, target=target)

    def pin_memory(self) -> Batch:
        return replace(self, images=self.images.pin_memory(), target=self.target.pin_memory())

    def split(self, parts: int) -> list[Batch]:
        """``parts`` batches of equally many samples each, in order; the memory format stays.

        Raises:
            ValueError: N is not divisible by ``parts``.
        """
        size, rest = divmod(len(self.target), parts)
        if rest:
            raise ValueError(f"parts={parts} does not divide the {len(self.target)} samples of a batch")
        if parts == 1:
            return [self]
        modalities = self.images.split(len(self.target))
        return [
            Batch(
                torch.cat([images[start : start + size] for images in modalities]),
                self.target[start : start + size],
                self.names[start : start + size],
                self.kinds,
                self.absent[start : start + size],
            )
            for start in range(0, len(self.target), size)
        ]

    def by_presence(self, dropped: Sequence[int] = ()) -> list[tuple[tuple[int, ...] | None, Batch]]:
        """The samples that have the same modalities together: those, None for all, and a batch of them alone.

        Args:
            dropped: modalities to leave out, but of samples that have no other.
        """
        size = len(self.target)
        every = tuple(range(len(self.images) // size))
        together: dict[tuple[int, ...], list[int]] = {}
        for n, absent in enumerate(self.absent or ((),) * size):
            there = tuple(m for m in every if m not in absent)
            together.setdefault(tuple(m for m in there if m not in dropped) or there, []).append(n)
        if list(together) == [every]:
            return [(None, self)]
        modalities = self.images.split(size)
        parts: list[tuple[tuple[int, ...] | None, Batch]] = []
        for there, rows in sorted(together.items(), key=lambda item: (-len(item[0]), item[0])):
            # Slices, which torch.cat joins in their memory format.
            images = torch.cat([modalities[m][n : n + 1] for m in there for n in rows])
            target = torch.stack([self.target[n] for n in rows])
            kinds = tuple(self.kinds[m] for m in there) if self.kinds else ()
            parts.append(
                (
                    None if there == every else there,
                    Batch(images, target, [self.names[n] for n in rows], kinds),
                )
            )
        return parts


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples; channels are broadened to their least common multiple and that of 3.

    Raises:
        DataError: the samples are of different sizes.
    """
    first = samples[0]
    for sample in samples:
        if sample.target.shape != first.target.shape:
            raise DataError(
                f"{sample.name} is {size_of(sample.target)} and {first.name} {size_of(first.target)}:"
                " samples of one batch must be of one size; use batch_size=1"
            )
    rows = [broaden(sample.images, _STEM_CHANNELS) for sample in samples]  # N times M images
    shape = (len(first.images) * len(samples), rows[0][0].shape[2], *first.target.shape)
    # Convolutions hand the format on, so that the whole network runs in it: on a CPU 1.1 to 2 times as fast
    # as in contiguous_format, and pooling 14 times.
    images = torch.empty(shape, memory_format=torch.channels_last)
    for n, row in enumerate(rows):
        for m, image in enumerate(row):
            images[m * len(samples) + n] = torch.from_numpy(image).permute(2, 0, 1)
    target = torch.from_numpy(np.stack([sample.target for sample in samples]).astype(np.int64))
    absent = tuple(sample.absent for sample in samples) if any(sample.absent for sample in samples) else ()
    return Batch(images, target, [sample.name for sample in samples], first.kinds, absent)


class Loader:
    """Iterates over the batches of one epoch from one step on; made by ``train_loader`` and ``eval_loader``.

    Worker processes, if any, outlive an epoch: ``seek`` to the next one instead of making another loader.
    Iterating draws nothing from torch's global random state.
    """

    def __init__(self, batches: _Batches, schedule: _Schedule, workers: int) -> None:
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        self._schedule = schedule
        self._loader: DataLoader[Any] = DataLoader(
            batches,
            batch_size=None,  # the schedule gives whole batches
            sampler=schedule,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    @property
    def steps_per_epoch(self) -> int:
        return self._schedule.steps

    def seek(self, epoch: int, start_step: int = 0) -> None:
        """The next iteration begins at ``start_step`` of ``epoch``.

        Raises:
            ValueError: ``epoch`` is negative or ``start_step`` not in ``0 .. steps_per_epoch``.
        """
        self._schedule.seek(epoch, start_step)

    def __len__(self) -> int:
        """Batches that an iteration yields: those from the start step on."""
        return len(self._schedule)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


def on_device(batches: Iterable[OnDevice], device: torch.device) -> Iterator[OnDevice]:
    """The batches, copied to ``device``: to a GPU while it still computes what came before.

    Args:
        batches: dataclasses of tensors with a method ``to``, as ``Batch``; a ``Loader``'s are pinned.
        device: where they are wanted.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = batch.to(device, non_blocking=True)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for value in vars(copied).values():
            if isinstance(value, Tensor):
                value.record_stream(current)  # because its memory was allocated for the other stream
        yield copied


def train_loader(
    dataset: SampleSet,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    epoch: int = 0,
    start_step: int = 0,
    workers: int = 0,
    drop_last: bool = True,
    collate: Collate = collate,
    part: tuple[int, int] = (0, 1),
) -> Loader:
    """Shuffled, augmented batches of ``epoch`` from ``start_step`` on.

    The order follows from (seed, epoch) and the augmentation of a sample from (seed, epoch, its index), so
    that batches are the same with any number of workers and a resumed run goes on where it stopped.

    Args:
        dataset: for example ``SegmentationSet``.
        transform: for example ``TrainTransform``; gets the sample's own random generator.
        batch_size: samples per batch.
        seed: not negative.
        epoch, start_step: where the first iteration begins; see ``Loader.seek``.
        workers: processes that read and augment; 0 does it in this one.
        drop_last: leave out an incomplete last batch (the images left out differ from epoch to epoch).
        collate: makes a batch of samples.
        part: (i, n) gives the i-th of n equal parts of every batch, for n processes that train together.

    Raises:
        ValueError: an argument is out of range; ``dataset`` holds less than one batch; n does not divide
            ``batch_size``, or the batches may be incomplete.
    """
    schedule = _Schedule(len(dataset), batch_size, drop_last, seed, part)
    schedule.seek(epoch, start_step)
    return Loader(_Batches(dataset, transform, seed, collate), schedule, workers)


def eval_loader(
    dataset: SampleSet,
    batch_size: int = 1,
    workers: int = 0,
    *,
    transform: Transform | None = None,
    collate: Collate = collate,
) -> Loader:
    """All samples in order, unchanged but for ``transform``; those of a batch must be of one size."""
    schedule = _Schedule(len(dataset), batch_size, False, None)
    return Loader(_Batches(dataset, transform, 0, collate), schedule, workers)


class _Schedule(Sampler[list[Key]]):
    """The keys of each batch; shuffled by ``seed`` and epoch, or in order where ``seed`` is None."""

    def __init__(
        self,
        size: int,
        batch_size: int,
        drop_last: bool,
        seed: int | None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if seed is not None and seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if drop_last and size < batch_size:
            raise ValueError(f"batch_size={batch_size} is more than the {size} images of the data set")
        if batch_size % part[1] or (part[1] > 1 and not drop_last):
            raise ValueError(
                f"batch_size={batch_size} must be divisible by {part[1]}, and every batch complete, "
                f"for {part[1]} parts"
            )
        self.size, self.batch_size, self.seed, self.part = size, batch_size, seed, part
        self.steps = size // batch_size if drop_last else -(-size // batch_size)
        self.seek(0)

    def seek(self, epoch: int, start_step: int = 0) -> None:
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        if not 0 <= start_step <= self.steps:
            raise ValueError(f"start_step must be 0 to {self.steps}, the steps of an epoch, got {start_step}")
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, np.arange(self.size)
        if self.seed is not None:
            _generator(self.seed, epoch).shuffle(order)
        index, parts = self.part
        length = self.batch_size // parts
        for step in range(self.start_step, self.steps):
            begin = step * self.batch_size + index * length
            yield [(epoch, int(i)) for i in order[begin : begin + length]]


class _Batches(Dataset[Any]):
    """Keys to batches; holds no state, so that it does not matter which process does which batch."""

    def __init__(self, dataset: SampleSet, transform: Transform | None, seed: int, collate: Collate) -> None:
        self.dataset, self.transform, self.seed, self.collate = dataset, transform, seed, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, keys: list[Key]) -> Any:
        # A DataError is handed over as a value: raised in a worker, its message would drown in a traceback.
        try:
            return self.collate([self._sample(*key) for key in keys])
        except DataError as error:
            return error

    def _sample(self, epoch: int, index: int) -> Any:
        sample = self.dataset[index]
        return self.transform(sample, _generator(self.seed, epoch, index)) if self.transform else sample


def _generator(seed: int, epoch: int, index: int = -1) -> np.random.Generator:
    """Independent streams: of an epoch's order, and of each sample in it."""
    # index + 1, because numpy pads short seeds with zeros: (seed, epoch) and (seed, epoch, 0) are the same.
    return np.random.default_rng((seed, epoch, index + 1))


def _start_worker(worker: int) -> None:
    """Start as every helper does, and in a process group of its own.

    A scheduler's SIGTERM, sent to the trainer's group, must leave the worker at work; but ignoring it would
    leave a trainer that ends with a mistake waiting for the worker, which Python then ends by SIGTERM.
    """
    start_worker(worker)
    os.setpgid(0, 0)
