"""Class weights, label smoothing, OHEM, focal loss and Dice against torch's loss and their formulas."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.networks.outputs import AuxiliaryOutput, SegmentationOutput, with_ensemble
from models.segmentation.criteria import Criterion, resized_losses
from models.segmentation.losses import Counts, segmentation_loss
from tests.segmentation.test_losses import Layers

M, N, K, VOID = 2, 4, 5, 255
SIZE = (9, 11)
WEIGHTS = torch.tensor([0.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
ALL = [
    Criterion(),
    Criterion(label_smoothing=0.2),
    Criterion("focal"),
    Criterion("focal", focal_gamma=0.5),
    Criterion("ohem"),
    Criterion("ohem", label_smoothing=0.1, ohem_threshold=0.05, ohem_min_kept=0.2),
    Criterion("ohem", ohem_threshold=0.2, ohem_min_kept=0.0, dice=0.5),
    Criterion(dice=1.0),
]


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(M, N, K, 4, 5, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def target() -> Tensor:
    """The last image is void, and so are pixels of the others."""
    target = torch.randint(0, K, (N, *SIZE))
    target[torch.rand(target.shape) < 0.3] = VOID
    target[-1] = VOID
    return target


def large(logits: Tensor) -> Tensor:
    return F.interpolate(logits, SIZE, mode="bilinear", align_corners=False)


def assert_same_and_slope(found: Tensor, expected: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    cotangent = torch.rand_like(found)
    slopes = [torch.autograd.grad(value, logits, cotangent)[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-13)
    assert slopes[0].abs().max() > 0


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs(
    logits: Tensor, target: Tensor, weights: Tensor | None, smoothing: float
) -> None:
    counts = Counts.of(target, VOID, weights)
    sums = resized_losses(logits, target, VOID, Criterion(label_smoothing=smoothing), weights)
    expected = [
        F.cross_entropy(large(x), target, weights, ignore_index=VOID, label_smoothing=smoothing)
        for x in logits
    ]
    assert_same_and_slope(sums[0] / counts.pixels, torch.stack(expected), logits)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss(logits: Tensor, target: Tensor, weights: Tensor | None, gamma: float) -> None:
    sums = resized_losses(logits, target, VOID, Criterion("focal", focal_gamma=gamma), weights)
    expected = []
    for x in logits:
        probability = large(x).softmax(1)
        terms = [
            -(1.0 if weights is None else weights[target[at]])
            * (1 - probability[at[0], target[at], at[1], at[2]]) ** gamma
            * probability[at[0], target[at], at[1], at[2]].log()
            for at in map(tuple, (target != VOID).nonzero().tolist())
        ]
        expected.append(torch.stack(terms).sum())
    assert_same_and_slope(sums[0], torch.stack(expected), logits)


@pytest.mark.parametrize("gamma", [0.3, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_focal_loss_of_certain_pixels(gamma: float, dtype: torch.dtype) -> None:
    """Their probability rounds to 1, where the power's own slope is infinite for an exponent below 1."""
    logits = torch.zeros(1, 1, 2, 1, 3, dtype=dtype)
    logits[0, 0, 0, 0] = torch.tensor([900.0, 15.0, -200.0])
    logits.requires_grad_()
    target = torch.zeros(1, 1, 3, dtype=torch.long)
    loss = resized_losses(logits, target, VOID, Criterion("focal", focal_gamma=gamma))
    loss.sum().backward()
    rest = 1 / (1 + math.exp(15))
    assert loss.item() == pytest.approx(200 + rest**gamma * -math.log1p(-rest), rel=1e-6)
    slope = -rest * (rest**gamma - gamma * (1 - rest) * rest ** (gamma - 1) * math.log1p(-rest))
    found = logits.grad[0, 0, 0, 0].tolist()
    # The softmax minus 1 has an error of half a unit of 1.
    error = torch.finfo(dtype).eps / rest
    assert found == [0, pytest.approx(slope, rel=max(error, 1e-9)), -1]


