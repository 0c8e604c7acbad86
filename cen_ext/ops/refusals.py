"""What PyTorch, and libraries on it, would do wrong with norms of M modalities, and is refused by name."""

from __future__ import annotations

from types import FrameType
from typing import Protocol

# Modules whose functions turn a norm into another layer, which takes tables [C] and does not exchange.
_REBUILDING = (
    "apex.parallel",
    "detectron2.layers.batch_norm",
    "liger_kernel.transformers.monkey_patch",
    "timm.layers.norm_act",
    "timm.layers.split_batchnorm",
    "torch.ao.nn.quantized.modules.normalization",
    "torch.nn.modules.batchnorm",
    "torch.nn.utils.fusion",
    "torch.utils.mkldnn",
)


class Norm(Protocol):
    """A norm of M modalities."""

    num_modalities: int
    order: str


def refuse_rebuilding(norm: Norm, reader: FrameType) -> None:
    """Raise TypeError where eps is read, as all that rebuilds a norm must, by a function that would."""
    module = reader.f_globals.get("__name__", "")
    if module.startswith(_REBUILDING):
        remedy = ""
        if hasattr(norm, "running_mean"):
            remedy = ": cen_ext.synchronize_statistics synchronizes its statistics, eval() freezes them"
        raise TypeError(
            f"{module}.{reader.f_code.co_name} cannot turn {type(norm).__name__}, the private norms of "
            f"several modalities, into a layer of one{remedy}"
        )


def refuse_data_parallel(norm: Norm) -> None:
    """Raise RuntimeError where a replica's share of the batch would have rows of the wrong modalities."""
    if norm.num_modalities > 1 and norm.order == "modality":
        raise RuntimeError(
            "torch.nn.DataParallel splits the batch axis, along which order='modality' has one modality "
            "after the other: give order='sample' to make_multimodal (or the layers) and to "
            "stack_modalities, or train with DistributedDataParallel"
        )
