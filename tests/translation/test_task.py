"""A step of adversarial training: against the usual code, its single pass, its options, its evaluation."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from bench.baselines.exchange import split_state, stacked_state
from bench.baselines.translation import EagerPatchGAN, EagerUNet
from models.data import DataError
from models.training import distributed
from models.training.errors import UsageError
from models.translation.build import open_split
from models.translation.inference import translate, translate_views, translating
from models.translation.metrics import fid
from models.translation.metrics.fid import FidSettings
from models.translation.task import TranslationTask
from tests.helpers.training_runs import together
from tests.helpers.translation_runs import DOMAINS, batches_of, prepare_views, tiny_recipe, tiny_task
from tests.training.test_options import NoReading, NoSizesFromValues

DOUBLE = torch.float64
KEPT = ["optim.step_in_backward=false"]  # where gradients are looked at


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_views(tmp_path_factory.mktemp("data") / "views")


def test_a_limit_is_spread_evenly(views: Path) -> None:
    task = tiny_task(views, "eval.limit=3")
    last = len(task.validation) - 1
    assert task.views == [0, last // 2, last]


# ---- the fusion's own loss


@pytest.mark.parametrize("passes", [1, 2])
def test_the_loss_of_a_fusion_trains_the_generator(views: Path, passes: int) -> None:
    """Alignment's discrepancy: it adds its weight times its gradient, and is logged."""
    options = ["fusion=align", "fusion.stages=2,3", "model.dropout=0.0", f"optim.passes={passes}", *KEPT]
    gradients = []
    for weight in (0.0, 3.0):
        task = tiny_task(views, *options, f"fusion.weight={weight}", dtype=DOUBLE)
        batch = batches_of(task, DOUBLE)[0]
        generator = task.nets.generator
        discriminate, generate = task.nets.parts
        discriminate(batch.images, batch.target)
        generate()
        gradients.append({name: p.grad.clone() for name, p in generator.named_parameters()})
    generator.zero_grad()
    generator(batch.images)
    generator.fusion.loss(generator).backward()
    for name, parameter in generator.named_parameters():
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close(gradients[1][name] - gradients[0][name], own, rtol=1e-7, atol=1e-9)
    assert generator.encoder.fusion_stages["2"].common[0].weight.grad.abs().max() > 1e-4
    losses = task.step(batch, 0)
    parts = [losses[f"adversarial/{name}"] for name in DOMAINS]
    parts += [task.recipe.loss.l1 * losses[f"l1/{name}"] for name in (*DOMAINS, "ensemble")]
    assert losses["fusion"] > 0
    assert_close(losses["loss"], sum(parts) + losses["penalty"] + losses["fusion"])


# ---- the usual code


