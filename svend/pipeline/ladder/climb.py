"""Climb a ladder: rung after rung, a verdict between them, and on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from svend.errors import (
    DivergenceError,
    GateFailure,
    HealthError,
    Interrupted,
    UserError,
)
from svend.pipeline.config import ModelScale, PipelineConfig
from svend.pipeline.console import make_console, say
from svend.pipeline.ladder.below import find_below
from svend.pipeline.ladder.display import standing_table
from svend.pipeline.ladder.options import Ladder, OnHold, OnStress, attempt_config
from svend.pipeline.ladder.rung import RungRun, StressRun
from svend.pipeline.ladder.standing import (
    LADDER_FILE,
    Attempt,
    Override,
    Standing,
    State,
)
from svend.pipeline.ladder.trend import (
    LOSS_FALLS_GATE,
    Trend,
    backtest_bound,
    prediction_gates,
)
from svend.pipeline.outcome import Ending
from svend.pipeline.own_model import ModelFactory, find_model_factory
from svend.pipeline.report import show_next_steps
from svend.pipeline.run_folder import RunFolder
from svend.pipeline.run_model import planned_model
from svend.pipeline.runner import PipelineResult, ScaleRunner
from svend.pipeline.tags import LADDER_NAME_TAG, LADDER_TAG, PARENT_SCALE_TAG, RUNG_TAG, STRESS_TAG
from svend.pipeline.validation import ValidationGate, ValidationResult
from svend.planning.scaling_law import why_too_few
from svend.tracking.environment import environment_tags
from svend.tracking.registry import acting_user
from svend.tracking.run import TrackedRun
from svend.tracking.runs import end_abandoned, experiment_of
from svend.tracking.spool import ADDRESS, SPOOL
from svend.tracking.store_errors import told_by_the_store

LEFT_RUNNING = "its process was killed after it had ended"


@dataclass(frozen=True)
class Means:
    """With what a ladder is climbed. `owns_process` as ScaleRunner has it.

    gates_full: whether a rung must pass FULL, its trend included, before the next begins.
    """

    model_factory: ModelFactory | None = None
    gates_full: bool = True
    owns_process: bool = False


@dataclass(frozen=True)
class Wish:
    """What is to become of a rung that has failed: another attempt, or going on above it."""

    retry: bool = False
    override: str | None = None


class LadderClimb:
    """A ladder that is being climbed, by this process alone.

    The last rung of what `go` returns may have failed. It raises UserError for what the user can
    mend, and Interrupted, with everything kept, after a signal.
    """

    def __init__(self, ladder: Ladder, name: str, folder: Path, means: Means = Means()) -> None:
        self._ladder = ladder
        self._means = means
        self._console: Console = make_console()
        self._folder = folder
        self._name = name
        self._results: list[PipelineResult] = []
        self.verdicts: list[ValidationResult] = []  # of all rungs of this call

    def go(self, wish: Wish = Wish()) -> list[PipelineResult]:
        """Climb, or go on; return how each rung of this call ended."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._standing = (
            Standing.open(self._folder) if (self._folder / LADDER_FILE).exists()
            else Standing(self._name, self._folder)
        )
        lock = self._standing.lock()
        lock.hold()
        try:
            self._heed(wish)
            self._below = ([] if self._ladder.below is None else find_below(
                self._ladder.below, self._ladder.rungs[self._ladder.config.start]))
            with self._tracked_ladder() as self._tracked:
                self._climb()
        finally:
            lock.release()
        return self._results

    def _heed(self, wish: Wish) -> None:
        """Do what is wished of a rung that failed; raise UserError if nothing is."""
        failed = next((a for scale in self._ladder.scales
                       if (a := self._standing.newest(scale)) and not a.may_go_on), None)
        if failed is None or failed.state is not State.FAILED:
            if wish.retry or wish.override:
                raise UserError(f"ladder {self._name}: no rung of it has failed; leave out --retry "
                                "and --override")
            return
        if wish.override is not None:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            failed.override = Override(acting_user(), now, wish.override)
            self._standing.save()
        elif wish.retry:
            self._standing.attempts.append(self._new_attempt(failed.scale, failed))
            self._standing.save()
        elif not self._may_rerun(failed):
            raise UserError(
                f"ladder {self._name}: stopped at rung {failed.scale.value}: {failed.reason}; "
                "mend it and add --retry to train it again, or go on above it with --override "
                "REASON, which is put on record"
            )

    @contextmanager
    def _tracked_ladder(self) -> Iterator[TrackedRun]:
        tracked = self._track()
        ending = Ending("FINISHED")
        try:
            yield tracked
            last = self._results[-1] if self._results else None
            if last is not None and not last.success:
                ending = Ending("FAILED", f"rung {last.scale.value}: {last.reason}")
        except BaseException as error:
            ending = Ending.by(error)
            raise
        finally:
            wait_seconds = self._any_rung.tracking_wait_seconds
            for line in tracked.end(ending.status, ending.reason, wait_seconds):
                say(self._console, line)

    @property
    def _any_rung(self) -> PipelineConfig:
        return self._ladder.rungs[self._ladder.config.start]

    def _track(self) -> TrackedRun:
        """Begin the ladder's run, or go on with it."""
        spool = self._folder / SPOOL

        def notify(line: str) -> None:
            say(self._console, line)

        if (spool / ADDRESS).is_file():
            tracked = TrackedRun.resume_spooled(spool, notify)
        else:
            tracked = TrackedRun.begin(self._ladder.experiment, self._name)
            # `mlflow run` may have chosen another: a run below is shown there in its own alone.
            self._standing.experiment = experiment_of(tracked.run_id)
            tracked.spool_to(spool, notify)
        self._standing.run_id = tracked.run_id
        self._standing.save()
        tracked.set_tags({
            **environment_tags(), LADDER_NAME_TAG: self._name, "svend.scale": "ladder",
            "svend.recipe": self._any_rung.training.data.recipe,
        })
        return tracked

    def _climb(self) -> None:
        for climbed in self._standing.climbed():
            self._close(climbed)
        self._record_standing()
        number = 0
        while number < len(self._ladder.scales):
            scale = self._ladder.scales[number]
            attempt = self._standing.newest(scale)
            if attempt is not None and attempt.may_go_on:
                number += 1
                continue
            if attempt is None or attempt.state is State.FAILED:
                attempt = self._new_attempt(scale, attempt)
                self._standing.attempts.append(attempt)
                self._standing.save()
            self._console.rule(f"rung {number + 1} of {len(self._ladder.scales)}: {scale.value}, "
                               f"{attempt.model}")
            result = self._run(attempt)
            self._results.append(result)
            self._record(attempt)
            if not attempt.may_go_on and not self._may_rerun(attempt):
                break
        self._console.print(standing_table(self._standing, self._ladder))
        show_next_steps(
            self._console, self._tracked.tracking_uri, self._tracked.experiment_id,
            self._tracked.run_id, self._folder, None,
        )

    def _new_attempt(self, scale: ModelScale, former: Attempt | None) -> Attempt:
        config = self._ladder.rungs[scale]
        model = planned_model(config, find_model_factory(config, self._means.model_factory))
        on_hold = former is not None and former.trend is Trend.HOLD
        return Attempt(
            scale=scale, number=1 if former is None else former.number + 1,
            # Another seed tells noise from fault; a fault is looked for on the seed that showed it.
            seed=config.training.seed + (1 if on_hold else 0),
            model=model.name, parameters=float(model.num_matrix_parameters()),
        )

    def _may_rerun(self, attempt: Attempt) -> bool:
        """Whether the rung is on hold for the first time, and another seed is to tell."""
        held = [a for a in self._standing.attempts
                if a.scale is attempt.scale and a.trend is Trend.HOLD]
        return (attempt.trend is Trend.HOLD and len(held) == 1
                and self._ladder.config.trend.on_hold is OnHold.RERUN)

    def _run(self, attempt: Attempt) -> PipelineResult:
        """Run an attempt from the infrastructure's check to its verdict, or go on with it."""
        config = attempt_config(
            self._ladder, attempt.scale, attempt.seed,
            str(self._folder / f"{attempt.scale.value}-{attempt.number}"),
            self._standing.experiment,
        )
        attempt.reason = ""
        started_seconds = time.monotonic()
        resume = _is_begun(config)
        history = self._history(attempt)
        runner = ScaleRunner(
            config, self._means.model_factory,
            self._rung_run(attempt, history, config),
            custom_gates=self._gates(attempt, history), owns_process=self._means.owns_process,
        )
        if not resume and not runner.validate_infrastructure():
            raise UserError(f"rung {attempt.scale.value}: cannot be trained here; mend the lines "
                            "marked FAIL, and run the ladder again")
        if not attempt.stressed and not resume:
            self._stress(attempt, config)
        result = runner.run(resume=resume)
        self.verdicts += runner.validator.history
        attempt.seconds += time.monotonic() - started_seconds
        attempt.steps = result.steps
        if result.interrupted:
            self._standing.save()
            raise Interrupted(
                f"{result.reason}; the ladder goes on at rung {attempt.scale.value}"
            )
        if not result.success:
            attempt.reason = attempt.reason or str(result.reason)
            if isinstance(result.error, GateFailure | DivergenceError | HealthError):
                attempt.state = State.FAILED
        self._standing.save()
        return result

    def _history(self, attempt: Attempt) -> list[Attempt]:
        scales = self._ladder.scales
        lower = scales[: scales.index(attempt.scale)]
        return [*self._below, *(a for a in self._standing.climbed() if a.scale in lower)]

    def _rung_run(
        self, attempt: Attempt, history: Sequence[Attempt], config: PipelineConfig
    ) -> RungRun:
        earlier = [a.error for a in self._standing.attempts
                   if a.scale is attempt.scale and a.number < attempt.number
                   and a.trend is Trend.HOLD and a.error is not None]
        tags = {LADDER_TAG: self._name, RUNG_TAG: attempt.scale.value,
                "svend.ladder.attempt": str(attempt.number)}
        if history and history[-1].run_id is not None:
            tags[PARENT_SCALE_TAG] = history[-1].run_id
        if history and history[-1].override is not None:
            tags["svend.ladder.rests_on_override"] = history[-1].override.reason
        return RungRun(
            parent_run_id=self._tracked.run_id, name=f"{attempt.scale.value}-{self._name}",
            gates_full=self._means.gates_full, strict=config.strict_validation, tags=tags,
            standing=self._standing, attempt=attempt, history=history, earlier_errors=earlier,
            trend=self._ladder.config.trend, console=self._console,
        )

    def _gates(self, attempt: Attempt, history: Sequence[Attempt]) -> list[ValidationGate]:
        """Return what a rung's loss must show for FULL, beside its benchmarks."""
        points = [point for below in history for point in below.points()]
        if attempt.predicted is not None:
            return [LOSS_FALLS_GATE, *prediction_gates(attempt.predicted.hold_above)]
        if attempt.folder is not None or why_too_few(points) is not None:
            return [LOSS_FALLS_GATE]
        trend = self._ladder.config.trend
        hold_above = max(trend.hold_above, backtest_bound(trend, points))
        return [LOSS_FALLS_GATE, *prediction_gates(hold_above)]

    def _stress(self, attempt: Attempt, config: PipelineConfig) -> None:
        """Train for a little while at a multiple of the rate, which brings out what is unstable.

        Wortsman et al. 2023 (arXiv 2309.14322): what large models show at their rate, small ones
        show at a higher one.
        """
        stress = self._ladder.config.stress
        if stress.steps == 0:
            return
        training = replace(
            config.training, learning_rate=stress.rate_factor * config.training.learning_rate,
            max_steps=stress.steps, horizons=[], save_steps=stress.steps,
        )
        at_rate = replace(config, training=training, eval_benchmarks=[],
                          checkpoint_dir=f"{config.checkpoint_dir}-stress")
        self._console.print(f"stress: {stress.steps} steps at {stress.rate_factor:g} times the "
                            "learning rate")
        result = ScaleRunner(at_rate, self._means.model_factory, StressRun(
            parent_run_id=self._tracked.run_id, name=f"{attempt.scale.value}-stress",
            registers=False, tags={LADDER_TAG: self._name, STRESS_TAG: "true"},
        ), owns_process=self._means.owns_process).run(resume=_is_begun(at_rate))
        if result.interrupted:
            raise Interrupted(str(result.reason))
        if not result.success:
            line = f"rung {attempt.scale.value}: stress run failed: {result.reason}"
            if stress.action is OnStress.FAIL:
                raise UserError(f"{line}; lower training.learning_rate, or set "
                                "ladder.stress.action=warn")
            self._console.print(f"warning: {line}", soft_wrap=True)
        attempt.stressed = True
        self._standing.save()

    def _close(self, attempt: Attempt) -> None:
        """End in the store what a process left running that was killed after its end."""
        if attempt.run_id is not None:
            status = "FINISHED" if attempt.state is State.PASSED else "FAILED"
            with told_by_the_store(f"rung {attempt.scale.value}"):
                end_abandoned(attempt.run_id, LEFT_RUNNING, status)

    def _record(self, attempt: Attempt) -> None:
        """Have the ladder's run tell of a rung, at the rung's number as the step."""
        predicted = attempt.predicted
        told = {
            "ladder/parameters": attempt.parameters, "ladder/loss": attempt.loss,
            "ladder/predicted_loss": None if predicted is None else predicted.loss,
            "ladder/prediction_error": attempt.error, "ladder/seconds": attempt.seconds,
        }
        self._tracked.log_metrics(
            {key: value for key, value in told.items() if value is not None},
            1 + self._ladder.scales.index(attempt.scale),
        )
        self._record_standing()

    def _record_standing(self) -> None:
        """Have the ladder's run show what was overridden, and the ladder's file."""
        self._tracked.set_tags({
            f"svend.ladder.override.{attempt.scale.value}":
                f"{override.reason} ({override.by}, {override.at})"
            for attempt in self._standing.attempts if (override := attempt.override) is not None
        })
        told = (self._folder / LADDER_FILE).read_text(encoding="utf-8")
        self._tracked.log_text(told, LADDER_FILE)


def _is_begun(config: PipelineConfig) -> bool:
    """Whether there is a run of this attempt to go on with."""
    training = config.training
    try:
        RunFolder.find_unfinished(
            config.checkpoint_dir, training.experiment_name, training.model_scale.value
        )
    except UserError:
        return False
    return True
