"""The segmentation recipes."""

from __future__ import annotations

from models.segmentation.settings import (
    DataSettings,
    EvalSettings,
    LossSettings,
    ModelSettings,
    OptimSettings,
    SegmentationRecipe,
    SegmentationStage,
    stages,
)
from models.training.registry import recipe
from models.training.settings import RunSettings


@recipe
def nyudv2_cen_refinenet101() -> SegmentationRecipe:
    """The paper's main setting: NYUDv2, RGB and depth, RefineNet on ResNet-101."""
    return SegmentationRecipe()


@recipe
def nyudv2_cen_refinenet152() -> SegmentationRecipe:
    """As nyudv2_cen_refinenet101 with ResNet-152, three stages of 150 epochs."""
    return SegmentationRecipe(
        model=ModelSettings(encoder="resnet152"), optim=OptimSettings(stages=stages(150))
    )


@recipe
def nyudv2_cen_refinenet50() -> SegmentationRecipe:
    """As nyudv2_cen_refinenet101 with ResNet-50."""
    return SegmentationRecipe(model=ModelSettings(encoder="resnet50"))


@recipe
def nyudv2_released_refinenet101() -> SegmentationRecipe:
    """What the authors' released code does: exchange anywhere, a weaker penalty added for every output."""
    return SegmentationRecipe(
        model=ModelSettings(region="all", criterion="abs"),
        loss=LossSettings(sparsity=2e-4, per_output=True),
    )


@recipe
def nyudv2_384_cen_refinenet18() -> SegmentationRecipe:
    """NYUDv2 at 384x288 with ResNet-18, for a CPU; depth from an 8-bit copy at 6528 units a metre."""
    return SegmentationRecipe(
        data=DataSettings(depth_scale=6528.0, batch_size=4, shorter_side=288, crop=256),
        model=ModelSettings(encoder="resnet18", width=128),
        run=RunSettings(log_steps=10, checkpoint_steps=100),
    )


@recipe
def synthetic_demo() -> SegmentationRecipe:
    """Minutes on a CPU: procedural rooms, a narrow RefineNet on ResNet-18, random weights."""
    rates = ((300, 2e-3), (200, 1e-3), (100, 2e-4))
    return SegmentationRecipe(
        data=DataSettings(num_classes=11, batch_size=4, shorter_side=96, scale=(0.75, 1.5), crop=96),
        # Scales that start near the threshold let the exchange begin within the first steps.
        model=ModelSettings(
            encoder="resnet18", frozen_statistics=False, initial_scale=0.05, width=32, dropout=0.1
        ),
        optim=OptimSettings(
            method="adamw",
            stages=tuple(SegmentationStage(steps=n, encoder_lr=rate, decoder_lr=rate) for n, rate in rates),
        ),
        eval=EvalSettings(batch_size=20),
        run=RunSettings(log_steps=50, evaluate_steps=300),
    )
