"""What PyTorch, and libraries on it, would do wrong with norms of M modalities, and is refused by name."""

from __future__ import annotations

from types import FrameType

# Modules whose functions turn a batch norm into another layer, which takes tables [C] and does not exchange.
_REBUILDING = (
    "apex.parallel",
    "detectron2.layers.batch_norm",
    "timm.layers.norm_act",
    "timm.layers.split_batchnorm",
    "torch.nn.modules.batchnorm",
    "torch.nn.utils.fusion",
    "torch.utils.mkldnn",
)


def refuse_rebuilding(norm: object, reader: FrameType) -> None:
    """Raise TypeError where eps is read, as all that rebuilds a norm must, by a function that would."""
    module = reader.f_globals.get("__name__", "")
    if module.startswith(_REBUILDING):
        raise TypeError(
            f"{module}.{reader.f_code.co_name} cannot turn {type(norm).__name__}, the private norms of "
            "several modalities, into a layer of one: cen_ext.synchronize_statistics synchronizes its "
            "statistics, eval() freezes them"
        )
