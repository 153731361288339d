"""What a model of more parameters, on more tokens, will reach: fitted on what smaller ones did.

The law is L(N, D) = E + A / N^alpha + B (N^gamma / D)^beta. With gamma = 0 it is that of Hoffmann
et al. 2022 (arXiv 2203.15556, section 3.3); with gamma = 1 what more data would still gain depends
on the tokens per parameter alone. Published ladders lie between, for batch and number of steps grow
with the model.

It is fitted by variable projection (Golub and Pereyra 1973): for given exponents the three
coefficients, none of them negative, are a linear problem, so that only the exponents are searched.

Shape suffixes: P points, C the coefficients E, A and B.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import nnls
from scipy.special import stdtrit

from svend.errors import UserError

Array = npt.NDArray[np.float64]

COEFFICIENTS = 6
# With fewer the fit says more of the noise than of the law.
MIN_RUNGS, MIN_POINTS = 2, 8
MIN_HORIZONS = 3
# Exponents that are looked at, first coarsely, then between the neighbours of the best.
LOWEST_EXPONENT, HIGHEST_EXPONENT, GRID = 0.05, 2.0, 10
GAMMAS = 5  # from 0 to 1
REFINED, REFINEMENTS = 5, 3
CONFIDENCE = 0.95
STANDARD_ERRORS = 2.0  # that make an interval of about CONFIDENCE
# Two sizes do not say how the term of the size goes on: every alpha fits them. What is known of
# other ladders (Hoffmann et al.: 0.34; 0.17 fits OLMo's) then decides, weighed as one point of that
# noise, which is also taken for the least that a seed moves a rung by.
USUAL_ALPHA, SPREAD_OF_LOG_ALPHA, NOISE = 0.3, 0.7, 0.002


class TooFewPoints(UserError):
    """There are not enough points to predict from."""


@dataclass(frozen=True)
class Point:
    """A loss that was measured: nats per token, after so many tokens, of so many parameters.

    parameters: of the blocks' matrices and the head. The learning rate has decayed at the point as
    at the others, and data, tokenizer and shape of the schedule are theirs. rung: points of one run
    share its seed and its faults, and are left out together.
    """

    parameters: float
    tokens: float
    loss: float
    rung: str


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = irreducible + a / N^alpha + b (N^gamma / D)^beta."""

    irreducible: float
    a: float
    alpha: float
    b: float
    beta: float
    gamma: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss at so many parameters and tokens."""
        of_data: float = self.b * (parameters**self.gamma / tokens) ** self.beta
        of_size: float = self.a / parameters**self.alpha
        return self.irreducible + of_size + of_data

    def __str__(self) -> str:
        return (f"{self.irreducible:.3f} + {self.a:.4g} / N^{self.alpha:.3f} "
                f"+ {self.b:.4g} (N^{self.gamma:.2f} / D)^{self.beta:.3f}")


@dataclass(frozen=True)
class Prediction:
    """A loss before it is measured, with the bounds of its interval at CONFIDENCE."""

    loss: float
    low: float
    high: float
    law: ScalingLaw


@dataclass(frozen=True)
class _Fits:
    """The best law at each triple of exponents that was looked at, and its squared errors."""

    laws: list[ScalingLaw]
    squares: Array

    @functools.cached_property
    def costs(self) -> Array:
        """The squared errors, and by how much the exponent of the size is unusual."""
        alphas = np.array([law.alpha for law in self.laws])
        unusual = np.log(alphas / USUAL_ALPHA) / SPREAD_OF_LOG_ALPHA
        costs: Array = self.squares + (NOISE * unusual) ** 2
        return costs

    @property
    def best(self) -> int:
        return int(np.argmin(self.costs))


def fit_law(points: Sequence[Point]) -> ScalingLaw:
    """Return the law with the least squared relative error. Raises TooFewPoints."""
    fits = _fit(tuple(points))
    return fits.laws[fits.best]


def predict(points: Sequence[Point], parameters: float, tokens: float) -> Prediction:
    """Return what is expected at so many parameters and tokens, from the points.

    The interval holds what each law gives that fits the points about as well as the best (profile
    likelihood), and the scatter about it. Points of a rung share its seed: so the interval is at
    least as wide as one that moves each rung by NOISE makes it, and as leaving out one rung after
    the other is off. Raises TooFewPoints.
    """
    fits = _fit(tuple(points))
    best = fits.best
    freedom = len(points) - COEFFICIENTS
    quantile = float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
    variance = float(fits.squares[best]) / freedom
    # Of points that lie on a law to rounding, the neighbours in the grid still count as it.
    as_good = fits.costs <= fits.costs[best] + max(quantile**2 * variance, 1e-12)
    losses = [law.loss(parameters, tokens)
              for law, good in zip(fits.laws, as_good, strict=True) if good]
    scatter = quantile * math.sqrt(variance)
    law = fits.laws[best]
    loss = law.loss(parameters, tokens)
    between_rungs = STANDARD_ERRORS * max(
        loss * left_out_error(points), _error_by_seeds(points, parameters, tokens, loss)
    )
    return Prediction(
        loss, min(min(losses) * (1 - scatter), loss - between_rungs),
        max(max(losses) * (1 + scatter), loss + between_rungs), law,
    )


def _error_by_seeds(
    points: Sequence[Point], parameters: float, tokens: float, loss: float
) -> float:
    """Return the standard error of a loss if each rung's seed moves all of its points by NOISE."""
    squares = 0.0
    for rung in _rungs(points):
        moved = [replace(point, loss=point.loss * (1 + NOISE)) if point.rung == rung else point
                 for point in points]
        squares += (fit_law(moved).loss(parameters, tokens) - loss) ** 2
    return math.sqrt(squares)


