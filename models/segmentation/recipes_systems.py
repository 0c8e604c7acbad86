"""Recipes of the systems that the paper's Table 3 compares with, and of two that came after it.

Each trains as published, as far as that is public, on NYUDv2 as CEN's recipes read it. Where a source crops
or shows rectangles, images are padded to the square that the augmentation cuts; padding has no labels. What
no source tells is ours, and said to be.
"""

from __future__ import annotations

from dataclasses import replace

from models.networks.fusion import Exchange, NoFusion
from models.networks.fusion.squeeze import SEAdd
from models.segmentation.recipes import nyudv2_cen_layer_norm_pvtv2_b2
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

_TEN_METERS = 10.0
_LIKE_CAFFE = (1 / 255,) * 3  # deviations by which colors are from 0 to 255, less the mean

_ESANET_EPOCHS = 500
_ESANET_STEPS = 795 // 8  # in an epoch of NYUDv2


def _stage(
    encoder_lr: float, decoder_lr: float, *, epochs: int = 0, steps: int | None = None
) -> tuple[SegmentationStage, ...]:
    return (SegmentationStage(epochs, steps, encoder_lr, decoder_lr),)


@recipe
def nyudv2_fcn32s() -> SegmentationRecipe:
    """FCN-32s on VGG-16, RGB alone; data.modalities=rgb,hha fuses late, model.fcn_fusion=early at the input.

    Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015: the sum of all pixels'
    losses, whole images one by one, momentum 0.99, rates of 1e-10, twice that for biases. model.weights are
    taken to be Caffe's; with torchvision's set model.weights_input=rgb, and data.mean and data.std to
    ImageNet's. HHA is normalized as colors are, not by its own mean.
    """
    mean = (92.318 / 255, 97.203 / 255, 116.190 / 255)
    return SegmentationRecipe(
        data=DataSettings(
            modalities=("rgb",),
            mean=mean,
            std=_LIKE_CAFFE,
            batch_size=1,
            shorter_side=480,
            scale=(1.0, 1.0),
            crop=640,
        ),
        model=ModelSettings(
            network="fcn32s", encoder="vgg16", weights_input="caffe", frozen_statistics=False
        ),
        fusion=NoFusion(),
        optim=OptimSettings(
            momentum=0.99, weight_decay=5e-4, bias_factor=2.0, stages=_stage(1e-10, 1e-10, steps=300_000)
        ),
        loss=LossSettings(sparsity=0.0, reduction="sum"),
    )


@recipe
def nyudv2_fusenet() -> SegmentationRecipe:
    """FuseNet SF5 on two VGG-16, RGB as torchvision's weights expect it and depth from 0 to 255, at 320x240.

    Hazirbas et al., "FuseNet: Incorporating Depth into Semantic Segmentation via Fusion-based CNN
    Architecture", ACCV 2016: SGD, rates of 1e-3 that fall to 0.9 of themselves every 50,000 steps, classes
    weighted by median frequency. Ours: 300 epochs, and 10 m for the depth of 255.
    """
    return SegmentationRecipe(
        data=DataSettings(
            depth_std=_TEN_METERS / 255, batch_size=4, shorter_side=240, scale=(1.0, 1.0), crop=320
        ),
        model=ModelSettings(network="fusenet", encoder="vgg16", frozen_statistics=False),
        fusion=NoFusion(),
        optim=OptimSettings(
            weight_decay=5e-4,
            schedule="step",
            decay=0.9,
            decay_steps=50_000,
            stages=_stage(1e-3, 1e-3, epochs=300),
        ),
        loss=LossSettings(sparsity=0.0, class_weights="median_frequency"),
    )


@recipe
def nyudv2_acnet() -> SegmentationRecipe:
    """ACNet on three ResNet-50, RGB and depth, with losses at five resolutions.

    Hu et al., "ACNet: Attention Based Network to Exploit Complementary Features for RGBD Semantic
    Segmentation", ICIP 2019: SGD, rates of 2e-3 that fall to 0.8 of themselves every 100 epochs (19,800 steps
    of 4 images), labels resized to the side outputs, classes weighted by median frequency. Ours: 1200 epochs,
    about those of the public checkpoint's name, and the scales.
    """
    return SegmentationRecipe(
        data=DataSettings(
            mean=(0.485, 0.416, 0.398),
            std=(0.264, 0.273, 0.283),
            depth_mean=2.842,
            depth_std=0.993,
            batch_size=4,
            shorter_side=480,
            scale=(1.0, 1.4),
            crop=640,
        ),
        model=ModelSettings(network="acnet", encoder="resnet50", frozen_statistics=False),
        fusion=NoFusion(),
        optim=OptimSettings(
            weight_decay=1e-4,
            schedule="step",
            decay=0.8,
            decay_steps=19_800,
            stages=_stage(2e-3, 2e-3, epochs=1200),
        ),
        loss=LossSettings(
            sparsity=0.0, auxiliary=1.0, auxiliary_size="logits", class_weights="median_frequency"
        ),
    )


@recipe
def nyudv2_adapnetpp() -> SegmentationRecipe:
    """AdapNet++ on ResNet-50, an expert for nyudv2_ssma: RGB, or data.modalities=depth or hha.

    Valada et al., "Self-Supervised Model Adaptation for Multimodal Semantic Segmentation", IJCV 2020: Adam
    with polynomial rates of power 0.9, side outputs weighted by 0.6 and 0.5, images of 768x384. Ours: rates,
    batch and length; the shorter side of 384, padded to squares.
    """
    return SegmentationRecipe(
        data=DataSettings(modalities=("rgb",), batch_size=8, shorter_side=384, scale=(1.0, 1.5), crop=512),
        model=ModelSettings(
            network="adapnetpp", encoder="adapnet_resnet50", dropout=0.7, frozen_statistics=False
        ),
        fusion=NoFusion(),
        optim=OptimSettings(
            method="adamw", weight_decay=0.0, schedule="polynomial", stages=_stage(1e-3, 1e-3, steps=100_000)
        ),
        loss=LossSettings(sparsity=0.0, auxiliary=(0.6, 0.5)),
    )


