"""Trace a network of unknown code by one forward pass: where its channels may be exchanged.

Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020, exchange channels after the norms
of spatial convolutions. In networks of other people neither names nor the order of registration tell which
those are, where blocks halve the resolution, or whether stages follow one another; the tensors do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)
# What may come between the image and its convolution, or between a convolution and its norm.
_REARRANGING = (torch.cat, F.pad, Tensor.contiguous, Tensor.permute, Tensor.reshape, Tensor.view)


class Call(NamedTuple):
    """A module that was called, and the tensors that it took and returned."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def halves(self) -> bool:
        """Whether the result has fewer rows than what was taken."""
        rows = [max((x.shape[-2] for x in part if x.dim() == 4), default=0) for part in self[1:]]
        return 0 < rows[1] < rows[0]


@dataclass(frozen=True)
class Trace:
    """A forward pass.

    Attributes:
        norms: names of all norms.
        layer_norms: those of layer norms among them.
        spatial: names of the norms that normalize what a spatial convolution returns, in the order of
            computation.
        stem: names of the weights that read the image.
        calls: of all modules, in the order in which they returned.
        image: the network's input.
        features: what the network returned.
    """

    norms: tuple[str, ...]
    layer_norms: frozenset[str]
    spatial: tuple[str, ...]
    stem: tuple[str, ...]
    calls: tuple[Call, ...]
    image: Tensor
    features: tuple[Tensor, ...]

    def chain(self, units: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Split modules into stages, each of which ends in one of the features.

        Args:
            units: names of the modules to run one after the other.

        Returns:
            Their names by stage; nothing where a module takes anything but the last one's result, or where a
            feature is none of their results.
        """
        wanted = set(units)
        calls = [call for call in self.calls if call.name in wanted]
        before = self.image
        for call in calls:
            if len(call.inputs) != 1 or len(call.outputs) != 1 or call.inputs[0] is not before:
                return ()
            before = call.outputs[0]
        # The last of several: an activation in place returns the tensor that it takes.
        ends = [
            max((i + 1 for i, call in enumerate(calls) if call.outputs[0] is feature), default=0)
            for feature in self.features
        ]
        names = [call.name for call in calls]
        once = len(set(names)) == len(names) and set(names) == wanted
        if not once or ends != sorted(set(ends)) or ends[-1] != len(calls):
            return ()
        return tuple(
            tuple(names[begin:end]) for begin, end in zip((0, *ends), ends, strict=False) if end > begin
        )

    def exchange_points(self) -> tuple[str, ...]:
        """Names of the norms at which channels may be exchanged.

        Batch, instance and group norms after spatial convolutions, as in the paper. Of layer norms those of
        blocks, the innermost modules that a container numbers: in a block that has some after spatial
        convolutions (ConvNeXt) these, else all that are the block's own, norm1 and norm2 in most
        transformers. Those of stems, patch embeddings and downsampling, and those within attention, are none.
        """
        blocks: dict[str, list[str]] = {}
        for norm in self.norms:
            block = norm.rpartition(".")[0]
            if norm in self.layer_norms and block.rpartition(".")[2].isdecimal():
                blocks.setdefault(block, []).append(norm)
        points = set(self.spatial) - self.layer_norms
        for block, own in blocks.items():
            if not any(other.startswith(f"{block}.") for other in blocks):
                points.update([norm for norm in own if norm in self.spatial] or own)
        return tuple(norm for norm in self.norms if norm in points)

    def downsampling(self) -> frozenset[str]:
        """Names of the norms in blocks that halve the resolution.

        A norm's block is the smallest module around it that has other norms, too; without one, the largest
        module around it. The network itself is no block.
        """
        halving = {call.name: call.halves for call in self.calls if call.name}
        found = set()
        for norm in self.norms:
            around = [name for name in _parents(norm) if name in halving]
            blocks = [name for name in around if sum(each.startswith(f"{name}.") for each in self.norms) > 1]
            if halving.get((blocks or around[-1:] or [norm])[0], False):
                found.add(norm)
        return frozenset(found)


def trace(module: nn.Module, image: Tensor) -> Trace:
    """Run a network once and watch it.

    A spatial convolution has a kernel larger than 1x1, grouped and depthwise ones included. Those that read
    the image do not count: the paper's ResNets exchange nothing after their stem either. A norm follows a
    convolution that returned the very tensor it takes; where several are concatenated (DenseNet, mixed
    kernels), one part from a spatial convolution is enough. Norms are torch's batch, instance, layer and
    group norms and their subclasses.

    Args:
        module: a network, whose state and training modes are left as they are.
        image: an input that it runs on in eval mode; on the meta device if the network is.
    """
    origins, calls = _Origins(image), list[Call]()
    spatial: dict[str, None] = {}

    def watch(name: str, layer: nn.Module) -> RemovableHandle:
        def note(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            call = Call(name, tuple(_tensors(inputs)), tuple(_tensors(output)))
            calls.append(call)
            if isinstance(layer, _NORMS) and origins.of_convolution(call.inputs[0]):
                spatial[name] = None

        return layer.register_forward_hook(note)

    handles = [watch(name, layer) for name, layer in module.named_modules()]
    training = {layer: layer.training for layer in module.modules()}
    try:
        with torch.no_grad(), origins:
            features = module.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
        for layer, mode in training.items():
            layer.training = mode
    norms = {name: layer for name, layer in module.named_modules() if isinstance(layer, _NORMS)}
    return Trace(
        tuple(norms),
        frozenset(name for name, layer in norms.items() if isinstance(layer, nn.LayerNorm)),
        tuple(spatial),
        tuple(key for key, weight in module.named_parameters() if origins.reads_image(weight)),
        tuple(calls),
        image,
        tuple(_tensors(features)),
    )


class _Origins(TorchFunctionMode):
    """Knows in a forward pass which tensors are the image or the result of a spatial convolution."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        # By id; the tensors are held, so that no other gets the id of one.
        self._images = {id(image): image}
        self._results: dict[int, Tensor] = {}
        self._stem: dict[int, Tensor] = {}  # weights

    def of_convolution(self, tensor: Tensor) -> bool:
        """Whether it comes from a spatial convolution of anything but the image."""
        return id(tensor) in self._results

    def reads_image(self, weight: Tensor) -> bool:
        """Whether a convolution with this weight took the image."""
        return id(weight) in self._stem

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.conv2d:
            x, weight = args[:2]
            if id(x) in self._images:
                self._stem[id(weight)] = weight
            elif max(weight.shape[2:]) > 1:
                self._results[id(result)] = result
        elif function in _REARRANGING:
            parts = args[0] if function is torch.cat else args[:1]
            for origin in (self._images, self._results):
                if any(id(part) in origin for part in parts):
                    origin[id(result)] = result
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a tensor, or in containers of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _parents(name: str) -> Iterator[str]:
    """The names of the modules around one, the smallest first, without the network's own."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
