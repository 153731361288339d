"""Intervals are those of the formulas, and hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svend.evaluation.measurement import (
    Measurement,
    bootstrap,
    mean_of_proportions,
    mean_of_samples,
    normal_quantile,
    proportion,
    quantile,
    wilson_interval,
)

COUNTS = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(COUNTS, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilsons_bounds_are_the_shares_that_a_score_test_just_does_not_reject(
    counts: tuple[int, int], level: float
) -> None:
    successes, n = counts
    z = normal_quantile(level)
    for bound in wilson_interval(successes, n, level):
        if 1e-12 < bound < 1 - 1e-12:
            score = abs(successes / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert score == pytest.approx(z, rel=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(36, 50), (132, 200), (821, 1319)])
def test_so_many_right_answers_are_needed_to_pass_60_percent_with_confidence(
    successes: int, n: int
) -> None:
    assert proportion(successes, n).interval_at(0.9)[0] >= 0.6
    assert proportion(successes - 1, n).interval_at(0.9)[0] < 0.6


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_wilsons_interval_holds_the_true_share_about_as_often_as_it_says(share: float) -> None:
    drawn = np.random.default_rng(0).binomial(200, share, 2000)
    held = [low <= share <= high for low, high in
            (wilson_interval(int(successes), 200, 0.95) for successes in drawn)]
    assert 0.93 <= np.mean(held) <= 0.98


@given(COUNTS, st.integers(2, 50))
def test_a_larger_sample_with_the_same_share_has_a_narrower_interval_around_it(
    counts: tuple[int, int], factor: int
) -> None:
    measured = proportion(*counts)
    low, high = measured.interval_at(0.95)
    more_low, more_high = measured.interval_at(0.95, factor)
    rounding = 1e-12
    assert low - rounding <= more_low <= measured.value + rounding
    assert measured.value - rounding <= more_high <= high + rounding
    exact = wilson_interval(counts[0] * factor, counts[1] * factor, 0.95)
    assert (more_low, more_high) == pytest.approx(exact, abs=1e-9)


@given(st.lists(COUNTS, min_size=1, max_size=6))
def test_the_mean_of_shares_counts_each_share_alike(parts: list[tuple[int, int]]) -> None:
    measured = mean_of_proportions(parts)
    assert measured.value == pytest.approx(np.mean([s / n for s, n in parts]))
    low, high = measured.interval
    assert low - 1e-12 <= measured.value <= high + 1e-12
    assert measured.sample_size == sum(n for _, n in parts)
    if len(parts) == 1:
        assert (low, high) == pytest.approx(proportion(*parts[0]).interval)


def test_the_interval_of_a_mean_of_shares_holds_the_truth_about_as_often_as_it_says() -> None:
    rng, shares, sizes = np.random.default_rng(1), (0.9, 0.2, 0.5), (60, 200, 100)
    held = []
    for _ in range(2000):
        parts = [(int(rng.binomial(n, p)), n) for p, n in zip(shares, sizes, strict=True)]
        low, high = mean_of_proportions(parts).interval
        held.append(low <= np.mean(shares) <= high)
    assert 0.93 <= np.mean(held) <= 0.98


def test_a_bootstrap_of_a_mean_is_as_wide_as_its_standard_error_says() -> None:
    values = np.random.default_rng(2).gamma(2.0, 1.0, 400)
    measured = mean_of_samples(list(values))
    low, high = measured.interval
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    narrower = measured.interval_at(0.95, 4.0)
    assert narrower[1] - narrower[0] == pytest.approx((high - low) / 2)
    assert mean_of_samples(list(values)).interval == measured.interval  # the same every time


def test_one_row_says_nothing_of_the_spread() -> None:
    measured = bootstrap(np.array([[2.0]]), lambda means: means[..., 0])
    assert measured.interval == (-math.inf, math.inf)
    assert measured.value == 2.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_a_quantile_is_the_smallest_value_that_so_many_do_not_exceed(seed: int) -> None:
    values = list(np.random.default_rng(seed).random(150))
    for share in (0.5, 0.99):
        value = quantile(values, share).value
        assert value in values
        assert np.mean(np.array(values) <= value) >= share
        assert np.mean(np.array(values) < value) < share


def test_the_interval_of_a_median_holds_it_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    held = []
    for _ in range(2000):
        low, high = quantile(list(rng.exponential(1.0, 60)), 0.5).interval
        held.append(low <= math.log(2) <= high)
    assert 0.94 <= np.mean(held) <= 0.985


def test_a_quantile_of_very_many_values_has_an_interval() -> None:
    values = np.random.default_rng(0).random(5000)
    low, high = quantile(list(values), 0.99).interval
    # By the binomial's normal approximation, for the rank.
    rank, spread = 0.99 * 5000, normal_quantile(0.95) * math.sqrt(5000 * 0.99 * 0.01)
    ordered = np.sort(values)
    assert ordered[int(rank - spread) - 2] <= low <= ordered[int(rank - spread) + 2]
    assert ordered[int(rank + spread) - 2] <= high <= ordered[int(rank + spread) + 2]


def test_too_few_values_have_no_upper_bound_for_a_99th_percentile() -> None:
    assert quantile([1.0] * 100, 0.99).interval[1] == math.inf
    assert quantile(list(np.linspace(0, 1, 1000)), 0.99).interval[1] < 1.0


def test_an_interval_without_a_formula_is_taken_for_a_normal_distributions() -> None:
    measured = Measurement(10.0, (8.04, 11.96), 50)
    assert measured.interval_at(0.95) == pytest.approx((8.04, 11.96))
    z = normal_quantile(0.9)
    assert measured.interval_at(0.9, 4.0) == pytest.approx((10 - z / 2, 10 + z / 2), rel=1e-4)
    assert Measurement(1.0).interval_at(0.9) is None
