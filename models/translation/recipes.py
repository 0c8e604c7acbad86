"""The translation recipes.

Tables 4 and 5 of the paper translate to RGB. Its depth is left open: depth_euclidean here, which
``data.domains=depth_zbuffer,normal`` changes. Other pairs are overrides of any recipe likewise,
``data.domains`` and ``data.target``.
"""

from __future__ import annotations

from dataclasses import replace

from models.networks.fusion import AsymFusion, Exchange
from models.training.registry import SYSTEMS, recipe
from models.training.settings import RunSettings
from models.translation import system
from models.translation.metrics.fid import FidSettings
from models.translation.settings import (
    DataSettings,
    EvalSettings,
    LossSettings,
    ModelSettings,
    OptimSettings,
    TranslationRecipe,
    TranslationStage,
)

SYSTEMS[TranslationRecipe] = system

_DEPTH, _TEXTURE, _SHADE = "depth_euclidean", "edge_texture", "reshading"
_EDGE = "edge_occlusion"  # beside texture, which is an edge, too, what else "edge" could be

# Scales of 1 would need tens of thousands of steps to come below the paper's threshold of 0.01. From here,
# with a larger penalty than the paper's, the first do so within a few hundred.
_NEAR = 0.05


def _taskonomy(*domains: str, target: str = "rgb") -> TranslationRecipe:
    return TranslationRecipe(data=DataSettings(domains=domains, target=target))


def _asymfusion(*domains: str) -> TranslationRecipe:
    """AsymFusion in CEN's settings, without exchange and penalty; its own are not public."""
    return replace(_taskonomy(*domains), fusion=AsymFusion(), loss=LossSettings(sparsity=0.0))


def _released(paper: TranslationRecipe) -> TranslationRecipe:
    """The released code's settings where they differ from the paper's."""
    return replace(
        paper,
        model=ModelSettings(decoder_norms="private"),
        fusion=Exchange(threshold=0.01, region="all"),
        optim=OptimSettings(passes=2),
        loss=LossSettings(per_output=True),
        eval=EvalSettings(
            fid=FidSettings(preparation="released", kid_subsets=50, kid_subset_size=None),
        ),
    )


def _short(steps: int, generator_lr: float, ema: float) -> OptimSettings:
    """Training in minutes instead of days: an average in place of many epochs, a rate that falls to 0."""
    stage = TranslationStage(steps=steps, generator_lr=generator_lr, ensemble_lr=1e-2, discriminator_lr=1e-4)
    return OptimSettings(schedule="cosine", ema=ema, stages=(stage,))


@recipe
def taskonomy_cen_shade_texture_rgb() -> TranslationRecipe:
    """The paper's main translation: Taskonomy, reshading and texture edges to RGB (Table 4)."""
    return _taskonomy(_SHADE, _TEXTURE)


@recipe
def taskonomy_cen_depth_normal_rgb() -> TranslationRecipe:
    """Depth and normals to RGB (Tables 4 and 5)."""
    return _taskonomy(_DEPTH, "normal")


@recipe
def taskonomy_cen_depth_normal_texture_rgb() -> TranslationRecipe:
    """Depth, normals and texture edges to RGB (Table 5)."""
    return _taskonomy(_DEPTH, "normal", _TEXTURE)


@recipe
def taskonomy_cen_depth_normal_texture_shade_rgb() -> TranslationRecipe:
    """Depth, normals, texture edges and reshading to RGB (Table 5)."""
    return _taskonomy(_DEPTH, "normal", _TEXTURE, _SHADE)


@recipe
def taskonomy_depth_rgb() -> TranslationRecipe:
    """Depth alone to RGB, pix2pix with instance norm (Table 5)."""
    return _taskonomy(_DEPTH)


@recipe
def taskonomy_normal_rgb() -> TranslationRecipe:
    """Normals alone to RGB (Table 5)."""
    return _taskonomy("normal")


@recipe
def taskonomy_texture_rgb() -> TranslationRecipe:
    """Texture edges alone to RGB (Table 5)."""
    return _taskonomy(_TEXTURE)


