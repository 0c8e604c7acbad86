"""The translation recipes say what the paper says; every one of them builds and lists its fields."""

from __future__ import annotations

import pytest

from cen_ext import exchanging_layers
from models.__main__ import main
from models.data import DOMAINS
from models.fusion import Exchange
from models.training import config, registry
from models.translation import recipes
from models.translation.build import build_discriminator, build_generator
from models.translation.settings import TranslationRecipe

NAMES = [name for name, make in registry.RECIPES.items() if make.__module__ == recipes.__name__]
DEPTH, TEXTURE, SHADE = "depth_euclidean", "edge_texture", "reshading"


def recipe(name: str, *overrides: str) -> TranslationRecipe:
    found: TranslationRecipe = config.override(registry.find(name), overrides)
    return found


def test_the_papers_settings() -> None:
    paper = recipe("taskonomy_cen_shade_texture_rgb")
    assert (paper.data.domains, paper.data.target) == ((SHADE, TEXTURE), "rgb")
    assert (paper.data.batch_size, paper.data.resize, paper.data.crop, paper.data.mirror) == (
        1,
        286,
        256,
        True,
    )
    assert (paper.model.size, paper.model.base_width, paper.model.discriminator_width) == (256, 64, 64)
    assert (paper.fusion.threshold, paper.loss.sparsity, paper.loss.l1) == (0.01, 1e-3, 100)
    assert (paper.fusion.region, paper.model.decoder_norms, paper.loss.per_output) == ("own", "shared", False)
    assert (paper.model.dropout, paper.eval.dropout, paper.loss.gan) == (0.5, True, "bce")
    (stage,) = paper.optim.stages
    assert (stage.epochs, stage.generator_lr, stage.discriminator_lr) == (300, 2e-4, 2e-4)
    assert (paper.optim.betas, paper.optim.schedule, paper.optim.passes) == ((0.5, 0.999), "constant", 1)


@pytest.mark.parametrize(
    ("name", "domains"),
    [
        ("taskonomy_cen_depth_normal_rgb", (DEPTH, "normal")),
        ("taskonomy_cen_depth_normal_texture_rgb", (DEPTH, "normal", TEXTURE)),
        ("taskonomy_cen_depth_normal_texture_shade_rgb", (DEPTH, "normal", TEXTURE, SHADE)),
        ("taskonomy_depth_rgb", (DEPTH,)),
        ("taskonomy_normal_rgb", ("normal",)),
        ("taskonomy_texture_rgb", (TEXTURE,)),
        ("taskonomy_shade_rgb", (SHADE,)),
    ],
)
def test_the_papers_tables_differ_in_their_inputs_alone(name: str, domains: tuple[str, ...]) -> None:
    changed = config.differing(recipe("taskonomy_cen_shade_texture_rgb"), recipe(name))
    assert changed == [f"data.domains: {SHADE},{TEXTURE} -> {','.join(domains)}"]


@pytest.mark.parametrize("pair", ["shade_texture", "depth_normal"])
def test_released_recipes_differ_as_the_released_code_does(pair: str) -> None:
    paper, released = recipe(f"taskonomy_cen_{pair}_rgb"), recipe(f"taskonomy_cen_{pair}_rgb_released")
    assert config.differing(paper, released) == [
        "model.decoder_norms: shared -> private",
        "fusion.region: own -> all",
        "optim.passes: 1 -> 2",
        "loss.per_output: false -> true",
    ]
    fid = released.eval.fid
    assert (fid.preparation, fid.kid_subsets, fid.kid_subset_size) == ("released", 50, None)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_builds(name: str) -> None:
    found = recipe(name, "model.base_width=3", "model.discriminator_width=2", "model.initial_scale=0.5")
    net = build_generator(found)
    count = len(found.data.domains)
    assert net.num_modalities == count
    assert {*found.data.domains, found.data.target} <= DOMAINS.keys()
    levels = found.model.size.bit_length() - 1
    assert len(net.encoder.levels) == levels
    assert len(exchanging_layers(net)) == (levels - 2 if count > 1 else 0)
    for layer in exchanging_layers(net).values():
        assert 0.4 < layer.weight.min() <= layer.weight.max() < 0.6
        if isinstance(found.fusion, Exchange):
            assert (layer.threshold, layer.region) == (found.fusion.threshold, found.fusion.region)
        else:
            assert layer.replaced_mask is not None
    assert build_discriminator(found).in_channels == 6


def test_fields_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(NAMES) >= 15
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}  " in listed for name in NAMES)
    assert main(["recipes", "taskonomy_cen_shade_texture_rgb", "eval.fid.weights=fid.pth"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("eval.fid.weights=fid.pth ") for line in lines)
    assert all(line.partition("#")[2].strip() for line in lines)
