"""The settings of a segmentation training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.data.images import IMAGENET_MEAN, IMAGENET_STD
from models.data.missing import Missing
from models.data.modalities import FLOORS
from models.networks.encoders import Normalization
from models.networks.fusion import Exchange, Fusion
from models.networks.fusion.base import FUSIONS
from models.segmentation import networks
from models.segmentation.losses import AuxiliarySize
from models.training.absence import require_drop
from models.training.config import choice, recorded, setting
from models.training.fusions import WithFusion
from models.training.settings import RunSettings, Stage, UpdateSettings, require, require_at_least

OF_LAYOUT = (
    "depth_scale",
    "bit_shift",
    "camera",
    "label_offset",
)  # settings that describe files, as layouts do


@dataclass(frozen=True)
class DataSettings:
    """Location, reading and augmentation of the images."""

    root: Path | None = setting(None, "the data set's folder; required", resumable=True)
    layout: str | None = setting(None, "nyu_cen, sun_handa, ...; none: told from the folder", resumable=True)
    lists: tuple[str, ...] = setting(
        (), "training and validation list in the folder; none: the layout's", resumable=True
    )
    modalities: tuple[str, ...] = setting(
        ("rgb", "depth"),
        "inputs, one branch each: rgb, depth, disparity, hha, normals, points, or the layout's own",
    )
    num_classes: int = setting(40, "classes; labels are 0 ... num_classes - 1")
    ignore_index: int = setting(255, "label of pixels that do not count")
    label_offset: int | None = setting(None, "what stored labels add to the class; none: the layout's")
    merge: str | None = setting(None, "nyu13: the 13 classes of stored 40 or 37; none: classes as stored")
    depth_scale: float | None = setting(None, "stored depth units per meter; none: the layout's")
    bit_shift: int | None = setting(
        None, "bits that stored depth is rotated to the right by; none: the layout's"
    )
    camera: tuple[float, ...] = setting(
        (), "fx,fy,cx,cy in pixels of the depth, or of the images it is registered to; none: the layout's"
    )
    hha_floor: int = setting(38, "what computed HHA has for floors: 38; 218 is upside down, as it once was")
    mean: tuple[float, ...] = setting(
        (),
        "of red, green and blue from 0 to 1, by which colors are normalized; none: as the encoder's weights",
    )
    std: tuple[float, ...] = setting((), "standard deviation of the same; none: as the encoder's weights")
    depth_mean: float = setting(0.0, "in the depth's unit, meters where its scale is known; taken off depth")
    depth_std: float = setting(1.0, "in the same unit; what the rest is divided by: 0.0392 makes 10 m 255")
    given: tuple[str, ...] = recorded()
    batch_size: int = setting(6, "images per step, of all processes together")
    shorter_side: int = setting(350, "length in pixels that the shorter side gets before the random scale")
    scale_of: Literal["shorter_side", "image"] = setting(
        "shorter_side", "what is scaled: that length, or the image itself, shorter_side at the least"
    )
    scale: tuple[float, float] = setting((0.5, 2.0), "range of the random scale")
    crop: int = setting(500, "side in pixels of the square crop; padded where the image is smaller")
    missing: Missing = setting(
        "refuse", "scenes that lack a file of some modality: refuse, skip, or fill: do without that branch"
    )
    drop_modality: float = setting(
        0.0, "probability, per training step, that one modality chosen at random is absent from it"
    )

    def __post_init__(self) -> None:
        require(len(self.modalities) > 0, "modalities must name at least one")
        require(len(set(self.modalities)) == len(self.modalities), "modalities must not repeat one")
        require(self.hha_floor in FLOORS, f"hha_floor must be 38 or 218, got {self.hha_floor}")
        require_at_least(2, self, "num_classes")
        require_at_least(1, self, "batch_size", "shorter_side")
        require_at_least(32, self, "crop")
        for name in ("mean", "std"):
            value = getattr(self, name)
            require(len(value) in (0, 3), f"{name} must be three numbers, got {value}")
        require(all(value > 0 for value in self.std), f"std must be positive, got {self.std}")
        require(self.depth_std > 0, f"depth_std must be positive, got {self.depth_std}")
        scale = self.depth_scale
        require(scale is None or scale > 0, f"depth_scale must be positive, got {scale}")
        require(
            0 < self.scale[0] <= self.scale[1] < math.inf, f"scale must be a range above 0, got {self.scale}"
        )
        require_drop(self.drop_modality, self.modalities)

    @property
    def normalization(self) -> Normalization:
        """Of colors; ImageNet's where nothing else is given."""
        return Normalization(self.mean or IMAGENET_MEAN, self.std or IMAGENET_STD)


