"""The losses of logits at label resolution, and their gradients: cross-entropy, OHEM, focal loss and Dice.

With p the softmax of a pixel's logits, y its class, w the class weights (1 without), ε the label smoothing
and γ the focal loss's exponent, a pixel costs

- in ``cross_entropy``: ``-(1 - ε) w_y log p_y - ε/K Σ_c w_c log p_c``, as torch's;
- in ``ohem``: the same, where the pixel is hard, else 0: p_y is below the threshold, or among the least of
  that image, a share of its pixels (online hard example mining; the threshold as in arXiv:1605.06885);
- in ``focal``: ``-w_y (1 - p_y)^γ log p_y`` (Lin et al., ICCV 2017).

Dice (Milletari et al., 3DV 2016), of one image, is the mean over the classes that are in its truth of
``1 - 2 Σ p_c g_c / (Σ p_c² + Σ g_c²)``; the sums are over the pixels that count, g is the one-hot truth.

Hard pixels and Dice are of single images, not of batches: so the parts that a batch is computed in, on one
device or many, add up to the batch. Others take the batch of one GPU; with one image on it they agree.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Criterion(NamedTuple):
    """How logits are compared with labels; the fields are ``loss``'s settings, the default cross-entropy."""

    kind: str = "cross_entropy"
    label_smoothing: float = 0.0
    focal_gamma: float = 2.0
    ohem_threshold: float = 0.7
    ohem_min_kept: float = 0.0625
    dice: float = 0.0


PLAIN = Criterion()


def resized_losses(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    criterion: Criterion = PLAIN,
    weights: Tensor | None = None,
) -> Tensor:
    """Losses of every output's logits, resized bilinearly (``align_corners=False``) to target.

    Nothing of label resolution is kept: the gradient is computed in the forward pass, image by image, while
    the logits of that resolution are at hand. For 40 classes these and their softmax would be 2.5 times the
    images, three times over for two modalities and their ensemble. Half types are resized and summed in
    float32. Nothing waits for the device.

    Args:
        logits: ``[outputs, N, K, h, w]``.
        target: ``[N, H, W]`` class indices; pixels of ``ignore_index`` do not count.
        criterion: what is computed.
        weights: ``[K]``, of the classes.

    Returns:
        ``[1, outputs]``, or with Dice ``[2, outputs]``. The first row sums over pixels; of OHEM, it sums over
        images the mean of the hard pixels, weighted by their classes. The second sums Dice over images.
    """
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    weights = None if weights is None else weights.to(wide)
    sums: Tensor = _ResizedLosses.apply(logits.to(wide), target, ignore_index, criterion, weights)  # type: ignore[no-untyped-call]
    return sums


class _ResizedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        criterion: Criterion,
        weights: Tensor | None,
    ) -> Tensor:
        counted = (target != ignore_index).unsqueeze(-1)
        classes = target.unsqueeze(-1).where(counted, 0)
        terms = 2 if criterion.dice > 0 else 1
        needed = ctx.needs_input_grad[0]
        gradients = [torch.empty_like(logits) for _ in range(terms)] if needed else []
        sums = logits.new_empty(terms, *logits.shape[:2])
        # One image at a time: a training step's memory is at its peak here.
        for output, image in product(*map(range, logits.shape[:2])):
            here = slice(image, image + 1)
            log_softmax = _resized_log_softmax(logits[output, here], target.shape[-2:])
            pixels = (log_softmax, classes[here], counted[here])
            # Dice first: the other one overwrites.
            for term in reversed(range(terms)):
                value, slope = _dice(*pixels) if term else _pixel_losses(*pixels, criterion, weights, needed)
                sums[term, output, image] = value
                if needed and slope is not None:
                    gradients[term][output, here] = _before_resizing(slope, counted[here], logits.shape[-2:])
            del log_softmax, pixels, slope  # before the next image's
        ctx.save_for_backward(*gradients)
        return sums.sum(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsums: Tensor) -> tuple[Tensor | None, ...]:
        parts = [
            gradient * own.view(-1, 1, 1, 1, 1)
            for gradient, own in zip(ctx.saved_tensors, dsums, strict=True)
        ]
        return sum(parts[1:], start=parts[0]), None, None, None, None


def _resized_log_softmax(logits: Tensor, size: torch.Size) -> Tensor:
    """``[1, K, h, w]`` to ``[1, H, W, K]``: classes last, as in memory where the network is channels_last."""
    large = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    large = large.permute(0, 2, 3, 1).contiguous()  # log_softmax would keep both while it runs
    return large.log_softmax(-1)


def _before_resizing(
    slope: Tensor,  # [1, H, W, K]
    counted: Tensor,  # [1, H, W, 1]
    size: torch.Size,  # h, w
) -> Tensor:
    """A loss's gradient by the logits before resizing, ``[1, K, h, w]``, from that by the resized ones."""
    slope = slope.masked_fill_(~counted, 0).permute(0, 3, 1, 2)
    gradient: Tensor = torch.ops.aten.upsample_bilinear2d_backward(
        slope, slope.shape[-2:], [*slope.shape[:2], *size], False, None, None
    )
    return gradient


