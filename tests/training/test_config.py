"""Typed settings: parsing, suggestions, round trips, differences."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import models.segmentation.recipes  # noqa: F401 - fills the registry
from models.data import Layout
from models.training import config, registry
from models.training.config import setting
from models.training.errors import UsageError, existing, writable
from models.training.settings import RunSettings, Stage, require, stage_ends


@dataclass(frozen=True)
class Inner:
    rate: float = setting(0.5, "a rate")
    steps: int | None = setting(None, "a length", resumable=True)

    def __post_init__(self) -> None:
        require(self.rate >= 0, f"rate must not be negative, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    flag: bool = setting(False, "a flag")
    kind: Literal["small", "large"] = setting("small", "a choice")
    names: tuple[str, ...] = setting(("rgb", "depth"), "some names")
    size: tuple[int, float] = setting((3, 0.5), "a pair")
    root: Path | None = setting(None, "a path")
    inner: Inner = setting(Inner(), "")
    items: tuple[Inner, ...] = setting((Inner(), Inner(0.25)), "")


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("flag=true", "flag", True),
        ("flag=False", "flag", False),
        ("kind=large", "kind", "large"),
        ("names=rgb", "names", ("rgb",)),
        ("names=(depth, rgb)", "names", ("depth", "rgb")),
        ("size=7,1e-3", "size", (7, 1e-3)),
        ("root=a/b=c", "root", Path("a/b=c")),
        ("root=none", "root", None),
        ("inner.rate=1e-3", "inner.rate", 1e-3),
        ("inner.steps=12", "inner.steps", 12),
        ("inner.steps=None", "inner.steps", None),
        ("items.1.rate=2", "items.1.rate", 2.0),
    ],
)
def test_override_parses_by_type(assignment: str, path: str, value: object) -> None:
    changed = config.flatten(config.override(Outer(), [assignment]))
    assert changed[path] == value
    assert type(changed[path]) is type(value)
    assert {k: v for k, v in changed.items() if k != path} == {
        k: v for k, v in config.flatten(Outer()).items() if k != path
    }


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("flg", "expected field=value, got 'flg'; did you mean 'flag'?"),
        ("root=", "root=: expected a path"),
        ("flg=true", "unknown field 'flg'; did you mean 'flag'?"),
        ("inner.rte=1", "did you mean 'inner.rate'?"),
        ("rate=1", "did you mean 'inner.rate'?"),
        ("stps=1", "did you mean 'inner.steps'?"),
        ("items.5.rate=1", "unknown field 'items.5.rate'; did you mean 'items.1.rate'?"),
        ("items.x.rate=1", "unknown field 'items.x.rate'"),
        ("inner=1", "inner is a group of fields; set one of them: inner.rate, inner.steps"),
        ("items.0=1", "items.0 is a group of fields"),
        ("flag.x=1", "unknown field 'flag.x'"),
        ("flag=1", "flag=1: expected true or false"),
        ("kind=larg", "kind=larg: expected one of small, large; did you mean 'large'?"),
        ("inner.steps=1.5", "inner.steps=1.5: expected a whole number"),
        ("inner.rate=fast", "inner.rate=fast: expected a number"),
        ("inner.rate=-1", "inner.rate must not be negative, got -1.0"),
        ("items.1.rate=-1", "items.1.rate must not be negative, got -1.0"),
        ("size=1", "size=1: expected 2 values separated by commas"),
        ("size=a,1", "size=a,1: expected a whole number"),
    ],
)
def test_override_refuses(assignment: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        config.override(Outer(), [assignment])


def test_override_does_not_suggest_what_was_given() -> None:
    with pytest.raises(UsageError, match=r"^expected field=value, got 'inner\.rate'$"):
        config.override(Outer(), ["inner.rate"])


_WORDS = st.text("abcxyz_", min_size=1).filter(lambda text: text not in ("none", "null"))


@given(
    st.builds(
        Outer,
        flag=st.booleans(),
        kind=st.sampled_from(["small", "large"]),
        names=st.lists(_WORDS).map(tuple),
        size=st.tuples(st.integers(), st.floats(allow_nan=False)),
        root=st.none() | _WORDS.map(Path),
        inner=st.builds(Inner, rate=st.floats(0), steps=st.none() | st.integers()),
        items=st.tuples(st.builds(Inner, rate=st.floats(0)), st.builds(Inner, rate=st.floats(0))),
    )
)
def test_settings_survive_text_and_json(settings: Outer) -> None:
    shown = [f"{path}={config.show(value)}" for path, value in config.flatten(settings).items()]
    assert config.override(Outer(), shown) == settings
    plain = json.loads(json.dumps(config.to_plain(settings)))
    assert config.from_plain(Outer(), plain) == settings


def test_from_plain_takes_defaults_for_new_fields_and_drops_old_ones() -> None:
    restored = config.from_plain(Outer(), {"flag": True, "gone": 3, "inner": {"steps": 4}})
    assert restored == Outer(flag=True, inner=Inner(steps=4))


def test_differing_leaves_resumable_fields_out() -> None:
    new = config.override(Outer(), ["inner.steps=9", "items.1.rate=3", "flag=true"])
    assert config.differing(Outer(), new) == ["flag: false -> true", "items.1.rate: 0.25 -> 3.0"]
    assert config.differing(Outer(), Outer(items=(Inner(),))) == ["items.1.rate: 0.25 -> none"]


def test_changes_hold_resumable_fields_and_those_of_mappings() -> None:
    new = config.override(Outer(), ["inner.steps=9", "flag=true"])
    changes = {"flag": "flag: false -> true", "inner.steps": "inner.steps: none -> 9"}
    assert config.changes(Outer(), new) == changes
    old = Layout("a", {"rgb": "rgb/{name}.png"})
    new = Layout("a", {"rgb": "{name}.png"}, label_shift={"val": 3})
    assert list(config.changes(old, new, "layout").values()) == [
        "layout.files.rgb: rgb/{name}.png -> {name}.png",
        "layout.label_shift.val: none -> 3",
    ]
    assert config.changes(old, old) == {}


def test_every_recipe_describes_itself_in_assignments_that_work() -> None:
    for name in registry.RECIPES:
        recipe = registry.find(name)
        assignments = [line.partition("  # ")[0].rstrip() for line in config.describe(recipe)]
        assert config.override(recipe, assignments) == recipe
        assert all(line.partition("  # ")[2] for line in config.describe(recipe)), name
    assert all(len(line.split("  ", 1)[1].strip()) > 20 for line in registry.listing())


def test_registry_names_the_nearest_and_refuses_two_of_one_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'synthetic_demo'"):
        registry.find("sythetic_demo")
    with pytest.raises(ValueError, match="two recipes named 'synthetic_demo'"):
        registry.recipe(registry.RECIPES["synthetic_demo"])


def test_recipes_hold_the_papers_values() -> None:
    paper = registry.find("nyudv2_cen_refinenet101")
    rates = [(stage.epochs, stage.encoder_lr, stage.decoder_lr) for stage in paper.optim.stages]
    assert rates == [(100, 5e-4, 3e-3), (100, 2.5e-4, 1.5e-3), (100, 1e-4, 7e-4)]
    assert (paper.optim.method, paper.optim.momentum, paper.optim.weight_decay) == ("sgd", 0.9, 1e-5)
    assert (paper.data.batch_size, paper.data.shorter_side, paper.data.crop) == (6, 350, 500)
    assert (paper.data.scale, paper.data.depth_scale) == ((0.5, 2.0), None)
    assert (paper.fusion.threshold, paper.fusion.region, paper.loss.sparsity) == (0.02, "own", 5e-3)
    assert paper.model.frozen_statistics
    assert not paper.loss.per_output
    assert [stage.epochs for stage in registry.find("nyudv2_cen_refinenet152").optim.stages] == [150] * 3
    released = registry.find("nyudv2_released_refinenet101")
    assert (released.fusion.region, released.loss.sparsity, released.loss.per_output) == ("all", 2e-4, True)


def test_stages_in_epochs_or_steps() -> None:
    assert stage_ends([Stage(epochs=2), Stage(steps=5), Stage(epochs=1)], steps_per_epoch=10) == [20, 25, 35]
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        RunSettings(steps=0)


@pytest.mark.parametrize(
    "assignment",
    [
        *["data.scale=1,inf", "data.scale=nan,2", "eval.batch_size=0", "eval.limit=0", "eval.pictures=-1"],
        *["loss.sparsity=-1", "model.dropout=-0.1", "model.dropout=1", "model.initial_scale=0"],
        *["fusion.threshold=-1", "fusion.threshold=nan", "model.width=0", "optim.momentum=-1"],
        *["optim.momentum=1", "optim.stages.1.decoder_lr=-1", "optim.stages.1.encoder_lr=-1e-3"],
        *["optim.stages.2.steps=-1", "optim.accumulate=0", "optim.clip=0", "optim.ema=1", "optim.power=-1"],
        *["optim.warmup_steps=-1", "optim.weight_decay=-1", "run.seed=-1", f"run.seed={2**32}"],
        "run.workers=-1",
    ],
)
def test_segmentation_settings_refuse_what_cannot_be_run(assignment: str) -> None:
    path = assignment.partition("=")[0]
    with pytest.raises(UsageError, match=rf"^{re.escape(path)} must (not )?be .*, got "):
        config.override(registry.find("synthetic_demo"), [assignment])


def test_the_last_values_that_can_be_run() -> None:
    assignments = ["eval.pictures=0", "loss.sparsity=0", "model.dropout=0", "fusion.threshold=0"]
    assignments += ["optim.momentum=0", "optim.stages.0.encoder_lr=0", f"run.seed={2**32 - 1}"]
    config.override(registry.find("synthetic_demo"), assignments)


def test_writable_makes_the_folder_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.json"
    assert writable(path, "--output") == path
    assert list(path.parent.iterdir()) == []
    with pytest.raises(UsageError, match=r"^--output: .*new is a folder"):
        writable(path.parent, "--output")
    path.write_text("a file")
    with pytest.raises(UsageError, match=r"^--output: cannot write .*metrics\.json/x/y: "):
        writable(path / "x" / "y", "--output")


def test_existing_names_the_nearest_folder_and_entry(tmp_path: Path) -> None:
    (tmp_path / "nyudv2_384").mkdir()
    assert existing(tmp_path / "nyudv2_384", "data.root") == tmp_path / "nyudv2_384"
    with pytest.raises(UsageError) as caught:
        existing(tmp_path / "nyudv2_348" / "rgb", "data.root")
    assert str(caught.value) == (
        f"data.root: {tmp_path}/nyudv2_348/rgb does not exist; {tmp_path} does, "
        "without 'nyudv2_348'; did you mean 'nyudv2_384'?"
    )


def test_settings_without_paths() -> None:
    recipe = config.override(
        registry.find("synthetic_demo"), ["data.root=data", "run.output=out", "run.seed=3"]
    )
    bare = config.without_paths(recipe)
    assert (bare.data.root, bare.model.weights, bare.run.output) == (None, None, None)
    assert bare == config.override(registry.find("synthetic_demo"), ["run.seed=3"])