@recipe
def nyudv2_ssma() -> SegmentationRecipe:
    """SSMA of two AdapNet++, RGB and HHA; model.experts=RGB_RUN,HHA_RUN starts it from nyudv2_adapnetpp's.

    As nyudv2_adapnetpp. Ours: the encoders at a tenth of the rate, as they are trained already.
    """
    expert = nyudv2_adapnetpp()
    return replace(
        expert,
        data=replace(expert.data, modalities=("rgb", "hha")),
        model=replace(expert.model, network="ssma"),
        optim=replace(expert.optim, stages=_stage(1e-4, 1e-3, steps=50_000)),
    )


@recipe
def nyudv2_rdfnet50() -> SegmentationRecipe:
    """RDFNet-50, RGB and HHA; model.encoder=resnet101_v1 or resnet152_v1 for the larger ones.

    Park et al., "RDFNet: RGB-D Multi-Level Residual Feature Fusion for Indoor Semantic Segmentation", ICCV
    2017: SGD, rates of 1e-4, a tenth of it for the encoders, images one by one, scaled by 0.7 to 1.3, and by
    0.6 to 1.2 in evaluation, colors less 128 of 255. model.weights are taken to be Caffe's, as those of
    nyudv2_fcn32s. Ours: 200 epochs.
    """
    return SegmentationRecipe(
        data=DataSettings(
            modalities=("rgb", "hha"),
            mean=(128 / 255,) * 3,
            std=_LIKE_CAFFE,
            batch_size=1,
            shorter_side=480,
            scale=(0.7, 1.3),
            crop=640,
        ),
        model=ModelSettings(network="rdfnet", encoder="resnet50_v1", weights_input="caffe"),
        fusion=NoFusion(),
        optim=OptimSettings(weight_decay=5e-4, stages=_stage(1e-5, 1e-4, epochs=200)),
        loss=LossSettings(sparsity=0.0),
        eval=EvalSettings(scales=(0.6, 0.8, 1.0, 1.2)),
    )


@recipe
def nyudv2_gnn3d() -> SegmentationRecipe:
    """3DGNN's graph of points in space on features of a dilated ResNet-50, whose place and training are ours.

    Qi et al., "3D Graph Neural Networks for RGBD Semantic Segmentation", ICCV 2017, whose network of single
    pixels is only in its archive: ours is CEN's ResNet, with CEN's rates and augmentation.
    """
    return SegmentationRecipe(
        data=DataSettings(modalities=("rgb", "points")),
        model=ModelSettings(network="gnn3d", encoder="resnet50"),
        fusion=NoFusion(),
        loss=LossSettings(sparsity=0.0),
    )


@recipe
def nyudv2_esanet_resnet34_nbt1d() -> SegmentationRecipe:
    """ESANet as published: NYUDv2, RGB and depth, two ResNet-34 of Non-Bottleneck-1D blocks, fused by se_add.

    Seichter et al., "Efficient RGB-D Semantic Segmentation for Indoor Scene Analysis", ICRA 2021: a mean IoU
    of 50.30 %. Published: SGD with momentum 0.9, a highest rate of 0.01 after a tenth of 500 epochs, weight
    decay 1e-4, batches of 8, classes weighted by their median frequency, labels resized to side outputs of
    weight 1, weights of ImageNet (model.weights). What the settings cannot say: crops of 480x640, which are
    squares of 480 here; changes of hue, saturation and value; rates that rise along a cosine, from a 25th of
    the highest one, where they rise linearly from 0 here; raw depth of one channel, normalized by numbers of
    its own.
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
            warmup_steps=_ESANET_EPOCHS // 10 * _ESANET_STEPS,
            stages=(SegmentationStage(epochs=_ESANET_EPOCHS, encoder_lr=0.01, decoder_lr=0.01),),
        ),
        loss=LossSettings(
            sparsity=0.0, auxiliary=1.0, auxiliary_size="logits", class_weights="median_frequency"
        ),
        eval=EvalSettings(interpolation="bilinear"),
    )


@recipe
def nyudv2_cen_esanet_resnet34_nbt1d() -> SegmentationRecipe:
    """nyudv2_esanet_resnet34_nbt1d with exchange in one encoder for both; penalty and threshold as CEN's."""
    published = nyudv2_esanet_resnet34_nbt1d()
    penalty = LossSettings().sparsity
    return replace(published, fusion=Exchange(), loss=replace(published.loss, sparsity=penalty))


@recipe
def nyudv2_cen_segformer_b2() -> SegmentationRecipe:
    """CEN on layer norms as TokenFusion's appendix has it: SegFormer-B2, RGB and depth of NYUDv2.

    Wang et al., CVPR 2022, Table 9: an IoU of 52.1 %, 49.7 % without exchange (``fusion=none``). Network,
    optimizer, rates, stages, batch and augmentation are theirs; ours, what nyudv2_cen_layer_norm_pvtv2_b2
    says, and no stochastic depth. ``model.weights`` takes the public ImageNet weights of MiT-B2, which NVIDIA
    licenses for research alone; without them that recipe's PVTv2 is the free alternative.
    """
    free = nyudv2_cen_layer_norm_pvtv2_b2()
    return replace(free, model=replace(free.model, network="segformer", encoder="mit_b2", dropout=0.1))
