"""Whether what a search found holds: reruns on fresh seeds, at two widths, against the noise."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from svend.pipeline.sweep.options import Sweep, Value
from svend.pipeline.sweep.study import TASK, SweepStudy, origin_of

DEFAULT = "default"
LEARNING_RATE = "training.learning_rate"
PROXY, SECOND_WIDTH, DOUBLE_RATE = "proxy", "second width", "twice the rate"
# Fresh ones begin here, far from those that people choose.
FIRST_SEED = 1_000_000
# Of pooled standard errors, by which a difference is taken for one.
ERRORS_APART = 2.0
MAX_RISE = 0.01


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
class Losses:
    """Held-out losses of one candidate under one condition, one for each seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def variance(self) -> float:
        return statistics.variance(self.values) if len(self.values) > 1 else math.nan

    def error_beside(self, other: Losses) -> float:
        """Return the standard error of the difference of the two means, variances pooled."""
        pooled = (self.variance + other.variance) / 2
        return math.sqrt(pooled * (1 / len(self.values) + 1 / len(other.values)))


Measured = dict[tuple[str, str], Losses]


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
    """Return the losses of every rerun that ended, by candidate and condition."""
    found: dict[tuple[str, str], list[float]] = {}
    for trial in confirmation.trials:
        if trial.state is TrialState.COMPLETE and trial.value is not None:
            task = _task_of(trial)
            found.setdefault((task["candidate"], task["condition"]), []).append(trial.value)
    return {key: Losses(tuple(values)) for key, values in found.items()}


def winner_of(candidates: Iterable[Candidate], losses: Measured) -> Candidate | None:
    """Return the searched candidate of the lowest mean loss on fresh seeds."""
    tried = [c for c in candidates if c.name != DEFAULT and (c.name, PROXY) in losses]
    return min(tried, key=lambda c: losses[c.name, PROXY].mean, default=None)


def judge(
    sweep: Sweep, candidates: list[Candidate], winner: Candidate | None, losses: Measured
) -> list[Rule]:
    """Decide each condition for carrying the winner's values upward."""
    if winner is None:
        return [Rule("confirmed", False, "nothing was run again")]
    seeds = sweep.config.confirm.seeds
    missing = [
        f"{c.name} at {condition}" for c in candidates for condition in (PROXY, SECOND_WIDTH)
        if len(losses.get((c.name, condition), Losses(())).values) < seeds
        and (condition == PROXY or sweep.config.confirm.second_width)
    ]
    rules = [Rule("all reruns ended", not missing, ", ".join(missing) or "each with every seed")]
    rules.append(_beats_default(winner, losses))
    edges = {
        d.key: edge for d in sweep.space
        if (edge := d.at_edge(winner.values.get(d.key))) is not None
    }
    where = ", ".join(f"{key} at its {edge} end" for key, edge in edges.items())
    rules.append(Rule("not at an edge", not edges, where or "every value is inside its range"))
    rules.append(_agrees_at_second_width(candidates, winner, losses))
    if any(d.key == LEARNING_RATE for d in sweep.space):
        rules.append(_is_on_safe_side(winner, losses))
    return rules


def _beats_default(winner: Candidate, losses: Measured) -> Rule:
    name = "beats the default"
    ours, theirs = losses.get((winner.name, PROXY)), losses.get((DEFAULT, PROXY))
    if ours is None or theirs is None:
        return Rule(name, False, "the default was not measured")
    gain, error = theirs.mean - ours.mean, ours.error_beside(theirs)
    return Rule(
        name, gain > ERRORS_APART * error,
        f"by {gain:.4f} ({ours.mean:.4f} against {theirs.mean:.4f}), which must be more than "
        f"{ERRORS_APART:g} standard errors of {error:.4f}",
    )


def _agrees_at_second_width(
    candidates: Iterable[Candidate], winner: Candidate, losses: Measured
) -> Rule:
    name = "agrees at two widths"
    there = {c.name: losses[c.name, SECOND_WIDTH] for c in candidates
             if (c.name, SECOND_WIDTH) in losses}
    if winner.name not in there:
        return Rule(name, False, "not measured at a second width")
    best = min(there, key=lambda candidate: there[candidate].mean)
    behind = there[winner.name].mean - there[best].mean
    error = there[winner.name].error_beside(there[best])
    return Rule(
        name, behind <= ERRORS_APART * error,
        f"the best there is {best} ({there[best].mean:.4f}); the winner is {behind:.4f} behind, "
        f"which must be at most {ERRORS_APART:g} standard errors of {error:.4f}",
    )


def _is_on_safe_side(winner: Candidate, losses: Measured) -> Rule:
    name = "safe at twice the learning rate"
    here, there = losses.get((winner.name, PROXY)), losses.get((winner.name, DOUBLE_RATE))
    if here is None or there is None:
        return Rule(name, False, "not measured")
    rise = there.mean / here.mean - 1
    return Rule(name, rise < MAX_RISE, f"the loss changes by {rise:+.2%}, which must be below "
                                       f"{MAX_RISE:+.0%}")


def _doubled(values: Mapping[str, Value]) -> dict[str, Value]:
    rate = values[LEARNING_RATE]
    assert isinstance(rate, int | float)
    return {**values, LEARNING_RATE: 2 * rate}


def _task_of(trial: FrozenTrial) -> dict[str, Any]:
    task: dict[str, Any] = json.loads(trial.user_attrs[TASK])
    return task
