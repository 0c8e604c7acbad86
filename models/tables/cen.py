"""Tables 1, 2, 4 and 5 of CEN, and further targets of its appendix.

Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020. The appendix is quoted after
Table 1 of Wang et al., "Multimodal Token Fusion for Vision Transformers", CVPR 2022.
"""

from __future__ import annotations

from models.tables.rows import Figure, Row, Table, scores

_SEGMENTATION = "nyudv2_cen_refinenet101"
_IOU = ("IoU rgb", "IoU depth", "IoU ensemble")
_FUSIONS = {"concat": "concat", "average": "average", "align": "align", "self-att.": "self_attention"}


_TABLE_1 = {
    "unshared convolutions and norms": (
        ("fusion=none", "fusion.convolutions=private"),
        ("45.5", "35.8", "47.6"),
    ),
    "shared convolutions and norms": (("fusion=none", "fusion.norms=shared"), ("43.7", "35.5", "45.2")),
    "shared convolutions, private norms": (("fusion=none",), ("46.2", "38.4", "48.0")),
    "the same, l1 on half of the channels": (("fusion=none", "fusion.penalty=own"), ("46.0", "38.1", "47.7")),
    "the same, exchanging (CEN)": ((), ("49.7", "45.1", "51.1")),
    "l1 on all channels, exchanging": (("fusion.region=all", "fusion.penalty=all"), ("48.6", "39.0", "49.8")),
}


def _table_1() -> Table:
    rows = [
        Row(method, _SEGMENTATION, overrides, scores=scores(_IOU, *ious))
        for method, (overrides, ious) in _TABLE_1.items()
    ]
    return Table(
        "CEN, Table 1: versions of CEN on NYUDv2, RefineNet with ResNet-101, single scale; IoU in per cent",
        "paper",
        _IOU,
        tuple(rows),
    )


_STAGES = {"early": "2", "middle": "3", "late": "4", "all-stage": "1,2,3,4"}

# By method and stages: IoU and parameters of the setting "commonly used"; IoU of both branches and the
# ensemble, and parameters, of "same as ours"; parameters used for fusion. Parameters are millions.
_TABLE_2 = {
    ("concat", "early"): ("47.2", "120.1", ("47.0", "37.5", "47.6"), "118.8a", "0.6a"),
    ("concat", "middle"): ("46.7", "147.7", ("46.6", "37.0", "47.4"), "120.3", "2.1"),
    ("concat", "late"): ("46.3", "169.0", ("46.3", "37.2", "46.9"), "126.6", "8.4"),
    ("concat", "all-stage"): ("47.5", "171.7", ("47.8", "36.9", "48.3"), "129.4a", "11.2a"),
    ("align", "early"): ("46.4", "238.8", ("46.3", "35.8", "46.7"), "120.8", "2.6"),
    ("align", "middle"): ("47.9", "246.7", ("47.7", "36.0", "48.1"), "128.7", "10.5"),
    ("align", "late"): ("47.6", "278.1", ("47.3", "35.4", "47.6"), "160.1", "41.9"),
    ("align", "all-stage"): ("46.8", "291.9", ("46.6", "35.5", "47.0"), "173.9", "55.7"),
    ("self-att.", "early"): ("47.8", "124.9", ("47.7", "38.3", "48.2"), "123.6a", "5.4a"),
    ("self-att.", "middle"): ("48.3", "166.9", ("48.0", "38.1", "48.7"), "139.4", "21.2"),
    ("self-att.", "late"): ("47.5", "245.5", ("47.6", "38.1", "48.3"), "203.2b", "84.9"),
    ("self-att.", "all-stage"): ("48.7", "272.3b", ("48.5", "37.7", "49.1"), "231.0", "112.8"),
}


def _table_2() -> Table:
    rows = [
        Row(
            f"{name} alone",
            _SEGMENTATION,
            (f"data.modalities={name}", "fusion=none"),
            scores=scores(_IOU, *ious),
            parameters=Figure("118.1"),
        )
        for name, ious in {"rgb": ("45.5", "", ""), "depth": ("", "35.8", "")}.items()
    ]
    for (method, stages), (iou, common, ious, same, for_fusion) in _TABLE_2.items():
        fusion = (f"fusion={_FUSIONS[method]}", f"fusion.stages={_STAGES[stages]}")
        for setting, name, values, parameters in (
            ("separate", "commonly used", ("", "", iou), common),
            ("shared", "same as ours", ious, same),
        ):
            rows.append(
                Row(
                    f"{method} ({stages})",
                    _SEGMENTATION,
                    (*fusion, f"fusion.setting={setting}"),
                    name,
                    scores(_IOU, *values),
                    Figure.of(parameters),
                    Figure.of(for_fusion),
                )
            )
    ours = scores(_IOU, "49.7", "45.1", "51.1")
    rows.append(Row("CEN", _SEGMENTATION, (), "same as ours", ours, Figure("118.2"), Figure("0.0")))
    return Table(
        "CEN, Table 2: fusion methods on NYUDv2, RefineNet with ResNet-101, single scale; IoU in per cent",
        "paper",
        _IOU,
        tuple(rows),
        notes={
            "a": "follows from rounded figures, as 120.1 - 118.1 - 1.4 = 0.6 and 118.2 + 0.6 = 118.8",
            "b": "no arithmetic gives it",
        },
        remarks=(
            "inferred from the table's parameters and IoU: the stages that early, middle and late stand for, "
            "align's three convolutions, and that the joined feature takes the place of rgb's (fused_to)",
            "ours, where the paper says nothing: fused_on and skips, which set where the joined feature goes "
            "when encoders are separate; the weight and the samples of align's MMD",
        ),
    )