def left_out_error(points: Sequence[Point]) -> float:
    """Return the root mean square error, as a share, of each rung predicted from the others.

    0 where leaving one out leaves too few.
    """
    squares = []
    for rung in _rungs(points):
        others = [point for point in points if point.rung != rung]
        if why_too_few(others):
            return 0.0
        law = fit_law(others)
        squares += [relative_error(point.loss, law.loss(point.parameters, point.tokens)) ** 2
                    for point in points if point.rung == rung]
    return math.sqrt(sum(squares) / len(squares))


def backtest(points: Sequence[Point]) -> pd.DataFrame:
    """Predict each rung from all others, and the rungs above the second from those below.

    Returns a row per point and `fitted_on` ("others" or "below"): rung, parameters, tokens,
    measured, predicted, low, high, and error, the measured loss against the predicted one as a
    share of it. Rungs that too few points remain for have no row.
    """
    rows = []
    order = _rungs(points)
    for number, rung in enumerate(order):
        others = [point for point in points if point.rung != rung]
        below = [point for point in others if point.rung in order[:number]]
        for fitted_on, known in (("others", others), ("below", below)):
            if why_too_few(known):
                continue
            for point in points:
                if point.rung != rung:
                    continue
                predicted = predict(known, point.parameters, point.tokens)
                rows.append({
                    "rung": rung, "fitted_on": fitted_on, "parameters": point.parameters,
                    "tokens": point.tokens, "measured": point.loss, "predicted": predicted.loss,
                    "low": predicted.low, "high": predicted.high,
                    "error": relative_error(point.loss, predicted.loss),
                })
    return pd.DataFrame(rows, columns=[
        "rung", "fitted_on", "parameters", "tokens", "measured", "predicted", "low", "high",
        "error",
    ])


def relative_error(measured: float, predicted: float) -> float:
    """Return by which share of the prediction the measured loss lies above it."""
    return (measured - predicted) / predicted


def expected_end(loss: float, below: float, below_at_end: float) -> float:
    """Return the loss at a run's end, expected from the one at a part of it.

    below: the loss at the same part of the run of the rung below; below_at_end: at its end. Runs of
    the same data, schedule and tokens per parameter fall alike.
    """
    return loss * below_at_end / below


def why_too_few(points: Sequence[Point]) -> str | None:
    """Say why nothing can be predicted from the points; None if something can."""
    rungs = _rungs(points)
    if len(rungs) < MIN_RUNGS:
        return f"too few sizes ({len(rungs)}), at least {MIN_RUNGS} are needed"
    if len(points) < MIN_POINTS:
        return f"too few points ({len(points)}), at least {MIN_POINTS} are needed"
    horizons = max(len({point.tokens for point in points if point.rung == rung}) for rung in rungs)
    if horizons < MIN_HORIZONS:
        return f"too few horizons ({horizons}), at least {MIN_HORIZONS} are needed"
    return None


def _rungs(points: Iterable[Point]) -> list[str]:
    """The rungs by size, the smallest first."""
    return list(dict.fromkeys(p.rung for p in sorted(points, key=lambda p: p.parameters)))


# From the same points many sizes are predicted: a ladder's rungs, a report's curves.
@functools.lru_cache(maxsize=256)
def _fit(points: tuple[Point, ...]) -> _Fits:
    reason = why_too_few(points)
    if reason is not None:
        raise TooFewPoints(f"no prediction: {reason}")
    losses_P = np.array([point.loss for point in points])
    if not (np.isfinite(losses_P).all() and (losses_P > 0).all()):
        raise UserError("no prediction: a loss among the points is not finite and above 0")
    exponents = np.geomspace(LOWEST_EXPONENT, HIGHEST_EXPONENT, GRID)
    rounds = [_fit_at(points, exponents, exponents, np.linspace(0, 1, GAMMAS))]
    step, gamma_step = exponents[1] / exponents[0], 1 / (GAMMAS - 1)
    for _ in range(REFINEMENTS):
        best = rounds[-1].laws[rounds[-1].best]
        factors = np.geomspace(1 / step, step, REFINED)
        gammas = best.gamma + np.linspace(-gamma_step, gamma_step, REFINED)
        rounds.append(_fit_at(
            points, best.alpha * factors, best.beta * factors, gammas.clip(0, 1)
        ))
        step, gamma_step = factors[1] / factors[0], gammas[1] - gammas[0]
    return _Fits([law for fits in rounds for law in fits.laws],
                 np.concatenate([fits.squares for fits in rounds]))


def _fit_at(points: Sequence[Point], alphas: Array, betas: Array, gammas: Array) -> _Fits:
    """Fit the coefficients at each combination of exponents."""
    losses_P = np.array([point.loss for point in points])
    # By the smallest, so that the columns are of one size whatever the exponents.
    smallest, fewest = min(p.parameters for p in points), min(p.tokens for p in points)
    sizes_P = np.array([point.parameters for point in points]) / smallest
    tokens_P = np.array([point.tokens for point in points]) / fewest
    ones_P = np.ones_like(losses_P)
    laws, squares = [], []
    for alpha, beta, gamma in itertools.product(alphas, betas, gammas):
        columns_PC = np.stack([ones_P, sizes_P**-alpha, (sizes_P**gamma / tokens_P) ** beta], 1)
        # Each point's error as a share of its loss.
        (irreducible, a, b), error = nnls(columns_PC / losses_P[:, None], ones_P)
        laws.append(ScalingLaw(
            irreducible=float(irreducible),
            a=float(a * smallest**alpha), alpha=float(alpha),
            b=float(b * (fewest / smallest**gamma) ** beta), beta=float(beta), gamma=float(gamma),
        ))
        squares.append(error**2)
    return _Fits(laws, np.array(squares))
