"""Which trainings there are in each phase, and what the results of one phase choose for the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

from bench.fusion.budgets import SEARCH_SEED, Budget
from bench.fusion.methods import METHODS

PHASES = ("search", "table", "long")
SCORE = "ensemble/mean_iou"  # by which trainings are compared
BEST = 2  # fusions that are trained longer

Result = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """What the search chooses among.

    Attributes:
        factor: of the budget's learning rates.
        threshold: of an exchange; "" for all else.
    """

    factor: float
    threshold: str = ""


@dataclass(frozen=True)
class Plan:
    """A training."""

    phase: str
    method: str
    choice: Choice
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and of its result's file."""
        parts = [self.method]
        if self.phase == "search":
            parts.append(f"rate{self.choice.factor:g}")
            if self.choice.threshold:
                parts.append(f"threshold{self.choice.threshold.replace('*median', 'm')}")
        return f"{self.phase}/{'_'.join([*parts, f'seed{self.seed}'])}"


Read = Callable[[Plan], Result | None]  # a training's result, or None where there is none


def search_plans(budget: Budget, method: str, read: Read) -> Iterator[Plan]:
    """The search's trainings of a method: of every learning rate, then, with the best, of every threshold.

    The second part asks ``read`` for the results of the first, and is left out where one is missing. A method
    that is ``like`` another has none.
    """
    if METHODS[method].like:
        return
    exchanges = METHODS[method].exchanges
    first = budget.thresholds[0] if exchanges else ""
    rates = [Plan("search", method, Choice(factor, first), SEARCH_SEED) for factor in budget.factors]
    yield from rates
    if exchanges and (best := _best(rates, read)) is not None:
        for threshold in budget.thresholds[1:]:
            yield Plan("search", method, Choice(best.choice.factor, threshold), SEARCH_SEED)


def chosen(budget: Budget, method: str, read: Read) -> Choice | None:
    """What the search found to be the best for a method; None while its results are not complete."""
    method = METHODS[method].like or method
    plans = list(search_plans(budget, method, read))
    complete = len(budget.factors) + (len(budget.thresholds) - 1) * METHODS[method].exchanges
    best = _best(plans, read) if len(plans) == complete else None
    return None if best is None else best.choice


def expert_plans(budget: Budget, plan: Plan, read: Read) -> Iterator[Plan]:
    """The trainings of single modalities that one starts from, in the order of the modalities."""
    for method in METHODS[plan.method].experts:
        choice = chosen(budget, method, read)
        if choice is not None:
            yield Plan(plan.phase, method, choice, plan.seed)


def table_plans(budget: Budget, read: Read) -> Iterator[Plan]:
    """The table's trainings, seeds interleaved, of the methods whose search is complete."""
    choices = {method: chosen(budget, method, read) for method in budget.methods}
    for seed in budget.seeds:
        for method, choice in choices.items():
            if choice is not None:
                yield Plan("table", method, choice, seed)


def long_plans(budget: Budget, read: Read) -> Iterator[Plan]:
    """Trainings of the table's two best fusions, and of no exchange; none before the table is whole."""
    scores: dict[str, list[float]] = {}
    for plan in table_plans(budget, read):
        result = read(plan)
        if result is None:
            return
        scores.setdefault(plan.method, []).append(result["metrics"][SCORE])
    fusions = [name for name in scores if METHODS[name].is_fusion and not METHODS[name].like]
    best = sorted(fusions, key=lambda method: -mean(scores[method]))[:BEST]
    for seed in budget.seeds:
        for method in ("none", *best):
            choice = chosen(budget, method, read)
            if choice is not None:
                yield Plan("long", method, choice, seed)


def _best(plans: list[Plan], read: Read) -> Plan | None:
    """The plan of the best result; None where one has none."""
    scores = {}
    for plan in plans:
        result = read(plan)
        if result is None:
            return None
        scores[plan] = result["metrics"][SCORE]
    return max(scores, key=lambda plan: scores[plan])