class Usual:
    """Both networks and the loop as they are usually written, two passes of the generator a step."""

    def __init__(self, task: TranslationTask) -> None:
        model, loss = task.recipe.model, task.recipe.loss
        options = {"size": model.size, "base_width": model.base_width, "dropout": 0.0}
        options |= {"threshold": task.recipe.fusion.threshold, "region": task.recipe.fusion.region}
        self.generator = EagerUNet(len(DOMAINS), decoder_norms=model.decoder_norms, **options)
        self.discriminator = EagerPatchGAN(base_width=model.discriminator_width)
        for usual, ours in zip(self.nets(), (task.nets.generator, task.nets.discriminator), strict=True):
            usual.double().load_state_dict(split_state(ours.state_dict(), usual))
        self.optimizers = [
            torch.optim.Adam(net.parameters(), 5e-4, betas=(0.5, 0.999)) for net in self.nets()
        ]
        self.optimizers[1].param_groups[0]["lr"] = 2e-4
        self.loss, self.model = loss, model

    def nets(self) -> tuple[nn.Module, nn.Module]:
        return self.generator, self.discriminator

    def criterion(self, decisions: Tensor, real: bool) -> Tensor:
        if self.loss.gan == "bce":
            return F.binary_cross_entropy_with_logits(decisions, torch.full_like(decisions, float(real)))
        if self.loss.gan == "least_squares":
            return F.mse_loss(decisions, torch.full_like(decisions, float(real)))
        return F.relu(1 - decisions if real else 1 + decisions).mean()

    def penalty(self) -> Tensor:
        total = torch.zeros((), dtype=DOUBLE)
        for level in self.generator.encoder.levels[1:-1]:
            own = level.norm[0].weight.shape[0] // len(DOMAINS)
            for m, norm in enumerate(level.norm):
                total = total + norm.weight[m * own : (m + 1) * own].abs().sum()
        return total

    def step(self, images: Tensor, target: Tensor) -> tuple[float, float]:
        xs = list(images.chunk(len(DOMAINS)))
        generator, discriminator = self.optimizers
        branches, _ = self.generator(xs)
        real = self.discriminator(xs, [target] * len(xs))
        fake = self.discriminator(xs, [branch.detach() for branch in branches])
        judged = sum(
            0.5 * (self.criterion(r, True) + self.criterion(f, False))
            for r, f in zip(real, fake, strict=True)
        )
        discriminator.zero_grad()
        judged.backward()
        discriminator.step()
        branches, ensemble = self.generator(xs)
        decisions = self.discriminator(xs, branches)
        if self.loss.gan == "hinge":
            total = -sum(decision.mean() for decision in decisions)
        else:
            total = sum(self.criterion(decision, True) for decision in decisions)
        total = total + self.loss.l1 * sum(F.l1_loss(image, target) for image in (*branches, ensemble))
        times = len(branches) + 1 if self.loss.per_output else 1
        total = total + self.loss.sparsity * times * self.penalty()
        generator.zero_grad()
        total.backward()
        generator.step()
        return total.item(), judged.item()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["loss.gan=hinge", "optim.passes=2"],
        [
            *["loss.gan=least_squares", "model.decoder_norms=private", "fusion.region=all"],
            *["loss.per_output=true", "loss.sparsity=0.1"],
        ],
    ],
)
def test_steps_are_those_of_the_usual_code(views: Path, overrides: list[str]) -> None:
    task = tiny_task(views, "model.dropout=0", *overrides, dtype=DOUBLE)
    usual = Usual(task)
    for step, batch in enumerate(batches_of(task, DOUBLE)):
        losses = task.step(batch, step)
        total, judged = usual.step(batch.images, batch.target)
        assert losses["loss"].item() == pytest.approx(total, rel=1e-8)
        assert losses["discriminator"].item() == pytest.approx(judged, rel=1e-8)
    assert step == 2
    for net, other in zip((task.nets.generator, task.nets.discriminator), usual.nets(), strict=True):
        expected = stacked_state(dict(other.named_parameters()))
        for name, parameter in net.named_parameters():
            # A bias before a norm has no gradient but rounding, of which Adam makes a little step.
            torch.testing.assert_close(
                parameter,
                expected[name].view_as(parameter),
                rtol=0,
                atol=1e-7,
                msg=lambda m, n=name: f"{n}: {m}",
            )


# ---- the step


@pytest.mark.parametrize("passes", [1, 2])
def test_passes_of_the_generator(views: Path, passes: int) -> None:
    task = tiny_task(views, f"optim.passes={passes}")
    calls = {"generator": 0, "discriminator": 0}
    task.nets.generator.register_forward_hook(lambda *_: calls.update(generator=calls["generator"] + 1))
    task.nets.discriminator.register_forward_hook(
        lambda *_: calls.update(discriminator=calls["discriminator"] + 1)
    )
    batch = next(iter(task.batches(0, 0)))
    task.step(batch, 0)
    assert calls == {"generator": passes, "discriminator": 2}


def test_the_generators_step_leaves_the_discriminators_gradients(views: Path) -> None:
    task = tiny_task(views, *KEPT)
    batch = next(iter(task.batches(0, 0)))
    before, after = task.nets.parts
    before(batch.images, batch.target)
    found = {name: p.grad.clone() for name, p in task.nets.discriminator.named_parameters()}
    assert all(parameter.grad is None for parameter in task.nets.generator.parameters())
    after()
    for name, parameter in task.nets.discriminator.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter.grad, found[name])
    assert all(parameter.grad is not None for parameter in task.nets.generator.parameters())


