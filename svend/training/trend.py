"""Whether the loss of a run falls, by a statistical test."""

from __future__ import annotations

import math
from typing import Any

BLOCKS = 16
# With fewer the test says nothing.
MIN_BLOCKS = 4
CONFIDENCE = 0.95


class LossTrend:
    """Means of the training loss over equal parts of a run, between two of its steps.

    first, last: optimizer steps, such as the warm-up's end and the beginning of the decay, whose
    own fall is no sign that the run still learns.
    """

    def __init__(self, first: int, last: int) -> None:
        self._first = first
        self._steps = max(1, last - first)
        self._blocks = min(BLOCKS, self._steps)
        self._sums = [0.0] * self._blocks
        self._counts = [0] * self._blocks

    def add(self, step: int, loss: float) -> None:
        """Take in the loss of a step (from 1); one that is not finite is left out."""
        behind = step - 1 - self._first
        if 0 <= behind < self._steps and math.isfinite(loss):
            block = behind * self._blocks // self._steps
            self._sums[block] += loss
            self._counts[block] += 1

    def slope_bound(self) -> float:
        """Return the upper bound of the slope, nats over the whole stretch; NaN if it is too short.

        Theil-Sen (Sen 1968), one-sided at CONFIDENCE: the loss falls where the bound is below 0.
        """
        shares = [(number + 0.5) / self._blocks for number, n in enumerate(self._counts) if n]
        means = [total / n for total, n in zip(self._sums, self._counts, strict=True) if n]
        if len(means) < MIN_BLOCKS:
            return math.nan
        from scipy.stats import theilslopes  # takes a second: once in a run, at its gate

        return float(theilslopes(means, shares, alpha=2 * CONFIDENCE - 1).high_slope)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been taken in."""
        return {"sums": list(self._sums), "counts": list(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._sums, self._counts = list(state["sums"]), list(state["counts"])
