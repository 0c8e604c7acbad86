"""torch.compile and CUDA graphs: the same step with less of the host's time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.networks.messages import first_line
from models.training import distributed
from models.training.errors import UsageError
from models.training.rng import preserved_rng
from models.training.settings import RunSettings

Recordable = Callable[..., tuple[Tensor, ...]]

# PyTorch's documentation asks for three: libraries choose kernels and allocate in the first ones.
_WARMUP_CALLS = 3
_CAPTURE_ERRORS = "thread_local"  # other threads may allocate meanwhile: the loader's pins batches


def check(run: RunSettings, device: torch.device) -> None:
    """Refuse ``run.compile`` and ``run.cuda_graphs`` where they cannot work, before work starts.

    Raises:
        UsageError: no compiler for the device; no CUDA device, or several processes.
    """
    if run.cuda_graphs and (device.type != "cuda" or distributed.world_size() > 1):
        raise UsageError(
            "run.cuda_graphs=true needs a CUDA device and a single process, "
            f"got {device} and {distributed.world_size()} processes"
        )
    if run.compile:
        try:
            torch.compile(torch.neg, dynamic=False)(torch.ones(64, device=device))
        except Exception as error:  # every part of the compiler has errors of its own
            raise UsageError(
                f"run.compile=true: torch.compile does not work for {device} here ({first_line(error)})"
            ) from None


def compiled(module: nn.Module, run: RunSettings) -> nn.Module:
    """``module``, compiled as one graph for the shapes that it sees if ``run.compile``."""
    if not run.compile:
        return module
    return torch.compile(module, fullgraph=True, dynamic=False)  # type: ignore[return-value]  # a module


class GraphedStep:
    """A function that computes gradients, recorded as a CUDA graph in its first call and replayed since.

    Args:
        function: tensors on one CUDA device, always of the same shapes, to tensors. It must set gradients
            anew, not add to those that are there, and may change buffers.
        module: whose buffers it may change; the calls before the recording leave no trace in them, nor in the
            random generators.
        rest: a second function, of what the first has left behind, such as a graph of gradients. It is
            recorded as a graph of its own, called by ``finish``, so that weights can be updated in between.
    """

    def __init__(self, function: Recordable, module: nn.Module, rest: Recordable | None = None) -> None:
        self.function = function
        self.module = module
        self.rest = rest
        self.graph: torch.cuda.CUDAGraph | None = None
        self.rest_graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()
        self.rest_outputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Replay the function and return its outputs, which the next call overwrites with the gradients."""
        graph = self.graph or self._record(inputs)
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given, non_blocking=True)
        graph.replay()
        return self.outputs

    def finish(self) -> tuple[Tensor, ...]:
        """Replay ``rest`` after a call and return its outputs, which the next one overwrites."""
        assert self.rest_graph is not None, "there is a rest to replay once the first function was called"
        self.rest_graph.replay()
        return self.rest_outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        buffers: list[Any] = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        with preserved_rng(), torch.cuda.stream(stream):
            for _ in range(_WARMUP_CALLS):
                self.function(*self.inputs)
                if self.rest is not None:
                    self.rest()
            for buffer, before in buffers:
                buffer.copy_(before)
        torch.cuda.current_stream().wait_stream(stream)
        graph, rest_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode=_CAPTURE_ERRORS):
            self.outputs = self.function(*self.inputs)
        if self.rest is not None:
            # The first one's memory, since this one reads what lies there; they are always replayed in order.
            with torch.cuda.graph(
                rest_graph, pool=graph.pool(), stream=stream, capture_error_mode=_CAPTURE_ERRORS
            ):
                self.rest_outputs = self.rest()
        self.graph, self.rest_graph = graph, rest_graph
        return graph
