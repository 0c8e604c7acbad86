"""What a network costs: its parameters and multiply-adds, counted without weights or images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.networks.fusion import FusionStage


def count_parameters(net: nn.Module) -> int:
    """The trainable numbers, as the papers count them: without the ensemble's ``alpha``."""
    return sum(parameter.numel() for name, parameter in net.named_parameters() if name != "alpha")


def count_fusion_parameters(net: nn.Module) -> int:
    """Those of the blocks that a fusion puts after stages; the column "params used for fusion" of Table 2."""
    stages = [module for module in net.modules() if isinstance(module, FusionStage)]
    return sum(parameter.numel() for stage in stages for parameter in stage.parameters())


def count_multiply_adds(net: nn.Module, shape: Sequence[int]) -> int:
    """The multiply-adds of convolutions and matrix products in a forward pass in evaluation mode.

    Norms, activations, pooling and resizing are not counted: for CEN's RefineNet-101 at 480x640 this gives
    617.9 billion, where DFormer's table of costs has 618.7.

    Args:
        net: on any device; on the meta device it takes no memory. In any mode, which is restored.
        shape: of the input, ``[M*N, C, H, W]``.
    """
    device = next(net.parameters()).device
    training = net.training
    net.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(*shape, device=device))
    net.train(training)
    return int(counter.get_total_flops()) // 2
