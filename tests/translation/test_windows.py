"""Translation of any size: reflected up to the network's multiple, in windows that fade into each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.translation.windows import OVERLAP, in_windows


class Recorder:
    """Stands in for a network of two outputs: the first image, and one that tells the images' size."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> list[Tensor]:
        self.seen.append(images)
        return [images[:1], torch.full_like(images[:1, :1], float(images.shape[-1]))]


def image(*size: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, *size)))


def test_what_fits_goes_through_as_it_is() -> None:
    run, x = Recorder(), image(32, 48)
    found = in_windows(run, x, 16, 48)
    assert run.seen == [x] or run.seen[0] is x
    assert torch.equal(found[0], x[:1])


@pytest.mark.parametrize("size", [(30, 41), (16, 17), (5, 40), (1, 3)])
def test_reflected_at_the_edges(size: tuple[int, int]) -> None:
    """As NumPy pads, with the image in the middle; also where the image is smaller than its padding."""
    run, x = Recorder(), image(*size)
    found = in_windows(run, x, 16, 64)
    missing = [-length % 16 for length in size]
    widths = [(0, 0), (0, 0), *((m // 2, m - m // 2) for m in missing)]
    (seen,) = run.seen
    np.testing.assert_array_equal(seen.numpy(), np.pad(x.numpy(), widths, mode="reflect"))
    assert torch.equal(found[0], x[:1])
    assert found[0].is_contiguous()


def test_memory_format_is_kept() -> None:
    run = Recorder()
    in_windows(run, image(30, 41).contiguous(memory_format=torch.channels_last), 16, 64)
    assert run.seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(100, 70), (48, 200), (33, 49)])
def test_windows_cover_and_add_up(size: tuple[int, int]) -> None:
    """Where windows agree, the result is what they say, in every pixel; none is larger than it may be."""
    run, x = Recorder(), image(*size)
    found = in_windows(run, x, 16, 48)
    np.testing.assert_allclose(found[0].numpy(), x[:1].numpy(), rtol=1e-12, atol=1e-12)
    assert len(run.seen) > 1
    assert all(max(seen.shape[-2:]) <= 48 for seen in run.seen)


def test_windows_fade_into_each_other() -> None:
    """Where they do not agree, the change from one to the next is spread over what they share."""
    count = 0

    def run(images: Tensor) -> list[Tensor]:
        nonlocal count
        count += 1
        return [torch.full_like(images[:1, :1], float(count - 1))]

    (found,) = in_windows(run, image(64, 96), 16, 64)
    assert count == 2
    row = found[0, 0, 30].numpy()
    assert (row[:32] == 0).all()
    assert (row[64:] == 1).all()
    assert 64 * OVERLAP == 32
    # The weights, written once more: sin² of each window's half period.
    x = np.arange(32, 64)
    first, second = (np.sin(np.pi * (x - start + 0.5) / 64) ** 2 for start in (0, 32))
    np.testing.assert_allclose(row[32:64], second / (first + second), rtol=1e-12)
    assert np.abs(np.diff(row)).max() < 0.06
