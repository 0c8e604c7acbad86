"""SegFormer of the library transformers, of two modalities: ``python -m examples.segformer ROOT [STEPS]``.

ROOT holds a data set of RGB and depth, as ``cen train`` takes it; ``pip install transformers`` brings the
network. Channels are exchanged at the two norms of each block: their scales choose which, as in the paper.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from cen_ext import make_multimodal, sparsity_penalty
from models.data import SegmentationSet, TrainTransform, train_loader

BLOCK_NORMS = ("layernorm_before", "layernorm_after", "layer_norm_1", "layer_norm_2")  # in any version


def segformer(num_classes: int, threshold: float = 0.02, **config: Any) -> nn.Module:
    """A SegFormer for two stacked modalities; its logits are ``[2*N, num_classes, h/4, w/4]``."""
    single = SegformerForSemanticSegmentation(SegformerConfig(num_labels=num_classes, **config))
    return make_multimodal(single, 2, threshold, where=lambda name, _: name.endswith(BLOCK_NORMS))


def train(net: nn.Module, root: Path, steps: int, crop: int = 224, rate: float = 5e-4) -> list[float]:
    """Train on crops of the data set; the losses, without the penalty on the scales."""
    data = SegmentationSet(root, "train", num_classes=net.config.num_labels)
    transform = TrainTransform(crop=crop, shorter_side=crop * 5 // 4)
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.01)
    losses: list[float] = []
    for epoch in range(steps):
        for batch in train_loader(data, transform, batch_size=4, seed=0, epoch=epoch):
            logits = net(batch.images).logits
            logits = nn.functional.interpolate(logits, size=batch.target.shape[-2:], mode="bilinear")
            loss = nn.functional.cross_entropy(logits, batch.target.repeat(2, 1, 1), ignore_index=255)
            (loss + 1e-4 * sparsity_penalty(net)).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                return losses
    return losses


if __name__ == "__main__":
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    losses = train(segformer(40).train(), Path(sys.argv[1]), steps)
    print(f"loss of the first steps {sum(losses[:5]) / 5:.2f}, of the last {sum(losses[-5:]) / 5:.2f}")