def test_what_is_reported(views: Path) -> None:
    task = tiny_task(views, "loss.sparsity=0")
    losses = task.step(next(iter(task.batches(0, 0))), 0)
    each = [f"{kind}/{name}" for kind in ("adversarial", "real", "fake") for name in DOMAINS]
    assert set(losses) == {*task.shown, *each, *(f"l1/{n}" for n in (*DOMAINS, "ensemble"))}
    values = {name: value.item() for name, value in losses.items()}
    sums = {
        kind: sum(v for n, v in values.items() if n.startswith(kind))
        for kind in ("adv", "l1", "real", "fake")
    }
    assert values["loss"] == pytest.approx(sums["adv"] + 100 * sums["l1"], rel=1e-5)
    assert values["discriminator"] == pytest.approx((sums["real"] + sums["fake"]) / 2, rel=1e-5)
    assert not any(value.requires_grad for value in losses.values())


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["run.precision=bf16", "optim.passes=2", "loss.gan=hinge"],
        ["run.precision=fp16", "optim.clip=0.1", "optim.ema=0.9", "optim.schedule=cosine"],
    ],
)
def test_a_step_does_not_wait_for_the_device(views: Path, overrides: list[str]) -> None:
    task = tiny_task(views, *overrides)
    batches = batches_of(task, torch.float32)
    task.step(batches[0], 0)  # what is made in the first step may look at things
    with NoReading(), NoSizesFromValues():
        losses = task.step(batches[1], 1)
    assert all(value.isfinite() for value in losses.values())


