"""Any network of ours as it is usually written: lists of M tensors, PyTorch's own layers."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from bench.baselines.exchange import exchange
from cen_ext import Conv3x3
from cen_ext.modules import ExchangeNorm
from cen_ext.ops.activation import ACTIVATIONS
from cen_ext.ops.streams import Streams


class PlainNorm(nn.Module):
    """A batch norm for each modality, the exchange by indexing with booleans, residual and activation.

    Args:
        norm: with running statistics.
    """

    def __init__(self, norm: ExchangeNorm) -> None:
        super().__init__()
        self.norms = nn.ModuleList(_batch_norm(norm, m) for m in range(norm.num_modalities))
        self.masks = list(norm.replaced())
        self.exchanges = any(mask.any() for mask in self.masks)
        self.activation, self.slope = norm.activation, norm.negative_slope

    def forward(self, x: Streams, residual: Streams | None = None) -> Streams:
        count = len(self.norms)
        x = Streams.of(x, count)  # where a library's code has joined the list
        xs = [self.norms[m % count](part) for m, part in enumerate(x.parts)]  # one norm may be shared by all
        if self.exchanges:
            xs = exchange(xs, self.masks)
        if residual is not None:
            xs = [part + other for part, other in zip(xs, Streams.of(residual, count).parts, strict=True)]
        return Streams(ACTIVATIONS[self.activation].value(part, self.slope) for part in xs)


def _batch_norm(norm: ExchangeNorm, m: int) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(norm.num_features, norm.eps)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(plain, name).data.copy_(getattr(norm, name)[m])
    return plain.eval()


class Straightforward(nn.Module):
    """A network whose modalities are lists, ``[M, 3, H, W]`` in and what the network returns out.

    Args:
        net: of batch norms, in evaluation mode.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.num_modalities = net.num_modalities
        self.net = copy.deepcopy(net)
        for name, module in net.named_modules():
            if isinstance(module, ExchangeNorm):
                self.net.set_submodule(name, PlainNorm(module))
            elif isinstance(module, Conv3x3):
                plain = nn.Conv2d(
                    module.in_channels,
                    module.out_channels,
                    3,
                    1,
                    module.padding,
                    module.dilation,
                    bias=module.bias is not None,
                )
                plain.load_state_dict(module.state_dict())
                self.net.set_submodule(name, plain)
        self.net.backend = "reference"  # also for what is no layer
        self.eval()

    def forward(self, x: Tensor) -> object:
        return self.net(Streams(x.chunk(self.num_modalities)))
