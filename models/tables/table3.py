"""Table 3 of CEN, the systems that it is compared with, and three that came after it.

Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020. Figures of RDFNet-50 are those of
its paper (Park et al., ICCV 2017); of ESANet those of its authors (Seichter et al., ICRA 2021) and of
TokenFusion (Wang et al., CVPR 2022) those of its Table 9 and its authors, and their parameters those of
DFormer's table of costs (Yin et al., ICLR 2024).
"""

from __future__ import annotations

from models.tables.rows import Figure, Row, Table, scores

_SCORES = ("NYUDv2 pixel", "NYUDv2 mean", "NYUDv2 IoU", "SUN pixel", "SUN mean", "SUN IoU")
_ALONE = ("data.modalities=rgb", "fusion=none")
_NO_LAYERS = "neither code nor a list of its layers is public"
_TOKENS = "it exchanges tokens, which is not done here"


def _refinenet(depth: int, *overrides: str) -> tuple[str, tuple[str, ...]]:
    return f"nyudv2_cen_refinenet{depth}", overrides


def _rivals() -> list[Row]:
    return [
        Row(
            "FCN-32s, rgb",
            "nyudv2_fcn32s",
            ("data.modalities=rgb",),
            "VGG16",
            scores(_SCORES, "60.0", "42.2", "29.2", "68.4", "41.1", "29.0"),
        ),
        Row(
            "RefineNet, rgb",
            *_refinenet(101, *_ALONE),
            "ResNet-101",
            scores(_SCORES, "73.8", "58.8", "46.4", "80.8", "57.3", "46.3"),
            Figure("118.1"),
        ),
        Row(
            "RefineNet, rgb",
            *_refinenet(152, *_ALONE),
            "ResNet-152",
            scores(_SCORES, "74.4", "59.6", "47.6", "81.1", "57.7", "47.0"),
            Figure.of("133.74a", "slides"),
        ),
        Row(
            "FuseNet",
            "nyudv2_fusenet",
            (),
            "VGG16",
            scores(_SCORES, "68.1", "50.4", "37.9", "76.3", "48.3", "37.3"),
        ),
        Row(
            "ACNet",
            "nyudv2_acnet",
            (),
            "ResNet-50",
            scores(_SCORES, "", "", "48.3", "", "", "48.1"),
            Figure.of("116.6b", "quoted"),
        ),
        Row(
            "SSMA",
            "nyudv2_ssma",
            (),
            "ResNet-50",
            scores(_SCORES, "75.2", "60.5", "48.7", "81.0", "58.1", "45.7"),
            Figure.of("56.44c", "quoted"),
        ),
        Row(
            "SSMA, theirs",
            "nyudv2_ssma",
            ("model.encoder=adapnet_resnet101",),
            "ResNet-101",
            scores(_SCORES, "75.8", "62.3", "49.6", "81.6", "60.4", "47.9"),
        ),
        Row(
            "CBN, theirs",
            *_refinenet(101, "fusion=conditional_norm"),
            "ResNet-101",
            scores(_SCORES, "75.5", "61.2", "48.9", "81.5", "59.8", "47.4"),
        ),
        Row(
            "3DGNN",
            "nyudv2_gnn3d",
            ("model.encoder=resnet101",),
            "ResNet-101",
            scores(_SCORES, "", "", "", "", "57.0", "45.9"),
        ),
        Row(
            "SCN",
            setting="ResNet-152",
            scores=scores(_SCORES, "", "", "49.6", "", "", "50.7"),
            reason=_NO_LAYERS,
        ),
        Row(
            "CFN",
            setting="ResNet-152",
            scores=scores(_SCORES, "", "", "47.7", "", "", "48.1"),
            reason=_NO_LAYERS,
        ),
        Row(
            "RDFNet",
            "nyudv2_rdfnet50",
            (),
            "ResNet-50",
            scores(_SCORES, "74.8", "60.4", "47.7", "", "", ""),
            origin="quoted",
        ),
        Row(
            "RDFNet",
            "nyudv2_rdfnet50",
            ("model.encoder=resnet101_v1",),
            "ResNet-101",
            scores(_SCORES, "75.6", "62.2", "49.1", "80.9", "59.6", "47.2"),
            Figure.of("366.71d", "slides"),
        ),
        Row(
            "RDFNet",
            "nyudv2_rdfnet50",
            ("model.encoder=resnet152_v1",),
            "ResNet-152",
            scores(_SCORES, "76.0", "62.8", "50.1", "81.5", "60.1", "47.7"),
            Figure.of("398.00d", "slides"),
        ),
    ]


