"""The segmentation loss against its formula, written out pixel by pixel."""

import math

import pytest
import torch
from torch import Tensor, nn

from models.networks.fusion import Exchange
from models.networks.outputs import AuxiliaryOutput, SegmentationOutput, with_ensemble
from models.segmentation.losses import cross_entropies, resized_cross_entropies, segmentation_loss

M, N, K = 2, 2, 3
SIZE = (5, 7)


def bilinear(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """``[K, h, w]`` to ``[K, H, W]``: sample at pixel centres, clamp at the border."""
    _, h, w = logits.shape
    out = logits.new_zeros(logits.shape[0], *size)
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * h / size[0] - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / size[1] - 0.5, 0), w - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            a, b = y - top, x - left
            out[:, i, j] = (1 - a) * ((1 - b) * logits[:, top, left] + b * logits[:, top, right])
            out[:, i, j] += a * ((1 - b) * logits[:, bottom, left] + b * logits[:, bottom, right])
    return out


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the pixels that are not 255 of ``-log softmax`` at the target's class."""
    terms = [
        logits[n, :, i, j].logsumexp(0) - logits[n, target[n, i, j], i, j]
        for n in range(N)
        for i in range(SIZE[0])
        for j in range(SIZE[1])
        if target[n, i, j] != 255
    ]
    return torch.stack(terms).mean()


