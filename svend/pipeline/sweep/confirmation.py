"""Whether what a search found holds: reruns on fresh seeds, at two widths, against the noise."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from svend.pipeline.sweep.options import Sweep, Value
from svend.pipeline.sweep.study import TASK, SweepStudy, origin_of

DEFAULT = "default"
LEARNING_RATE = "training.learning_rate"
PROXY, SECOND_WIDTH, DOUBLE_RATE = "proxy", "second width", "twice the rate"
# Fresh ones begin here, far from those that people choose.
FIRST_SEED = 1_000_000


@dataclass(frozen=True)
class Candidate:
    """Values that are tried again, and what they are called."""

    name: str
    values: dict[str, Value]


@dataclass(frozen=True)
class Rule:
    """One condition for carrying the result upward, with what was measured."""

    name: str
    holds: bool
    why: str


@dataclass(frozen=True)
class Reruns:
    """Held-out losses of candidates under one condition, by candidate and seed.

    A seed is a corpus, an order and an init, so that candidates are compared within seeds: what is
    left of a loss beside its candidate's mean and its seed's is noise (two-way analysis of
    variance without interaction), pooled over candidates.
    """

    losses: dict[str, dict[int, float]]

    def mean(self, candidate: str) -> float:
        return statistics.fmean(self.losses[candidate].values())

    def complete(self, candidate: str, seeds: int) -> bool:
        return len(self.losses.get(candidate, {})) == seeds

    @property
    def standard_error(self) -> float:
        """The standard error of the difference of two candidates' means."""
        names = list(self.losses)
        shared = sorted(set.intersection(*(set(self.losses[name]) for name in names)))
        table = np.array([[self.losses[name][seed] for seed in shared] for name in names])
        freedom = (len(names) - 1) * (len(shared) - 1)
        if freedom < 1:
            return math.nan  # with which nothing compares as better
        noise = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
        return math.sqrt(2 * float((noise**2).sum()) / freedom / len(shared))


Measured = dict[str, Reruns]  # by condition


def choose_candidates(sweep: Sweep, search: SweepStudy) -> list[Candidate]:
    """Return the best trials, and the values that nobody searched for."""
    best: list[Candidate] = []
    for trial in search.ended():
        diverged = any(value > 0 for value in trial.constraints.values())
        values = dict(trial.params)
        if not diverged and values not in [candidate.values for candidate in best]:
            best.append(Candidate(f"trial-{origin_of(trial)}", values))
    return [*best[: sweep.config.confirm.top], Candidate(DEFAULT, sweep.default_values())]


def tasks_at(
    sweep: Sweep, candidates: Iterable[Candidate], condition: str
) -> list[dict[str, Any]]:
    """Return the reruns of candidates under a condition, one for each fresh seed."""
    changes: dict[str, Any] = {}
    if condition == SECOND_WIDTH:
        changes = dict(sweep.config.confirm.second_width)
    return [
        {
            "name": f"{candidate.name}-{condition.replace(' ', '-')}-seed-{seed}",
            "candidate": candidate.name, "condition": condition, "seed": FIRST_SEED + seed,
            "values": _doubled(candidate.values) if condition == DOUBLE_RATE
            else candidate.values,
            "changes": changes,
        }
        for candidate in candidates
        for seed in range(sweep.config.confirm.seeds)
    ]


def measured(confirmation: SweepStudy) -> Measured:
    """Return the losses of every rerun that ended, by condition."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for trial in confirmation.trials:
        if trial.state is TrialState.COMPLETE and trial.value is not None:
            task = _task_of(trial)
            of_condition = found.setdefault(task["condition"], {})
            of_condition.setdefault(task["candidate"], {})[task["seed"]] = trial.value
    return {condition: Reruns(losses) for condition, losses in found.items()}


def winner_of(candidates: Iterable[Candidate], reruns: Measured) -> Candidate | None:
    """Return the searched candidate of the lowest mean loss on fresh seeds."""
    here = reruns.get(PROXY, Reruns({}))
    tried = [c for c in candidates if c.name != DEFAULT and c.name in here.losses]
    return min(tried, key=lambda c: here.mean(c.name), default=None)


def judge(
    sweep: Sweep, candidates: list[Candidate], winner: Candidate | None, reruns: Measured
) -> list[Rule]:
    """Decide each condition for carrying the winner's values upward."""
    if winner is None:
        return [Rule("confirmed", False, "nothing was run again")]
    wanted = [(PROXY, c) for c in candidates]
    if sweep.config.confirm.second_width:
        wanted += [(SECOND_WIDTH, c) for c in candidates]
    if LEARNING_RATE in winner.values:
        wanted.append((DOUBLE_RATE, winner))
    seeds = sweep.config.confirm.seeds
    missing = [
        f"{candidate.name} at {condition}" for condition, candidate in wanted
        if not reruns.get(condition, Reruns({})).complete(candidate.name, seeds)
    ]
    if missing:
        return [Rule("all reruns ended", False, f"missing or failed: {', '.join(missing)}")]
    edges = {
        d.key: edge for d in sweep.space
        if (edge := d.at_edge(winner.values.get(d.key))) is not None
    }
    where = ", ".join(f"{key} at its {edge} end" for key, edge in edges.items())
    rules = [
        _beats_default(winner, reruns[PROXY], sweep.config.confirm.errors_apart),
        Rule("not at an edge", not edges, where or "every value is inside its range"),
        _agrees_at_second_width(
            winner, reruns.get(SECOND_WIDTH), sweep.config.confirm.errors_apart
        ),
    ]
    if LEARNING_RATE in winner.values:
        rules.append(_is_on_safe_side(winner, reruns, sweep.config.confirm.max_rise))
    return rules


def _beats_default(winner: Candidate, here: Reruns, errors_apart: float) -> Rule:
    gain, error = here.mean(DEFAULT) - here.mean(winner.name), here.standard_error
    return Rule(
        "beats the default", gain > errors_apart * error,
        f"by {gain:.4f} ({here.mean(winner.name):.4f} against {here.mean(DEFAULT):.4f}), which "
        f"must be more than {errors_apart:g} standard errors of {error:.4f}",
    )


def _agrees_at_second_width(
    winner: Candidate, there: Reruns | None, errors_apart: float
) -> Rule:
    name = "agrees at two widths"
    if there is None:
        return Rule(name, False, "not measured: the sweep has no second width")
    best = min(there.losses, key=there.mean)
    behind, error = there.mean(winner.name) - there.mean(best), there.standard_error
    return Rule(
        name, behind <= errors_apart * error,
        f"the best there is {best} ({there.mean(best):.4f}); the winner is {behind:.4f} behind, "
        f"which must be at most {errors_apart:g} standard errors of {error:.4f}",
    )


def _is_on_safe_side(winner: Candidate, reruns: Measured, max_rise: float) -> Rule:
    rise = reruns[DOUBLE_RATE].mean(winner.name) / reruns[PROXY].mean(winner.name) - 1
    return Rule(
        "safe at twice the learning rate", rise < max_rise,
        f"the loss changes by {rise:+.2%}, which must be below {max_rise:+.0%}",
    )


def _doubled(values: Mapping[str, Value]) -> dict[str, Value]:
    rate = values[LEARNING_RATE]
    assert isinstance(rate, int | float)
    return {**values, LEARNING_RATE: 2 * rate}


def _task_of(trial: FrozenTrial) -> dict[str, Any]:
    task: dict[str, Any] = json.loads(trial.user_attrs[TASK])
    return task
