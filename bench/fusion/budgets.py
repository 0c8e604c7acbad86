"""How long, on what and how large the trainings are."""

from __future__ import annotations

from dataclasses import dataclass

RECIPE = "nyudv2_384_cen_refinenet18"  # whose data settings are those of NYUDv2 at 384x288
MOMENTUM = 0.9
SCENES_AT_ONCE = 16  # neighbors in the training list stay together: they show the same rooms
HELD_OUT = 5  # one block of so many is held out for the search
SEARCH_SEED = 0  # whatever the table's seeds are
SEARCH_PART = 5  # the search trains so many times shorter
LONG = 3  # the last trainings are so many times longer

_COMMON = (
    *("optim.method=sgd", f"optim.momentum={MOMENTUM}", "optim.weight_decay=1e-4"),
    *("optim.schedule=polynomial", "optim.warmup_steps=20"),
    *("data.depth_scale=6528", "run.workers=0", "run.log_steps=10", "run.checkpoint_steps=100"),
    *("run.precision=bf16", "model.decoder_init=torch"),
)


@dataclass(frozen=True)
class Budget:
    """The trainings' common settings.

    Attributes:
        steps: of a training of the table.
        settings: of the recipe.
        rates: learning rates of encoder and decoder, of which the search tries multiples.
        factors: those multiples.
        thresholds: that the search tries for an exchange, the first one while it looks for the rate.
        methods: in the table, if no others are asked for.
        seeds: of the table.
    """

    steps: int
    settings: tuple[str, ...]
    rates: tuple[float, float] = (0.01, 0.05)
    factors: tuple[float, ...] = (0.25, 0.5, 1.0)
    thresholds: tuple[str, ...] = ("0.75*median", "0.5*median", "0.02")
    methods: tuple[str, ...] = (
        *("rgb", "depth", "none", "concat_all_shared", "align_middle_shared"),
        *("self_attention_middle_shared", "asymfusion", "cen_code", "cen_paper"),
        "cen_paper_dropout",
        *("adapnetpp_rgb", "adapnetpp_depth", "ssma", "fusenet"),
    )
    seeds: tuple[int, ...] = (0, 1, 2)


BUDGETS = {
    "cpu": Budget(
        steps=700,
        settings=(
            *_COMMON,
            *("model.network=deeplabv3plus", "model.encoder=resnet50_v1", "model.width=128"),
            *("model.decoder_norms=private", "model.dropout=0.1", "data.batch_size=4"),
            # Half the images' size: a crop then shows most of a room, for a quarter of the time.
            *("data.crop=160", "data.shorter_side=144", "data.scale=0.75,1.5", "eval.scales=0.5"),
        ),
    ),
    # Estimates, not measured: on an H200 a training of the table takes 25 s, the search 4 minutes.
    "gpu": Budget(
        steps=300,
        settings=(
            *_COMMON,
            *("model.network=refinenet", "model.encoder=resnet50_v1", "model.width=256"),
            *("model.dropout=0.5", "data.crop=384", "data.shorter_side=350", "data.batch_size=8"),
            *("run.device=cuda", "run.workers=12"),
        ),
        rates=(0.005, 0.01),  # RefineNet's decoder has no norms
    ),
}