class Layers(nn.Module):
    """One layer that exchanges and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion = Exchange(threshold=0.02)
        self.exchanging = self.fusion.norm(4, M, exchange_point=True, dtype=torch.float64)
        self.plain = self.fusion.norm(4, M, dtype=torch.float64)
        nn.init.normal_(self.exchanging.weight)


@pytest.fixture
def output() -> SegmentationOutput:
    logits = torch.randn(M * N, K, 2, 3, dtype=torch.float64, requires_grad=True)
    return with_ensemble(logits, torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True))


@pytest.fixture
def target() -> Tensor:
    target = torch.randint(0, K, (N, *SIZE))
    target[torch.rand(N, *SIZE) < 0.3] = 255
    return target


def expected_entropies(output: SegmentationOutput, target: Tensor) -> Tensor:
    weights = output.alpha
    ensemble = weights[0] * output.branches[0] + weights[1] * output.branches[1]
    resized = [torch.stack([bilinear(x, SIZE) for x in out]) for out in (*output.branches, ensemble)]
    return torch.stack([cross_entropy(logits, target) for logits in resized])


def test_cross_entropies(output: SegmentationOutput, target: Tensor) -> None:
    torch.testing.assert_close(cross_entropies(output, target, 255), expected_entropies(output, target))


@pytest.mark.parametrize(("per_output", "times"), [(False, 1), (True, M + 1)])
def test_loss_is_their_sum_and_the_penalty(
    output: SegmentationOutput, target: Tensor, per_output: bool, times: int
) -> None:
    net = Layers()
    loss, entropies, found, auxiliary, fusion, dice = segmentation_loss(
        net, output, target, sparsity=0.25, per_output=per_output, ignore_index=255
    )
    scales = net.exchanging.weight.detach().abs()
    penalty = scales[0, 0] + scales[0, 1] + scales[1, 2] + scales[1, 3]
    torch.testing.assert_close(entropies, expected_entropies(output, target))
    torch.testing.assert_close(found, 0.25 * times * penalty)
    torch.testing.assert_close(loss, expected_entropies(output, target).sum() + 0.25 * times * penalty)
    assert auxiliary == fusion == dice == 0
    loss.backward()
    signs = net.exchanging.weight.detach().sign()
    own = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    torch.testing.assert_close(net.exchanging.weight.grad, 0.25 * times * signs * own)
    assert net.plain.weight.grad is None


@pytest.mark.parametrize("weight", [0.4, 0.0])
def test_auxiliary_logits_are_added_with_their_weight(
    output: SegmentationOutput, target: Tensor, weight: float
) -> None:
    net, options = Layers(), {"sparsity": 0.25, "per_output": False, "ignore_index": 255}
    plain = segmentation_loss(net, output, target, **options)
    logits = torch.randn(M, N, K, 3, 2, dtype=torch.float64, requires_grad=True)
    with_auxiliary = AuxiliaryOutput(*output, (logits,))
    loss = segmentation_loss(net, with_auxiliary, target, auxiliary=weight, **options)
    each = [cross_entropy(torch.stack([bilinear(x, SIZE) for x in branch]), target) for branch in logits]
    torch.testing.assert_close(loss.auxiliary, weight * sum(each))
    torch.testing.assert_close(loss.total, plain.total + weight * sum(each))
    torch.testing.assert_close(loss.entropies, expected_entropies(output, target))
    torch.testing.assert_close(loss.penalty, plain.penalty)
    by_default = segmentation_loss(net, with_auxiliary, target, **options)
    torch.testing.assert_close(by_default.total, plain.total + 0.4 * sum(each))


def test_the_ensembles_loss_trains_alpha_alone(target: Tensor) -> None:
    logits = torch.randn(M * N, K, 2, 3, dtype=torch.float64, requires_grad=True)
    alpha = torch.zeros(M, dtype=torch.float64, requires_grad=True)
    *branches, ensemble = cross_entropies(with_ensemble(logits, alpha), target, 255)
    to_logits, to_alpha = torch.autograd.grad(ensemble, [logits, alpha], retain_graph=True)
    assert to_logits.abs().max() == 0
    assert to_alpha.abs().min() > 0
    to_logits, to_alpha = torch.autograd.grad(sum(branches), [logits, alpha])
    assert to_logits.abs().max() > 0
    assert to_alpha.abs().max() == 0


def test_a_batch_without_labels_counts_nothing(output: SegmentationOutput) -> None:
    entropies = cross_entropies(output, torch.full((N, *SIZE), 255), 255)
    assert entropies.tolist() == [0, 0, 0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_resized_cross_entropies(layout: torch.memory_format, target: Tensor) -> None:
    stacked = torch.randn(3 * N, K, 2, 3, dtype=torch.float64).to(memory_format=layout).requires_grad_()

    def sums(logits: Tensor) -> Tensor:
        return resized_cross_entropies(logits.unflatten(0, (3, N)), target, 255)

    assert torch.autograd.gradcheck(sums, stacked)


def test_resized_cross_entropies_keep_nothing_of_label_resolution(target: Tensor) -> None:
    logits = torch.randn(3, N, K, 2, 3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda _: None):
        resized_cross_entropies(logits, target, 255)
    assert kept == [logits.numel()]
    with torch.no_grad():
        assert not resized_cross_entropies(logits, target, 255).requires_grad


def test_resized_cross_entropies_of_half_logits_are_float32(target: Tensor) -> None:
    logits = torch.randn(3, N, K, 2, 3, dtype=torch.bfloat16, requires_grad=True)
    sums = resized_cross_entropies(logits, target, 255)
    sums.sum().backward()
    wide = logits.detach().float().requires_grad_()
    expected = resized_cross_entropies(wide, target, 255)
    expected.sum().backward()
    assert sums.dtype == torch.float32
    assert torch.equal(sums, expected)
    assert torch.equal(logits.grad, wide.grad.bfloat16())


def test_logits_that_are_not_counted_may_be_nan() -> None:
    logits = torch.zeros(1, 1, K, 4, 4, dtype=torch.float64)
    logits[..., 0, :] = torch.nan
    logits.requires_grad_()
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    target[:, 0] = 255
    sums = resized_cross_entropies(logits, target, 255)
    sums.sum().backward()
    assert sums.item() == pytest.approx(12 * math.log(K))
    assert torch.isfinite(logits.grad).all()


def test_auxiliary_heads_have_weights_of_their_own(output: SegmentationOutput, target: Tensor) -> None:
    net, options = Layers(), {"sparsity": 0.25, "per_output": False, "ignore_index": 255}
    heads = [torch.randn(1, N, K, *size, dtype=torch.float64) for size in ((3, 2), (1, 4))]
    each = [cross_entropy(torch.stack([bilinear(x, SIZE) for x in head[0]]), target) for head in heads]
    both = AuxiliaryOutput(*output, tuple(heads))
    found = segmentation_loss(net, both, target, auxiliary=(0.6, 0.5), **options).auxiliary
    torch.testing.assert_close(found, 0.6 * each[0] + 0.5 * each[1])
    found = segmentation_loss(net, both, target, auxiliary=0.3, **options).auxiliary
    torch.testing.assert_close(found, 0.3 * (each[0] + each[1]))
    with pytest.raises(ValueError, match="shorter"):
        segmentation_loss(net, both, target, auxiliary=(0.6,), **options)


def test_labels_are_resized_to_auxiliary_logits(output: SegmentationOutput, target: Tensor) -> None:
    net, options = Layers(), {"sparsity": 0.25, "per_output": False, "ignore_index": 255}
    h, w = 2, 3
    logits = torch.randn(1, N, K, h, w, dtype=torch.float64, requires_grad=True)
    found = segmentation_loss(
        net,
        AuxiliaryOutput(*output, (logits,)),
        target,
        auxiliary=0.7,
        auxiliary_size="logits",
        **options,
    ).auxiliary
    total = logits.new_zeros(())
    for n in range(N):
        for i in range(h):
            for j in range(w):  # the nearest pixel, rounded down
                label = target[n, i * SIZE[0] // h, j * SIZE[1] // w]
                if label != 255:
                    total = total + logits[0, n, :, i, j].logsumexp(0) - logits[0, n, label, i, j]
    pixels = (target != 255).sum() * (h * w) / (SIZE[0] * SIZE[1])
    torch.testing.assert_close(found, 0.7 * total / pixels)
