"""Translation scores against numpy, scipy and closed forms, in float64."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch import distributed as dist
from torchmetrics.functional.image import structural_similarity_index_measure

from models.training.config import override
from models.training.errors import UsageError
from models.translation.metrics import SCORES, TranslationMetrics, structural_similarity, table
from models.translation.metrics.fid import (
    FeatureScores,
    FeatureStatistics,
    FidSettings,
    clean,
    covariance_root,
    feature_scores,
    frechet_distance,
    kernel_distance,
    released,
    squared_mmd,
)
from models.translation.metrics.inception import Inception
from tests.helpers.training_runs import spawn_two

NAMES = ("shade", "texture", "ensemble")


def images(seed: int, *shape: int) -> Tensor:
    """Smooth float32 images in [-1, 1] with some noise."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.standard_normal(shape), (0, 0, 3, 3))
    return torch.from_numpy(np.tanh(4 * smooth + 0.1 * rng.standard_normal(shape))).float()


def by_hand(output: Tensor, target: Tensor, unit: float) -> dict[str, float]:
    """The mean of every image's scores; SSIM with scipy's Gaussian filter, its borders cut off."""
    rows = []
    for a, b in zip(output.double().numpy(), target.double().numpy(), strict=True):
        mse = np.mean((a - b) ** 2)
        ssim = np.mean([ssim_by_hand((x + 1) / 2, (y + 1) / 2) for x, y in zip(a, b, strict=True)])
        mae = np.mean(np.abs(a - b))
        rows.append((mae, mse, mae * unit, mse * unit**2, 10 * np.log10(2**2 / mse), ssim))
    l1, l2, mae, mse, psnr, ssim = np.mean(rows, 0)
    return dict(zip(SCORES, (l1, l2, mae, mse, np.sqrt(mse), psnr, ssim), strict=True))


def ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    def means(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, radius=5)[5:-5, 5:-5]

    ma, mb = means(a), means(b)
    va, vb, vab = means(a**2) - ma**2, means(b**2) - mb**2, means(a * b) - ma * mb
    c1, c2 = 1e-4, 9e-4
    return np.mean((2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value_range", [(0.0, 1.0), (0.0, 11.1)])
def test_scores_over_batches(channels: int, value_range: tuple[float, float]) -> None:
    target, *outputs = (images(seed, 5, channels, 24, 31) for seed in range(4))
    outputs[0] = (0.9 * target + 0.1 * outputs[0]).clamp(-1, 1)
    metrics = TranslationMetrics(NAMES, value_range)
    for part in (slice(0, 2), slice(2, 5)):
        metrics.update([output[part] for output in outputs], target[part])
    metrics.reduce()  # alone: nothing to join
    found = metrics.compute()
    assert list(found) == [f"{name}/{score}" for name in NAMES for score in SCORES]
    for name, output in zip(NAMES, outputs, strict=True):
        for score, value in by_hand(output, target, (value_range[1] - value_range[0]) / 2).items():
            assert found[f"{name}/{score}"] == pytest.approx(value, rel=1e-11), score


def test_a_constant_error_in_closed_form() -> None:
    metrics = TranslationMetrics(("ensemble",))
    metrics.update([torch.full((1, 3, 16, 16), 0.5)], torch.zeros(1, 3, 16, 16))
    x, y = 0.75, 0.5  # in [0, 1]
    assert metrics.compute() == pytest.approx(
        {
            "ensemble/l1": 0.5,
            "ensemble/l2": 0.25,
            "ensemble/mae": 0.25,
            "ensemble/mse": 0.0625,
            "ensemble/rmse": 0.25,
            "ensemble/psnr": 10 * math.log10(16),
            "ensemble/ssim": (2 * x * y + 1e-4) / (x * x + y * y + 1e-4),
        },
        rel=1e-11,
    )


def test_without_error_and_without_images() -> None:
    metrics = TranslationMetrics(("ensemble",))
    assert all(map(math.isnan, metrics.compute().values()))
    same = images(0, 2, 3, 16, 16)
    metrics.update([same], same)
    found = metrics.compute()
    assert [found[f"ensemble/{score}"] for score in SCORES[:6]] == [0, 0, 0, 0, 0, math.inf]
    assert found["ensemble/ssim"] == pytest.approx(1, abs=1e-14)


def test_ssim_is_the_common_one_but_for_the_edges() -> None:
    """torchmetrics adds windows that reach over the edges; on 256×256 pixels they are 8 % of all of them."""
    a, b = ((images(seed, 1, 3, 256, 256).double() + 1) / 2 for seed in range(2))
    b = 0.7 * a + 0.3 * b
    _, full = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    inner = full[..., 5:-5, 5:-5].mean()
    assert float(structural_similarity(a, b).mean()) == pytest.approx(float(inner), rel=1e-11)
    assert float(structural_similarity(a, b).mean()) == pytest.approx(float(full.mean()), abs=5e-3)


def test_outputs_that_do_not_fit_are_named() -> None:
    metrics = TranslationMetrics(NAMES)
    target = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"expected 3 outputs \(shade, texture, ensemble\), got 2"):
        metrics.update([target] * 2, target)
    with pytest.raises(ValueError, match=r"texture is \(1, 1, 16, 16\), the target \(1, 3, 16, 16\)"):
        metrics.update([target, target[:, :1], target], target)
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 10\); expected .* 11×11 pixels"):
        metrics.update([target[..., :10]] * 3, target[..., :10])
    with pytest.raises(ValueError, match="value_range must be"):
        TranslationMetrics(NAMES, (1.0, 1.0))
    with pytest.raises(ValueError, match="features is for 2 outputs, names has 3"):
        TranslationMetrics(NAMES, features=FeatureScores(2, nn.Identity(), FidSettings()))


