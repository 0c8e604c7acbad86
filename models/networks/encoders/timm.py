"""Any network of timm that has batch norms, as an encoder for M modalities.

timm's pyramid (``features_only``) goes through ``cen_ext.convert.replace_norms``: convolutions are shared,
norms come from the caller. Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020,
exchange channels after the norms of spatial convolutions. Which those are, one traced forward pass tells: in
timm's networks neither names nor the order of registration do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from cen_ext import ExchangeBatchNorm2d
from cen_ext.convert import replace_norms
from models.networks.branches import stacked_input
from models.networks.messages import first_line, suggest

STRIDES = (4, 8, 16, 32)  # of the features that decoders take

# (the original, whether it follows a spatial convolution, the activation to fuse) -> the norm in its place
MakeNorm = Callable[[nn.BatchNorm2d, bool, str], nn.Module]

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
# What may come between the image and its convolution, or between a convolution and its norm.
_REARRANGING = (torch.cat, F.pad, Tensor.contiguous, Tensor.permute, Tensor.reshape, Tensor.view)


class TimmEncoder(nn.Module):
    """A converted feature pyramid of timm; ``timm_encoder`` builds it.

    Args:
        network: ``[M*N, in_channels, H, W]`` to a list of features, finest first.
        num_modalities, channels, in_channels, frozen_statistics: the attributes.
        stem_weights: the attribute, as names in ``network``.
        input_mean, input_std: the attributes.
        left_out: names in timm's whole network that the pyramid does without.

    Attributes:
        channels: of the four features, finest first.
        strides: by which they are smaller than the input: 4, 8, 16 and 32.
        in_channels: channels of every modality's input.
        frozen_statistics: ``train()`` leaves the norms in eval mode: running statistics are used and not
            updated, while weight and bias train.
        stem_weights: names, in the state dict, of weights ``[C, in_channels, h, w]`` that read the image: one
            in most networks, several where branches begin at it, none where it is rearranged before.
        input_mean, input_std: of red, green and blue in [0, 1], that timm's pretrained weights expect.
    """

    strides = STRIDES

    def __init__(
        self,
        network: nn.Module,
        num_modalities: int,
        *,
        channels: Sequence[int],
        in_channels: int,
        frozen_statistics: bool,
        stem_weights: Iterable[str],
        input_mean: Sequence[float],
        input_std: Sequence[float],
        left_out: Iterable[str],
    ) -> None:
        super().__init__()
        self.network = network
        self.num_modalities = num_modalities
        self.channels = tuple(channels)
        self.in_channels = in_channels
        self.frozen_statistics = frozen_statistics
        self.stem_weights = tuple(f"network.{name}" for name in stem_weights)
        self.input_mean = tuple(input_mean)
        self.input_std = tuple(input_std)
        self._left_out = frozenset(left_out)

    def train(self, mode: bool = True) -> TimmEncoder:
        """As ``nn.Module.train``, but with ``frozen_statistics`` the norms stay in eval mode."""
        super().train(mode)
        if self.frozen_statistics:
            for module in self.modules():
                if isinstance(module, ExchangeBatchNorm2d):
                    module.eval()
        return self

    def forward(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Compute features at 1/4, 1/8, 1/16 and 1/32 of the input's size.

        Args:
            x: ``[M*N, in_channels, H, W]`` stacked modality-major, or a sequence of M tensors
                ``[N, in_channels, H, W]``.

        Returns:
            Four ``[M*N, channels[i], h, w]``, finest first.

        Raises:
            ValueError: another number of modalities or channels, or modalities of different shapes.
        """
        return list(self.network(stacked_input(x, self.num_modalities, self.in_channels)))

    def from_pretrained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate timm's state dict of the whole network to this encoder's names, without classifier.

        What lies behind the last feature is left out with it; names that timm's network does not have stay.
        """
        own = self.network.state_dict()
        return {
            f"network.{_own_name(key, own)}": value
            for key, value in state.items()
            if key not in self._left_out
        }


def timm_encoder(
    name: str,
    num_modalities: int,
    make_norm: MakeNorm,
    *,
    in_channels: int = 3,
    frozen_statistics: bool = True,
) -> TimmEncoder:
    """Build timm's network of that name, with random weights, for M modalities.

    Args:
        name: from ``timm.list_models()``. Nothing is downloaded.
        num_modalities: M >= 1.
        make_norm: called as ``make_norm(original, exchange_point, activation)`` for every norm, where
            ``exchange_point`` says that it follows a spatial convolution (``spatial_norms``);
            ``cen_ext.convert.replace_norms`` says what it returns.
        in_channels: channels of every modality's input.
        frozen_statistics: as the attribute of ``TimmEncoder``.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such network, or one that is not a pyramid of strides 4, 8, 16 and 32, has no
            norms that exchange, or norms that would mix the modalities; num_modalities or in_channels
            below 1.
    """
    for argument, value in (("num_modalities", num_modalities), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    timm = _timm()
    if not timm.is_model(name):
        raise ValueError(f"encoder: timm has no network {name!r}{suggest(name, timm.list_models())}")
    config = timm.get_pretrained_cfg(name)
    options = {"pretrained": False, "in_chans": in_channels}
    with torch.device("meta"):  # to look at: names, shapes and the order of computation take no memory
        whole = timm.create_model(name, **options).state_dict()
        pyramid = _pyramid(timm, name, options)
        trace = _trace(pyramid, torch.empty(1, in_channels, *config.input_size[1:]))
    own = pyramid.state_dict()
    stem_weights = [key for key in trace.stem if own[key].shape[1] == in_channels]
    network = replace_norms(_pyramid(timm, name, options), make_norm, trace.norms)
    encoder = TimmEncoder(
        network,
        num_modalities,
        channels=pyramid.feature_info.channels(),
        in_channels=in_channels,
        frozen_statistics=frozen_statistics,
        stem_weights=stem_weights,
        input_mean=config.mean,
        input_std=config.std,
        left_out=(key for key in whole if _own_name(key, own) not in own),
    )
    return encoder.train()


def spatial_norms(module: nn.Module, image: Tensor) -> list[str]:
    """Names of the norms that normalize what a spatial convolution returns, in the order of computation.

    A spatial convolution has a kernel larger than 1x1, grouped and depthwise ones included. Those that read
    the image do not count: the paper's ResNets exchange nothing after their stem either. A norm follows a
    convolution that returned the very tensor it takes; where several are concatenated (DenseNet, mixed
    kernels), one part from a spatial convolution is enough. Norms are torch's batch and instance norms and
    their subclasses.

    Args:
        module: a network, whose state and training modes are left as they are.
        image: an input that it runs on once, in eval mode; on the meta device if the network is.
    """
    return _trace(module, image).norms


class _Trace(NamedTuple):
    """Names of the norms that follow a spatial convolution, and of the weights that read the image."""

    norms: list[str]
    stem: list[str]


def _trace(module: nn.Module, image: Tensor) -> _Trace:
    origins = _Origins(image)
    norms: dict[str, None] = {}

    def watch(name: str, norm: nn.Module) -> RemovableHandle:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if origins.of_convolution(inputs[0]):
                norms[name] = None

        return norm.register_forward_pre_hook(note)

    handles = [watch(name, norm) for name, norm in module.named_modules() if isinstance(norm, _NORMS)]
    training = {layer: layer.training for layer in module.modules()}
    try:
        with torch.no_grad(), origins:
            module.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
        for layer, mode in training.items():
            layer.training = mode
    return _Trace(
        list(norms), [key for key, weight in module.named_parameters() if origins.reads_image(weight)]
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


def _timm() -> ModuleType:
    try:
        import timm  # here, so that the other networks need torch alone
    except ImportError as error:
        raise ImportError("encoders of timm need it: pip install 'cen_ext[timm]'") from error
    module: ModuleType = timm
    return module


def _pyramid(timm: ModuleType, name: str, options: Mapping[str, Any]) -> Any:
    """The network without what follows its last feature, returning the last four."""
    last = tuple(range(-len(STRIDES), 0))
    try:
        pyramid = timm.create_model(name, features_only=True, out_indices=last, **options)
    except (AssertionError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"encoder: timm's {name} has no features of strides {STRIDES}: {first_line(error)}"
        ) from error
    strides = tuple(pyramid.feature_info.reduction())
    if strides != STRIDES:
        raise ValueError(
            f"encoder: timm's {name} ends in features of strides {strides}, and decoders take {STRIDES}"
        )
    return pyramid


def _own_name(key: str, own: Mapping[str, Tensor]) -> str:
    """The pyramid's name for the whole network's: the same, with a container flattened, or wrapped."""
    candidates = (key, key.replace(".", "_", 1), f"model.{key}")
    return next((name for name in candidates if name in own), key)
