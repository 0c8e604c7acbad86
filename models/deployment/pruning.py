"""Leave out of a trained network what its exchange discards.

In evaluation the route of every channel is known: where a modality's channel is replaced and no other
modality borrows it, nothing reads what the convolution makes of it (Wang et al., "Deep Multimodal Fusion by
Channel Exchanging", NeurIPS 2020, Eq. 6). Here each modality gets a convolution of its own, of those channels
alone that somebody reads, with the norm's affine in its weights, and the exchange is a matter of copying.
With half of each of two modalities' channels exchanged, an exchanging convolution costs what it costs one
modality alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves, tree_map

from cen_ext import Conv3x3, ExchangeBatchNorm2d, ExchangeInstanceNorm2d
from cen_ext.modules import ExchangeNorm
from cen_ext.ops.norm_exchange import reference
from cen_ext.ops.norm_exchange.options import Options
from cen_ext.ops.streams import joined
from models.deployment.layers import Exchanged, Own, Place
from models.deployment.pairs import Pair, find_pairs
from models.networks.messages import first_line
from models.networks.private import PrivateConv2d

KERNEL_MULTIPLE = 32  # of channels, as the compiled 3x3 convolution needs


@dataclass(frozen=True)
class Pruned:
    """A network that computes what it uses.

    Attributes:
        net: the network, for evaluation with all modalities.
        channels: by the name of each norm whose convolution makes fewer channels than it made, how many it
            makes for each modality, and how many there are.
    """

    net: nn.Module
    channels: Mapping[str, tuple[tuple[int, ...], int]]


@torch.no_grad()
def prune(net: nn.Module, x: Any, *, multiple: int = KERNEL_MULTIPLE) -> Pruned:
    """A copy of a network without the channels that its exchange discards.

    Its outputs are the network's to rounding. A convolution is pruned if an exchanging norm alone reads what
    it makes: a batch norm with running statistics, or an instance norm with those of each image. One before a
    depthwise convolution is pruned as that is. Other grouped convolutions keep all channels, and so do those
    before layer and group norms, in whose statistics every channel counts. From one such convolution to the
    next modalities are not stacked (``cen_ext.ops.streams``): they have weights of their own, even where no
    channel is left out, as the norm's affine is in them.

    Args:
        net: in evaluation mode, with layers of ``cen_ext``; its thresholds and masks as they are to be used.
        x: an input that it runs on; both networks are run on it, to see which layer reads what, and that
            their outputs agree.
        multiple: keep as many more channels of 3x3 convolutions as make their number a multiple of this. With
            the compiled kernel, which needs 32, they are cheaper than fewer channels without it.

    Raises:
        ValueError: the network is in training mode.
        RuntimeError: the copy cannot run, or its outputs differ: the network's own code does with a stack
            what the copy's layers do not allow for.
    """
    norms = (module for module in net.modules() if isinstance(module, ExchangeNorm))
    if net.training or any(norm.training for norm in norms):
        raise ValueError("net must be in evaluation mode to be pruned: call net.eval() first")
    layers = _layers(net, find_pairs(net, x))
    for layer in reversed(layers):  # what the later ones leave out is not read of the earlier
        layer.choose(multiple)
    pruned, channels = copy.deepcopy(net), {}
    for layer in layers:
        counts = tuple(map(len, layer.kept))
        if min(counts) < layer.channels:
            channels[layer.pair.norm] = (counts, layer.channels)
        _turn(pruned.get_submodule(layer.pair.conv), Own(layer.convolutions()))
        _turn(pruned.get_submodule(layer.pair.norm), layer.exchange())
    pruned.register_forward_hook(_join)
    _check_same(net, pruned.eval(), x)
    return Pruned(pruned, channels)


def _turn(module: nn.Module, other: nn.Module) -> None:
    """Make another module of one, wherever a network refers to it: some do so outside of their submodules."""
    module.__class__, module.__dict__ = type(other), other.__dict__


def _join(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
    """A hook: stack what the network itself returns of its last layers."""
    return tree_map(joined, output)


def _check_same(net: nn.Module, pruned: nn.Module, x: Any) -> None:
    """Compare the outputs of two networks.

    Raises:
        RuntimeError: the second one cannot run, or they differ.
    """
    expected = tree_leaves(net(x))
    try:
        found = tree_leaves(pruned(x))
        torch.testing.assert_close(found, expected, rtol=0, atol=_tolerance(expected), equal_nan=True)
    except Exception as error:  # whatever the network's own code may raise
        raise RuntimeError(
            f"{type(net).__name__} cannot be pruned: {first_line(error)}; it works unpruned"
        ) from error


def _tolerance(outputs: Sequence[Any]) -> float:
    """An absolute one, of rounding through many layers."""
    tensors = [each for each in outputs if isinstance(each, Tensor) and each.is_floating_point()]
    return max(
        (1e4 * torch.finfo(y.dtype).eps * y.abs().amax().item() for y in tensors if y.numel()), default=0.0
    )


def _layers(net: nn.Module, pairs: Sequence[Pair]) -> list[_Layer]:
    """The pairs that can be folded, linked where a depthwise convolution reads another's result."""
    layers: dict[str, _Layer] = {}
    for pair in pairs:
        conv, norm = net.get_submodule(pair.conv), net.get_submodule(pair.norm)
        assert isinstance(conv, _ConvNd)  # as ``find_pairs`` says
        if not isinstance(norm, ExchangeBatchNorm2d | ExchangeInstanceNorm2d):
            continue
        plain = type(norm).forward is ExchangeNorm.forward  # subclasses may do more
        if plain and norm.order == "modality":
            layers[pair.conv] = _Layer(pair, conv, norm)
    for layer in layers.values():
        after = layers.get(layer.pair.feeds or "")
        if after is None or not after.is_depthwise or after.num_modalities != layer.num_modalities:
            continue
        if not layer.replaced.any() and not layer.pair.adds:
            layer.after, after.before = after, layer
    return list(layers.values())


