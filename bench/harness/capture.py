"""A provider's calls as CUDA graphs: its kernels without the host's part."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness.providers import Call, FunctionProvider


class NotCaptured(RuntimeError):
    """The provider does what cannot be captured; the message says what."""


class Graphs(NamedTuple):
    """Forward and backward of one input set; their results are in the same memory after every replay."""

    forward: torch.cuda.CUDAGraph
    outputs: Sequence[Tensor]
    backward: torch.cuda.CUDAGraph
    gradients: Sequence[Tensor]  # none where there is no backward


class GraphedProvider(NamedTuple):
    """In a provider's place: replays instead of calls."""

    name: str
    calls: list[Call]
    graphs: list[Graphs]

    def forward(self, i: int) -> Sequence[Tensor]:
        self.graphs[i].forward.replay()
        return self.graphs[i].outputs

    def backward(self, i: int, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        self.graphs[i].backward.replay()
        return self.graphs[i].gradients


def capture(provider: FunctionProvider) -> GraphedProvider:
    """Capture a provider that has run before, so that whatever compiles at first has compiled.

    Raises:
        NotCaptured: it waits for the device, or cannot be captured for another reason.
    """
    # Autograd's nodes remember the stream that they were made on; none made outside may be left.
    gc.collect()
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    try:
        # A failed capture leaves PyTorch's state in disorder: see first that nothing waits.
        with torch.cuda.stream(stream), waiting_refused():
            _run(provider, 0)
        torch.cuda.synchronize()
        graphs = [_capture_call(provider, i, stream) for i in range(len(provider.calls))]
    except RuntimeError as error:
        torch.cuda.set_stream(current)  # a failed capture may have left its own
        torch.cuda.synchronize()
        raise NotCaptured(str(error).partition("\n")[0]) from error
    return GraphedProvider(provider.name, provider.calls, graphs)


def _run(provider: FunctionProvider, i: int) -> None:
    outputs = provider.forward(i)
    if provider.calls[i].leaves:
        provider.backward(i, outputs)


def _capture_call(provider: FunctionProvider, i: int, stream: torch.cuda.Stream) -> Graphs:
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward, stream=stream):
        outputs = provider.forward(i)
    gradients: Sequence[Tensor] = ()
    if provider.calls[i].leaves:
        with torch.cuda.graph(backward, pool=forward.pool(), stream=stream):
            gradients = provider.backward(i, outputs)
    return Graphs(forward, [y.detach() for y in outputs], backward, gradients)


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Operations that make the host wait for the device raise RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