def _pixel_losses(
    log_softmax: Tensor,  # [1, H, W, K]; overwritten
    classes: Tensor,  # [1, H, W, 1]
    counted: Tensor,  # [1, H, W, 1]
    criterion: Criterion,
    weights: Tensor | None,  # [K]
    needed: bool,  # the slope is
) -> tuple[Tensor, Tensor | None]:
    """The sum over an image's pixels, of OHEM their mean; and its gradient by the resized logits.

    The gradient is ``(pull + Σ push) * softmax - pull * one_hot - push``, where ``push`` is what smoothing
    gives to every class; OHEM's share is a factor. Its values where pixels do not count mean nothing.
    """
    own = log_softmax.gather(-1, classes)
    pull = None if weights is None else weights[classes]  # of the true class; None: 1
    share = None
    if criterion.kind == "ohem":
        share = _share_of_hard(own.exp(), counted, pull, criterion)
    gain, push = own, None
    if criterion.kind == "focal":
        modulated, slope_factor = _focal(own, criterion.focal_gamma)
        gain = modulated if pull is None else pull * modulated
        pull = slope_factor if pull is None else pull * slope_factor
    elif criterion.label_smoothing > 0:
        uniform = torch.ones_like(log_softmax[0, 0, 0]) if weights is None else weights
        push = criterion.label_smoothing / log_softmax.shape[-1] * uniform
        pull = (1 - criterion.label_smoothing) * (torch.ones_like(own) if pull is None else pull)
        # Not a matrix product, which a GPU may round to TF32.
        gain = pull * own + (log_softmax * push).sum(-1, keepdim=True)
    elif pull is not None:
        gain = pull * own
    if share is not None:
        gain = share * gain
    # Not a product: what is not counted may be NaN.
    value = -gain.where(counted, 0).sum()
    if not needed:
        return value, None
    slope = log_softmax.exp_()
    if push is not None and pull is not None:
        slope.mul_(pull + push.sum()).sub_(push).scatter_add_(-1, classes, -pull)
    else:
        slope.scatter_add_(-1, classes, slope.new_full((), -1).expand_as(classes))
        if pull is not None:
            slope.mul_(pull)
    return value, slope if share is None else slope.mul_(share)


def _share_of_hard(own: Tensor, counted: Tensor, weights: Tensor | None, criterion: Criterion) -> Tensor:
    """Each pixel's share in the mean over an image's hard ones, but for its class's weight; of others 0.

    Args:
        own: ``[1, H, W, 1]`` probability of the true class.
        counted: the same shape.
        weights: of every pixel's class; those of weight 0 are never hard.
    """
    candidates = counted if weights is None else counted & (weights > 0)
    hard = own < criterion.ohem_threshold
    kept = math.ceil(criterion.ohem_min_kept * own.numel())
    if kept > 0:
        # A fixed number, whatever counts, so that no size depends on values; where fewer count, all do.
        least = own.where(candidates, math.inf).flatten().topk(kept, largest=False, sorted=False).values
        hard = hard | (own <= least.amax())
    hard = hard & candidates
    total = (hard.to(own.dtype) if weights is None else weights.where(hard, 0)).sum()
    return (1 / total.where(total > 0, 1)).where(hard, 0)


def _focal(own: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """``(1 - p)^γ log p`` of log p, and the factor that it has the cross-entropy's slope multiplied by."""
    rest = -torch.expm1(own)  # 1 - p, without cancellation
    power = rest**gamma
    ratio = (-own / rest).where(rest > 0, 1)  # its limit where p is 1
    return power * own, power * (1 + gamma * own.exp() * ratio)


def _dice(log_softmax: Tensor, classes: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """An image's Dice loss, 0 where nothing is labeled, and its gradient by the resized logits.

    Args:
        log_softmax: ``[1, H, W, K]``.
        classes, counted: ``[1, H, W, 1]``.
    """
    softmax = log_softmax.exp().masked_fill_(~counted, 0)
    truth, own = classes.flatten(), softmax.gather(-1, classes)
    nothing = own.new_zeros(softmax.shape[-1], dtype=torch.float64)
    # Not of one-hot truth, which takes twice the time.
    size = nothing.scatter_add(0, truth, counted.flatten().double())
    both = nothing.scatter_add(0, truth, own.flatten().double())
    squares = softmax.square()
    present = size > 0
    union = (squares.sum((0, 1, 2)) + size).where(present, 1)
    share = present.double() / present.sum().clamp(min=1)  # of each class in the mean
    value = (share * (1 - 2 * both / union)).sum()
    # The gradient by the softmax is a softmax - b one_hot, and that by the logits follows.
    a, b = (factor.to(own.dtype) for factor in (4 * share * both / union.square(), 2 * share / union))
    pull = own * b[classes]
    slope = squares.mul_(a)
    mean = slope.sum(-1, keepdim=True) - pull
    return value.to(own.dtype), slope.addcmul_(softmax, mean, value=-1).scatter_add_(-1, classes, -pull)