@dataclass(frozen=True)
class ModelSettings:
    """The network; the arguments of its builder but for what the data decides."""

    network: str = setting(
        "refinenet",
        "refinenet, light_refinenet, pspnet, deeplabv3plus, segformer or esanet; or a system, which fuses in "
        "its own way: fcn32s, fusenet, acnet, adapnetpp, ssma, rdfnet, gnn3d, or another registered one",
    )
    encoder: str = setting(
        "resnet101",
        "resnet18 to resnet152, resnet50_v1 to resnet152_v1 for weights of that form (stride in a 1x1), "
        "xception65, xception71, mit_b0 to mit_b5, resnet34_nbt1d, or another registered one; or timm:NAME; "
        "systems have their own",
    )
    weights: Path | None = setting(
        None,
        "weights of the encoder, torchvision's, timm's or SegFormer's, .pth or .safetensors",
        resumable=True,
    )
    weights_input: Literal["rgb", "bgr", "caffe"] = setting(
        "rgb",
        "what weights were trained on: rgb as torchvision's, bgr, or caffe: bgr up to 255",
        resumable=True,
    )
    start: Path | None = setting(
        None,
        "run, checkpoint or exported network whose weights the whole network starts from",
        resumable=True,
    )
    experts: tuple[Path, ...] = setting(
        (),
        "of ssma: runs or exported networks of one modality each, in the modalities' order, that it starts "
        "from",
        resumable=True,
    )
    frozen_statistics: bool = setting(
        True, "train with the running statistics of the weights, as the paper does"
    )
    initial_scale: float | None = setting(
        None, "where scales that exchange start, if no weights hold them; none: 1"
    )
    width: int = setting(256, "channels of the decoder; 256 in deeplabv3plus's paper, 512 in pspnet's")
    dropout: float = setting(
        0.5, "probability, in the decoder; 0.1 is usual in pspnet, deeplabv3plus and segformer"
    )
    decoder_init: Literal["torch", "kaiming"] = setting(
        "torch",
        "kaiming preserves the variance of activations, a faster start with adamw; of RefineNets",
    )
    decoder_norms: Literal["shared", "private"] = setting(
        "shared", "of deeplabv3plus: shared by the modalities, or one for each; pspnet's are private"
    )
    output_stride: int = setting(16, "of deeplabv3plus's encoder: 16, or 8 with dilations twice as large")
    fcn_fusion: Literal["late", "early"] = setting(
        "late",
        "of fcn32s with two modalities: two networks of averaged scores, or one of all channels",
    )
    fused_stages: int = setting(5, "of fusenet: stages of the encoder, from the first on, that are fused")
    ssma_dilations: Literal["paper", "released"] = setting(
        "paper", "of adapnetpp and ssma: dilations of the encoder's multi-scale units"
    )
    aspp_rates: tuple[int, ...] = setting(
        (3, 6, 12), "of adapnetpp and ssma: dilations of the pyramid; 6,12,18 for Cityscapes of 19 classes"
    )
    neighbors: int = setting(64, "of gnn3d: nearest points that a point hears of")
    graph_steps: int = setting(3, "of gnn3d: how often they are heard")
    graph_cell: Literal["vanilla", "lstm"] = setting("vanilla", "of gnn3d: how a point's state changes")

    def __post_init__(self) -> None:
        require_at_least(1, self, "width", "fused_stages", "neighbors", "graph_steps")
        require(0 <= self.dropout < 1, f"dropout must be from 0 to below 1, got {self.dropout}")
        scale = self.initial_scale
        require(scale is None or scale > 0, f"initial_scale must be positive, got {scale}")
        stride = self.output_stride
        require(stride in (8, 16), f"output_stride must be 8 or 16, got {stride}")


@dataclass(frozen=True)
class SegmentationStage(Stage):
    """A stage's learning rates."""

    encoder_lr: float = setting(5e-4, "learning rate of the encoder")
    decoder_lr: float = setting(3e-3, "learning rate of the decoder and of the ensemble's weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(0, self, "encoder_lr", "decoder_lr")


def stages(epochs: int) -> tuple[SegmentationStage, ...]:
    """The paper's three stages, of as many epochs each."""
    rates = ((5e-4, 3e-3), (2.5e-4, 1.5e-3), (1e-4, 7e-4))
    return tuple(SegmentationStage(epochs, None, encoder, decoder) for encoder, decoder in rates)


@dataclass(frozen=True)
class OptimSettings(UpdateSettings):
    """The optimizer."""

    method: Literal["sgd", "adamw"] = setting("sgd", "kind of optimizer")
    momentum: float = setting(0.9, "momentum of sgd; first beta of adamw")
    weight_decay: float = setting(1e-5, "weight decay")
    bias_factor: float = setting(1.0, "factor of the learning rates of convolutions' biases; 2 in FCN")
    stages: tuple[SegmentationStage, ...] = setting(stages(100), "stretches of training, one after the other")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, f"momentum must be from 0 to below 1, got {self.momentum}")
        require_at_least(0, self, "weight_decay", "bias_factor")


