"""Private copies of norms that the operator has no version of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from cen_ext.convert.joining import joined_class, new_joined
from cen_ext.functional import stack_modalities, unstack_modalities
from cen_ext.ops import fx
from cen_ext.ops.refusals import refuse_data_parallel
from cen_ext.tables import PrivateTables

_new_joined = new_joined  # layers that were pickled before name this


class PrivateNorm(PrivateTables):
    """M copies of a norm that treats each row by itself, one per modality, without exchange.

    ``make_multimodal`` makes them of RMSNorm, LayerNorm of several dimensions and others. Each is of its
    original's class, too, and runs that class's forward on the rows of every modality with that modality's
    scales and shifts. Takes the stacked ``[M*N, ...]``, with rows on the first axis. In order "modality",
    windows or patches that a network folds into it behind the rows are rows, too.

    State names are the original's; a ``[*shape]`` entry of a single-modality checkpoint loads into every
    modality.

    Attributes:
        num_modalities: M.
        order: of the rows, as in ``stack_modalities``.
        weight, bias: ``[M, *shape]`` where the original's are ``[*shape]``, as tables that write through
            (``cen_ext.tables.Table``); None where it has none.
    """

    row_shape: tuple[int, ...]
    order: str

    def table_shape(self) -> tuple[int, ...]:
        """``(M, *shape)``."""
        return self.num_modalities, *self.row_shape

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[M*N, ...]``.

        Raises:
            ValueError: the first axis is not divisible by M, or by as many modalities as are present.
        """
        if isinstance(x, Proxy):
            return fx.call_module(self, x)
        results = []
        modalities = range(self.num_modalities) if self.present is None else self.present
        parts = unstack_modalities(x, len(modalities), order=self.order)
        for modality, rows in zip(modalities, parts, strict=True):
            results.append(super(PrivateNorm, self._showing(modality)).forward(rows))
        self.shown = None
        return stack_modalities(results, order=self.order)

    def _showing(self, modality: int) -> PrivateNorm:
        """The layer with the tables of one modality, which is a copy, as other threads may run the layer."""
        single = self
        if not torch.compiler.is_compiling():  # which a compiler would not understand
            single = self.__new__(type(self))
            single.__dict__.update(self.__dict__)
        single.shown = modality
        return single

    def _replicate_for_data_parallel(self) -> Any:
        refuse_data_parallel(self)
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.flatten_tables(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        own = f"num_modalities={self.num_modalities}"
        own += "" if self.order == "modality" else f", order={self.order!r}"
        return ", ".join(filter(None, (super().extra_repr(), own)))


def make_private(
    norm: Any, num_modalities: int, order: str, tables: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Turn a norm of single rows into private copies of itself, in place.

    Args:
        num_modalities, order: attributes of the result.
        tables: what the parameters of the norms before have become; those of this norm are added.
    """
    own = dict(norm.named_parameters(recurse=False))
    norm.__class__ = joined_class(PrivateNorm, type(norm))
    norm.num_modalities, norm.order = num_modalities, order
    norm.row_shape = tuple(next(iter(own.values())).shape)
    for name, parameter in own.items():
        if parameter not in tables:
            stacked = parameter.detach().flatten().repeat(num_modalities)
            tables[parameter] = nn.Parameter(stacked, parameter.requires_grad)
        norm._parameters[name] = tables[parameter]