_LEVELS = {"early": "1", "middle": "4", "late": "8", "all-layer": "1,2,3,4,5,6,7,8"}
_FID_KID = ("FID", "KID x 100")
_TO_ALL = "ours: the joined feature goes on in all branches, as none is privileged (fused_to=all)"
_NO_NORM = (
    "self-attention ends without its norm, which a batch of one image with one pixel does not have (level 8)"
)
_TABLE_4 = {
    "taskonomy_cen_shade_texture_rgb": (
        "shade + texture",
        ("62.63", "1.65"),
        {
            "concat": (("87.46", "3.64"), ("95.16", "4.67"), ("122.47", "6.56"), ("78.82", "3.13")),
            "average": (("93.72", "4.22"), ("93.91", "4.27"), ("126.74", "7.10"), ("80.64", "3.24")),
            "align": (("99.68", "4.93"), ("95.52", "4.75"), ("98.33", "4.70"), ("92.30", "4.20")),
            "self-att.": (("83.60", "3.38"), ("90.79", "3.92"), ("105.62", "5.42"), ("73.87", "2.46")),
        },
    ),
    "taskonomy_cen_depth_normal_rgb": (
        "depth + normal",
        ("84.33", "2.70"),
        {
            "concat": (("105.17", "5.15"), ("100.29", "3.37"), ("116.51", "5.74"), ("99.08", "4.28")),
            "average": (("109.25", "5.50"), ("104.95", "4.98"), ("122.42", "6.76"), ("99.63", "4.41")),
            "align": (("111.65", "5.53"), ("108.92", "5.26"), ("105.85", "4.98"), ("105.03", "4.91")),
            "self-att.": (("100.70", "4.47"), ("98.63", "4.35"), ("108.02", "5.09"), ("96.73", "3.95")),
        },
    ),
}


def unet_fusion(name: str, levels: str = _LEVELS["all-layer"]) -> tuple[str, ...]:
    """Overrides that put a fusion at levels of a U-Net, which keeps all branches."""
    assignments = [f"fusion={name}", f"fusion.stages={levels}"]
    if name == "mmf":
        assignments.append("fusion.setting=shared")
    if name == "self_attention":
        assignments.append("fusion.norm_at_end=none")
    return (*assignments, *(() if name == "align" else ("fusion.fused_to=all",)))


def _table_4() -> Table:
    rows = []
    for recipe, (inputs, ours, baselines) in _TABLE_4.items():
        rows.append(Row("CEN", recipe, (), inputs, scores(_FID_KID, *ours)))
        for method, figures in baselines.items():
            for (name, levels), values in zip(_LEVELS.items(), figures, strict=True):
                overrides = unet_fusion(_FUSIONS[method], levels)
                rows.append(Row(f"{method} ({name})", recipe, overrides, inputs, scores(_FID_KID, *values)))
    return Table(
        "CEN, Table 4: fusion methods on Taskonomy, translation to RGB by U-Net-256",
        "paper",
        _FID_KID,
        tuple(rows),
        remarks=(_TO_ALL, _NO_NORM),
    )


def _table_5() -> Table:
    rows = {
        "depth": ("113.91", "5.68"),
        "normal": ("108.20", "5.42"),
        "texture": ("97.51", "4.82"),
        "shade": ("100.96", "5.17"),
        "depth_normal": ("84.33", "2.70"),
        "depth_normal_texture": ("60.90", "1.56"),
        "depth_normal_texture_shade": ("57.19", "1.33"),
    }
    return Table(
        "CEN, Table 5: 1 to 4 modalities of Taskonomy, translation to RGB by U-Net-256",
        "paper",
        _FID_KID,
        tuple(
            Row(
                "CEN" if "_" in inputs else "one modality",
                f"taskonomy_{'cen_' if '_' in inputs else ''}{inputs}_rgb",
                (),
                inputs.replace("_", " + "),
                scores(_FID_KID, *values),
            )
            for inputs, values in rows.items()
        ),
    )


_ERRORS = ("10 MAE", "10 RMSE")


def _appendix() -> Table:
    targets = {
        "taskonomy_cen_rgb_shade_normal": "rgb + shade to normal",
        "taskonomy_cen_rgb_normal_shade": "rgb + normal to shade",
        "taskonomy_cen_rgb_texture_depth": "rgb + edge to depth",
    }
    figures = {
        "concat": (("1.34", "2.85"), ("1.28", "2.02"), ("0.33", "0.75")),
        "self-att.": (("1.26", "2.76"), ("1.18", "1.76"), ("0.30", "0.70")),
        "align": (("1.52", "3.25"), ("1.41", "2.21"), ("0.45", "0.90")),
        "CEN": (("1.12", "2.51"), ("1.10", "1.72"), ("0.28", "0.66")),
    }
    rows = [
        Row(
            method if method == "CEN" else f"{method} (all-layer)",
            recipe,
            () if method == "CEN" else unet_fusion(_FUSIONS[method]),
            words,
            scores(_ERRORS, *values[i]),
        )
        for i, (recipe, words) in enumerate(targets.items())
        for method, values in figures.items()
    ]
    return Table(
        "CEN, appendix: other targets on Taskonomy, U-Net-256, as TokenFusion's Table 1 has them",
        "quoted",
        _ERRORS,
        tuple(rows),
        remarks=(
            "RMSE is printed as MSE, but on [-1, 1] that cannot exceed twice the MAE, as seven of these do",
            "ours: edge is edge_texture, depth is depth_euclidean; neither is told",
            _TO_ALL,
            _NO_NORM,
        ),
    )


TABLES = {
    "1": _table_1(),
    "2": _table_2(),
    "4": _table_4(),
    "5": _table_5(),
    "appendix": _appendix(),
}
REMARKS_ON_UNETS = (_TO_ALL, _NO_NORM)