@dataclass(frozen=True)
class LossSettings:
    """The loss: what the outputs' logits are compared with the labels by, and what is beside it."""

    sparsity: float = setting(5e-3, "weight of the penalty on the scales")
    per_output: bool = setting(
        False, "add the penalty once for every branch and the ensemble, as the released code"
    )
    auxiliary: float | tuple[float, ...] = setting(
        0.4,
        "weight of the losses of auxiliary heads, of pspnet, esanet and systems, or one for each head; 0: no "
        "such heads in pspnet and esanet",
    )
    auxiliary_size: AuxiliarySize = setting(
        "labels", "where auxiliary heads meet labels: logits resized to the labels, or labels to the logits"
    )
    reduction: Literal["mean", "sum"] = setting(
        "mean", "of pixels' losses: their mean, or sum, for rates that were published for sums"
    )
    kind: Literal["cross_entropy", "ohem", "focal"] = setting(
        "cross_entropy", "of the branches, the ensemble and the auxiliary head; ohem: of hard pixels alone"
    )
    class_weights: tuple[float, ...] | Literal["median_frequency"] | None = setting(
        None, "one per class, or median_frequency, counted in the training labels; none: 1"
    )
    label_smoothing: float = setting(0.0, "share of the truth that is spread evenly over the classes")
    focal_gamma: float = setting(2.0, "of focal: exponent of 1 - p, p the true class's probability")
    ohem_threshold: float = setting(0.7, "of ohem: a pixel is hard where the true class has less probability")
    ohem_min_kept: float = setting(
        0.0625, "of ohem: share of each image's pixels, the hardest ones, that counts at least"
    )
    dice: float = setting(0.0, "weight of the Dice losses that are added; 0: none")

    def __post_init__(self) -> None:
        require_at_least(0, self, "sparsity")
        beside = self.auxiliary if isinstance(self.auxiliary, tuple) else (self.auxiliary,)
        require(
            all(0 <= weight < math.inf for weight in beside) and len(beside) > 0,
            f"auxiliary must be one or more numbers from 0 on, got {self.auxiliary}",
        )
        weights = self.class_weights
        require(
            not isinstance(weights, tuple)
            or (all(0 <= weight < math.inf for weight in weights) and any(weight > 0 for weight in weights)),
            f"class_weights must be numbers from 0 on, one of them above 0, got {weights}",
        )
        smoothing, threshold, kept = self.label_smoothing, self.ohem_threshold, self.ohem_min_kept
        require(0 <= smoothing < 1, f"label_smoothing must be from 0 to below 1, got {smoothing}")
        require(0 < threshold <= 1, f"ohem_threshold must be above 0 and at most 1, got {threshold}")
        require(0 <= kept <= 1, f"ohem_min_kept must be from 0 to 1, got {kept}")
        for name in ("focal_gamma", "dice"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must be a number from 0 on, got {value}")


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation."""

    batch_size: int = setting(
        1, "images of one size, or windows of one image, that the network sees at once", resumable=True
    )
    interpolation: Literal["bicubic", "bilinear"] = setting(
        "bicubic", "how logits are resized to the labels", resumable=True
    )
    scales: tuple[float, ...] = setting(
        (1.0,), "factors that images are resized by; the logits are averaged", resumable=True
    )
    flip: bool = setting(False, "look at mirrored images as well", resumable=True)
    window: int | None = setting(
        None,
        "side in pixels of a window that slides over the resized images; none: whole images",
        resumable=True,
    )
    overlap: float = setting(0.25, "least share of a window that the next one covers", resumable=True)
    limit: int | None = setting(
        None, "number of images to evaluate, spread evenly over all; none: all", resumable=True
    )
    pictures: int = setting(4, "validation images shown in TensorBoard", resumable=True)
    frames: bool = setting(
        False, "predict writes every frame's labels and colors of videos as well", resumable=True
    )
    sheet: int = setting(
        8, "scenes on the contact sheet of evaluate and predict; 0: no sheet", resumable=True
    )
    without: tuple[str, ...] = setting(
        (), "modalities to evaluate without, as if there were no files of them", resumable=True
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, "batch_size", "limit")
        require_at_least(0, self, "pictures", "sheet")
        require_at_least(32, self, "window")
        require(
            len(self.scales) > 0 and all(0 < scale < math.inf for scale in self.scales),
            f"scales must be one or more factors above 0, got {self.scales}",
        )
        require(0 <= self.overlap < 1, f"overlap must be from 0 to below 1, got {self.overlap}")


@dataclass(frozen=True)
class SegmentationRecipe(WithFusion):
    """A segmentation training, whole."""

    data: DataSettings = setting(DataSettings(), "")
    model: ModelSettings = setting(ModelSettings(), "")
    fusion: Fusion = choice(Exchange(), "how the modalities meet", FUSIONS)
    optim: OptimSettings = setting(OptimSettings(), "")
    loss: LossSettings = setting(LossSettings(), "")
    eval: EvalSettings = setting(EvalSettings(), "")
    run: RunSettings = setting(RunSettings(), "")

    def check_subset(self) -> None:
        networks.check_subset(self.model.network, self.fusion)