def hard_mean(
    logits: Tensor, target: Tensor, criterion: Criterion, weights: Tensor | None
) -> tuple[Tensor, int]:
    """The weighted mean over the hard pixels of ``[K, H, W]``, and how many there are."""
    log_softmax = logits.log_softmax(0)
    own = WEIGHTS.new_ones(K) if weights is None else weights
    candidates = [at for at in product(*map(range, SIZE)) if target[at] != VOID and own[target[at]] > 0]
    candidates.sort(key=lambda at: log_softmax[(target[at], *at)].item())
    least = math.ceil(criterion.ohem_min_kept * SIZE[0] * SIZE[1])
    hard = [
        at
        for rank, at in enumerate(candidates)
        if rank < least or log_softmax[(target[at], *at)].exp() < criterion.ohem_threshold
    ]
    if not hard:
        return logits.new_zeros(()), 0
    smoothing = criterion.label_smoothing
    losses = [
        -(1 - smoothing) * own[target[at]] * log_softmax[(target[at], *at)]
        - smoothing / K * (own * log_softmax[(slice(None), *at)]).sum()
        for at in hard
    ]
    return torch.stack(losses).sum() / own[target[tuple(torch.tensor(hard).T)]].sum(), len(hard)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(
    ("threshold", "kept", "smoothing", "numbers"),
    [
        (0.3, 0.0625, 0.0, "most"),
        (0.05, 0.2, 0.1, "those kept"),
        (0.05, 1.0, 0.0, "all"),  # more than count
        (1e-9, 0.0, 0.0, "none"),
    ],
)
def test_hard_pixels(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    threshold: float,
    kept: float,
    smoothing: float,
    numbers: str,
) -> None:
    target[0] = target[0].clamp(max=K - 1)  # enough pixels to keep a fifth of them
    criterion = Criterion("ohem", smoothing, ohem_threshold=threshold, ohem_min_kept=kept)
    sums = resized_losses(logits, target, VOID, criterion, weights)
    found = [
        [hard_mean(*pair, criterion, weights) for pair in zip(large(x), target, strict=True)] for x in logits
    ]
    expected = torch.stack([torch.stack([mean for mean, _ in each]).sum() for each in found])
    counted = target[0].numel() if weights is None else int((WEIGHTS[target[0]] > 0).sum())
    first = found[0][0][1]
    assert {
        "most": 20 < first < counted,
        "those kept": 20 <= first < 40,
        "all": first == counted,
        "none": first == 0,
    }[numbers]
    if numbers == "none":
        assert sums.tolist() == [[0, 0]]
    else:
        assert_same_and_slope(sums[0], expected, logits)


def test_pixels_that_are_as_hard_as_the_last_one_are_kept() -> None:
    logits = torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0]).view(1, 1, 1, 1, 8)
    both = torch.cat([logits, torch.zeros_like(logits)], 2)
    criterion = Criterion("ohem", ohem_threshold=0.1, ohem_min_kept=0.25)
    loss = resized_losses(both, torch.zeros(1, 1, 8, dtype=torch.long), VOID, criterion)
    assert loss.item() == pytest.approx(math.log(2))


def test_dice(logits: Tensor, target: Tensor) -> None:
    target[0][target[0] == 2] = VOID  # a class that the image lacks
    sums = resized_losses(logits, target, VOID, Criterion(dice=0.25))
    expected = []
    for x in logits:
        images = []
        for softmax, truth in zip(large(x).softmax(1), target[:-1], strict=False):
            softmax, truth = softmax[:, truth != VOID], truth[truth != VOID]
            losses = [
                1 - 2 * softmax[c][truth == c].sum() / (softmax[c].square().sum() + (truth == c).sum())
                for c in truth.unique().tolist()
            ]
            images.append(torch.stack(losses).mean())
        assert len(images) == N - 1
        expected.append(torch.stack(images).sum())
    assert_same_and_slope(sums[1], torch.stack(expected), logits)
    torch.testing.assert_close(sums[0], resized_losses(logits, target, VOID)[0])


@pytest.mark.parametrize("criterion", ALL)
def test_gradients(criterion: Criterion, target: Tensor) -> None:
    stacked = torch.randn(2, K, 2, 3, dtype=torch.float64).to(memory_format=torch.channels_last)

    def losses(x: Tensor) -> Tensor:
        return resized_losses(x[:, None], target[:1, :5, :6], VOID, criterion, WEIGHTS)

    assert torch.autograd.gradcheck(losses, stacked.requires_grad_())


def test_a_compiled_loss_gives_the_same(logits: Tensor, target: Tensor) -> None:
    """As one graph; without code generation, which takes longer."""

    def loss(x: Tensor) -> Tensor:
        pixels = Counts.of(target[:1], VOID, WEIGHTS).pixels
        return resized_losses(x[:1, :1], target[:1], VOID, ALL[6], WEIGHTS).sum() / pixels

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=False)
    assert_same_and_slope(compiled(logits), loss(logits), logits)


