"""What a look at a run's health says: figures to log, and which of them are problems.

The thresholds are the configuration's (`health`); docs/health.md says where they come from.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from svend.errors import HealthError
from svend.pipeline.config import HealthAction, HealthConfig
from svend.training.health import HealthReading

HEALTH_TAG = "svend.health"
# Of the peak rate. Far below it fp32 rounds away what a healthy layer would have moved: at a peak
# of 3e-4 a gain of 1 still moves by 3e-7, a few units in its last place; by 3e-9 it does not.
LOWEST_RATE_FACTOR = 1e-3


@dataclass(frozen=True)
class HealthFigures:
    """What a look saw, read from the device.

    by_layer: one value per layer of each measure, named as it is logged. min_head_entropies: of the
    head with the lowest, per layer; empty where the model could not be looked into.
    """

    layers: Sequence[str]
    by_layer: Mapping[str, Sequence[float]]
    min_head_entropies: Sequence[float]

    @classmethod
    def read(cls, reading: HealthReading) -> HealthFigures:
        """Read what a look saw; waits for the device."""
        by_layer = {"relative_update": reading.relative_update_L.tolist()}
        inspection = reading.inspection
        if inspection is None:
            return cls(reading.layers, by_layer, [])
        by_layer |= {
            "attention_logit": inspection.attention_logit_L.tolist(),
            "head_entropy": inspection.mean_head_entropy_L.tolist(),
            "residual_rms": inspection.residual_rms_L.tolist(),
            "attention_branch_rms": inspection.attention_branch_rms_L.tolist(),
            "feed_forward_branch_rms": inspection.feed_forward_branch_rms_L.tolist(),
        }
        return cls(reading.layers, by_layer, inspection.min_head_entropy_L.tolist())

    def of_layers(self, measure: str) -> Iterator[tuple[float, str]]:
        """Return a measure's values, each with its layer; none where it was not measured."""
        return zip(self.by_layer.get(measure, ()), self.layers, strict=False)

    @property
    def branch_shares(self) -> list[tuple[float, str, str]]:
        """What each branch adds, as a share of the stream before its block; layer and branch."""
        if not self.min_head_entropies:
            return []
        return [
            (added / stream if stream else math.nan, layer, branch)
            for branch in ("attention", "feed_forward")
            for layer, added, stream in zip(
                self.layers, self.by_layer[f"{branch}_branch_rms"], self.by_layer["residual_rms"],
                strict=True,
            )
        ]

    def metrics(self) -> dict[str, float]:
        """Return what is logged of the look, by name; a figure over NaN is NaN."""
        updates = self.by_layer["relative_update"]
        metrics = {
            "health/min_relative_update": float(np.min(updates)),
            "health/max_relative_update": float(np.max(updates)),
        }
        if self.min_head_entropies:
            shares = [share for share, _, _ in self.branch_shares]
            metrics |= {
                "health/max_attention_logit": float(np.max(self.by_layer["attention_logit"])),
                "health/min_head_entropy": float(np.min(self.min_head_entropies)),
                "health/mean_head_entropy": float(np.mean(self.by_layer["head_entropy"])),
                "health/min_branch_share": float(np.min(shares)),
                "health/residual_rms": float(np.max(self.by_layer["residual_rms"])),
            }
        return metrics | {
            f"health/{layer}/{measure}": value
            for measure, values in self.by_layer.items()
            for layer, value in zip(self.layers, values, strict=True)
        }


@dataclass(frozen=True)
class Problem:
    """What a look found out of bounds: where, which value, which threshold; and what may help."""

    finding: str
    what_to_do: str


class HealthMonitor:
    """Holds look after look against the thresholds.

    Of each threshold it tells the first problem, and counts the looks in a row that show one; a
    resumed run tells and counts anew.
    """

    def __init__(self, health: HealthConfig) -> None:
        self._health = health
        self._in_a_row: Counter[str] = Counter()
        self._told: dict[str, str] = {}
        self.failure: HealthError | None = None

    @property
    def summary(self) -> str:
        """The problems told so far, as a tag has them."""
        return "; ".join(self._told.values())

    def judge(
        self, figures: HealthFigures, step: int, rate_factor: float, skipped_steps: int, *,
        skipped: bool,
    ) -> list[str]:
        """Return a line for each threshold that is crossed for the first time.

        rate_factor: the schedule's in this step. skipped: whether the step changed no weight. If a
        problem is to end the run, `failure` says so from then on.
        """
        problems = {
            "max_attention_logit": self._attention_logit(figures),
            "min_branch_share": self._branch_share(figures),
            "max_spikes": self._spikes(skipped_steps),
        }
        # What moved nothing, or hardly could, says nothing of the layers: the count stays.
        if not skipped and rate_factor >= LOWEST_RATE_FACTOR:
            problems["min_relative_update"] = self._relative_update(figures, rate_factor)
        told = []
        for threshold, problem in problems.items():
            self._in_a_row[threshold] = self._in_a_row[threshold] + 1 if problem else 0
            if problem is None:
                continue
            line = f"step {step}: {problem.finding}"
            if threshold not in self._told:
                self._told[threshold] = line
                told.append(line)
            looks = self._in_a_row[threshold]
            fails = self._health.action is HealthAction.FAIL and looks >= self._health.patience
            if fails and self.failure is None:
                self.failure = HealthError(
                    f"health at {line}, in {looks} look{'s' if looks > 1 else ''} in a row; "
                    f"{problem.what_to_do}; or set health.{threshold} otherwise, or "
                    "health.action=warn, and go on from the last checkpoint with resume=true"
                )
        return told

    def _attention_logit(self, figures: HealthFigures) -> Problem | None:
        limit = self._health.max_attention_logit
        above = [] if limit is None else [
            (logit, layer) for logit, layer in figures.of_layers("attention_logit") if logit > limit
        ]
        if not above:
            return None
        logit, layer = max(above)
        return Problem(
            f"{layer}: the largest attention logit is {logit:.4g}, above "
            f"health.max_attention_logit = {limit:g}",
            "begin again with a lower training.learning_rate",
        )

    def _branch_share(self, figures: HealthFigures) -> Problem | None:
        limit = self._health.min_branch_share
        below = [] if limit is None else [
            found for found in figures.branch_shares if found[0] < limit
        ]
        if not below:
            return None
        share, layer, branch = min(below)
        return Problem(
            f"{layer}: {branch} adds {share:.3g} of the residual stream, below "
            f"health.min_branch_share = {limit:g}",
            "begin again with a lower training.learning_rate or training.weight_decay, or with "
            "fewer layers",
        )

    def _relative_update(self, figures: HealthFigures, rate_factor: float) -> Problem | None:
        """Judge the update that the step would have made at the peak rate.

        Updates are proportional to the rate: so that neither warm-up nor decay looks like death.
        """
        limit = self._health.min_relative_update
        below = [] if limit is None else [
            (update / rate_factor, layer) for update, layer in figures.of_layers("relative_update")
            if update / rate_factor < limit
        ]
        if not below:
            return None
        update, layer = min(below)
        return Problem(
            f"{layer}: the relative update, at the peak rate, is {update:.3g}, below "
            f"health.min_relative_update = {limit:g}",
            "see whether the layer is frozen or gets no gradient, or raise training.learning_rate",
        )

    def _spikes(self, skipped_steps: int) -> Problem | None:
        limit = self._health.max_spikes
        if limit is None or skipped_steps <= limit:
            return None
        return Problem(
            f"{skipped_steps:,} steps skipped so far, above health.max_spikes = {limit:,}",
            "begin again with a lower training.learning_rate, or without the data of those steps",
        )
