"""Providers of the operator's benchmark: cen_ext, its backends and the baselines, each with its inputs.

A provider is a function of one input set and the form in which it takes the set: all modalities stacked, or
lists of M tensors (views of the stacked ones, so that every provider reads the same memory).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

import cen_ext
from bench.baselines import exchange as usual
from bench.harness.shapes import DTYPES, LAYOUTS, SMALL_SCALES, Case, bare

# Relative errors in the Euclidean norm. What is within rounding of the activation's kink may pass a gradient
# in one provider and not in another, which outweighs all other differences: 0.0015 on the largest float32
# shape, 0.026 in bfloat16, where the eager code rounds between its steps.
TOLERANCES = {"float32": 5e-3, "bfloat16": 0.1}
Function = Callable[..., Sequence[Tensor]]


class InputSet(NamedTuple):
    """Tensors of one call; weight, bias and the running statistics are the same ones in every set."""

    x: Tensor  # [M*N, C, H, W]
    weight: Tensor  # [M, C]
    bias: Tensor
    mean: Tensor | None  # running statistics; with batch norm alone
    var: Tensor | None
    residual: Tensor | None  # as x
    dy: Tensor


class Call(NamedTuple):
    """An input set as one provider takes it."""

    arguments: tuple[object, ...]
    leaves: list[Tensor]  # what gradients are asked for: x, weight, bias, residual; or M of each
    dy: list[Tensor]


class Provider(Protocol):
    """Implementation that is timed: its functions, or graphs that replay them."""

    @property
    def name(self) -> str: ...

    @property
    def calls(self) -> list[Call]: ...

    def forward(self, i: int) -> Sequence[Tensor]:
        """Outputs of input set i."""

    def backward(self, i: int, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients with respect to its leaves."""


class FunctionProvider(NamedTuple):
    """A function with its calls of all input sets."""

    name: str
    function: Function
    calls: list[Call]

    def forward(self, i: int) -> Sequence[Tensor]:
        """Outputs of input set i, with gradients recorded."""
        return self.function(*self.calls[i].arguments)

    def backward(self, i: int, outputs: Sequence[Tensor] | Sequence[GradientEdge]) -> Sequence[Tensor]:
        """Gradients with respect to x, weight, bias and the residual."""
        return torch.autograd.grad(outputs, self.calls[i].leaves, self.calls[i].dy)

    def step(self) -> Sequence[Tensor]:
        """Forward and backward of the first input set; y is freed in between, as in training, where the
        next layer's backward pass is done with it."""
        return self.backward(0, [get_gradient_edge(y) for y in self.forward(0)])


def make_sets(case: Case, count: int, device: str = "cpu") -> list[InputSet]:
    """``count`` independent random input sets of a case."""
    # Its own generator: a capture that failed leaves PyTorch's unusable on a GPU.
    here: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    table = (case.shape.num_modalities, case.shape.channels)
    weight = torch.rand(table, **here) + 0.5
    if case.options.threshold > 0:
        small = torch.randperm(weight.numel(), **here)[: round(SMALL_SCALES * weight.numel())]
        weight.view(-1)[small] = case.options.threshold / 2
    bias = torch.randn(table, **here) * 0.3
    running = case.options.norm == "batch"
    mean = torch.randn(table, **here) * 0.3 if running else None
    var = torch.rand(table, **here) + 0.5 if running else None

    def like_x() -> Tensor:
        dtype, layout = DTYPES[case.dtype], LAYOUTS[case.layout]
        empty = torch.empty(case.shape.full, dtype=dtype, device=device, memory_format=layout)
        return empty.normal_(0.5, 2, generator=here["generator"])

    return [
        InputSet(like_x(), weight, bias, mean, var, like_x() if case.residual else None, like_x())
        for _ in range(count)
    ]


def stacked_call(tensors: InputSet) -> Call:
    """Call of an input set as cen_ext takes it: modalities stacked."""
    x, weight, bias, mean, var, residual, dy = tensors
    running = [None if t is None else t.clone() for t in (mean, var)]
    x, weight, bias = (leaf.detach().requires_grad_() for leaf in (x, weight, bias))
    leaves = [x, weight, bias]
    if residual is not None:
        residual = residual.detach().requires_grad_()
        leaves.append(residual)
    return Call((x, weight, bias, *running, residual), leaves, [dy])


def listed_call(tensors: InputSet) -> Call:
    """Call of an input set as the usual code takes it: a list of M tensors for each argument."""
    x, weight, bias, mean, var, residual, dy = tensors
    count = weight.shape[0]

    def split(t: Tensor | None) -> list[Tensor]:
        return [] if t is None else [part.detach() for part in t.chunk(count)]

    def rows(t: Tensor | None) -> list[Tensor]:
        return [] if t is None else [row.clone() for row in t]

    xs, weights, biases, residuals = split(x), rows(weight), rows(bias), split(residual)
    leaves = [leaf.requires_grad_() for leaf in (*xs, *weights, *biases, *residuals)]
    return Call((xs, weights, biases, rows(mean), rows(var), residuals), leaves, split(dy))


def stacked(case: Case, backend: str | None) -> Function:
    """cen_ext's operator."""
    options = case.options._asdict()

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        residual: Tensor | None,
    ) -> Sequence[Tensor]:
        y = cen_ext.norm_exchange(
            x,
            weight,
            bias,
            mean,
            var,
            residual=residual,
            training=case.statistics == "batch",
            backend=backend,
            **options,
        )
        return [y]

    return run


