"""What is compared: one modality alone, no exchange, the blocks of the paper's Table 2, AsymFusion, CEN.

Two CEN differ in λ alone. The paper and its released code name penalties whose ℓ1 travel, the way that the
penalty alone moves a scale over the whole training, differs eightfold: 0.56 and 0.067 (ResNet-101, NYUDv2).
They are two experiments. A shorter training keeps the travel, and with it the experiment, by a larger λ.
"""

from __future__ import annotations

from dataclasses import dataclass

PLACES = {"early": "2", "middle": "3", "late": "4", "all": "1,2,3,4"}  # stages after which Table 2 fuses
SETTINGS = {"shared": "same as ours", "separate": "commonly used"}  # the paper's names of the columns
BLOCKS = {"concat": "concat", "align": "align", "self_attention": "self-attention"}


@dataclass(frozen=True)
class Method:
    """A training to compare.

    Attributes:
        title: in tables.
        settings: of the recipe, what makes it this method.
        travel: of an exchange, how far its penalty moves a scale in the whole training; None without penalty.
        like: the method whose search chooses for this one, too; "": it has its own.
        is_fusion: it joins modalities in the budget's network, and goes on to longer trainings if it is best.
        pretrained: its encoder starts from the given weights.
        experts: methods of one modality each, from whose trainings of the same seed it starts instead.
    """

    title: str
    settings: tuple[str, ...]
    travel: float | None = None
    like: str = ""
    is_fusion: bool = True
    pretrained: bool = True
    experts: tuple[str, ...] = ()

    @property
    def exchanges(self) -> bool:
        return self.travel is not None


def _table2() -> dict[str, Method]:
    return {
        f"{block}_{place}_{setting}": Method(
            f"{words}, {place}, {name}",
            (f"fusion={block}", f"fusion.stages={stages}", f"fusion.setting={setting}"),
        )
        for block, words in BLOCKS.items()
        for place, stages in PLACES.items()
        for setting, name in SETTINGS.items()
    }


# What the budgets set for their network, as it is for systems, which have decoders of their own.
_SYSTEM = ("fusion=none", "model.width=256", "model.decoder_norms=shared", "loss.auxiliary=0.6,0.5")
_ADAPNET = (*_SYSTEM, "model.network=adapnetpp", "model.encoder=adapnet_resnet50", "model.dropout=0.7")


def _systems() -> dict[str, Method]:
    """Systems of the paper's Table 3, on the same data, loss and steps; nothing else of theirs is kept."""
    alone = {
        f"adapnetpp_{modality}": Method(
            f"AdapNet++, {words} alone", (*_ADAPNET, f"data.modalities={modality}"), is_fusion=False
        )
        for modality, words in (("rgb", "RGB"), ("depth", "depth"))
    }
    ssma = Method(
        "SSMA, from both",
        (*_ADAPNET, "model.network=ssma"),
        like="adapnetpp_rgb",
        is_fusion=False,
        experts=tuple(alone),
    )
    fusenet = Method(
        "FuseNet, from random weights",
        (
            *(*_SYSTEM, "model.network=fusenet", "model.encoder=vgg16"),
            *("loss.auxiliary=0.4", "model.dropout=0.5", "data.depth_std=0.0392157"),  # 10 m are 255
        ),
        is_fusion=False,
        pretrained=False,
    )
    return {**alone, "ssma": ssma, "fusenet": fusenet}


METHODS = {
    "rgb": Method("RGB alone", ("fusion=none", "data.modalities=rgb"), is_fusion=False),
    "depth": Method("depth alone", ("fusion=none", "data.modalities=depth"), is_fusion=False),
    "none": Method("both, shared, no exchange", ("fusion=none",), is_fusion=False),
    **_table2(),
    "asymfusion": Method("AsymFusion", ("fusion=asymfusion",)),
    "cen_code": Method("CEN, the code's λ", ("fusion=exchange",), travel=0.067),
    "cen_paper": Method("CEN, the paper's λ", ("fusion=exchange",), travel=0.56),
    "cen_paper_dropout": Method(
        "CEN, the paper's λ, modality dropout",
        ("fusion=exchange", "data.drop_modality=0.5"),
        travel=0.56,
        like="cen_paper",
    ),
    **_systems(),
}

# Measured with corrupted inputs as well: trained without modality dropout and with it.
CORRUPTED = ("cen_paper", "cen_paper_dropout")
