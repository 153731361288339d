"""A rung's run: predicted before its first step, looked at on the way, judged at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from svend.errors import GateFailure, UserError
from svend.pipeline.job import Job
from svend.pipeline.ladder.options import TrendConfig
from svend.pipeline.ladder.standing import Attempt, FrozenPrediction, Look, Standing, State
from svend.pipeline.ladder.trend import (
    BELOW_PLAUSIBLE,
    PREDICTION_ERROR,
    SLOPE_BOUND,
    Bounds,
    Trend,
    judge_early,
)
from svend.pipeline.nested import NestedRun
from svend.pipeline.schema import to_tree
from svend.pipeline.tags import TREND_TAG
from svend.pipeline.validation import Measurement, ValidationResult
from svend.planning.scaling_law import (
    Point,
    expected_end,
    predict,
    relative_error,
    why_too_few,
)
from svend.tracking.registry import RegisteredVersion
from svend.training.state import Horizon

PREDICTION_FILE = "prediction.json"


@dataclass(kw_only=True)
class RungRun(NestedRun):
    """What a ladder wants of a rung's run.

    history: the rungs below, from the lowest, whose losses it is held against. earlier_errors: of
    attempts on other seeds, which count as much as this one's. strict: whether a failed FULL ends
    the ladder, or is on record only.
    """

    standing: Standing
    attempt: Attempt
    history: Sequence[Attempt]
    earlier_errors: Sequence[float]
    strict: bool
    trend: TrendConfig
    console: Console

    def begun(self, run_id: str) -> None:
        self.attempt.run_id = run_id
        self.standing.save()

    def prepared(self, job: Job) -> None:
        """Refuse what cannot be compared, and freeze the prediction before the first step."""
        attempt = self.attempt
        attempt.total_steps = job.plan.total_steps
        attempt.data_fingerprint = job.corpus.fingerprint
        attempt.tokenizer_sha256 = job.corpus.tokenizer.sha256
        self._check_comparable()
        points = [point for below in self.history for point in below.points()]
        if attempt.folder is None:  # else it is gone on with: what was predicted stays
            attempt.unpredicted = why_too_few(points) or ""
            if not attempt.unpredicted:
                attempt.predicted = self._predict(points, float(job.plan.tokens))
        self._record_prediction(job, points)
        # The store has what was predicted before there is anything to compare it with.
        job.tracked.flush(job.config.tracking_wait_seconds)
        attempt.folder = str(job.folder.path)
        self.standing.save()

    def reached(self, job: Job, horizon: Horizon) -> None:
        """Keep the horizon, and hold the end that it lets expect against the prediction.

        Raises GateFailure where horizons one after another say that the rung is not worth its end.
        """
        attempt = self.attempt
        attempt.horizons = [h for h in attempt.horizons if h.step < horizon.step] + [horizon]
        if horizon.step == attempt.total_steps:
            self._judge_end(job, horizon.loss)
        else:
            self._look_ahead(job, horizon)
        self.standing.save()

    def measurements(self) -> Mapping[str, Measurement]:
        """Return the loss against its prediction, and the slope of the training loss."""
        attempt, below = self.attempt, None
        if attempt.predicted is not None and attempt.error is not None:
            below = max(0.0, attempt.predicted.investigate_below - attempt.error)
        measured = {PREDICTION_ERROR: attempt.error, BELOW_PLAUSIBLE: below,
                    SLOPE_BOUND: attempt.slope_bound}
        return {name: Measurement(value) for name, value in measured.items() if value is not None}

    def decided(
        self, job: Job, verdict: ValidationResult | None, registered: RegisteredVersion | None
    ) -> None:
        """Put on record whether the rung above may begin."""
        attempt = self.attempt
        must_pass = self.gates_full and self.strict
        passed = not must_pass or (verdict is not None and verdict.passed)
        attempt.state = State.PASSED if passed else State.FAILED
        attempt.version = None if registered is None else f"{registered.name}/{registered.version}"
        if verdict is not None and not verdict.passed:
            failures = "; ".join(verdict.failures)
            judged = attempt.trend not in (Trend.PASS, Trend.UNPREDICTED)
            attempt.reason = f"{attempt.trend.value}: {failures}" if judged else failures
        job.tracked.set_tags({TREND_TAG: attempt.trend.value})
        self.standing.save()

    def _check_comparable(self) -> None:
        if not self.history:
            return
        below, attempt = self.history[-1], self.attempt
        for what, was, now in (
            ("the data's fingerprint", below.data_fingerprint, attempt.data_fingerprint),
            ("the tokenizer", below.tokenizer_sha256, attempt.tokenizer_sha256),
        ):
            if was != now:
                raise UserError(
                    f"rung {attempt.scale.value}: {what} is {now[:16]}, {was[:16]} at "
                    f"{below.scale.value}: not comparable; restore it, or climb a ladder of "
                    "another name from its first rung"
                )

    def _predict(self, points: Sequence[Point], tokens: float) -> FrozenPrediction:
        found = predict(points, self.attempt.parameters, tokens)
        return FrozenPrediction(
            loss=found.loss, low=found.low, high=found.high, law=str(found.law),
            rungs=list(dict.fromkeys(point.rung for point in points)), points=len(points),
            **vars(Bounds.of(self.trend, points, found)),
        )

    def _record_prediction(self, job: Job, points: Sequence[Point]) -> None:
        """Log the prediction, in parameters, which MLflow lets nobody change."""
        predicted = self.attempt.predicted
        if predicted is None:
            job.tracked.set_tags({TREND_TAG: Trend.UNPREDICTED.value})
            self.console.print(f"prediction: none, {self.attempt.unpredicted}")
            return
        job.tracked.log_params({
            "ladder.predicted_loss": f"{predicted.loss:.6f}",
            "ladder.predicted_low": f"{predicted.low:.6f}",
            "ladder.predicted_high": f"{predicted.high:.6f}",
            "ladder.law": predicted.law,
            "ladder.predicted_from": f"{predicted.points} points of {', '.join(predicted.rungs)}",
            "ladder.hold_above": f"{predicted.hold_above:.6f}",
            "ladder.stop_above": f"{predicted.stop_above:.6f}",
            "ladder.investigate_below": f"{predicted.investigate_below:.6f}",
        })
        told = {**to_tree(predicted), "parameters": self.attempt.parameters,
                "tokens": job.plan.tokens, "fitted_on": [vars(point) for point in points]}
        job.tracked.log_text(json.dumps(told, indent=1) + "\n", PREDICTION_FILE)
        self.console.print(
            f"prediction: held-out loss {predicted.loss:.4f} ({predicted.low:.4f} to "
            f"{predicted.high:.4f}), from {predicted.points} points below; up to "
            f"{predicted.hold_above:+.1%} passes", soft_wrap=True,
        )

    def _look_ahead(self, job: Job, horizon: Horizon) -> None:
        attempt, predicted = self.attempt, self.attempt.predicted
        share = horizon.step / attempt.total_steps
        below = self.history[-1] if self.history else None
        then = None if below is None else below.loss_at(share)
        end = None if below is None else below.loss
        if predicted is None or then is None or end is None:
            return
        expected = expected_end(horizon.loss, then, end)
        error = relative_error(expected, predicted.loss)
        attempt.looks = [look for look in attempt.looks if look.step < horizon.step]
        attempt.looks.append(Look(horizon.step, expected, error))
        job.tracked.log_metrics(
            {"ladder/expected_end_loss": expected, "ladder/expected_error": error}, horizon.step
        )
        self.console.print(
            f"at {share:.0%}: expected to end at {expected:.4f}, {error:+.2%} of the prediction"
        )
        errors = [look.error for look in attempt.looks]
        verdict = judge_early(
            errors, self.trend.early_stop_above, predicted.investigate_below,
            self.trend.early_in_a_row,
        )
        if verdict is not Trend.PASS:
            attempt.trend, attempt.state = verdict, State.FAILED
            told = ", ".join(f"{e:+.2%}" for e in errors)
            attempt.reason = (
                f"{verdict.value} at {share:.0%} of the run: the end is expected at "
                f"{expected:.4f}, predicted was {predicted.loss:.4f} (so far {told})"
            )
            job.tracked.set_tags({TREND_TAG: verdict.value})
            self.standing.save()
            raise GateFailure(attempt.reason)

    def _judge_end(self, job: Job, loss: float) -> None:
        attempt, predicted = self.attempt, self.attempt.predicted
        slope_bound = job.state.trend.slope_bound()
        # No number where the run was too short to tell: FULL then names it as not measured.
        attempt.slope_bound = slope_bound if math.isfinite(slope_bound) else None
        if predicted is None:
            return
        error = relative_error(loss, predicted.loss)
        errors = [*self.earlier_errors, error]
        attempt.error = sum(errors) / len(errors)
        bounds = Bounds(
            predicted.hold_above, predicted.stop_above, predicted.investigate_below
        )
        attempt.trend = bounds.judge(attempt.error)
        job.tracked.log_metrics({"ladder/prediction_error": error}, attempt.total_steps)
        seeds = "" if len(errors) == 1 else f", {attempt.error:+.2%} as the mean of {len(errors)}"
        self.console.print(
            f"end: {loss:.4f}, {error:+.2%} of the prediction{seeds}: {attempt.trend.value}"
        )


@dataclass(kw_only=True)
class StressRun(NestedRun):
    """A short run at a high rate, which fails where steps are skipped or nothing is learnt."""

    def reached(self, job: Job, horizon: Horizon) -> None:
        skipped = int(job.state.guard.skipped_steps)
        # Not known of a run that was gone on with: then the skipped steps alone tell.
        worse = math.isfinite(job.first_loss) and not horizon.loss < job.first_loss
        if skipped or worse:
            raise GateFailure(
                f"{skipped} of {horizon.step} steps skipped, held-out loss {job.first_loss:.4f} at "
                f"the start and {horizon.loss:.4f} at the end"
            )
