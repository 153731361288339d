"""What a rung's loss says of it, held against what was predicted: pass, hold, stop, investigate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from svend.pipeline.config import ValidationGate
from svend.pipeline.ladder.options import TrendConfig
from svend.planning.scaling_law import Point, Prediction, left_out_error, relative_error

PREDICTION_ERROR, SLOPE_BOUND = "prediction_error", "loss_slope_bound"
# By which share of the prediction a loss lies below the lowest that is plausible.
BELOW_PLAUSIBLE = "loss_below_plausible"
AS_PREDICTED, NOT_TOO_GOOD, LOSS_FALLS = "loss_as_predicted", "loss_not_too_good", "loss_falls"


class Trend(Enum):
    """What becomes of a rung by its loss."""

    PASS = "pass"
    HOLD = "hold"  # a little worse than predicted: another seed tells
    STOP = "stop"
    INVESTIGATE = "investigate"  # too good: evaluation data that leaked, or repeated data
    UNPREDICTED = "no prediction"


@dataclass(frozen=True)
class Bounds:
    """Of the measured loss above the predicted one, as shares of the prediction.

    A loss below the prediction is looked into only where the prediction's interval rules it out
    too: from two rungs it is uncertain by several percent, and a good loss wastes nothing.
    """

    hold_above: float
    stop_above: float
    investigate_below: float

    @classmethod
    def of(cls, trend: TrendConfig, points: Sequence[Point], found: Prediction) -> Bounds:
        """Return the configured bounds, widened by what is known of the prediction's error."""
        twice = backtest_bound(trend, points)
        return cls(
            max(trend.hold_above, twice), max(trend.stop_above, twice),
            min(trend.investigate_below, -twice, relative_error(found.low, found.loss)),
        )

    def judge(self, error: float) -> Trend:
        """Return what becomes of a rung whose loss lies so far above its prediction."""
        if not error <= self.stop_above:  # not a number, too
            return Trend.STOP
        if error > self.hold_above:
            return Trend.HOLD
        return Trend.INVESTIGATE if error < self.investigate_below else Trend.PASS


def backtest_bound(trend: TrendConfig, points: Sequence[Point]) -> float:
    """Return twice the error of leaving one rung out, below which no bound is; 0 for few rungs."""
    enough = len({point.rung for point in points}) >= trend.backtest_after
    return 2 * left_out_error(points) if enough else 0.0


def prediction_gates(hold_above: float) -> list[ValidationGate]:
    """Return the gates of FULL that a rung's loss opens only where it is judged PASS."""
    return [
        ValidationGate(
            name=AS_PREDICTED, metric_name=PREDICTION_ERROR, comparison="<=",
            threshold=hold_above, description="the loss is not above the one predicted",
        ),
        ValidationGate(
            name=NOT_TOO_GOOD, metric_name=BELOW_PLAUSIBLE, comparison="<=", threshold=0.0,
            description="nor so far below it that evaluation data must have leaked",
        ),
    ]


LOSS_FALLS_GATE = ValidationGate(
    name=LOSS_FALLS, metric_name=SLOPE_BOUND, comparison="<", threshold=0.0,
    description="the training loss falls: the upper bound of its slope is below 0",
)


def judge_early(errors: Sequence[float], above: float, below: float, in_a_row: int) -> Trend:
    """Return STOP or INVESTIGATE where so many errors in a row lie outside the bounds, else PASS.

    errors: of the end expected at each horizon so far, against the prediction.
    """
    last = errors[-in_a_row:]
    if len(last) == in_a_row and all(not error <= above for error in last):
        return Trend.STOP
    if len(last) == in_a_row and all(error < below for error in last):
        return Trend.INVESTIGATE
    return Trend.PASS
