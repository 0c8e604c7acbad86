"""The recipes of ESANet, as published and with exchange.

Seichter et al., "Efficient RGB-D Semantic Segmentation for Indoor Scene Analysis", ICRA 2021: a mean IoU of
50.30 % on NYUDv2.

What the settings cannot say of that training:

- crops of 480x640: they are squares here, of 480 pixels;
- changes of hue, saturation and value;
- the one-cycle schedule: rates there rise along a cosine, from a 25th of the highest one, during a tenth of
  the epochs, and the momentum may change with them; here they rise linearly from 0 for as many steps;
- labels of side outputs, which there are resized to the logits; here the logits are resized to the labels;
- raw depth of one channel, normalized by its mean and deviation.
"""

from __future__ import annotations

from dataclasses import replace

from models.networks.fusion import Exchange
from models.networks.fusion.squeeze import SEAdd
from models.segmentation.settings import (
    DataSettings,
    EvalSettings,
    LossSettings,
    ModelSettings,
    OptimSettings,
    SegmentationRecipe,
    SegmentationStage,
)
from models.training.registry import recipe

_EPOCHS = 500
_STEPS = 795 // 8  # in an epoch of NYUDv2


@recipe
def nyudv2_esanet_resnet34_nbt1d() -> SegmentationRecipe:
    """ESANet as published: NYUDv2, RGB and depth, two ResNet-34 of Non-Bottleneck-1D blocks, fused by se_add.

    Published: SGD with momentum 0.9, a highest rate of 0.01 after a tenth of 500 epochs, weight decay 1e-4,
    batches of 8, classes weighted by their median frequency, side outputs of weight 1, weights of ImageNet
    (model.weights).
    """
    return SegmentationRecipe(
        data=DataSettings(batch_size=8, shorter_side=480, scale=(1.0, 1.4), crop=480),
        model=ModelSettings(
            network="esanet", encoder="resnet34_nbt1d", frozen_statistics=False, width=512, dropout=0.0
        ),
        fusion=SEAdd(),
        optim=OptimSettings(
            weight_decay=1e-4,
            schedule="cosine",
            warmup_steps=_EPOCHS // 10 * _STEPS,
            stages=(SegmentationStage(epochs=_EPOCHS, encoder_lr=0.01, decoder_lr=0.01),),
        ),
        loss=LossSettings(sparsity=0.0, auxiliary=1.0, class_weights="median_frequency"),
        eval=EvalSettings(interpolation="bilinear"),
    )


@recipe
def nyudv2_cen_esanet_resnet34_nbt1d() -> SegmentationRecipe:
    """nyudv2_esanet_resnet34_nbt1d with exchange in one encoder for both; penalty and threshold as CEN's."""
    published = nyudv2_esanet_resnet34_nbt1d()
    penalty = LossSettings().sparsity
    return replace(published, fusion=Exchange(), loss=replace(published.loss, sparsity=penalty))
