"""Norms that can have running statistics: batch norm and instance norm."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _NormBase

from cen_ext.functional import norm_exchange
from cen_ext.modules.base import ExchangeNorm, Mask, check_count, ones_of
from cen_ext.ops.norm_exchange.checks import check_number
from cen_ext.ops.norm_exchange.sync import check_process_group


class RunningExchangeNorm(ExchangeNorm, _NormBase):
    """Base of ``ExchangeBatchNorm2d`` and ``ExchangeInstanceNorm2d``: all but the kind of norm.

    Args:
        num_features: channels C.
        num_modalities: M >= 1.
        momentum: weight of a batch in the running statistics; None for their cumulative average.
        track_running_stats: False uses the statistics of x in training and in eval. The default is that of
            torch's layer: True for batch norm, False for instance norm. Set to False on a layer that has
            running statistics, it keeps them as they are; instance norm then uses those of x in eval, too.
        process_group: as in ``norm_exchange``, in training mode; ``synchronize_statistics`` sets it. Deep
            copies keep it; pickling drops it.
        affine, bias: as in torch; the other arguments, and errors, as in ``ExchangeNorm``.
    """

    tracks_by_default: ClassVar[bool]
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        num_modalities: int,
        *,
        threshold: float = 0.0,
        region: str = "own",
        criterion: str = "abs",
        replaced: Tensor | None = None,
        mask: Mask | None = None,
        lender: Tensor | None = None,
        activation: str = "identity",
        negative_slope: float = 0.01,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        track_running_stats: bool | None = None,
        order: str = "modality",
        process_group: dist.ProcessGroup | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("num_features", num_features)
        if momentum is not None:
            check_number("momentum", momentum)
        check_process_group(process_group, self.norm)
        super().__init__(
            num_features,
            num_modalities=num_modalities,
            momentum=momentum,
            track_running_stats=False,  # torch's statistics would be [C]
            threshold=threshold,
            region=region,
            criterion=criterion,
            replaced=replaced,
            mask=mask,
            lender=lender,
            activation=activation,
            negative_slope=negative_slope,
            eps=eps,
            affine=affine,
            bias=bias,
            order=order,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.process_group = process_group
        if track_running_stats is None:
            track_running_stats = self.tracks_by_default
        self.track_running_stats = track_running_stats
        if track_running_stats:
            ones = ones_of(self.table_shape(), device, dtype)
            self.running_mean = torch.zeros_like(ones)
            self.running_var = ones
            self.num_batches_tracked = torch.zeros((), device=ones.device, dtype=torch.long)

    def table_shape(self) -> tuple[int, int]:
        return self.num_modalities, self.num_features

    def normalize(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        training, tracks = self.training, self.track_running_stats
        running_mean, running_var = self.running_mean, self.running_var
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.momentum is None and self.num_batches_tracked is not None:
            momentum = (self.num_batches_tracked + 1).to(weight.dtype).reciprocal()
        process_group = self.process_group if training else None
        # As in torch: in eval mode, batch norm reads what it has, and instance norm what it tracks.
        of_x = training or running_mean is None or not (tracks or self.norm == "batch")
        if of_x and not tracks:
            running_mean = running_var = None
        # Synchronized processes count the same batches, even one whose own batch is empty.
        updates = training and tracks and (x.numel() > 0 or process_group is not None)
        whole = (running_mean, running_var)
        if self.present is not None and running_mean is not None and running_var is not None:
            if updates and self.momentum is None:
                raise ValueError(
                    "momentum=None averages over all batches, which the layer counts for its modalities "
                    "together: give a momentum to train with some of them"
                )
            running_mean, running_var = self.of_present(running_mean), self.of_present(running_var)
        y = norm_exchange(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            residual=residual,
            training=of_x,
            momentum=momentum,
            process_group=process_group,
            **self.call_options(),
        )
        if updates and self.present is not None:
            for table, rows in zip(whole, (running_mean, running_var), strict=True):
                if table is not None and rows is not None:
                    for m, row in zip(self.present, rows, strict=True):
                        table[m].copy_(row)
        if updates and (batches := self.num_batches_tracked) is not None:
            batches.add_(1)
        return y

    def _load_as_torch(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Not instance norm's, which refuses running statistics that it does not track even if not strict.
        _NormBase._load_from_state_dict(self, state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process_group": None}  # process groups cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Layers that were pickled before they were torch's norms lack these.
        self.__dict__.setdefault("affine", True)
        self.__dict__.setdefault("track_running_stats", self.running_mean is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExchangeNorm:
        memo[id(self.process_group)] = self.process_group  # process groups cannot be copied
        return super().__deepcopy__(memo)

    def own_repr(self) -> tuple[str, str]:
        last = f"momentum={self.momentum}, eps={self.eps}, track_running_stats={self.track_running_stats}"
        return str(self.num_features), last


class ExchangeBatchNorm2d(RunningExchangeNorm, nn.BatchNorm2d):
    """Batch norm of M modalities with channel exchange, residual and activation fused.

    ``torch.nn.BatchNorm2d`` per modality, then the exchange. ``eval()`` uses the running statistics while
    ``weight`` and ``bias`` still train, which is the paper's recipe for segmentation.
    Arguments, state and errors: ``RunningExchangeNorm`` and ``ExchangeNorm``.
    """

    norm = "batch"
    tracks_by_default = True


class ExchangeInstanceNorm2d(RunningExchangeNorm, nn.InstanceNorm2d):
    """Instance norm of M modalities with channel exchange, residual and activation fused.

    ``torch.nn.InstanceNorm2d`` with an affine per modality, then the exchange, which depends on its scale.
    Unlike in torch, ``momentum=None`` is the cumulative average here, too.
    Arguments, state and errors: ``RunningExchangeNorm`` and ``ExchangeNorm``.
    """

    norm = "instance"
    tracks_by_default = False
