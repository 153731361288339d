"""What a rung's loss says of it, held against what was predicted: pass, hold, stop, investigate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from svend.pipeline.config import ValidationGate
from svend.pipeline.ladder.options import TrendConfig
from svend.planning.scaling_law import Point, left_out_error

PREDICTION_ERROR, SLOPE_BOUND = "prediction_error", "loss_slope_bound"
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
    """Of the measured loss above the predicted one, as shares of the prediction."""

    hold_above: float
    stop_above: float
    investigate_below: float

    @classmethod
    def of(cls, trend: TrendConfig, points: Sequence[Point]) -> Bounds:
        """Return the configured bounds; after enough rungs not below twice the backtest's error."""
        bounds = cls(trend.hold_above, trend.stop_above, trend.investigate_below)
        if len({point.rung for point in points}) < trend.backtest_after:
            return bounds
        twice = 2 * left_out_error(points)
        return cls(max(bounds.hold_above, twice), max(bounds.stop_above, twice),
                   min(bounds.investigate_below, -twice))

    def judge(self, error: float) -> Trend:
        """Return what becomes of a rung whose loss lies so far above its prediction."""
        if not error <= self.stop_above:  # not a number, too
            return Trend.STOP
        if error > self.hold_above:
            return Trend.HOLD
        return Trend.INVESTIGATE if error < self.investigate_below else Trend.PASS

    def gates(self) -> list[ValidationGate]:
        """Return the gates of FULL that only PASS opens."""
        return [
            ValidationGate(
                name=AS_PREDICTED, metric_name=PREDICTION_ERROR, comparison="<=",
                threshold=self.hold_above, description="the loss is not above the one predicted",
            ),
            ValidationGate(
                name=NOT_TOO_GOOD, metric_name=PREDICTION_ERROR, comparison=">=",
                threshold=self.investigate_below,
                description="nor so far below it that evaluation data must have leaked",
            ),
        ]


LOSS_FALLS_GATE = ValidationGate(
    name=LOSS_FALLS, metric_name=SLOPE_BOUND, comparison="<", threshold=0.0,
    description="the training loss falls: the upper bound of its slope is below 0",
)


class EarlyWatch:
    """Ends a rung whose expected end lies outside the bounds at several horizons in a row."""

    def __init__(self, bound: float, in_a_row: int) -> None:
        self._bound = bound
        self._in_a_row = in_a_row

    def judge(self, errors: Sequence[float]) -> Trend:
        """Return STOP or INVESTIGATE where the last errors all say so, else PASS.

        errors: of the end expected at each horizon so far, against the prediction.
        """
        last = errors[-self._in_a_row :]
        if len(last) == self._in_a_row and all(not error <= self._bound for error in last):
            return Trend.STOP
        if len(last) == self._in_a_row and all(error < -self._bound for error in last):
            return Trend.INVESTIGATE
        return Trend.PASS
