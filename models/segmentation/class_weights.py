"""Weights of the classes in the loss, given or counted in the training labels."""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from models.data import SegmentationSet, eval_loader
from models.data.images import read_label_values
from models.data.layouts import LABELS
from models.training import distributed

MEDIAN_FREQUENCY = "median_frequency"
_MAPS = 8  # that a worker counts at a time


class _Counts:
    """The label maps of a part of a set, each as ``[2, K]``: pixels of every class, and all that count where
    the class appears."""

    def __init__(self, dataset: SegmentationSet, indices: range) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        dataset = self.dataset
        path = dataset.scenes[self.indices[index]][LABELS]
        target = dataset.classes_of(path, read_label_values(path).values)
        counts = np.bincount(target.ravel(), minlength=256)
        counts[dataset.ignore_index] = 0
        pixels = counts[: dataset.num_classes]
        return torch.from_numpy(np.stack([pixels, (pixels > 0) * pixels.sum()]))


def _added(counts: list[Tensor]) -> Tensor:
    return torch.stack(counts).sum(0)


def median_frequency(pixels: NDArray[np.int64], where_present: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights by which a class counts the more the rarer it is (Eigen and Fergus, ICCV 2015, section 4.3.1).

    A class's frequency is its share of the pixels of the images that it appears in; its weight the median of
    the frequencies over its own.

    Args:
        pixels: ``[K]`` pixels of every class.
        where_present: ``[K]`` pixels that count of the images with that class.

    Returns:
        ``[K]``, 0 for classes without a pixel, which are left out of the median.
    """
    present = pixels > 0
    frequency = pixels[present] / where_present[present]
    weights = np.zeros(len(pixels))
    weights[present] = np.median(frequency) / frequency
    return weights


def count_weights(dataset: SegmentationSet, workers: int) -> tuple[Tensor, str]:
    """Read every label map of a set, each process its share, for the weights by ``median_frequency``.

    Args:
        dataset: the training images.
        workers: processes that read for this one.

    Returns:
        ``[K]`` float64 on the CPU, the same in all processes; and a line that tells how they came about.

    Raises:
        DataError: a label map is broken, or holds a label out of range.
    """
    begin = time.perf_counter()
    part = range(distributed.rank(), len(dataset), distributed.world_size())
    total = torch.zeros(2, dataset.num_classes, dtype=torch.long)
    loader = eval_loader(_Counts(dataset, part), _MAPS, workers, collate=_added)
    hidden = None if distributed.rank() == 0 else True  # None: shown on a terminal
    for counts in tqdm(loader, desc="class frequencies", leave=False, disable=hidden):
        total += counts
    weights = median_frequency(*distributed.total(total).numpy())
    seconds = time.perf_counter() - begin
    return torch.from_numpy(weights), _note(dataset, weights, seconds)


def _note(dataset: SegmentationSet, weights: NDArray[np.float64], seconds: float) -> str:
    names = dataset.class_names
    present = np.flatnonzero(weights)
    low, high = (present[choose(weights[present])] for choose in (np.argmin, np.argmax))
    note = (
        f"class weights by {MEDIAN_FREQUENCY} from {len(dataset)} label maps, counted in {seconds:.1f} s: "
        f"{weights[low]:.3g} ({names[low]}) to {weights[high]:.3g} ({names[high]})"
    )
    absent = [name for name, weight in zip(names, weights, strict=True) if weight == 0]
    return f"{note}; 0 for {', '.join(absent)}, which no pixel is of" if absent else note