class _Layer:
    """A convolution and its norm, and which of their channels each modality has to make."""

    def __init__(self, pair: Pair, conv: _ConvNd, norm: ExchangeBatchNorm2d | ExchangeInstanceNorm2d) -> None:
        self.pair, self.conv, self.norm = pair, conv, norm
        self.num_modalities, self.channels = norm.table_shape()
        self.is_depthwise = 1 < conv.groups == conv.in_channels == conv.out_channels
        self.before: _Layer | None = None  # makes what this depthwise one reads
        self.after: _Layer | None = None  # a depthwise one that alone reads what this makes
        self.replaced = norm.replaced().cpu()
        lender = None if norm.lender is None else norm.lender.cpu()
        route = reference.route_of(self.replaced.float(), Options(), self.replaced, lender)
        none = torch.zeros(self.num_modalities, *self.replaced.shape, dtype=torch.bool)
        self.lends = none if route is None else reference.lends(route) & self.replaced[:, None]
        self.kept = [list(range(self.channels))] * self.num_modalities

    def choose(self, multiple: int) -> None:
        """Choose the channels to keep; of the layer that this one feeds they are chosen."""
        if self.after is not None:
            self.kept = self.after.kept
            return
        if self.conv.groups > 1 and self.before is None:
            return
        read = ~self.replaced | self.lends.any(0)
        multiple = multiple if isinstance(self.conv, Conv3x3) and self.channels % multiple == 0 else 1
        for row in read:
            row[0] |= not row.any()  # a convolution has a channel
            unread = (~row).nonzero().flatten()
            row[unread[: -int(row.sum()) % multiple]] = True
        self.kept = [row.nonzero().flatten().tolist() for row in read]

    def convolutions(self) -> list[nn.Module]:
        """One for each modality, with the affine of a norm whose statistics are known."""
        return [self._convolution(m) for m in range(self.num_modalities)]

    def _convolution(self, m: int) -> nn.Module:
        conv, channels = self.conv, torch.tensor(self.kept[m], device=self.conv.weight.device)
        weight, bias, module = conv.weight, conv.bias, conv
        if isinstance(conv, PrivateConv2d):
            weight = weight.chunk(self.num_modalities)[m]
            bias = None if bias is None else bias.chunk(self.num_modalities)[m]
            module = conv.of_one_modality()
        made = 1 if isinstance(conv, _ConvTransposeNd) else 0
        scale, shift = self._affine(m, channels)
        wide = weight.double().index_select(made, channels)
        wide = wide * scale.view([-1 if dim == made else 1 for dim in range(wide.dim())])
        if bias is not None:
            shift = shift + bias.double()[channels] * scale
        folded = copy.deepcopy(module)
        channels_last = weight.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last and wide.dim() == 4 else torch.contiguous_format
        folded.weight = _fixed(wide.to(weight.dtype).contiguous(memory_format=layout))
        folded.bias = _fixed(shift.to(weight.dtype))
        folded.out_channels = len(channels)
        if self.is_depthwise:
            folded.in_channels = folded.groups = len(channels)
        return folded

    def _affine(self, m: int, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift, in float64, of what the convolution makes; none if statistics are those of x."""
        norm, ones = self.norm, torch.ones(len(channels), dtype=torch.float64, device=channels.device)
        if norm.running_mean is None or norm.running_var is None:
            return ones, torch.zeros_like(ones)
        scale, shift = self._tables(m, channels)
        scale = scale * (norm.running_var[m, channels].double() + norm.eps).rsqrt()
        return scale, shift - norm.running_mean[m, channels].double() * scale

    def _tables(self, m: int, channels: Tensor) -> tuple[Tensor, Tensor]:
        """The norm's own, in float64."""
        ones = torch.ones(len(channels), dtype=torch.float64, device=channels.device)
        weight, bias = self.norm.table("weight"), self.norm.table("bias")
        return (
            ones if weight is None else weight[m, channels].double(),
            torch.zeros_like(ones) if bias is None else bias[m, channels].double(),
        )

    def exchange(self) -> nn.Module:
        """What takes the norm's place."""
        norm = self.norm
        instance = None
        if norm.running_mean is None:
            instance = Own([self._instance_norm(m) for m in range(self.num_modalities)])
        return Exchanged(
            self._sources() if self.replaced.any() else [],
            [len(kept) for kept in self.kept],
            norm.activation,
            norm.negative_slope,
            norms=instance,
        )

    def _sources(self) -> list[list[list[Place]]]:
        """For each modality and channel, where it or the channels whose mean replaces it are made."""
        places = [{channel: i for i, channel in enumerate(kept)} for kept in self.kept]

        def of(m: int, channel: int) -> list[Place]:
            lenders = self.lends[m, :, channel].nonzero().flatten().tolist()
            makers = lenders if self.replaced[m, channel] else [m]
            return [Place(maker, places[maker][channel]) for maker in makers]

        return [[of(m, channel) for channel in range(self.channels)] for m in range(self.num_modalities)]

    def _instance_norm(self, m: int) -> nn.InstanceNorm2d:
        """Of the channels that modality m makes."""
        channels = torch.tensor(self.kept[m], device=self.conv.weight.device)
        norm = nn.InstanceNorm2d(len(channels), self.norm.eps, affine=True, device=channels.device)
        weight, bias = (table.to(self.conv.weight.dtype) for table in self._tables(m, channels))
        norm.weight, norm.bias = _fixed(weight), _fixed(bias)
        return norm


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
