"""A measured value with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr

Values = npt.NDArray[np.float64]
INTERVAL_LEVEL = 0.95
BOOTSTRAP_RESAMPLES = 2000
# An interval's bounds at a level of confidence, and at a multiple of the sample size.
Bounds = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Measurement:
    """A measured value, with its 95% confidence interval and sample size where it is a sample.

    `bounds` gives the interval at another level, and as it would be for a multiple of the sample
    with the same value; without it, the 95% interval is taken for a normal distribution's.
    data_fingerprint: a hash of what it was measured on, where that has one of its own. run_id: the
    run that measured it, where that is another than the one that decides on it.
    """

    value: float
    interval: tuple[float, float] | None = None
    sample_size: int | None = None
    data_fingerprint: str | None = None
    run_id: str | None = None
    bounds: Bounds | None = field(default=None, repr=False, compare=False)

    def interval_at(self, level: float, size_factor: float = 1.0) -> tuple[float, float] | None:
        """Return the two-sided interval at a level; None where the value is no sample."""
        if self.bounds is not None:
            return self.bounds(level, size_factor)
        if self.interval is None:
            return None
        scale = normal_quantile(level) / normal_quantile(INTERVAL_LEVEL) / math.sqrt(size_factor)
        low, high = self.interval
        return self.value + (low - self.value) * scale, self.value + (high - self.value) * scale


def normal_quantile(level: float) -> float:
    """Return how many standard deviations hold a two-sided share `level` of a normal."""
    return NormalDist().inv_cdf(0.5 + level / 2)


def wilson_interval(successes: float, n: float, level: float) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927)."""
    z = normal_quantile(level)
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def proportion(successes: int, n: int) -> Measurement:
    """Return a share of n problems, with its Wilson interval."""

    def bounds(level: float, size_factor: float) -> tuple[float, float]:
        return wilson_interval(successes * size_factor, n * size_factor, level)

    return Measurement(successes / n, bounds(INTERVAL_LEVEL, 1.0), n, bounds=bounds)


def mean_of_proportions(parts: Sequence[tuple[int, int]]) -> Measurement:
    """Return the mean of shares (successes, n) that count alike whatever their n.

    The interval adds the distances of each share's Wilson bounds in quadrature (Newcombe 1998,
    method 10, for a mean in place of a difference).
    """
    shares = [successes / n for successes, n in parts]
    value = sum(shares) / len(shares)

    def bounds(level: float, size_factor: float) -> tuple[float, float]:
        below = above = 0.0
        for share, (successes, n) in zip(shares, parts, strict=True):
            low, high = wilson_interval(successes * size_factor, n * size_factor, level)
            below, above = below + (share - low) ** 2, above + (high - share) ** 2
        return value - math.sqrt(below) / len(parts), value + math.sqrt(above) / len(parts)

    total = sum(n for _, n in parts)
    return Measurement(value, bounds(INTERVAL_LEVEL, 1.0), total, bounds=bounds)


def mean_of_samples(values: Sequence[float], seed: int = 0) -> Measurement:
    """Return the mean of values, one for each problem, with a bootstrap interval."""
    array = np.asarray(values, dtype=np.float64)
    return bootstrap(array[:, None], lambda resampled: resampled[..., 0], seed)


def bootstrap(
    rows_NC: Values, statistic: Callable[[Values], Values], seed: int = 0
) -> Measurement:
    """Return a statistic of the rows' column means, with its percentile bootstrap interval.

    rows_NC: (n, columns), a row for each independent unit. statistic: takes means, (..., columns),
    and returns (...). Efron and Tibshirani 1993, chapter 13.
    """
    n = len(rows_NC)
    value = float(statistic(rows_NC.mean(axis=0)))
    if n < 2:
        return Measurement(value, (-math.inf, math.inf), n)
    # How often each row is drawn, for all resamples at once.
    counts_RN = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), BOOTSTRAP_RESAMPLES)
    drawn = statistic(counts_RN @ rows_NC / n)
    drawn = drawn[~np.isnan(drawn)]

    def bounds(level: float, size_factor: float) -> tuple[float, float]:
        low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
        shrink = math.sqrt(size_factor)
        return value + float(low - value) / shrink, value + float(high - value) / shrink

    return Measurement(value, bounds(INTERVAL_LEVEL, 1.0), n, bounds=bounds)


def quantile(values: Sequence[float], share: float) -> Measurement:
    """Return a quantile of values, such as 0.99, with its interval by order statistics.

    The bounds are those values that the quantile lies between by the binomial distribution (David
    and Nagaraja 2003, section 7.1), infinite where there are too few values for one.
    """
    ordered = sorted(values)
    n = len(ordered)
    value = ordered[min(n - 1, math.ceil(share * n) - 1)]
    # Entry k: how likely it is that at most k values lie below the quantile.
    cumulative = bdtr(np.arange(n + 1), n, share)

    def bounds(level: float, size_factor: float) -> tuple[float, float]:  # noqa: ARG001
        tail = (1 - level) / 2
        low = int((cumulative <= tail).sum())
        high = int((cumulative < 1 - tail).sum())
        return (ordered[low - 1] if low else 0.0), (ordered[high] if high < n else math.inf)

    return Measurement(value, bounds(INTERVAL_LEVEL, 1.0), n, bounds=bounds)