def listed(case: Case, exchange: Callable[[list[Tensor], list[Tensor]], list[Tensor]]) -> Function:
    """The usual code: one norm per modality, the exchange, the residual, the activation in place."""
    options, training = case.options, case.statistics == "batch"

    def normalize(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
        if options.norm == "layer":
            rows = x.movedim(1, -1)
            return F.layer_norm(rows, rows.shape[-1:], weight, bias, options.eps).movedim(-1, 1)
        if options.norm == "instance":
            return F.instance_norm(x, mean, var, weight, bias, eps=options.eps)
        return F.batch_norm(x, mean, var, weight, bias, training, eps=options.eps)

    def run(
        xs: list[Tensor],
        weights: list[Tensor],
        biases: list[Tensor],
        means: list[Tensor],
        variances: list[Tensor],
        residuals: list[Tensor],
    ) -> Sequence[Tensor]:
        none = [None] * len(xs)
        tables = zip(xs, weights, biases, means or none, variances or none, strict=True)
        ys = [normalize(*tensors) for tensors in tables]
        if options.threshold > 0 and len(xs) > 1:
            ys = exchange(ys, usual.replaced(weights, options.threshold, options.region))
        if residuals:
            ys = [y + residual for y, residual in zip(ys, residuals, strict=True)]
        if options.activation == "relu":
            ys = [F.relu_(y) for y in ys]
        elif options.activation == "leaky_relu":
            ys = [F.leaky_relu_(y, options.negative_slope) for y in ys]
        return ys

    return run


def copy(x: Tensor) -> Sequence[Tensor]:
    """The bytes of one pass over x, by the quickest means there is."""
    return [x.clone()]


def compiled(function: Function, mode: str | None = None) -> Function:
    """Under ``torch.compile``, whole and for this shape alone."""
    run: Function = torch.compile(function, dynamic=False, fullgraph=True, mode=mode)
    return run


MAKERS: dict[str, tuple[Callable[[Case], Function], Callable[[InputSet], Call]]] = {
    "cen_ext": (lambda case: stacked(case, None), stacked_call),
    "reference": (lambda case: stacked(case, "reference"), stacked_call),
    "straightforward": (lambda case: listed(case, usual.exchange), listed_call),
    "where": (lambda case: listed(case, usual.exchange_where), listed_call),
    "compile": (lambda case: compiled(listed(case, usual.exchange_where)), listed_call),
    "compile_reference": (lambda case: compiled(stacked(case, "reference")), stacked_call),
    "cuda": (lambda case: stacked(case, "cuda"), stacked_call),
    "triton": (lambda case: stacked(case, "triton"), stacked_call),
    # Without torch.compile's own CUDA graphs, which copy their inputs first; a run makes everybody's.
    "compile_max": (
        lambda case: compiled(listed(case, usual.exchange_where), "max-autotune-no-cudagraphs"),
        listed_call,
    ),
    "norm": (
        lambda case: listed(bare(case), usual.exchange_where),
        lambda tensors: listed_call(tensors._replace(residual=None)),
    ),
    "copy": (lambda case: copy, lambda tensors: Call((tensors.x,), [], [])),
}
UNCHECKED = ("norm", "copy")  # they compute something else
ON_GPUS = ("cuda", "triton")


def unavailable(names: Sequence[str], device: str) -> dict[str, str]:
    """Reasons why providers cannot run on a device, by the names of those that cannot."""
    backends = cen_ext.available_backends()
    reasons = {}
    for name in names:
        if name in ON_GPUS and device == "cpu":
            reasons[name] = "it runs on GPUs"
        elif name in ("cuda", "triton") and backends.get(name) != "ok":
            reasons[name] = backends.get(name, "cen_ext has no such backend")
    return reasons


def make_provider(name: str, case: Case, sets: list[InputSet]) -> FunctionProvider:
    """A provider by name with its calls of all the input sets."""
    function, call = MAKERS[name]
    return FunctionProvider(name, function(case), [call(tensors) for tensors in sets])


def chosen_backend(case: Case, tensors: InputSet) -> str:
    """The backend that ``backend=None`` runs: the first, best first, that does not refuse."""
    for name, state in cen_ext.available_backends().items():
        if state != "ok":
            continue
        try:
            with torch.no_grad():
                stacked(case, name)(*stacked_call(tensors).arguments)
        except RuntimeError:
            continue
        return name
    raise RuntimeError("no backend of cen_ext runs here")


def results(provider: Provider) -> dict[str, Tensor]:
    """y and the gradients of the first input set, stacked, by name."""
    outputs = provider.forward(0)
    tensors = [t.detach() for t in (*outputs, *provider.backward(0, outputs))]
    count = len(outputs)  # 1, or M lists
    parts = [tensors[i : i + count] for i in range(0, len(tensors), count)]
    joined = [torch.stack(part) if part[0].dim() == 1 else torch.cat(part) for part in parts]
    return dict(zip(("y", "dx", "dweight", "dbias", "dresidual"), joined, strict=False))


def check_agreement(case: Case, provider: Provider, expected: dict[str, Tensor]) -> None:
    """Run a provider once, and see that nothing wrong will be timed.

    Raises:
        AssertionError: y or a gradient differs from what is expected, the reference's ``results``, by more
            than the type's tolerance.
    """
    found = results(provider)
    for name, right in expected.items():
        error = relative_error(found[name], right)
        if not error <= TOLERANCES[case.dtype]:
            raise AssertionError(
                f"{provider.name}: {name} of {case} is {error:.2g} off the reference, "
                f"expected at most {TOLERANCES[case.dtype]:.2g}"
            )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Euclidean norm of the difference over that of what is expected."""
    difference, size = (
        torch.linalg.vector_norm(t, dtype=torch.float64).item() for t in (found - expected, expected)
    )
    return difference / size if size > 0 else math.inf