def statistics(x: np.ndarray, *cuts: int) -> FeatureStatistics:
    found = FeatureStatistics(x.shape[1])
    for part in np.split(x, cuts):
        found.update(torch.from_numpy(part))
    return found


def distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    roots = (covariance_root(x.covariance()) for x in (a, b))
    (mean_a, root_a), (mean_b, root_b) = zip((a.mean(), b.mean()), roots, strict=True)
    return float(frechet_distance(mean_a, root_a, mean_b, root_b))


def test_moments_of_a_stream() -> None:
    """Means of size 5 and deviations of size 1: the sums' rounding is 25 times that of the covariance."""
    x = 5 + np.random.default_rng(0).standard_normal((50, 6))
    found = statistics(x, 1, 17)
    np.testing.assert_allclose(found.mean(), x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance(), np.cov(x.T), rtol=1e-11, atol=1e-12)
    assert len(torch.cat(found.vectors)) == 50
    forgetful = FeatureStatistics(6, keep=False)
    forgetful.update(torch.from_numpy(x))
    assert forgetful.vectors == []


def test_distance_of_gaussians_in_closed_form() -> None:
    """With common axes: Σ (√a - √b)² of the variances, and the means' distance."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    a, b = rng.uniform(0, 2, (2, 12))
    a[:3] = b[2:5] = 0  # singular, in different directions
    mean_a, mean_b = rng.standard_normal((2, 12))
    roots = [covariance_root(torch.from_numpy(axes * var @ axes.T)) for var in (a, b)]
    assert [root.shape for root in roots] == [(12, 9), (12, 9)]
    found = frechet_distance(torch.from_numpy(mean_a), roots[0], torch.from_numpy(mean_b), roots[1])
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    # Variances that are 0 come out as some 1e-16, below what counts; a root of what did would be 1e-8.
    assert float(found) == pytest.approx(expected, rel=1e-13)


def test_distance_is_scipys() -> None:
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((200, 20)) @ rng.standard_normal((20, 20)) for _ in "xy")
    sx, sy = np.cov(x.T), np.cov(y.T)
    root = np.trace(sqrtm(sx @ sy)).real
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(sx) + np.trace(sy) - 2 * root
    assert distance(statistics(x), statistics(y)) == pytest.approx(expected, rel=1e-9)


def test_distance_with_fewer_images_than_features() -> None:
    """From the centred features X, Y themselves, the last trace is the nuclear norm of X Yᵀ."""
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((30, 100)), 1.3 * rng.standard_normal((40, 100)) + 0.1
    xc, yc = (z - z.mean(0) for z in (x, y))
    overlap = np.linalg.norm(xc @ yc.T, "nuc") / math.sqrt(29 * 39)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(xc**2) / 29 + np.sum(yc**2) / 39 - 2 * overlap
    assert distance(statistics(x), statistics(y)) == pytest.approx(expected, rel=1e-12)
    assert abs(distance(statistics(x), statistics(x, 10))) < 1e-12 * np.sum(xc**2)


def mmd_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def pairs(z: np.ndarray) -> float:
        return np.mean([kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    return pairs(x) + pairs(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kid_by_brute_force() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((9, 5)), rng.standard_normal((7, 5)) + 0.5
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    assert float(squared_mmd(a, b)) == pytest.approx(mmd_by_hand(x, y), rel=1e-12)
    # Subsets of all images are all the same; the order of sums is not.
    assert float(kernel_distance(a[:7], b, 3, 7, seed=0)) == pytest.approx(mmd_by_hand(x[:7], y), rel=1e-12)
    generator = torch.Generator().manual_seed(5)
    drawn = [[torch.randperm(len(z), generator=generator)[:4] for z in (x, y)] for _ in range(6)]
    expected = np.mean([mmd_by_hand(x[i], y[j]) for i, j in drawn])
    assert float(kernel_distance(a, b, 6, 4, seed=5)) == pytest.approx(expected, rel=1e-12)


def test_kid_is_unbiased() -> None:
    """Of one distribution: 0 within four standard errors, and of both signs."""
    rng = np.random.default_rng(4)
    found = np.array(
        [float(squared_mmd(*torch.from_numpy(rng.standard_normal((2, 20, 4))))) for _ in range(400)]
    )
    assert abs(found.mean()) < 4 * found.std() / 20
    assert found.min() < 0 < found.max()


@pytest.mark.parametrize("size", [(64, 80), (400, 500)])
def test_clean_images_are_pils(size: tuple[int, int]) -> None:
    """Pillow resizes in floating point as Parmar et al. do.

    torch rounds positions of up to 500 pixels to float32, 3e-5; the cubic's slope is below 1.5 a pixel, the
    steps between pixels are 2, and there are two axes. A grey level is 8e-3.
    """
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    x = images(0, 1, 1, *size).sign().expand(-1, 3, -1, -1) * 0.999  # edges, so that the cubic overshoots
    grey = np.round(127.5 * (x[0, 0].numpy() + 1)).astype(np.float32)
    expected = np.asarray(image.fromarray(grey).resize((299, 299), image.Resampling.BICUBIC)).clip(0, 255)
    found = 2 * clean(x)[0, 1].numpy() - 1
    assert np.abs(found - (expected - 128) / 128).max() < 2e-4


def drawn(image: np.ndarray) -> np.ndarray:
    """An image ``[3, H, W]`` as the released code's file has it, ``[500, 500, 3]`` from 0 to 255.

    Each image's own extremes, of all channels, become 0 and 255; cut off to 8 bits; pixels by their distance.
    """
    low, high = image.min(), image.max()
    gray = ((image - low) / (high - low) * np.float32(255)).astype(np.uint8).transpose(1, 2, 0)
    for axis in (0, 1):
        length = gray.shape[axis]
        apart = np.abs((np.arange(500)[:, None] + 0.5) / 500 - (np.arange(length) + 0.5) / length)
        gray = gray.take(apart.round(12).argmin(1), axis)
    return gray


@pytest.mark.parametrize("size", [(256, 256), (128, 128), (75, 130)])
def test_released_images_are_stretched_cut_off_and_drawn(size: tuple[int, int]) -> None:
    x = torch.cat([0.4 * images(0, 1, 3, *size) + 0.1, images(1, 1, 3, *size)])
    found = released(x)
    assert found.shape == (2, 3, 500, 500)
    for one, image in zip(found, x, strict=True):
        np.testing.assert_array_equal((255 * one).round().permute(1, 2, 0).numpy(), drawn(image.numpy()))
        assert (one.min(), one.max()) == (0, 1)
    # Cut off, not rounded; of one value: black; not a number: stays so, which a score is to show.
    ramp = torch.tensor([0.0, 0.41, 0.9, 1.0]).view(1, 1, 2, 2) * 2 - 1
    assert set((255 * released(ramp)).round().unique().tolist()) == {0, 104, 229, 255}
    assert released(torch.full((1, 1, 2, 2), 0.3)).abs().max() == 0
    assert released(torch.full((1, 3, 4, 4), math.nan)).isnan().all()


def test_released_images_are_matplotlibs(tmp_path: Path) -> None:
    """A figure of 5×5 inches without margins; the resampling of early 2019 named, which was the default."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from matplotlib.figure import Figure

    x = images(0, 1, 3, 256, 256)
    figure = Figure(figsize=(5, 5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    low, high = x.min(), x.max()
    gray = ((x[0] - low) / (high - low) * 255).floor().to(torch.uint8).permute(1, 2, 0).numpy()
    axes.imshow(gray, interpolation="nearest")
    figure.savefig(tmp_path / "a.png", dpi=100)
    file = cv2.imread(str(tmp_path / "a.png"))[:, :, ::-1]
    np.testing.assert_array_equal((255 * released(x)[0]).round().permute(1, 2, 0).numpy(), file)


def test_kids_subsets_of_all_images_are_one() -> None:
    """50 subsets of 1000 of fewer images, as the released code draws them: all of the images, each time."""
    settings = FidSettings(kid_subsets=50, kid_subset_size=None)
    assert [settings.subset_size(count) for count in (7, 500, 1000, 1500)] == [7, 500, 1000, 1000]
    settings.check_images(2)

    def means(x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))[:, None].expand(-1, 2048)

    scores = FeatureScores(1, means, settings)
    output, target = images(0, 7, 3, 16, 16), images(1, 7, 3, 16, 16)
    scores.update([output], target)
    x, y = (means(clean(each)).double().numpy() for each in (output, target))
    cubes = [(a @ b.T / 2048 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = [(k.sum() - np.trace(k)) / 42 for k in cubes[:2]]
    found = scores._kid(scores.outputs[0])
    assert found["kid"] == pytest.approx(100 * (sum(within) - 2 * cubes[2].mean()), rel=1e-9)


def test_feature_scores_of_outputs() -> None:
    """FID and KID of every output, as from all its features at once; the features are crude ones."""
    weight = torch.randn(2048, 3 * 4, generator=torch.Generator().manual_seed(0))

    def crude(x: Tensor) -> Tensor:
        assert x.shape[1] == 3
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1) @ weight.T

    target, good, bad = images(0, 12, 1, 16, 16), images(1, 12, 1, 16, 16), images(2, 12, 1, 16, 16) - 0.5
    settings = FidSettings(kid_subsets=7, kid_subset_size=6)
    metrics = TranslationMetrics(("good", "bad"), features=FeatureScores(2, crude, settings))
    for part in (slice(0, 5), slice(5, 12)):
        metrics.update([good[part], bad[part]], target[part])
    found = metrics.compute()
    features = [crude(clean(x.expand(-1, 3, -1, -1))) for x in (target, good, bad)]
    centred = [(x.double() - x.double().mean(0)).numpy() for x in features]
    for name, x, xc in zip(("good", "bad"), features[1:], centred[1:], strict=True):
        means = (x.double().mean(0) - features[0].double().mean(0)).square().sum()
        spread = (np.sum(xc**2) + np.sum(centred[0] ** 2)) / 11
        overlap = np.linalg.norm(xc @ centred[0].T, "nuc") / 11
        # Products of float32 features round to some 1e-7, batch by batch differently.
        assert found[f"{name}/fid"] == pytest.approx(float(means) + spread - 2 * overlap, rel=1e-5)
        kid = 100 * float(kernel_distance(x, features[0], 7, 6, 0))
        assert found[f"{name}/kid"] == pytest.approx(kid, rel=1e-4)
    assert found["good/fid"] < found["bad/fid"]
    lines = [line.split() for line in table(found).splitlines()]
    assert lines[0] == [*SCORES, "fid", "kid"]
    assert lines[2] == ["bad", *(f"{found[f'bad/{score}']:.4f}" for score in lines[0])]


def test_settings_name_what_is_wrong(tmp_path: Path) -> None:
    settings = FidSettings(weights=tmp_path / "none.pth", kid_subset_size=100)
    with pytest.raises(
        UsageError, match=r"^eval\.fid\.kid_subset_size=100: .* only 40 images; .* eval\.fid\.kid_subsets=0"
    ):
        feature_scores(settings, 3, 40)
    with pytest.raises(UsageError, match=r"^eval\.fid\.weights: .*pt_inception-2015-12-05"):
        feature_scores(settings, 3, 100)
    assert feature_scores(FidSettings(kid_subset_size=100), 3, 40) is None
    with pytest.raises(UsageError, match="kid_subset_size must be at least 2, got 1"):
        override(settings, ["kid_subset_size=1"])
    with pytest.raises(UsageError, match=r"FID needs .* 2 images or more, and there is 1"):
        override(settings, ["kid_subsets=0"]).check_images(1)


def test_the_network_itself(tmp_path: Path) -> None:
    """From a file of (random) weights to scores of 256×256 images, in both preparations."""
    torch.manual_seed(0)
    net, path = Inception(), tmp_path / "weights.pth"
    for weight in net.parameters():
        if weight.dim() == 4:
            nn.init.kaiming_normal_(weight)  # keeps differences between images to the end
    torch.save(net.state_dict(), path)
    target = images(0, 2, 3, 256, 256)
    outputs = [0.8 * target + 0.2 * images(1, 2, 3, 256, 256), target, torch.full_like(target, math.nan)]
    metrics, names = {}, ("shade", "same", "diverged")
    for preparation in ("clean", "released"):
        settings = FidSettings(weights=path, preparation=preparation, kid_subset_size=2)
        metrics[preparation] = TranslationMetrics(names, features=feature_scores(settings, 3, 2))
        with torch.autocast("cpu", torch.bfloat16):
            metrics[preparation].update(outputs, target)
    # No bfloat16: features of one image in two batches, and by the network alone, are those of float32.
    vectors = torch.cat(metrics["clean"].features.target.vectors)
    torch.testing.assert_close(vectors, net(clean(target)), rtol=1e-4, atol=1e-5)
    assert (vectors - net(released(target))).abs().max() > 1e-2
    torch.testing.assert_close(
        torch.cat(metrics["released"].features.target.vectors), net(released(target)), rtol=1e-4, atol=1e-5
    )
    found = metrics["clean"].compute()
    assert found["shade/fid"] > 1e-2
    assert abs(found["same/fid"]) < 1e-9 * found["shade/fid"]
    assert all(math.isnan(found[f"diverged/{score}"]) for score in (*SCORES, "fid", "kid"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_updates_do_not_wait_for_the_gpu() -> None:
    net, settings = Inception().cuda(), FidSettings(kid_subset_size=4)
    metrics = TranslationMetrics(("shade",), features=FeatureScores(1, net, settings, "cuda"), device="cuda")
    target, output = images(0, 2, 3, 64, 64).cuda(), images(1, 2, 3, 64, 64).cuda()
    metrics.update([output], target)  # libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.update([output], target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    alone = TranslationMetrics(("shade",))
    alone.update([output.cpu()], target.cpu())
    found = metrics.compute()
    assert {key: found[key] for key in alone.compute()} == pytest.approx(alone.compute(), rel=1e-11)


FEATURES, TARGETS = np.random.default_rng(7).standard_normal((2, 5, 4))


def work(rank: int, folder: Path) -> None:
    """The work of each of two processes: three images and two, alternating."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    part = slice(rank, None, 2)
    metrics = TranslationMetrics(NAMES)
    target, *outputs = (images(seed, 5, 3, 16, 16) for seed in range(4))
    metrics.update([output[part] for output in outputs], target[part])
    metrics.reduce()
    features, single = statistics(FEATURES[part], 1), FeatureStatistics(4)
    if rank == 0:
        single.update(torch.from_numpy(FEATURES[:1]))
    for joined in (features, single):
        joined.reduce()
    moments = {"mean": features.mean(), "covariance": features.covariance(), "vectors": features.vectors}
    found = {"metrics": metrics.compute(), "moments": moments, "single": single.vectors}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    spawn_two(work, tmp_path)
    target, *outputs = (images(seed, 5, 3, 16, 16) for seed in range(4))
    whole = TranslationMetrics(NAMES)
    whole.update(outputs, target)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["metrics"] == pytest.approx(whole.compute(), rel=1e-12)
        np.testing.assert_allclose(found["moments"]["mean"], FEATURES.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found["moments"]["covariance"], np.cov(FEATURES.T), rtol=1e-11)
        # In the images' order, so that KID is that of one process.
        vectors = torch.cat(found["moments"]["vectors"])
        features, targets = torch.from_numpy(FEATURES), torch.from_numpy(TARGETS)
        assert torch.equal(vectors, features)
        kids = [
            float(kernel_distance(x, targets, 4, 3, seed=0)) for x in (vectors, features, features.flip(0))
        ]
        assert kids[0] == kids[1] != kids[2]
        assert torch.equal(torch.cat(found["single"]), features[:1])