def test_half_precision_trains_as_float32_does(views: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        task = tiny_task(views, f"run.precision={precision}", "model.dropout=0")
        found[precision] = torch.stack([task.step(batch, 0)["loss"] for batch in task.batches(0, 0)])
        scalers = [each.scaler for each in task.nets.optimizations.values()]
        assert len({id(scaler) for scaler in scalers}) == 2
        assert all(scaler.is_enabled() == (precision == "fp16") for scaler in scalers)
    for precision, tolerance in (("bf16", 2e-2), ("fp16", 1e-2)):
        torch.testing.assert_close(found[precision], found["fp32"], rtol=tolerance, atol=0)
        assert not torch.equal(found[precision], found["fp32"])


def test_rates_and_average(views: Path) -> None:
    options = ["optim.ema=0.9", "optim.schedule=polynomial", "optim.power=1"]
    task = tiny_task(views, *options, "optim.stages.0.ensemble_lr=0.01", dtype=DOUBLE)
    decay, weights = 0.9, []
    average = {name: p.clone() for name, p in task.nets.generator.named_parameters()}
    for step, batch in enumerate(batches_of(task, DOUBLE)):
        task.step(batch, step)
        weights = dict(task.nets.generator.named_parameters())
        share = 1 - min(decay, (1 + step) / (10 + step))
        average = {name: value + share * (weights[name] - value) for name, value in average.items()}
    rates = {"generator": 5e-4, "ensemble": 1e-2, "discriminator": 2e-4}
    assert task.learning_rates() == pytest.approx({name: rate * 5 / 7 for name, rate in rates.items()})
    assert task.evaluated is task.nets.ema.net
    for name, parameter in task.evaluated.named_parameters():
        torch.testing.assert_close(parameter, average[name], rtol=1e-12, atol=1e-14)


def test_a_compiled_step_gives_the_same(views: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One graph a part, and its gradients; without the time that making machine code of it takes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = []
    for choice in ("false", "true"):
        options = ["model.dropout=0", "model.size=8", f"run.compile={choice}", *KEPT]
        task = tiny_task(views, *options, dtype=DOUBLE)
        batch = batches_of(task, DOUBLE)[0]
        losses = task.step(batch, 0)
        gradients = {name: p.grad for name, p in task.nets.generator.named_parameters()}
        gradients |= {f"d.{name}": p.grad for name, p in task.nets.discriminator.named_parameters()}
        found.append((losses, gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)


# ---- several processes


CASES = {"paper": [], "rest": ["optim.passes=2", "loss.gan=hinge", "optim.clip=0.1", "optim.ema=0.9"]}


def trained(views: Path, overrides: list[str]) -> dict[str, Any]:
    """Losses, weights, running statistics and evaluation after an epoch in float64."""
    torch.set_default_dtype(DOUBLE)  # as what spreads gradients must know from the start
    task = tiny_task(views, "model.dropout=0", *overrides, dtype=DOUBLE)
    losses = []
    for step, batch in enumerate(batches_of(task, DOUBLE)):
        values = task.step(batch, step)
        losses.append(distributed.mean(torch.stack(list(values.values()))))
    state = task.state_dict()
    states = {name: dict(state[name]) for name in ("net", "discriminator", "ema") if name in state}
    task.nets.generator.float()
    if task.nets.ema is not None:
        task.nets.ema.net.float()
    return {"losses": losses, **states, "metrics": task.evaluate(lambda: False)}


FID = ["eval.fid.weights=w.pth", "eval.fid.preparation=released"]
KID = [*FID, "eval.fid.kid_subset_size=2", "eval.fid.kid_subsets=3"]


def crude(images: Tensor) -> Tensor:
    """Stands in for the Inception, which has as many features."""
    weight = torch.randn(12, 2048, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return F.adaptive_avg_pool2d(images, 2).flatten(1) @ weight


def scored(views: Path) -> dict[str, float]:
    """An untrained generator's evaluation with KID; FID is made up, as its decompositions take seconds."""
    fid.load_inception = lambda _: crude_network()  # in a process of its own
    fid.covariance_root = lambda covariance: covariance[:, :1]
    found = tiny_task(views, *KID).evaluate(lambda: False)
    assert found is not None
    return {name: value for name, value in found.items() if not name.endswith("/fid")}


def crude_network() -> nn.Module:
    network = nn.Module()
    network.forward = crude
    return network


def train_and_save(views: Path, folder: Path) -> None:
    results: dict[str, Any] = {"scored": scored(views)}
    results |= {name: trained(views, overrides) for name, overrides in CASES.items()}
    torch.save(results, folder / f"{distributed.rank()}.pt")


def test_two_processes_are_one_with_the_same_batches(views: Path, tmp_path: Path) -> None:
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        assert together(train_and_save, views, folder, processes=processes) == [0] * processes
        found[processes] = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
    (whole,) = found[1]
    scores = whole["scored"]
    assert len({score for name, score in scores.items() if name.endswith("/kid")}) == 3
    for part in found[2]:
        assert part["scored"] == pytest.approx(scores, rel=1e-12)
        for name in (*DOMAINS, "ensemble"):
            assert part["scored"][f"{name}/kid"] == scores[f"{name}/kid"]
        for case in CASES:
            metrics = part[case].pop("metrics")
            assert metrics == pytest.approx(whole[case]["metrics"], rel=1e-5)
            expected = {name: value for name, value in whole[case].items() if name != "metrics"}
            torch.testing.assert_close(part[case], expected, rtol=1e-7, atol=1e-9)


# ---- evaluation


@pytest.fixture
def task(views: Path) -> TranslationTask:
    return tiny_task(views)


def test_the_loss_is_that_of_a_step(views: Path) -> None:
    """Of one whose discriminator does not learn in between."""
    task = tiny_task(views, "model.dropout=0", "optim.stages.0.discriminator_lr=0")
    batch = next(iter(task.batches(0, 0)))
    loss = task.loss(batch)
    assert_close(loss.detach(), task.step(batch, 0)["loss"])


def test_evaluation_leaves_everything_as_it_was(task: TranslationTask) -> None:
    before = {name: value.clone() for name, value in task.nets.generator.state_dict().items()}
    drawn = torch.get_rng_state()
    first = task.evaluate(lambda: False)
    assert task.nets.generator.training
    assert all(module.training for module in task.nets.generator.modules())
    assert torch.equal(torch.get_rng_state(), drawn)
    after = task.nets.generator.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert task.evaluate(lambda: False) == first
    assert task.evaluate(lambda: True) is None


def test_each_picture_has_statistics_and_dropout_of_its_own(task: TranslationTask) -> None:
    net, recipe = task.nets.generator, task.recipe
    a, b, c = (batch.images[::4].contiguous() for batch in task.batches(0, 0))
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            assert module.p in (0.0, 0.5)
    with translating(net, dropout=True):
        first = translate(net, a, "a", recipe)
        translate(net, b, "b", recipe)
        again, other = translate(net, a, "a", recipe), translate(net, a, "b", recipe)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    with translating(net, dropout=False):
        found = translate(net, a, "a", recipe)
        assert torch.equal(found[0], translate(net, a, "b", recipe)[0])
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        expected = net(a)  # in training mode
    assert torch.equal(torch.stack(found), torch.stack([*expected.branches, expected.ensemble]))
    net.eval()
    assert not torch.allclose(net(c).ensemble, net.train()(c).ensemble)


@pytest.mark.parametrize("dropout", ["true", "false"])
def test_scores_do_not_depend_on_the_batch(views: Path, dropout: str) -> None:
    found = []
    for size in (1, 2, 3):
        task = tiny_task(views, f"eval.batch_size={size}", f"eval.dropout={dropout}")
        found.append(task.evaluate(lambda: False))
    for other in found[1:]:  # without dropout, convolutions of several views may round otherwise
        assert other == pytest.approx(found[0], rel=1e-12 if dropout == "true" else 1e-5)


def test_a_batch_is_split_only_where_dropout_acts(task: TranslationTask) -> None:
    net, recipe = task.nets.generator, task.recipe
    batch = next(iter(task.batches(0, 0)))
    rows: list[int] = []
    net.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with translating(net, dropout=True):
        found = translate_views(net, batch.images, batch.names, recipe)
        for i, name in enumerate(batch.names):
            single = batch.images[i :: len(batch.names)].contiguous(memory_format=torch.channels_last)
            alone = translate(net, single, name, recipe)  # in the layout of batches: dropout draws in it
            assert all(torch.equal(x[i : i + 1], y) for x, y in zip(found, alone, strict=True))
    assert rows == [2] * 8  # two domains, four views twice
    with translating(net, dropout=False):
        translate_views(net, batch.images, batch.names, recipe)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with translating(net, dropout=True):
        translate_views(net, batch.images, batch.names, recipe)
    assert rows[8:] == [8, 8]


def test_the_best_is_chosen_by_the_score_that_is_set(views: Path) -> None:
    metrics = {"ensemble/l1": 0.3, "ensemble/psnr": 15.0}
    nearest, clearest = tiny_task(views), tiny_task(views, "eval.best=psnr")
    assert (nearest.score(metrics), nearest.best_metric) == (-0.3, "ensemble/l1")
    assert (clearest.score(metrics), clearest.best_metric) == (15.0, "ensemble/psnr")


def test_depth_is_scored_as_its_logarithm(views: Path) -> None:
    task = tiny_task(views, "data.target=depth_zbuffer", "data.domains=rgb")
    metrics = task.evaluate(lambda: False)
    assert metrics["rgb/mae"] == pytest.approx(metrics["rgb/l1"] * 11.1 / 2)
    assert all(map(math.isfinite, metrics.values()))
    task = tiny_task(views, "eval.value_range=0,255")
    metrics = task.evaluate(lambda: False)
    assert metrics["normal/mae"] == pytest.approx(metrics["normal/l1"] * 127.5)


class Features:
    """Stands in for FID's and KID's scores; keeps what it was given."""

    def __init__(self, settings: FidSettings, outputs: int, views: int, device: torch.device) -> None:
        self.settings, self.outputs, self.views = settings, range(outputs), views
        self.images: list[Tensor] = []

    def update(self, outputs: Sequence[Tensor], target: Tensor) -> None:
        self.images.append(torch.stack([*outputs, target]))

    def compute(self) -> list[dict[str, float]]:
        return [{"fid": 10.0 + output, "kid": 1.0} for output in self.outputs]


def test_fid_is_asked_for_as_set(views: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Features] = []

    def feature_scores(*arguments: Any) -> Features:
        made.append(Features(*arguments))
        return made[-1]

    monkeypatch.setattr("models.translation.evaluate.feature_scores", feature_scores)
    monkeypatch.setattr("models.translation.metrics.fid.load_inception", lambda _: nn.Identity())
    task = tiny_task(views, "eval.fid.weights=w.pth", "eval.fid.kid_subset_size=2", "eval.best=fid")
    metrics = task.evaluate(lambda: False)
    (features,) = made
    assert (features.settings, len(features.outputs), features.views) == (task.recipe.eval.fid, 3, 3)
    images = torch.cat(features.images, 1)  # of both branches, the ensemble and the target
    assert images.shape == (4, 3, 3, 32, 32)
    assert metrics["ensemble/l1"] == pytest.approx((images[2] - images[3]).abs().mean().item(), rel=1e-5)
    assert (metrics["normal/fid"], metrics["ensemble/fid"]) == (10, 12)
    assert task.score(metrics) == -12


# ---- mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.crop=33"], r"data.crop must be from 1 to resize=36|multiple of model.size"),
        (["data.crop=28"], r"data.crop must be a multiple of model.size=32"),
        (["data.crop=8", "model.size=8"], r"at least 24 for the discriminator, got 8"),
        (["data.crop=40"], r"data.crop must be from 1 to resize=36, got 40"),
        (["model.size=30"], r"model.size must be a power of two"),
        (["model.base_width=0"], r"model.base_width must be at least 1"),
        (["model.discriminator_width=0"], r"model.discriminator_width must be at least 1"),
        (
            ["data.domains=normal,edge_textur"],
            r"data: unknown domain 'edge_textur'.*did you mean 'edge_texture'",
        ),
        (["data.domains=normal,reshading"], r"data: domains and target must differ"),
        (["optim.accumulate=2"], r"optim.accumulate must be 1 in translation"),
        (["optim.passes=3"], r"optim.passes must be 1 or 2"),
        (["optim.betas=0.5,1"], r"optim.betas must be below 1"),
        (["loss.gan=wgan"], r"one of bce, hinge, least_squares"),
        (["loss.l1=-1"], r"loss.l1 must be at least 0"),
        (["eval.best=fid"], r"eval.best=fid needs eval.fid.weights"),
        (["eval.fid.weights=none.pth", "eval.limit=1"], r"2 images or more, and there is 1"),
        (
            ["eval.fid.weights=none.pth"],
            r"^eval.fid.kid_subset_size=100: there are only 3 images; .* eval.fid.kid_subsets=0 for no KID",
        ),
        (
            ["eval.fid.weights=none.pth", "eval.fid.kid_subsets=0"],
            r"^eval.fid.weights: none.pth: no such weights file",
        ),
        (
            ["eval.fid.weights=pyproject.toml", "eval.fid.kid_subsets=0"],
            r"^eval.fid.weights: pyproject.toml: not a file of weights",
        ),
        (["eval.window=31"], r"eval.window must be at least 32, got 31"),
        (["eval.size=whole"], r"eval.size=whole: expected one of square, full"),
        (["eval.value_range=1,1"], r"eval.value_range must be low,high"),
        (["run.cuda_graphs=true"], r"run.cuda_graphs=true needs a CUDA device"),
        (["data.batch_size=13"], r"data.batch_size=13 is more than the 12"),
    ],
)
def test_mistakes_are_named(views: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TranslationTask(tiny_recipe(views, *overrides))


@pytest.mark.parametrize("split", ["train", "val"])
def test_pictures_are_looked_at_before_work_starts(views: Path, tmp_path: Path, split: str) -> None:
    recipe = tiny_recipe(shutil.copytree(views, tmp_path / "views"))
    dataset = open_split(recipe.data, split)
    target = dataset._views[0].path(dataset.root, recipe.data.target)
    kept = target.read_bytes()
    target.write_bytes(b"no picture")
    with pytest.raises(DataError, match=target.name):
        TranslationTask(recipe)
    target.write_bytes(kept)
    TranslationTask(recipe)
