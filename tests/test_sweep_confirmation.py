"""Whether a result may be carried upward: each rule holds and fails where it should."""

from __future__ import annotations

import numpy as np
import pytest

from svend.pipeline.sweep.confirmation import (
    DEFAULT,
    DOUBLE_RATE,
    FIRST_SEED,
    PROXY,
    SECOND_WIDTH,
    Candidate,
    Measured,
    Reruns,
    judge,
    tasks_at,
    winner_of,
)
from svend.pipeline.sweep.options import load_sweep

SWEEP = load_sweep("minute", {"scale": "tiny"}, [("sweep.confirm.seeds", "3")])
WINNER = Candidate("trial-1", {"training.learning_rate": 5e-3, "training.weight_decay": 0.1})
OTHER = Candidate("trial-2", {"training.learning_rate": 8e-3, "training.weight_decay": 0.2})
CANDIDATES = [WINNER, OTHER, Candidate(DEFAULT, {})]
SEEDS = [0.5, 0.0, -0.4]  # what a seed adds to everyone's loss: far more than the noise


def reruns(means: dict[str, float], noise: float = 0.003) -> Reruns:
    rng = np.random.default_rng(0)
    return Reruns({
        name: {FIRST_SEED + n: mean + seed + float(rng.normal(0, noise))
               for n, seed in enumerate(SEEDS)}
        for name, mean in means.items()
    })


def good() -> Measured:
    return {
        PROXY: reruns({"trial-1": 2.0, "trial-2": 2.01, DEFAULT: 2.1}),
        SECOND_WIDTH: reruns({"trial-1": 3.0, "trial-2": 3.01, DEFAULT: 3.1}),
        DOUBLE_RATE: reruns({"trial-1": 2.005}),
    }


def failing(measured: Measured, winner: Candidate | None = WINNER) -> list[str]:
    return [rule.name for rule in judge(SWEEP, CANDIDATES, winner, measured) if not rule.holds]


def test_a_good_result_may_be_carried_upward() -> None:
    assert failing(good()) == []
    assert winner_of(CANDIDATES, good()) == WINNER


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({PROXY: reruns({"trial-1": 2.0, "trial-2": 2.01, DEFAULT: 2.002})}, "beats the default"),
        ({PROXY: reruns({"trial-1": 2.0, "trial-2": 2.0, DEFAULT: 2.1}, noise=0.2)},
         "beats the default"),
        ({SECOND_WIDTH: reruns({"trial-1": 3.1, "trial-2": 3.0, DEFAULT: 3.1})},
         "agrees at two widths"),
        ({DOUBLE_RATE: reruns({"trial-1": 2.05})}, "safe at twice the learning rate"),
        ({SECOND_WIDTH: reruns({"trial-1": 3.0, DEFAULT: 3.1})}, "all reruns ended"),
        ({DOUBLE_RATE: Reruns({})}, "all reruns ended"),
    ],
)
def test_each_rule_fails_where_it_should(change: Measured, rule: str) -> None:
    assert failing({**good(), **change}) == [rule]


def test_a_value_at_the_edge_of_its_range_is_no_result() -> None:
    edge = Candidate("trial-1", {**WINNER.values, "training.learning_rate": 0.0299})
    rules = judge(SWEEP, [edge, OTHER, CANDIDATES[2]], edge, good())
    assert [r.why for r in rules if not r.holds] == ["training.learning_rate at its high end"]


def test_nothing_run_again_is_no_result() -> None:
    assert failing({}, None) == ["confirmed"]


def test_differences_between_seeds_are_no_noise() -> None:
    """The standard error is that of what seeds do not explain, checked against a simulation."""
    rng = np.random.default_rng(1)
    errors, differences = [], []
    for _ in range(400):
        noise = rng.normal(0, 0.1, (4, 3))
        table = np.arange(4)[:, None] + np.array(SEEDS)[None] * 9 + noise
        drawn = Reruns({str(n): dict(enumerate(row.tolist())) for n, row in enumerate(table)})
        errors.append(drawn.standard_error**2)
        differences.append(drawn.mean("1") - drawn.mean("0"))
    assert np.sqrt(np.mean(errors)) == pytest.approx(np.std(differences), rel=0.1)
    assert np.std(differences) == pytest.approx(0.1 * np.sqrt(2 / 3), rel=0.1)


def test_reruns_are_on_fresh_seeds_at_the_condition_they_name() -> None:
    tasks = tasks_at(SWEEP, [WINNER], DOUBLE_RATE)
    assert [task["seed"] for task in tasks] == [FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2]
    assert all(task["values"]["training.learning_rate"] == 1e-2 for task in tasks)
    width = tasks_at(SWEEP, [WINNER], SECOND_WIDTH)[0]
    assert width["changes"] == SWEEP.config.confirm.second_width
    assert width["values"] == WINNER.values
