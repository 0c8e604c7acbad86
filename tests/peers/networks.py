"""Tables of public networks: small ones of as many families as there are, with random weights.

A row says how to make the network and what image it takes; what cannot be converted is in ``REFUSED``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.helpers import vision


class Row(NamedTuple):
    """A network, and the size of an input ``[N, *size]``."""

    make: Callable[[], nn.Module]
    size: tuple[int, ...]


# Image size, and further arguments, of timm's networks. Where batch norms are left with few values, rounding
# changes the gradients: these get larger images.
_ANY_SIZE = """
convformer_s18 convmixer_768_32 convnext_atto_rms convnextv2_atto cpubone_nano cs3darknet_focus_s cs3darknet_s
csatv2 cspnext_tiny cspresnet50 cspresnext50 darknet17 darknetaa53 davit_tiny densenet121 densenetblur121d
dla34 dla46_c dla46x_c dpn48b dpn68b eca_nfnet_l0 eca_resnext26ts edgenext_xx_small efficientnet_b0
efficientnet_b0_g16_evos efficientnet_b0_g8_gn efficientnet_b0_gn efficientnet_lite0 efficientvim_m1
efficientvit_b0 ese_vovnet19b_slim_dw ese_vovnet39b_evos fasternet_t0 fastvit_t8 fbnetc_100 fbnetv3_b
focalnet_tiny_srf gcresnext26ts gernet_s ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a hgnet_tiny
hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto lambda_resnet26t lcnet_035 lcnetv2_small
legacy_seresnet18 legacy_xception lowformer_b0 mambaout_femto mixnet_s mnasnet_050 mobilenet_edgetpu_v2_xs
mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium
mobileone_s0 mobilevit_xxs mobilevitv2_050 nextvit_small nf_ecaresnet26 nf_regnet_b0 poolformer_s12
poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetv_040 regnetx_002 regnety_002 regnetz_b16 regnetz_b16_evos
repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s res2next50 resnest14d resnet10t resnet50_gn
resnetblur18 resnetv2_18 resnetv2_50d_evos resnetv2_50d_frn resnetv2_50d_gn resnext26ts rexnet_100
rexnetr_100 sam2_hiera_tiny selecsls42 seresnext26d_32x4d shvit_s1 skresnet18 spnasnet_100 starnet_s050
test_byobnet test_convnext test_convnext2 test_convnext3 test_efficientnet test_efficientnet_evos
test_efficientnet_gn test_efficientnet_ln test_mambaout test_nfnet test_resnet tf_efficientnet_cc_b0_4e
tf_efficientnetv2_b0 tf_mobilenetv3_small_minimal_100 tiny_vit_5m_224 tinynet_e tresnet_m xception41
xception41p
"""
_BUILT_FOR_A_SIZE = """
cait_xxs24_224 coat_lite_tiny coat_tiny coatnext_nano_rw_224 convit_tiny deit_tiny_distilled_patch16_224
deit_tiny_patch16_224 eca_botnext26ts_256 efficientformerv2_s0 efficientvit_m0 eva02_tiny_patch14_224
gcvit_xxtiny gmixer_12_224 gmlp_ti16_224 hiera_tiny_224 levit_128s levit_conv_128s maxvit_pico_rw_256
maxxvit_rmlp_nano_rw_256 mixer_s32_224 mvitv2_tiny nest_tiny pit_ti_224 pit_ti_distilled_224 resmlp_12_224
sequencer2d_s swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
test_coatnet test_maxvit test_vit test_vit2 test_vit3 test_vit_relpos tnt_s_legacy_patch16_224
twins_pcpvt_small twins_svt_small visformer_tiny vit_tiny_patch16_224 vit_tiny_patch16_dinov3_qkvb
vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xcit_nano_12_p16_224
"""
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: (64, {}) for name in _ANY_SIZE.split()},
    **{name: (64, {"img_size": 64}) for name in _BUILT_FOR_A_SIZE.split()},
    "bat_resnext26ts": (256, {}),
    "beit_base_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "crossvit_tiny_240": (240, {}),
    "efficientformer_l1": (224, {}),
    "efficientvim_m1": (96, {}),
    "efficientvit_m0": (128, {"img_size": 128}),
    "inception_v3": (160, {}),
    "levit_128s": (128, {"img_size": 128}),
    "levit_conv_128s": (128, {"img_size": 128}),
    "naflexvit_base_patch16_gap": (64, {"depth": 2}),
    "samvit_base_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "sehalonet33ts": (256, {}),
    "selecsls42": (96, {}),
    "shvit_s1": (96, {}),
}


def timm_row(name: str) -> Row:
    """A network of timm."""
    size, options = TIMM[name]
    create = vision.timm().create_model
    return Row(lambda: create(name, pretrained=False, num_classes=8, **options), (3, size, size))


# Builders of torchvision.models, by module, with their input sizes.
TORCHVISION: dict[str, tuple[int, ...]] = {
    "convnext_tiny": (3, 64, 64),
    "densenet121": (3, 64, 64),
    "efficientnet_b0": (3, 64, 64),
    "efficientnet_v2_s": (3, 64, 64),
    "googlenet": (3, 64, 64),
    "maxvit_t": (3, 224, 224),
    "mnasnet0_5": (3, 64, 64),
    "mobilenet_v2": (3, 64, 64),
    "mobilenet_v3_small": (3, 64, 64),
    "regnet_x_400mf": (3, 64, 64),
    "regnet_y_400mf": (3, 64, 64),
    "resnet18": (3, 64, 64),
    "resnext50_32x4d": (3, 64, 64),
    "shufflenet_v2_x0_5": (3, 64, 64),
    "squeezenet1_1": (3, 64, 64),
    "swin_t": (3, 64, 64),
    "swin_v2_t": (3, 64, 64),
    "segmentation.deeplabv3_mobilenet_v3_large": (3, 64, 64),
    "segmentation.fcn_resnet50": (3, 64, 64),
    "segmentation.lraspp_mobilenet_v3_large": (3, 64, 64),
    "video.mc3_18": (3, 4, 32, 32),
    "video.r3d_18": (3, 4, 32, 32),
}


def torchvision_row(name: str) -> Row:
    """A network of torchvision."""
    models = vision.torchvision().models
    options: dict[str, Any] = {"weights": None, "num_classes": 8}
    if name.startswith("segmentation."):
        options["weights_backbone"] = None
    if name == "googlenet":
        options |= {"init_weights": False, "aux_logits": False}
    module, _, builder = name.rpartition(".")
    create = getattr(getattr(models, module) if module else models, builder)
    return Row(lambda: create(**options), TORCHVISION[name])


# Classes of monai.networks.nets with their arguments and input sizes.
MONAI: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "AHNet": (
        "AHNet",
        ((1, 1, 1, 1),),
        dict(spatial_dims=2, in_channels=1, out_channels=2, psp_block_num=0),
        (1, 64, 64),
    ),
    "AttentionUnet": ("AttentionUnet", (2, 1, 2, (4, 8, 16), (2, 2)), {}, (1, 32, 32)),
    "AutoEncoder": ("AutoEncoder", (2, 1, 2, (4, 8), (2, 2)), dict(norm="BATCH"), (1, 32, 32)),
    "BasicUNet": ("BasicUNet", (2, 1, 2, (4, 4, 8, 8, 16, 4)), {}, (1, 32, 32)),
    "BasicUNetPlusPlus": ("BasicUNetPlusPlus", (2, 1, 2, (4, 4, 8, 8, 16, 4)), {}, (1, 32, 32)),
    "Classifier": ("Classifier", ((1, 32, 32), 3, (4, 8), (2, 2)), {}, (1, 32, 32)),
    "Critic": ("Critic", ((1, 32, 32), (4, 8), (2, 2)), {}, (1, 32, 32)),
    "DenseNet of volumes": (
        "DenseNet",
        (3, 1, 3),
        dict(init_features=8, growth_rate=4, block_config=(2, 2)),
        (1, 16, 16, 16),
    ),
    "DenseNet121": ("DenseNet121", (2, 1, 3), {}, (1, 64, 64)),
    "Discriminator": ("Discriminator", ((1, 32, 32), (4, 8), (2, 2)), {}, (1, 32, 32)),
    "DynUNet": (
        "DynUNet",
        (3, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2)),
        dict(filters=(4, 8, 16)),
        (1, 16, 16, 16),
    ),
    "DynUNet with batch norm": (
        "DynUNet",
        (2, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2)),
        dict(filters=(4, 8, 16), norm_name="batch"),
        (1, 32, 32),
    ),
    "EfficientNetBN": (
        "EfficientNetBN",
        ("efficientnet-b0",),
        dict(pretrained=False, spatial_dims=2, in_channels=1, num_classes=3),
        (1, 64, 64),
    ),
    "FlexibleUNet": (
        "FlexibleUNet",
        (1, 2, "efficientnet-b0"),
        dict(decoder_channels=(32, 16, 8, 8, 4)),
        (1, 64, 64),
    ),
    "Generator": ("Generator", ((8,), (4, 4, 4), (8, 4), (2, 2)), {}, (8,)),
    "HighResNet": ("HighResNet", (2, 1, 2), dict(norm_type="batch"), (1, 32, 32)),
    "PatchDiscriminator": ("PatchDiscriminator", (2, 4, 1), dict(num_layers_d=2), (1, 32, 32)),
    "Quicknat": ("Quicknat", (), dict(num_classes=2, num_channels=1, num_filters=4), (1, 32, 32)),
    "RegUNet": ("RegUNet", (2, 1, 4, 2), {}, (1, 32, 32)),
    "Regressor": ("Regressor", ((1, 32, 32), (2,), (4, 8), (2, 2)), {}, (1, 32, 32)),
    "ResNet of volumes": (
        "ResNet",
        ("basic", (1, 1, 1, 1), (4, 8, 16, 32)),
        dict(spatial_dims=3, n_input_channels=1, num_classes=3),
        (1, 32, 32, 32),
    ),
    "ResNet with instance norm": (
        "ResNet",
        ("basic", (1, 1, 1, 1), (4, 8, 16, 32)),
        dict(spatial_dims=2, n_input_channels=1, num_classes=3, norm=("instance", {"affine": True})),
        (1, 64, 64),
    ),
    "SegResNet": ("SegResNet", (2, 8, 1, 2), dict(blocks_down=(1, 1), blocks_up=(1,)), (1, 32, 32)),
    "SegResNet with batch norm": (
        "SegResNet",
        (2, 8, 1, 2),
        dict(blocks_down=(1, 1), blocks_up=(1,), norm="BATCH"),
        (1, 32, 32),
    ),
    "SegResNetDS": ("SegResNetDS", (3, 4, 1, 2), dict(blocks_down=(1, 1), norm="batch"), (1, 16, 16, 16)),
    "SwinUNETR": (
        "SwinUNETR",
        (),
        dict(in_channels=1, out_channels=2, feature_size=12, spatial_dims=2, depths=(1, 1, 1, 1)),
        (1, 64, 64),
    ),
    "UNet": ("UNet", (2, 1, 2, (4, 8, 16), (2, 2)), dict(num_res_units=2), (1, 32, 32)),
    "UNet of volumes": (
        "UNet",
        (3, 1, 2, (4, 8, 16), (2, 2)),
        dict(num_res_units=1, norm="batch"),
        (1, 16, 16, 16),
    ),
    "VNet": ("VNet", (2, 1, 2), {}, (1, 32, 32)),
    "ViT": (
        "ViT",
        (1, (32, 32), (16, 16)),
        dict(hidden_size=24, mlp_dim=24, num_layers=1, num_heads=2, spatial_dims=2, classification=True),
        (1, 32, 32),
    ),
}


def monai_row(name: str) -> Row:
    """A network of monai."""
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    builder, args, options, size = MONAI[name]
    return Row(lambda: getattr(nets, builder)(*args, **options), size)


class Rows(nn.Module):
    """All that a network returns, in a row for each of its batch: ``[N, everything]``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        results = [t for t in tree_leaves(self.net(x)) if isinstance(t, Tensor)]
        return torch.cat([t.flatten(1) for t in results], 1)


def prepared(row: Row) -> nn.Module:
    """The network without what draws at random, and without parameters that hide the norms before them.

    Scales that begin at zero or nearly so would hide what a branch does.
    """
    net = Rows(row.make())
    for layer in net.modules():
        for probability in ("p", "drop_prob", "drop_rate", "drop_connect_rate"):
            if isinstance(getattr(layer, probability, None), float):
                setattr(layer, probability, 0.0)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                parameter += 0.2 * torch.rand_like(parameter)
    return net
