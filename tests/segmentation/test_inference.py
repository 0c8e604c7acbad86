"""Several sizes, mirrored, through windows: against formulas, with networks whose answer is known."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import models
import tests.helpers.small_xception  # noqa: F401 - registers its encoder
from models.segmentation import SegmentationOutput
from models.segmentation.inference import mirrored, places, predict_labels, resized, scores
from models.segmentation.settings import DataSettings, EvalSettings, SegmentationRecipe
from models.training.settings import RunSettings
from tests.helpers.networks import randomise_norms

M, N, K = 2, 2, 4
SIZE = (21, 34)
RGB_DEPTH = ("rgb", "depth")
WEIGHTS = torch.tensor([0.7, 0.3], dtype=torch.float64)


class Known(nn.Module):
    """Logits by a formula of the stacked images; it keeps the shapes that it was given."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits = logits
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> SegmentationOutput:
        self.shapes.append(tuple(x.shape))
        branches = self.logits(x).unflatten(0, (M, -1))
        ensemble = (WEIGHTS[:, None, None, None, None].to(branches) * branches).sum(0)
        return SegmentationOutput(branches, ensemble, WEIGHTS)


def convolution(side: int = 1, stride: int = 1) -> Known:
    weight = torch.randn(K, 3, side, side, dtype=torch.float64)
    return Known(lambda x: F.conv2d(x, weight, stride=stride, padding=side // 2))


def images(size: tuple[int, int] = SIZE) -> Tensor:
    """In the format that networks are run in, so that the same sums are rounded the same."""
    return torch.randn(M * N, 3, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


def recipe(
    modalities: Sequence[str] = RGB_DEPTH, precision: str = "fp32", **settings: object
) -> SegmentationRecipe:
    settings = {"interpolation": "bilinear", **settings}
    data, run = DataSettings(modalities=tuple(modalities)), RunSettings(precision=precision)
    return SegmentationRecipe(data=data, eval=EvalSettings(**settings), run=run)


def found(net: nn.Module, x: Tensor, modalities: Sequence[str] = RGB_DEPTH, **settings: object) -> Tensor:
    """``[M+1, N, K, H, W]``"""
    return torch.stack(list(scores(net, x, SIZE, recipe(modalities, **settings))))


def plain(net: nn.Module, x: Tensor, size: Sequence[int] = SIZE, interpolation: str = "bilinear") -> Tensor:
    output = net(x)
    return torch.stack(
        [
            F.interpolate(logits, tuple(size), mode=interpolation, align_corners=False)
            for logits in (*output.branches, output.ensemble)
        ]
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_single_look(interpolation: str) -> None:
    net, x = convolution(3, stride=4), images()
    expected = plain(net, x, interpolation=interpolation)
    torch.testing.assert_close(found(net, x, interpolation=interpolation), expected, rtol=0, atol=0)
    labels = predict_labels(net, x, SIZE, recipe(interpolation=interpolation))
    assert torch.equal(torch.stack(labels), expected.argmax(2))


@pytest.mark.parametrize("stride", [1, 4])
def test_mirrored_is_the_mean_with_the_mirrored_look(stride: int) -> None:
    net, x = convolution(3, stride), images()
    expected = (plain(net, x) + plain(net, x.flip(-1)).flip(-1)) / 2
    torch.testing.assert_close(found(net, x, flip=True), expected)
    assert (expected - plain(net, x)).abs().max() > 0.1


def test_mirrored_changes_nothing_where_left_and_right_are_alike() -> None:
    net, x = convolution(1), images()
    torch.testing.assert_close(found(net, x, flip=True), plain(net, x), rtol=0, atol=1e-14)


def test_mirrored_normals_point_the_other_way() -> None:
    """As training mirrors them: then a network's answer, mirrored back, is the one for the scene itself."""
    x = torch.randn(M, N, 3, *SIZE)
    rgb, normals = mirrored(x, ("rgb", "normals"))
    assert torch.equal(mirrored(x, ("rgb", "points")), x.flip(-1))
    assert torch.equal(rgb, x[0].flip(-1))
    assert torch.equal(normals[:, 0], -x[1, :, 0].flip(-1))
    assert torch.equal(normals[:, 1:], x[1, :, 1:].flip(-1))
    net = Known(lambda images: images[:, :1].square().repeat(1, K, 1, 1))
    y = x.double().flatten(0, 1)
    torch.testing.assert_close(found(net, y, ("rgb", "normals"), flip=True), found(net, y))
    across = Known(lambda images: images[:, :1].repeat(1, K, 1, 1))
    assert found(across, y, ("rgb", "normals"), flip=True)[1].abs().max() < 1e-14
    torch.testing.assert_close(found(across, y, ("normals", "rgb"), flip=True)[1], found(across, y)[1])


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.0, 1.7])
def test_inputs_are_resized_as_in_training(scale: float) -> None:
    size = tuple(max(1, round(side * scale)) for side in SIZE)
    x = torch.rand(5, 1, 3, *SIZE)
    modalities = ("rgb", "depth", "hha", "normals", "points")
    for image, modality, small in zip(x, modalities, resized(x, scale, modalities), strict=True):
        how = cv2.INTER_LINEAR if modality == "rgb" else cv2.INTER_NEAREST_EXACT
        expected = cv2.resize(image[0].numpy().transpose(1, 2, 0), size[::-1], interpolation=how)
        np.testing.assert_allclose(small[0].numpy().transpose(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_sizes_are_averaged(flip: bool) -> None:
    net, x = convolution(3, stride=2), images()
    scales = (0.5, 1.0, 1.75)
    expected = torch.zeros(M + 1, N, K, *SIZE, dtype=torch.float64)
    for scale in scales:
        scaled = resized(x.unflatten(0, (M, N)), scale, RGB_DEPTH).flatten(0, 1)
        expected += plain(net, scaled) / len(scales)
        if flip:
            expected += (plain(net, scaled.flip(-1)).flip(-1) - plain(net, scaled)) / 2 / len(scales)
    torch.testing.assert_close(found(net, x, scales=scales, flip=flip), expected)


@given(
    length=st.integers(1, 300),
    side=st.integers(1, 120),
    overlap=st.floats(0, 1, exclude_max=True),
)
def test_windows_cover_every_pixel_and_lie_within(length: int, side: int, overlap: float) -> None:
    spans = [rows for rows, _ in places((length, 1), side, overlap)]
    assert (spans[0].start, spans[-1].stop) == (0, length)
    assert {span.stop - span.start for span in spans} == {min(side, length)}
    for one, other in pairwise(spans):
        assert one.start < other.start
        assert other.start - one.start <= max(1, int(side * (1 - overlap)))
    if overlap == 0 and length % side == 0:
        assert len(spans) == length // side


def test_windows_of_both_directions() -> None:
    assert places((8, 12), 8, 0.5) == [
        (slice(0, 8), slice(0, 8)),
        (slice(0, 8), slice(4, 12)),
    ]
    assert places((8, 12), None, 0.5) == places((8, 12), 12, 0.5) == [(slice(0, 8), slice(0, 12))]


def test_the_whole_image_as_window_is_a_single_look() -> None:
    net, x = convolution(3, stride=4), images()
    for window in (34, 500):
        assert torch.equal(found(net, x, window=window), plain(net, x))


@pytest.mark.parametrize(("stride", "flip", "batch_size"), [(1, False, 1), (4, False, 6), (4, True, 3)])
def test_overlapping_windows_are_averaged(stride: int, flip: bool, batch_size: int) -> None:
    """In a larger size, each pixel the mean of all windows that hold it; brought back to the labels' size."""
    weight = torch.randn(K, 3, 3, 3, dtype=torch.float64)
    net = Known(
        lambda x: F.conv2d(x, weight, stride=stride, padding=1) + torch.arange(-(-x.shape[-1] // stride))
    )
    x = images()
    size = (42, 68)  # twice
    twice = resized(x.unflatten(0, (M, N)), 2, RGB_DEPTH).flatten(0, 1)
    sums = torch.zeros(M + 1, N, K, *size, dtype=torch.float64)
    counts = torch.zeros(size, dtype=torch.float64)
    for top in (0, 10):
        for left in (0, 18, 36):
            part = (..., slice(top, top + 32), slice(left, left + 32))
            look = plain(net, twice[part], (32, 32))
            if flip:
                look = (look + plain(net, twice[part].flip(-1), (32, 32)).flip(-1)) / 2
            sums[part] += look
            counts[part] += 1
    assert counts.min() == 1
    mean = (sums / counts).flatten(0, 1)
    expected = F.interpolate(mean, SIZE, mode="bilinear", align_corners=False).unflatten(0, (M + 1, N))
    settings = {"scales": (2.0,), "window": 32, "overlap": 0.4, "flip": flip, "batch_size": batch_size}
    net.shapes.clear()
    torch.testing.assert_close(found(net, x, **settings), expected)
    assert {shape[-2:] for shape in net.shapes} == {(32, 32)}
    assert max(shape[0] // M for shape in net.shapes) == max(N, batch_size // N * N)


def test_windows_change_nothing_where_pixels_are_seen_alone() -> None:
    net, x = convolution(1), images((64, 80))
    expected = plain(net, x)
    torch.testing.assert_close(found(net, x, window=32, overlap=0.3), expected)
    torch.testing.assert_close(found(net, x, window=32, overlap=0.0), expected)


def test_the_ensemble_of_the_means_is_the_mean_of_the_ensembles() -> None:
    net, x = convolution(3, stride=2), images((50, 60))
    *branches, ensemble = found(net, x, scales=(0.8, 1.3), flip=True, window=32)
    torch.testing.assert_close(ensemble, WEIGHTS[0] * branches[0] + WEIGHTS[1] * branches[1])


def test_logits_of_autocast_are_averaged_in_float32() -> None:
    weight = torch.randn(K, 3, 1, 1)
    net, x = Known(lambda x: F.conv2d(x, weight)), images().float()
    result = found(net, x, precision="bf16", scales=(1.0, 1.5), flip=True)
    assert result.dtype == torch.float32
    exact = found(net, x, scales=(1.0, 1.5), flip=True)
    error = (result - exact).abs()
    assert error.max() > 0  # the network's own
    assert error.max() < 2**-6 * exact.abs().max()
    assert not torch.equal(result, result.bfloat16().float())


@pytest.mark.parametrize("builder", [models.refinenet, models.pspnet, models.deeplabv3plus])
def test_real_networks_at_awkward_sizes(builder: Callable[..., nn.Module]) -> None:
    """Sides that no stride divides, against every look taken by hand."""
    net = builder("resnet18", K, M, width=8, dropout=0.0).double().eval()
    randomise_norms(net)
    x = torch.randn(M, 3, 67, 91, dtype=torch.float64)
    expected = torch.zeros(M + 1, 1, K, 67, 91, dtype=torch.float64)
    with torch.no_grad():
        for scale in (0.6, 1.3):
            scaled = resized(x.unflatten(0, (M, 1)), scale, RGB_DEPTH).flatten(0, 1)
            for look in (scaled, scaled.flip(-1)):
                logits = plain(net, look, (67, 91), "bicubic")
                expected += (logits.flip(-1) if look is not scaled else logits) / 4
    looks = {"scales": (0.6, 1.3), "flip": True, "interpolation": "bicubic"}
    result = torch.stack(list(scores(net, x, (67, 91), recipe(**looks))))
    assert expected.std() > 1e-3
    torch.testing.assert_close(result, expected)
    windows = recipe(**looks, window=48, batch_size=4)
    assert all(score.isfinite().all() for score in scores(net, x, (67, 91), windows))


def test_windows_of_deeplabv3plus_by_hand() -> None:
    """Its image pooling sees a window alone; in two sizes, each pixel is the mean of all windows with it."""
    net = models.deeplabv3plus("small_xception", K, M, width=8, dropout=0.0).double().eval()
    randomise_norms(net)
    size, doubled = (24, 35), (48, 70)
    x = torch.randn(M, 3, *size, dtype=torch.float64)
    large = resized(x.unflatten(0, (M, 1)), 2, RGB_DEPTH).flatten(0, 1)
    sums = torch.zeros(M + 1, 1, K, *doubled, dtype=torch.float64)
    counts = torch.zeros(doubled, dtype=torch.float64)
    with torch.no_grad():
        for top in (0, 16):
            for left in (0, 19, 38):
                part = (..., slice(top, top + 32), slice(left, left + 32))
                sums[part] += plain(net, large[part], (32, 32))
                counts[part] += 1
        mean = (sums / counts).flatten(0, 1)
        brought_back = F.interpolate(mean, size, mode="bilinear", align_corners=False).unflatten(
            0, (M + 1, 1)
        )
        # Once the height fits and the width does not: two windows of all rows.
        sides = [plain(net, x[..., columns], (24, 32)) for columns in (slice(0, 32), slice(3, 35))]
        own = torch.cat(
            [sides[0][..., :3], (sides[0][..., 3:] + sides[1][..., :29]) / 2, sides[1][..., 29:]], -1
        )
    settings = recipe(scales=(1.0, 2.0), window=32, overlap=0.0, batch_size=4)
    result = torch.stack(list(scores(net, x, size, settings)))
    assert result.std() > 1e-3
    torch.testing.assert_close(result, (own + brought_back) / 2)
