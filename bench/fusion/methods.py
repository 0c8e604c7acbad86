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
    """

    title: str
    settings: tuple[str, ...]
    travel: float | None = None
    like: str = ""

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


METHODS = {
    "rgb": Method("RGB alone", ("fusion=none", "data.modalities=rgb")),
    "depth": Method("depth alone", ("fusion=none", "data.modalities=depth")),
    "none": Method("both, shared, no exchange", ("fusion=none",)),
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
}

# Measured with corrupted inputs as well: trained without modality dropout and with it.
CORRUPTED = ("cen_paper", "cen_paper_dropout")
