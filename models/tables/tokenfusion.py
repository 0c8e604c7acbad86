"""The table of TokenFusion's appendix that has CEN on layer norms.

Wang et al., "Multimodal Token Fusion for Vision Transformers", CVPR 2022.
"""

from __future__ import annotations

from models.tables.rows import Row, Table, scores

_ACCURACY = ("pixel accuracy", "mean accuracy", "IoU")
_RECIPE = "nyudv2_cen_segformer_b2"

TABLES = {
    "tokenfusion-nyudv2": Table(
        "TokenFusion, Table 9: NYUDv2, channels exchanged by the scales of layer norms; in per cent",
        "paper",
        _ACCURACY,
        (
            Row("no exchange", _RECIPE, ("fusion=none",), scores=scores(_ACCURACY, "75.2", "62.5", "49.7")),
            Row("channels", _RECIPE, scores=scores(_ACCURACY, "77.2", "65.0", "52.1")),
        ),
        remarks=(
            "its other two rows exchange tokens, which is not done here",
            "ours: exchange at norm1 and norm2 of each block, threshold and shares; the penalty on these "
            "norms alone; no stochastic depth",
            "the ImageNet weights of SegFormer-B2's encoder are for research alone. "
            "nyudv2_cen_layer_norm_pvtv2_b2 trains the same on free ones: PVTv2-B2, of the same widths and "
            "depths, and RefineNet",
        ),
    )
}