def _ours() -> list[Row]:
    """CEN's own rows."""
    return [
        Row(
            "CEN, RefineNet",
            *_refinenet(101),
            "ResNet-101, single-scale",
            scores(_SCORES, "76.2", "62.8", "51.1", "82.0", "60.9", "49.6"),
            Figure("118.2"),
        ),
        Row(
            "CEN, RefineNet",
            *_refinenet(101),
            "ResNet-101",
            scores(_SCORES, "77.2", "63.7", "51.7", "82.8", "61.9", "50.2"),
            Figure("118.2"),
        ),
        Row(
            "CEN, RefineNet",
            *_refinenet(152),
            "ResNet-152",
            scores(_SCORES, "77.4", "64.8", "52.2", "83.2", "62.5", "50.8"),
        ),
        Row(
            "CEN, PSPNet",
            "nyudv2_cen_pspnet152",
            (),
            "ResNet-152",
            scores(_SCORES, "77.7", "65.0", "52.5", "83.5", "63.2", "51.1"),
        ),
    ]


def _later() -> list[Row]:
    """Systems that came after it, and the exchange in them."""
    nbt1d, b2 = "ResNet-34 NBt1D", "SegFormer-B2"
    return [
        Row(
            "ESANet",
            "nyudv2_esanet_resnet34_nbt1d",
            (),
            nbt1d,
            scores(_SCORES, "", "", "50.3", "", "", "48.2"),
            Figure.of("31.2b"),
            origin="quoted",
        ),
        Row("ESANet, exchanging", "nyudv2_cen_esanet_resnet34_nbt1d", (), nbt1d),
        Row(
            "no exchange",
            "nyudv2_cen_segformer_b2",
            ("fusion=none",),
            b2,
            scores(_SCORES, "75.2", "62.5", "49.7", "", "", ""),
            origin="quoted",
        ),
        Row(
            "CEN, by layer norms",
            "nyudv2_cen_segformer_b2",
            (),
            b2,
            scores(_SCORES, "77.2", "65.0", "52.1", "", "", ""),
            origin="quoted",
        ),
        Row(
            "TokenFusion",
            setting=b2,
            scores=scores(_SCORES, "78.6", "66.2", "53.3", "", "", "51.4"),
            parameters=Figure.of("26.0b"),
            origin="quoted",
            reason=_TOKENS,
        ),
    ]


TABLES = {
    "3": Table(
        "CEN, Table 3: NYUDv2 and SUN RGB-D; in per cent",
        "paper",
        _SCORES,
        (*_rivals(), *_ours(), *_later()),
        notes={
            "a": "as AsymFusion's slides print it",
            "b": "as DFormer's table of costs has it",
            "c": "with 12 classes, as SSMA's own paper has it",
            "d": "of its fusion block before CEN's decoder, as AsymFusion's slides count",
        },
        remarks=(
            "commands train on NYUDv2; for SUN RGB-D, data.root=FOLDER of it and data.num_classes=37",
            "CEN's rows are multi-scale but for the one that says single-scale, of scales that are not told "
            "(eval.scales, eval.flip); those of the others are as their papers have them",
            "theirs: built by CEN's authors, without public code; CBN is conditional batch norm",
            "3DGNN: ours but for its graph; on NYUDv2 its own paper has an IoU of 43.1, with VGG16",
            "ESANet's 31.2 million are of a decoder of 128 channels and a block in each module, unlike its "
            "scores: models.esanet(width=128, decreasing=False, blocks=1), 31.22 million",
            "ESANet, exchanging: ours, which no paper has",
        ),
    )
}
