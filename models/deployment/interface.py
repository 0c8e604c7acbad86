"""What an exported network takes and returns: plain tensors, in place of modules and their containers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from cen_ext.ops.streams import Streams
from models.networks.private import PrivateConv2d
from models.networks.segmentor import EncoderDecoder
from models.networks.systems.base import LEAST, System
from models.networks.systems.unet import UNet

OUTPUTS = ("ensemble", "branches", "all")
FORMS = ("separate", "stacked")


@dataclass(frozen=True)
class Interface:
    """Names and shapes of an exported network's inputs and outputs.

    Attributes:
        modalities: names of the M modalities, in their order.
        form: ``"separate"``: an input ``[N, 3, H, W]`` for each, of its name; ``"stacked"``: one input
            ``images`` ``[M*N, 3, H, W]``, modality-major.
        outputs: ``"ensemble"`` ``[N, K, h, w]``, ``"branches"`` ``[M, N, K, h, w]``, or ``"all"``, those two.
        multiple: what H and W must be divisible by.
        size: H and W, if they are fixed.
        least: H and W at the least, if they are not: below, a network's coarsest feature is a single pixel,
            which to torch's programs is a case of its own.
    """

    modalities: tuple[str, ...]
    form: str = "separate"
    outputs: str = "ensemble"
    multiple: int = 1
    size: tuple[int, int] | None = None
    least: int = LEAST

    @property
    def input_names(self) -> tuple[str, ...]:
        return self.modalities if self.form == "separate" else ("images",)

    @property
    def output_names(self) -> tuple[str, ...]:
        return OUTPUTS[:2] if self.outputs == "all" else (self.outputs,)

    def arguments(self, images: Tensor) -> tuple[Tensor, ...]:
        """The inputs for stacked images ``[M*N, 3, H, W]``; contiguous, as an AOTInductor package takes any
        memory to be.
        """
        parts = images.chunk(len(self.modalities)) if self.form == "separate" else (images,)
        return tuple(part.contiguous() for part in parts)

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """Which sizes of the inputs may vary, as ``torch.export`` takes it: batch, height and width."""
        batch = Dim("batch", min=1)
        rows = batch if self.form == "separate" else len(self.modalities) * batch
        if self.size is not None:
            return tuple({0: rows} for _ in self.input_names)
        height, width = (Dim(name, min=self.least) for name in ("height", "width"))
        if self.multiple > 1:
            height, width = (self.multiple * Dim(f"{name}_units", min=1) for name in ("height", "width"))
        return tuple({0: rows, 2: height, 3: width} for _ in self.input_names)


class Plain(nn.Module):
    """A pruned network with an interface's inputs and outputs.

    Args:
        net: whose ensemble and branches are wanted.
        interface: their form.
        half: compute in float16; inputs and outputs stay float32.
        layout: to compute in, or None for that of the weights and inputs; outputs are contiguous.
    """

    def __init__(
        self,
        net: nn.Module,
        interface: Interface,
        half: bool = False,
        layout: torch.memory_format | None = None,
    ) -> None:
        super().__init__()
        self.net = net.half() if half else net
        if layout is not None:
            self.net.to(memory_format=layout)  # type: ignore[call-overload]  # torch's annotations lack it
        self.layout = layout
        self.interface = interface
        self.half_precision = half
        self.is_linear_at_end = interface.outputs == "ensemble" and _merge_classifier(self.net)
        self.forward = _with_parameters(self.forward, interface.input_names)  # type: ignore[method-assign]

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """The interface's inputs to its outputs."""
        count = len(self.interface.modalities)
        x = Streams(images) if self.interface.form == "separate" else Streams.of(images[0], count)
        x = x.each(Tensor.half) if self.half_precision else x
        if self.layout is not None:
            x = x.each(Tensor.contiguous, memory_format=self.layout)
        if self.is_linear_at_end:
            found = (self.net.decoder(self.net.encoder(x)),)  # type: ignore[operator]  # modules, as below
        else:
            output = self.net(x)
            values = {"ensemble": output.ensemble, "branches": output.branches}
            found = tuple(values[name] for name in self.interface.output_names)
        return tuple(value.float().contiguous() for value in found)


def _with_parameters(forward: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """A function of any number of tensors as one of parameters, which exported programs' messages name."""

    def named(*images: Tensor) -> Any:
        return forward(*images)

    valid = [
        name if name.isidentifier() and not iskeyword(name) else f"input_{i}" for i, name in enumerate(names)
    ]
    named.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in valid])  # type: ignore[attr-defined]
    return named


class _EnsembleClassifier(nn.Module):
    """The ensemble of a classifier's logits, classified once: the classifier of the weighted features.

    Args:
        classifier: a convolution.
        weights: ``[M]`` of the ensemble, of sum 1, so that biases are the classifier's own.
    """

    def __init__(self, classifier: nn.Module, weights: Sequence[float]) -> None:
        super().__init__()
        self.classifier = classifier
        self.weights = tuple(weights)

    def forward(self, x: Tensor | Streams) -> Tensor:
        """Features ``[M*N, C, h, w]``, stacked or apart, to ``[N, K, h, w]``."""
        parts = Streams.of(x, len(self.weights)).parts
        mixed = sum(part * weight for part, weight in zip(parts, self.weights, strict=True))
        y: Tensor = self.classifier(mixed)
        return y


def _merge_classifier(net: nn.Module) -> bool:
    """Where the branches end in a convolution and their ensemble is a weighted sum, classify that sum.

    Returns:
        Whether that is so: the decoder returns the ensemble then.
    """
    if not isinstance(net, EncoderDecoder) or net.alpha is None or net.num_branches == 1:
        return False
    classifier = getattr(net.decoder, "classifier", None)
    if not isinstance(classifier, nn.Conv2d) or isinstance(classifier, PrivateConv2d):
        return False
    net.decoder.classifier = _EnsembleClassifier(classifier, net.branch_weights())
    return True


def least_of(net: nn.Module) -> int:
    """The least height and width of a network's input where they may vary, see ``Interface``."""
    return net.least if isinstance(net, System) else LEAST


def multiple_of(net: nn.Module) -> int:
    """What the height and width of a network's input must be divisible by."""
    return 1 << len(net.encoder.levels) if isinstance(net, UNet) else 1
