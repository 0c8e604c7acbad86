"""The settings of a translation training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.networks.fusion import Exchange, Fusion
from models.networks.fusion.base import FUSIONS
from models.training.absence import require_drop
from models.training.config import choice, setting
from models.training.fusions import WithFusion
from models.training.settings import RunSettings, Stage, UpdateSettings, require, require_at_least
from models.translation.metrics.fid import FidSettings

PASSES = (1, 2)


@dataclass(frozen=True)
class DataSettings:
    """Location, reading and augmentation of the images."""

    root: Path | None = setting(
        None, "the data set's folder, with a layout.json or in Taskonomy's layout; required", resumable=True
    )
    lists: tuple[str, ...] = setting(
        (), "training and validation list in the folder; none: the layout's", resumable=True
    )
    domains: tuple[str, ...] = setting(
        ("reshading", "edge_texture"),
        "inputs, one branch each: modalities of layout.json, or Taskonomy's rgb, normal, reshading, ...",
    )
    target: str = setting("rgb", "the domain that is made of them")
    batch_size: int = setting(1, "views per step, of all processes together")
    resize: int = setting(286, "length in pixels that the shorter side gets before the crop")
    crop: int = setting(256, "side in pixels of the square that training cuts out at random")
    mirror: bool = setting(True, "mirror half of the views")
    drop_modality: float = setting(
        0.0, "probability, per training step, that one input domain chosen at random is absent from it"
    )

    def __post_init__(self) -> None:
        require(len(self.domains) > 0, "domains must name at least one")
        require_at_least(1, self, "batch_size", "resize", "crop")
        require_drop(self.drop_modality, self.domains)


@dataclass(frozen=True)
class ModelSettings:
    """The networks; the arguments of their builders but for what the data decides."""

    start: Path | None = setting(
        None, "run, checkpoint or exported network whose weights the training starts from", resumable=True
    )
    size: int = setting(256, "side of the images that the encoder's last level reduces to one pixel")
    base_width: int = setting(64, "channels of the generator's finest level")
    discriminator_width: int = setting(64, "channels of the discriminator's first level")
    initial_scale: float | None = setting(
        None, "where scales that exchange start, spread by 2 %; none: 1, as pix2pix's"
    )
    decoder_norms: Literal["shared", "private"] = setting(
        "shared", "norms of the decoder: shared by the domains, as in the paper, or private, as released"
    )
    dropout: float = setting(0.5, "probability, in the three coarsest levels of the decoder")

    def __post_init__(self) -> None:
        scale = self.initial_scale
        require(scale is None or scale > 0, f"initial_scale must be positive, got {scale}")
        require(0 <= self.dropout < 1, f"dropout must be from 0 to below 1, got {self.dropout}")


@dataclass(frozen=True)
class TranslationStage(Stage):
    """A stage's learning rates."""

    epochs: int = setting(300, "length in epochs")
    generator_lr: float = setting(2e-4, "learning rate of the generator")
    ensemble_lr: float | None = setting(None, "learning rate of the ensemble's weights; none: generator_lr")
    discriminator_lr: float = setting(2e-4, "learning rate of the discriminator")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(0, self, "generator_lr", "ensemble_lr", "discriminator_lr")


@dataclass(frozen=True)
class OptimSettings(UpdateSettings):
    """The two optimizers, both Adam and set alike; the average is the generator's."""

    betas: tuple[float, float] = setting((0.5, 0.999), "Adam's decays of the gradient's moments")
    passes: int = setting(
        1, "passes of the generator per step; 2, as the released code: one more for the discriminator"
    )
    stages: tuple[TranslationStage, ...] = setting(
        (TranslationStage(),), "stretches of training, one after the other"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.accumulate == 1,
            "accumulate must be 1 in translation: the discriminator learns between the generator's pass and "
            f"its backward pass, so that parts of a batch would save no memory, got {self.accumulate}",
        )
        require(all(0 <= beta < 1 for beta in self.betas), f"betas must be below 1, got {self.betas}")
        require(self.passes in PASSES, f"passes must be 1 or 2, got {self.passes}")


@dataclass(frozen=True)
class LossSettings:
    """The losses."""

    gan: Literal["bce", "hinge", "least_squares"] = setting(
        "bce", "adversarial loss: binary cross-entropy, hinge or least squares"
    )
    l1: float = setting(100.0, "weight of the mean absolute differences from the target")
    sparsity: float = setting(1e-3, "weight of the penalty on the scales")
    per_output: bool = setting(
        False, "add the penalty once for every branch and the ensemble, as the released code"
    )

    def __post_init__(self) -> None:
        require_at_least(0, self, "l1", "sparsity")


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation."""

    batch_size: int = setting(
        1, "views that the generator sees at once; with dropout it sees one after the other", resumable=True
    )
    dropout: bool = setting(
        True,
        "translate with dropout, as the paper; drawn anew for every view, always the same",
        resumable=True,
    )
    limit: int | None = setting(
        None, "number of views to evaluate, spread evenly over all; none: all", resumable=True
    )
    value_range: tuple[float, float] | None = setting(
        None,
        "what -1 and 1 are in MAE, MSE and RMSE; none: 0,1, a range in layout.json, or of depth 0,11.1: "
        "ln(1 + stored)",
        resumable=True,
    )
    best: Literal["l1", "rmse", "psnr", "ssim", "fid", "kid"] = setting(
        "l1", "score of the ensemble by which the best checkpoint is chosen", resumable=True
    )
    pictures: int = setting(
        4, "validation views shown in TensorBoard and in the run's folder", resumable=True
    )
    sheet: int = setting(8, "views on the contact sheet of evaluate and predict; 0: no sheet", resumable=True)
    fid: FidSettings = setting(FidSettings(), "")
    size: Literal["square", "full"] = setting(
        "square",
        "square: the middle, data.crop pixels wide once resized; full: whole images in their own size",
        resumable=True,
    )
    window: int | None = setting(
        None,
        "side in pixels of the overlapping windows that whole images are translated in; none: data.crop",
        resumable=True,
    )
    without: tuple[str, ...] = setting((), "input domains to evaluate without", resumable=True)

    def __post_init__(self) -> None:
        require_at_least(1, self, "batch_size", "limit")
        require_at_least(32, self, "window")
        require_at_least(0, self, "pictures", "sheet")
        if self.value_range is not None:
            low, high = self.value_range
            require(low < high, f"value_range must be low,high with low below high, got {low},{high}")


@dataclass(frozen=True)
class TranslationRecipe(WithFusion):
    """A translation training, whole."""

    data: DataSettings = setting(DataSettings(), "")
    model: ModelSettings = setting(ModelSettings(), "")
    fusion: Fusion = choice(Exchange(threshold=0.01), "how the domains meet in the encoder", FUSIONS)
    optim: OptimSettings = setting(OptimSettings(), "")
    loss: LossSettings = setting(LossSettings(), "")
    eval: EvalSettings = setting(EvalSettings(), "")
    run: RunSettings = setting(RunSettings(), "")
