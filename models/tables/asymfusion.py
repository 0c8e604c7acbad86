"""The tables of AsymFusion's slides.

Wang et al., "Learning Deep Multimodal Feature Representation with Asymmetric Multi-layer Fusion", ACM MM
2020.
"""

from __future__ import annotations

from models.tables.cen import REMARKS_ON_UNETS, unet_fusion
from models.tables.rows import Figure, Row, Table, scores

_ACCURACY = ("pixel accuracy", "mean accuracy", "IoU")
_EDGE, _DEPTH, _TEXTURE, _SHADE = "edge_occlusion", "depth_euclidean", "edge_texture", "reshading"


def _alone(modality: str) -> tuple[str, ...]:
    return (f"data.modalities={modality}", "fusion=none")


def _nyudv2() -> Table:
    rows = (
        ("RefineNet, rgb", "cen", "101", _alone("rgb"), ("73.8", "58.8", "46.4"), "118.10"),
        ("RefineNet, rgb", "cen", "152", _alone("rgb"), ("74.4", "59.6", "47.6"), "133.74"),
        ("RDFNet", "cen", "101", ("fusion=mmf",), ("75.6", "62.2", "49.1"), "366.71"),
        ("RDFNet", "cen", "152", ("fusion=mmf",), ("76.0", "62.8", "50.1"), "398.00"),
        ("RefineNet, rgb, theirs", "cen", "101", _alone("rgb"), ("73.8", "59.0", "46.5"), "118.10"),
        ("RefineNet, depth, theirs", "cen", "101", _alone("depth"), ("64.0", "45.6", "34.3"), "118.10"),
        ("AsymFusion", "asymfusion", "101", (), ("76.6", "63.5", "50.8"), "118.20"),
        ("AsymFusion", "asymfusion", "152", (), ("77.0", "64.0", "51.2"), "133.89"),
    )
    return Table(
        "AsymFusion: NYUDv2, RefineNet; in per cent",
        "slides",
        _ACCURACY,
        tuple(
            Row(
                method,
                f"nyudv2_{family}_refinenet{depth}",
                overrides,
                f"ResNet-{depth}",
                scores(_ACCURACY, *values),
                Figure(parameters),
            )
            for method, family, depth, overrides, values, parameters in rows
        ),
        remarks=(
            "RDFNet: its fusion block before CEN's decoder, whose parameters are those that the slides print",
            "CFN and SCN, which the slides list as well, have no description that they could be built from",
        ),
    )


def _cityscapes() -> Table:
    rows = {
        "DeepLabv3+, rgb, theirs": ("", _alone("rgb"), "79.4", "43.48a"),
        "DeepLabv3+, depth, theirs": ("", _alone("disparity"), "62.3", "43.48a"),
        "AsymFusion": ("asymfusion_", (), "82.1", "43.52b"),
    }
    return Table(
        "AsymFusion: Cityscapes, DeepLabv3+ with Xception-65, validation; IoU in per cent",
        "slides",
        ("IoU",),
        tuple(
            Row(
                method,
                f"cityscapes_{family}deeplabv3plus_xception65",
                overrides,
                scores=scores(("IoU",), iou),
                parameters=Figure.of(parameters),
            )
            for method, (family, overrides, iou, parameters) in rows.items()
        ),
        notes={
            "a": "Xception-71's, which the slides took over with their neighbors; Xception-65 has 41.05",
            "b": "no set of private norms gives it",
        },
        remarks=("ours: where AsymFusion acts in Xception's blocks, how disparity is encoded, the schedule",),
    )


def _translation() -> Table:
    # By the recipe's name: the inputs, and FID of concat, average, attention, MMF and AsymFusion.
    sets = {
        "shade_depth": ((_SHADE, _DEPTH), ("96.5", "101.3", "87.3", "92.0", "82.5")),
        "normal_texture": (("normal", _TEXTURE), ("88.9", "93.0", "83.3", "85.9", "77.8")),
        "depth_texture_normal": ((_DEPTH, _TEXTURE, "normal"), ("86.4", "90.2", "81.5", "82.1", "75.1")),
        "shade_normal_edge": ((_SHADE, "normal", _EDGE), ("92.8", "94.4", "85.6", "88.6", "79.4")),
    }
    fusions = {"concat": "concat", "average": "average", "attention": "self_attention", "MMF": "mmf"}
    rows = []
    for name, (domains, (*baselines, ours)) in sets.items():
        words = name.replace("_", " + ")
        inputs = f"data.domains={','.join(domains)}"
        for (method, fusion), fid in zip(fusions.items(), baselines, strict=True):
            overrides = (inputs, *unet_fusion(fusion))
            recipe = "taskonomy_cen_depth_normal_rgb"
            rows.append(Row(method, recipe, overrides, words, scores(("FID",), fid)))
        recipe = f"taskonomy_asymfusion_{name}_rgb"
        rows.append(Row("AsymFusion", recipe, (), words, scores(("FID",), ours)))
    return Table(
        "AsymFusion: Taskonomy, translation to RGB by U-Net-256",
        "slides",
        ("FID",),
        tuple(rows),
        remarks=(
            "ours: edge is edge_occlusion, as texture is edge_texture; depth is depth_euclidean; fusion acts "
            "at every level; where AsymFusion acts in a U-Net",
            *REMARKS_ON_UNETS,
        ),
    )


TABLES = {
    "asymfusion-nyudv2": _nyudv2(),
    "asymfusion-cityscapes": _cityscapes(),
    "asymfusion-translation": _translation(),
}