@pytest.mark.parametrize("criterion", ALL)
def test_nothing_of_label_resolution_is_kept(logits: Tensor, target: Tensor, criterion: Criterion) -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda _: None):
        resized_losses(logits, target, VOID, criterion, WEIGHTS)
    assert kept == [logits.numel()] * (2 if criterion.dice else 1)


@pytest.mark.parametrize("criterion", ALL)
def test_void_pixels_may_be_nan_and_halves_are_computed_in_float32(
    target: Tensor, criterion: Criterion
) -> None:
    logits = torch.randn(M, N, K, *SIZE, dtype=torch.bfloat16)
    expected = resized_losses(logits.float(), target, VOID, criterion, WEIGHTS)
    logits = logits.where((target != VOID)[:, None], torch.nan).requires_grad_()
    found = resized_losses(logits, target, VOID, criterion, WEIGHTS)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    found.sum().backward()
    assert logits.grad.isfinite().all()


def output_of(branches: Tensor, alpha: Tensor) -> SegmentationOutput:
    return with_ensemble(branches.flatten(0, 1), alpha)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("criterion", ALL)
def test_a_batch_in_parts_is_the_batch(
    logits: Tensor, target: Tensor, criterion: Criterion, parts: int
) -> None:
    """Whatever counts in each of them: the last part has no label at all."""
    alpha = torch.tensor([0.3, -0.2], dtype=torch.float64)
    net, settings = Layers(), {"sparsity": 0.25, "per_output": False, "ignore_index": VOID}
    how = {"criterion": criterion, "weights": WEIGHTS}

    def loss(chosen: slice, **counts: Tensor) -> tuple[Tensor, Tensor]:
        output = output_of(logits[:, chosen], alpha)
        auxiliary = AuxiliaryOutput(*output, (logits[:, chosen].flip(2),))
        found = segmentation_loss(net, auxiliary, target[chosen], **settings, **how, **counts)
        return torch.cat([member.reshape(-1) for member in found]), found.total

    whole, total = loss(slice(None))
    (slope,) = torch.autograd.grad(total, logits)
    pixels, images = (count / parts for count in Counts.of(target, VOID, WEIGHTS))
    each = [
        loss(slice(start, start + N // parts), pixels=pixels, images=images)
        for start in range(0, N, N // parts)
    ]
    torch.testing.assert_close(sum(values for values, _ in each) / parts, whole)
    (slope_of_parts,) = torch.autograd.grad(sum(total for _, total in each) / parts, logits)
    torch.testing.assert_close(slope_of_parts, slope)


def test_members_of_the_loss(logits: Tensor, target: Tensor) -> None:
    criterion = Criterion("focal", dice=0.5)
    output = output_of(logits, torch.tensor([0.3, -0.2], dtype=torch.float64))
    auxiliary = AuxiliaryOutput(*output, (logits.flip(2),))
    settings = {"sparsity": 0.25, "per_output": False, "ignore_index": VOID, "auxiliary": 0.3}
    loss = segmentation_loss(Layers(), auxiliary, target, **settings, criterion=criterion, weights=WEIGHTS)
    pixels, images = Counts.of(target, VOID, WEIGHTS)
    assert (pixels, images) == (WEIGHTS[target[target != VOID]].sum(), N - 1)
    outputs = torch.cat([logits, output.ensemble[None]])
    sums, of_auxiliary = (
        resized_losses(x, target, VOID, criterion, WEIGHTS) for x in (outputs, logits.flip(2))
    )
    torch.testing.assert_close(loss.entropies, sums[0] / pixels)
    torch.testing.assert_close(loss.dice, 0.5 * sums[1].sum() / images)
    beside = 0.3 * (of_auxiliary[0].sum() / pixels + 0.5 * of_auxiliary[1].sum() / images)
    torch.testing.assert_close(loss.auxiliary, beside)
    torch.testing.assert_close(loss.total, loss.entropies.sum() + loss.penalty + loss.dice + beside)


@pytest.mark.parametrize("criterion", ALL)
def test_a_batch_without_labels_costs_nothing(logits: Tensor, criterion: Criterion) -> None:
    output = output_of(logits, torch.zeros(M, dtype=torch.float64))
    target = torch.full((N, *SIZE), VOID)
    settings = {"sparsity": 0.0, "per_output": False, "ignore_index": VOID}
    loss = segmentation_loss(Layers(), output, target, **settings, criterion=criterion, weights=WEIGHTS)
    assert (loss.entropies.tolist(), loss.dice.item()) == ([0, 0, 0], 0)
    (slope,) = torch.autograd.grad(loss.total, logits)
    assert slope.abs().max() == 0