@recipe
def taskonomy_shade_rgb() -> TranslationRecipe:
    """Reshading alone to RGB (Table 5)."""
    return _taskonomy(_SHADE)


@recipe
def taskonomy_cen_rgb_shade_normal() -> TranslationRecipe:
    """RGB and reshading to normals."""
    return _taskonomy("rgb", _SHADE, target="normal")


@recipe
def taskonomy_cen_rgb_normal_shade() -> TranslationRecipe:
    """RGB and normals to reshading."""
    return _taskonomy("rgb", "normal", target=_SHADE)


@recipe
def taskonomy_cen_rgb_texture_depth() -> TranslationRecipe:
    """RGB and texture edges to depth."""
    return _taskonomy("rgb", _TEXTURE, target=_DEPTH)


@recipe
def taskonomy_asymfusion_shade_depth_rgb() -> TranslationRecipe:
    """AsymFusion of reshading and depth, in CEN's settings; where it acts in a U-Net is ours."""
    return _asymfusion(_SHADE, _DEPTH)


@recipe
def taskonomy_asymfusion_normal_texture_rgb() -> TranslationRecipe:
    """taskonomy_asymfusion_shade_depth_rgb of normals and texture edges."""
    return _asymfusion("normal", _TEXTURE)


@recipe
def taskonomy_asymfusion_depth_texture_normal_rgb() -> TranslationRecipe:
    """taskonomy_asymfusion_shade_depth_rgb of depth, texture edges, normals; the cycle of three is ours."""
    return _asymfusion(_DEPTH, _TEXTURE, "normal")


@recipe
def taskonomy_asymfusion_shade_normal_edge_rgb() -> TranslationRecipe:
    """taskonomy_asymfusion_depth_texture_normal_rgb of reshading, normals and occlusion edges."""
    return _asymfusion(_SHADE, "normal", _EDGE)


@recipe
def taskonomy_cen_shade_texture_rgb_released() -> TranslationRecipe:
    """The released code's settings: exchange anywhere, private decoder norms, two passes per step."""
    return _released(taskonomy_cen_shade_texture_rgb())


@recipe
def taskonomy_cen_depth_normal_rgb_released() -> TranslationRecipe:
    """taskonomy_cen_shade_texture_rgb_released of depth and normals."""
    return _released(taskonomy_cen_depth_normal_rgb())


@recipe
def nyudv2_384_depth_normal_rgb() -> TranslationRecipe:
    """Depth and normals of NYUDv2 at 384x288 to RGB, ten minutes on a CPU.

    ``prepare domains --depth-scale 6528`` makes them of the copy that nyudv2_384_cen_refinenet18 is for.
    """
    return TranslationRecipe(
        data=DataSettings(domains=("depth_zbuffer", "normal"), batch_size=4, resize=144, crop=128),
        model=ModelSettings(size=64, base_width=32, discriminator_width=24, initial_scale=_NEAR, dropout=0.0),
        optim=_short(3500, generator_lr=1e-3, ema=0.998),
        # In so short a run the paper's weight of 100 for L1 leaves colorful noise, this one blurred rooms.
        loss=LossSettings(l1=1000.0, sparsity=0.05),
        eval=EvalSettings(limit=100),
        run=RunSettings(log_steps=20, checkpoint_steps=100, evaluate_steps=1750),
    )


@recipe
def synthetic_translation_demo() -> TranslationRecipe:
    """Minutes on a CPU: rooms of prepare synthetic --domains, normals and texture edges to reshading."""
    return TranslationRecipe(
        data=DataSettings(domains=("normal", _TEXTURE), target="reshading", batch_size=4, resize=72, crop=64),
        model=ModelSettings(size=64, base_width=16, discriminator_width=16, initial_scale=_NEAR, dropout=0.1),
        optim=_short(600, generator_lr=5e-4, ema=0.99),
        loss=LossSettings(sparsity=0.02),
        run=RunSettings(log_steps=20, checkpoint_steps=100, evaluate_steps=300),
    )
