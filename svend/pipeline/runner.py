"""One run from top to bottom: plan, train, gate, save, register. The only wiring."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from svend.device import (
    describe_device,
    keep_freed_memory,
    peak_bytes,
    resolve_device,
    resolve_precision,
)
from svend.errors import (
    GateFailure,
    Interrupted,
    RankLost,
    ResourceError,
    TrialPruned,
    UserError,
)
from svend.evaluation.heldout import HeldoutLoss
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.benchmarking import evaluate_model
from svend.pipeline.branches import find_branch, follow_branch, horizon_at, record_horizon
from svend.pipeline.checkpoints import Checkpoint, DriveCheckpointManager
from svend.pipeline.config import Branch, ModelScale, PipelineConfig
from svend.pipeline.console import make_console, say
from svend.pipeline.crew import Crew, Farewell, stay_for_orders
from svend.pipeline.divergence import (
    Divergence,
    StepReading,
    fail,
    find_divergence,
    find_good_checkpoint,
    go_back,
)
from svend.pipeline.drive_copier import mount_google_drive
from svend.pipeline.evaluation_report import AnswerProgress, measurement_table
from svend.pipeline.health import HEALTH_TAG, HealthFigures, HealthMonitor
from svend.pipeline.infrastructure import CheckResult, InfrastructureChecks
from svend.pipeline.interruption import StopSignals
from svend.pipeline.job import (
    Job,
    Saving,
    planned_model,
    prepare_job,
)
from svend.pipeline.nested import NestedRun
from svend.pipeline.record import (
    measurement_rows,
    passed_levels,
    record_evaluation,
    record_verdicts,
    register_version,
    undecided,
)
from svend.pipeline.replica import (
    ModelFactory,
    begin_partial_save,
    build_model,
    count_nonfinite,
    follow_run,
    gather_model,
    load_weights,
    measure_heldout,
    sharded_bytes,
    stage_steps,
)
from svend.pipeline.report import (
    TrainingProgress,
    show_checks,
    show_measured,
    show_next_steps,
    show_plan,
    verdict_table,
)
from svend.pipeline.run_folder import RunFolder
from svend.pipeline.validation import (
    Evidence,
    GateLevel,
    Measurement,
    PipelineValidator,
    ValidationGate,
    ValidationResult,
)
from svend.planning.plan import explain_out_of_memory, is_out_of_memory
from svend.ranks import Place, find_place
from svend.tracking.ledger import told_by_the_store
from svend.tracking.registry import RegisteredVersion
from svend.tracking.run import TrackedRun
from svend.tracking.runs import MAX_TAG_LENGTH, end_joined_run, joined_experiment_name
from svend.training.health import HealthReading
from svend.training.loop import StepMetrics
from svend.training.parallel import join_ranks
from svend.training.profiling import profiled_steps


@dataclass(frozen=True)
class PipelineResult:
    """How a run ended, behind which step. `final_loss` is the held-out loss last measured, or NaN.

    `error` is the user's mistake, the failed gate or the stopped trial that ended it, if one did.
    `interrupted_at_once`: by a second signal, or the end of the grace time; a save that was under
    way is left to itself.
    """

    scale: ModelScale
    success: bool
    final_loss: float
    training_time_seconds: float
    reason: str | None = None
    error: UserError | None = None
    interrupted: bool = False
    interrupted_at_once: bool = False
    steps: int = 0
    run_id: str | None = None
    checkpoint_dir: Path | None = None
    registered: RegisteredVersion | None = None


logger = logging.getLogger(__name__)
# For telling the tracking store of an end that is to be at once.
LAST_WORD_SECONDS = 2.0
# The levels that are about training itself.
STOPPING = (GateLevel.QUICK, GateLevel.STANDARD)


class ScaleRunner:
    """Runs one scale: `run()` trains it as a tracked run and returns how it ended.

    model_factory: builds the model of a scale in place of ReasoningTransformer. nested: what a
    sweep or a ladder wants of the run. custom_gates: decided at FULL, beside the built-in ones.
    owns_process: whether it may end the process, at the end of the grace time after a signal.
    """

    def __init__(
        self,
        config: PipelineConfig,
        model_factory: ModelFactory | None = None,
        nested: NestedRun | None = None,
        *,
        custom_gates: Iterable[ValidationGate] = (),
        owns_process: bool = False,
    ) -> None:
        self.config = config
        self.model_factory = model_factory
        self.nested = nested
        self.owns_process = owns_process
        self.validator = PipelineValidator(
            strict=config.strict_validation,
            custom_gates=custom_gates,
            gates=config.gates,
            thresholds=config.training.validation_gates,
        )
        self._console = make_console()
        self._health = HealthMonitor(config.health)

    def run(self, resume: bool = False, force: bool = False) -> PipelineResult:
        """Train, gate, checkpoint and register; with `resume`, go on where the last run stopped.

        With `force` too, also where settings, data or tokenizer are others than the run's, as far
        as its state can be loaded: each difference is put on record in the run.
        A user's mistake, a failed gate and an interruption end the run and are returned as its
        reason; anything else is a bug, ends the run as FAILED, and is raised.
        Of several processes, as torchrun or Slurm start them, the first does this; the others do
        their share of its steps, and return what it returns.
        """
        place = find_place()
        if not place.leads:
            stay_for_orders()
            keep_freed_memory()
            result: PipelineResult = follow_run(
                self.model_factory, resolve_device(self.config.training.device), self.meet(place)
            )
            return result
        self._crew: Crew | None = None
        try:
            result = self._lead(place, resume=resume, force=force)
        finally:
            if self._crew is not None:
                self._crew.dismiss(None)
        return result

    def _lead(self, place: Place, *, resume: bool, force: bool) -> PipelineResult:
        started_seconds = time.monotonic()
        self._job: Job | None = None
        tracked: TrackedRun | None = None
        folder: RunFolder | None = None
        status, reason, registered = "FINISHED", None, None
        failure: UserError | None = None
        grace_seconds = self.config.grace_seconds
        with StopSignals(grace_seconds, exits=self.owns_process) as signals:
            try:
                config = _within_experiment(self.config).resolve()
                mount_google_drive(Path(config.checkpoint_dir).expanduser())
                folder = _folder_to_resume(config, force) if resume else None
                # Not in the middle of a store's migration, nor before the run can be ended.
                with signals.deferred():
                    tracked = self._track(config, folder)
                signals.raise_if_requested()
                self._crew = self.meet(place)
                with self._explaining_out_of_memory():
                    job = self._prepare(config, tracked, folder, self._crew, force)
                    self._train(job, signals)
                    registered = self._finish(job, signals)
                self._require_full(job)
            except TrialPruned as pruned:
                failure, reason = pruned, str(pruned)
            except UserError as error:
                failure, status, reason = error, "FAILED", str(error)
            except OSError as error:
                status, reason = "FAILED", f"{type(error).__name__}: {error}"
                if error.errno != errno.ENOSPC:
                    raise
                reason = (f"{error.filename or config.checkpoint_dir}: the disk is full; make "
                          "room, and go on with resume=true")
            except Interrupted as interruption:
                status, reason = "KILLED", str(interruption)
            except BaseException as error:
                status, reason = "FAILED", f"{type(error).__name__}: {error}"
                raise
            finally:
                signals.closing()
                if tracked is not None:
                    # A checkpoint of which a part will never come is not waited for.
                    self._close(tracked, signals, status, reason,
                                saves=not isinstance(failure, RankLost))
                elif reason is not None:
                    end_joined_run(status, reason)
                if folder is not None:
                    folder.release()
        result = PipelineResult(
            scale=self.config.training.model_scale,
            success=status == "FINISHED" and failure is None,
            final_loss=self._job.final_loss if self._job else math.nan,
            training_time_seconds=time.monotonic() - started_seconds,
            reason=reason,
            error=failure,
            interrupted=status == "KILLED",
            interrupted_at_once=signals.at_once,
            steps=self._job.state.step if self._job else 0,
            run_id=tracked.run_id if tracked else None,
            checkpoint_dir=self._job.folder.path if self._job else None,
            registered=registered,
        )
        if self._crew is not None:
            self._crew.dismiss(replace(result, error=None))
        return result

    def meet(self, place: Place) -> Crew:
        """Meet the other processes of the run."""
        device = resolve_device(self.config.training.device)
        return Crew(join_ranks(place, device, self.config.rank_timeout_seconds))

    @contextlib.contextmanager
    def _explaining_out_of_memory(self) -> Iterator[None]:
        """Raise ResourceError, with the plan and what to change, where memory runs out."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ResourceError(self._explain_out_of_memory(error)) from error

    def _explain_out_of_memory(self, error: BaseException) -> str:
        config = self.config.resolve() if self._job is None else self._job.config
        device = resolve_device(config.training.device)
        training = replace(
            config.training, precision=resolve_precision(config.training.precision, device)
        )
        return explain_out_of_memory(
            planned_model(config, self.model_factory), training, device,
            None if self._job is None else self._job.plan, error,
        )

    def _prepare(
        self, config: PipelineConfig, tracked: TrackedRun, folder: RunFolder | None, crew: Crew,
        force: bool,
    ) -> Job:
        with self._console.status("preparing"):
            job = self._job = prepare_job(
                config, tracked, folder, self.model_factory, self.validator.gates, self._console,
                crew, force=force,
            )
        show_plan(self._console, job.config, job.plan, job.corpus, job.sequences,
                  describe_device(job.device), job.carried, job.sharing)
        if self.nested is not None:
            self.nested.prepared(job)
        return job

    def validate_infrastructure(self) -> bool:
        """Try what really breaks runs, print a line for each, and return whether all passed."""
        return all(check.passed for check in self.check_infrastructure())

    def check_infrastructure(self) -> list[CheckResult]:
        """Try what really breaks runs, print a line for each, and return them."""
        try:
            config = self.config.resolve()
            mount_google_drive(Path(config.checkpoint_dir).expanduser())
        except UserError as error:
            return show_checks(
                self._console, [CheckResult("configuration", False, str(error))]
            )
        keep_freed_memory()
        checks = InfrastructureChecks(
            config,
            lambda: planned_model(config, self.model_factory),
            lambda device: build_model(config, self.model_factory, device),
        )
        return show_checks(self._console, checks.run())

    def _close(
        self, tracked: TrackedRun, signals: StopSignals, status: str, reason: str | None,
        *, saves: bool,
    ) -> None:
        """Wait for what is on its way, as long as there is time, and end the run."""
        job = self._job
        if job is not None and saves and not signals.at_once:
            self._close_checkpoints(job)
        at_once = signals.at_once
        wait_seconds = min(
            LAST_WORD_SECONDS if at_once else self.config.tracking_wait_seconds,
            0.8 * signals.remaining_seconds,
        )
        unsent = tracked.end(
            status, reason, wait_seconds, lambda: signals.at_once and not at_once
        )
        for line in unsent:
            say(self._console, line)
        if job is not None:
            waits = saves and not unsent and not signals.at_once
            if waits and not job.manager.list_checkpoints():
                job.folder.discard_if_empty()
            job.folder.release()

    def _track(self, config: PipelineConfig, folder: RunFolder | None) -> TrackedRun:
        if folder is not None:
            tracked = TrackedRun.resume_spooled(
                folder.spool_path, lambda line: say(self._console, line)
            )
        elif self.nested is not None:
            tracked = TrackedRun.begin(
                config.training.experiment_name, self.nested.name, self.nested.parent_run_id
            )
        else:
            training = config.training
            name = f"{training.model_scale.value}-{training.data.recipe}"
            tracked = TrackedRun.begin(training.experiment_name, name)
        if self.nested is not None:
            self.nested.begun(tracked.run_id)
            tracked.set_tags(self.nested.tags)
        return tracked

    def _train(self, job: Job, signals: StopSignals) -> None:
        """Iterate the loop; decide after each step whether to log, gate, save, go back or stop.

        A checkpoint due at a skipped step is put off until one is accepted.
        """
        training, total_steps = job.config.training, job.plan.total_steps
        self._health = HealthMonitor(job.config.health)
        self._begin(job, signals)
        pending: list[StepMetrics] = []
        save_due = False
        progress = TrainingProgress(self._console, total_steps, job.state.step)
        with progress, signals.deferred():
            for metrics in self._steps(job):
                if math.isnan(job.start_seconds):
                    float(metrics.loss)  # waits for the device
                    job.start_seconds = time.time() - psutil.Process().create_time()
                step, last = metrics.step, metrics.step == total_steps
                branch = find_branch(job)
                pending.append(metrics)
                quick = step % training.quick_gate_steps == 0 or last
                save_due = (
                    save_due or last or step % training.save_steps == 0 or branch is not None
                )
                read = step % training.logging_steps == 0 or quick or save_due
                readings: list[StepReading] = []
                if read or signals.requested:
                    readings, speed = self._log(job, pending)
                    pending.clear()
                    progress.advance(step, readings[-1].loss, speed)
                    divergence = find_divergence(job, readings, look_at_weights=quick or save_due)
                    if divergence is not None:
                        self._rewind(job, divergence)
                        save_due, last, quick, branch = False, False, False, None
                        progress.advance(job.state.step, None, None)
                else:
                    progress.advance(step, None, None)
                save = save_due and (last or not readings[-1].skipped)
                if quick and not save:  # where it is saved, QUICK is decided on the held-out loss
                    self._gate_quick(job)
                if save:
                    save_due = False
                    self._evaluate_and_save(job, signals)
                    if branch is not None and signals.requested is None:
                        self._follow(job, branch, signals)
                if last or (job.saving is not None and job.saving.done):
                    self._settle(job)
                if signals.requested and not last:
                    self._stop(job, signals)
        signals.raise_if_requested()

    def _begin(self, job: Job, signals: StopSignals) -> None:
        """Do what belongs to the step that the run begins or goes on from."""
        if job.state.step == 0:
            self._evaluate(job)
            return
        self._decide_if_undecided(job)
        branch = find_branch(job)  # of a process that was killed on it
        if branch is not None:
            self._follow(job, branch, signals)

    def _follow(self, job: Job, branch: Branch, signals: StopSignals) -> None:
        """See what the run would have reached, had it ended at a horizon."""
        self._settle(job)
        with job.spending("branches"):
            horizon = follow_branch(job, branch, lambda: signals.requested is not None)
        if horizon is not None:
            self._console.print(
                f"horizon at step {horizon.step}: held-out loss {horizon.loss:.4f}, decayed from "
                f"step {branch.start} on"
            )
            if self.nested is not None:
                self.nested.reached(job, horizon)

    def _steps(self, job: Job) -> Iterator[StepMetrics]:
        steps = stage_steps(job, job.plan.total_steps, looks=True)
        if not job.config.training.profile:
            return steps
        folder = job.folder.path / "profile"

        def report(table: str) -> None:
            job.tracked.log_artifacts(folder, "profile")
            job.tracked.set_tags({"svend.profile": "profile/"})
            self._console.print(f"profile: {folder}\n{table}", markup=False, soft_wrap=True)

        return profiled_steps(steps, job.plan.total_steps - job.state.step, folder, report)

    def _log(self, job: Job, pending: list[StepMetrics]) -> tuple[list[StepReading], float]:
        """Read the pending steps from the device and log them; return them and tokens/s."""
        readings = [
            StepReading(
                metrics.step, float(metrics.loss), float(metrics.gradient_norm),
                int(metrics.skipped_steps), int(metrics.skipped_in_a_row),
            )
            for metrics in pending
        ]
        # After the reads, which wait for the device: the time is that of finished work.
        seconds = time.perf_counter() - pending[0].started_seconds
        tokens_per_second = len(pending) * job.plan.tokens_per_step / seconds
        with job.spending("tracking"):
            self._track_steps(job, pending, readings, tokens_per_second)
        for reading in readings:
            job.state.trend.add(reading.step, reading.loss)
            if reading.skipped:
                self._console.print(f"step {reading.step}: skipped ({reading})")
        for metrics, reading in zip(pending, readings, strict=True):
            if metrics.health is not None:
                self._check_health(job, metrics, metrics.health, reading)
        return readings, tokens_per_second

    def _check_health(
        self, job: Job, metrics: StepMetrics, health: HealthReading, reading: StepReading
    ) -> None:
        """Log what a look saw; warn of what is out of bounds, or end the run by HealthError."""
        figures = HealthFigures.read(health)
        with job.spending("tracking"):
            job.tracked.log_metrics(figures.metrics(), metrics.step)
        lines = self._health.judge(
            figures, metrics.step, metrics.learning_rate / job.config.training.learning_rate,
            reading.skipped_steps, skipped=reading.skipped,
        )
        for line in lines:
            say(self._console, f"warning: health at {line}")
        if lines:
            job.tracked.set_tags({HEALTH_TAG: self._health.summary[:MAX_TAG_LENGTH]})
        if self._health.failure is not None:
            self._settle(job)
            record_verdicts(job.tracked, job.folder)
            raise self._health.failure

    def _track_steps(
        self,
        job: Job,
        pending: list[StepMetrics],
        readings: list[StepReading],
        tokens_per_second: float,
    ) -> None:
        flops_per_second = tokens_per_second * job.plan.flops_per_token
        for metrics, reading in zip(pending, readings, strict=True):
            logger.debug(
                "step %d: loss %.4f, gradient norm %.3f, learning rate %.3g, %d tokens",
                metrics.step, reading.loss, reading.gradient_norm, metrics.learning_rate,
                metrics.tokens,
            )
            job.tracked.log_metrics(
                {
                    "train/loss": reading.loss,
                    "train/gradient_norm": reading.gradient_norm,
                    "train/skipped_steps": reading.skipped_steps,
                    "train/learning_rate": metrics.learning_rate,
                    "train/tokens": metrics.tokens,
                    "train/flops": float(metrics.step) * job.plan.tokens_per_step
                    * job.plan.flops_per_token,
                    "train/tokens_per_second": tokens_per_second,
                    "train/flops_per_second": flops_per_second,
                    "train/peak_fraction": flops_per_second / job.plan.peak_flops,
                },
                metrics.step,
            )

        job.tracked.log_metrics(
            {
                f"data/epochs/{job.corpus.counts[number].source}": epoch
                for number, epoch in job.state.stream.epochs_by_source().items()
            },
            pending[-1].step,
        )

    def _rewind(self, job: Job, divergence: Divergence) -> None:
        """Go back to the last good checkpoint, once; then, or where there is none, fail."""
        self._settle(job)
        if job.state.rewinds:
            raise fail(job, divergence, "it had gone back to a checkpoint before")
        checkpoint = find_good_checkpoint(job)
        if checkpoint is None:
            raise fail(job, divergence, "there is no good checkpoint to go back to")
        metrics = go_back(job, divergence, checkpoint)
        self._save(job, metrics)
        self._settle(job)
        self._console.print(
            f"step {divergence.at.step}: {divergence.reason}; back at step {job.state.step}, and "
            "on behind the data in between", soft_wrap=True,
        )

    def _gate_quick(self, job: Job) -> None:
        """Decide QUICK on the last accepted step: what a skipped one measured moved no weight."""
        accepted = job.state.guard.last_accepted()
        if accepted is None:
            return
        loss, _ = accepted
        evidence = Evidence(
            job.state.step, None, job.corpus.fingerprint, job.tracked.run_id
        )
        self._record(job, self._decide_quick(job, loss, evidence))

    def _decide_quick(self, job: Job, loss: float, evidence: Evidence) -> ValidationResult:
        measurements = {
            "loss": Measurement(loss),
            "nonfinite_parameters": Measurement(job.call(count_nonfinite)),
        }
        return self.validator.decide(GateLevel.QUICK, measurements, evidence)

    def _evaluate(self, job: Job) -> HeldoutLoss:
        training = job.config.training
        with job.spending("evaluating"):
            measured = job.call(measure_heldout)
        job.final_loss = measured.loss
        if math.isnan(job.first_loss):
            job.first_loss = measured.loss
        if job.state.step <= job.evaluated_step:
            return measured  # logged before
        job.evaluated_step = job.state.step
        bytes_per_token = job.heldout.bytes_per_token(training.heldout_sequences)
        job.tracked.log_metrics(
            {
                "eval/heldout_loss": measured.loss,
                "eval/perplexity": measured.perplexity,
                "eval/bits_per_byte": measured.bits_per_byte(bytes_per_token),
            },
            job.state.step,
        )
        return measured

    def _evaluate_and_save(self, job: Job, signals: StopSignals) -> None:
        """Measure the weights, decide on them, and begin to save them.

        Benchmarks are measured at the first checkpoint after each `evaluation.every_steps`; those
        of the end come when it is known which checkpoint is the best.
        """
        self._settle(job)
        measured = self._evaluate(job)
        if self.nested is not None:
            self.nested.judge(job.state.step, measured.loss)
        _, norm = job.state.guard.last_accepted() or (math.nan, math.nan)
        values = {"loss": measured.loss, "perplexity": measured.perplexity, "gradient_norm": norm}
        verdicts = self._decide(job, measured, norm)
        every, step = job.config.evaluation.every_steps, job.state.step
        if every and step < job.plan.total_steps and step // every > job.saved_step // every:
            verdicts += self._evaluate_benchmarks(job, signals)
        self._save(job, values, verdicts)
        if not all(verdict.passed for verdict in verdicts if verdict.level in STOPPING):
            self._settle(job)

    def _evaluate_benchmarks(self, job: Job, signals: StopSignals) -> tuple[ValidationResult, ...]:
        """Measure the benchmarks on the weights as they are, and decide what they are enough for.

        That is FULL, and PRODUCTION where each of its metrics was measured.
        """
        model, step = job.state.model, job.state.step
        if not job.config.eval_benchmarks:
            return ()
        if not isinstance(model, ReasoningTransformer):
            self._console.print(
                f"benchmarks: not measured; {type(model).__name__} is no ReasoningTransformer"
            )
            return ()
        heldout = self._evaluate(job)
        with job.spending("evaluating"), AnswerProgress(self._console) as progress:
            whole = job.call(gather_model)
            assert isinstance(whole, ReasoningTransformer)
            evaluation = evaluate_model(
                job.config, whole, job.corpus.tokenizer, job.questions, lambda: heldout,
                progress.advance, lambda: signals.requested is not None,
            )
        record_evaluation(job.tracked, evaluation, step)
        job.measured = evaluation.measurements
        self._console.print(measurement_table(evaluation.results, evaluation.measurements))
        return self._decide_full(job, {**heldout.measurements(), **evaluation.measurements})

    def _decide_full(
        self, job: Job, measurements: Mapping[str, Measurement]
    ) -> tuple[ValidationResult, ...]:
        """Decide FULL, and PRODUCTION where each of its metrics was measured."""
        if self.nested is not None:
            measurements = {**measurements, **self.nested.measurements()}
        step = job.state.step
        levels = [GateLevel.FULL]
        if all(gate.metric_name in measurements
               for gate in self.validator.gates[GateLevel.PRODUCTION] if gate.required):
            levels.append(GateLevel.PRODUCTION)
        verdicts = tuple(
            self.validator.decide(level, measurements, Evidence(step)) for level in levels
        )
        job.full_verdict = verdicts[0]
        return verdicts

    def _decide(
        self, job: Job, measured: HeldoutLoss, gradient_norm: float
    ) -> tuple[ValidationResult, ...]:
        """Decide QUICK and STANDARD on the model's weights."""
        step = job.state.step
        quick = self._decide_quick(job, measured.loss, Evidence(step))
        standard = self.validator.decide(
            GateLevel.STANDARD,
            {**measured.measurements(), "gradient_norm": Measurement(gradient_norm)},
            Evidence(step),
        )
        return quick, standard

    def _settle(self, job: Job) -> None:
        """Wait for the checkpoint on its way, and record the verdicts with the hash it got."""
        saving, job.saving = job.saving, None
        if saving is None:
            return
        begun, started_seconds = saving.checkpoint_id, time.perf_counter()
        with job.spending("saving"), job.crew.together():
            checkpoint_id = begun if isinstance(begun, str) else begun.result()
            checkpoint = next(
                c for c in job.manager.list_checkpoints() if c.checkpoint_id == checkpoint_id
            )
        job.saved_step = saving.step
        # What the loop waited for: the copy, and the writing as far as it was not done by now.
        stall_seconds = saving.stall_seconds + time.perf_counter() - started_seconds
        job.tracked.log_metrics({
            "save/stall_seconds": stall_seconds, "save/write_seconds": job.manager.write_seconds,
            "save/bytes": checkpoint.bytes,
        }, saving.step)
        self._record_on(job, checkpoint, saving.verdicts)

    def _record_on(
        self, job: Job, checkpoint: Checkpoint, verdicts: Iterable[ValidationResult]
    ) -> None:
        evidence = Evidence(
            checkpoint.step, checkpoint.weights_sha256, job.corpus.fingerprint, job.tracked.run_id
        )
        self._record(job, *(replace(verdict, evidence=evidence) for verdict in verdicts))

    def _decide_if_undecided(self, job: Job) -> None:
        """Decide on the checkpoint just loaded if the process was killed before it could.

        A gate that failed under strict validation still stands.
        """
        checkpoint = next(
            c for c in job.manager.list_checkpoints() if c.step == job.state.step
        )
        if not checkpoint.metrics:
            return  # saved by an interruption, between evaluations
        rows = job.folder.read_verdicts(checkpoint.weights_sha256)
        if undecided(self.validator.gates, rows, (GateLevel.QUICK, GateLevel.STANDARD)):
            norm = checkpoint.metrics["gradient_norm"]
            self._record_on(job, checkpoint, self._decide(job, self._evaluate(job), norm))
        elif self.validator.strict and GateLevel.STANDARD not in passed_levels(
            self.validator.gates, rows
        ):
            raise GateFailure(
                f"the checkpoint at step {checkpoint.step} failed its gate; begin another run, "
                "with other settings or thresholds"
            )

    def _save(
        self, job: Job, metrics: Mapping[str, float], verdicts: tuple[ValidationResult, ...] = ()
    ) -> None:
        """Begin to save; `_settle` ends it."""
        # First the metrics: a run resumed from this checkpoint does not train these steps again.
        with job.spending("tracking"):
            job.tracked.keep()
        state, manager, started_seconds = job.state, job.manager, time.perf_counter()
        save = manager.save_in_background if job.plan.saves_in_background else manager.save
        with job.spending("saving"):
            if job.sharded:
                size_bytes = sharded_bytes(job)
                job.call(begin_partial_save, manager.prepare_folder(state.step, size_bytes))
            begun = save(
                None if job.sharded else state.model, None if job.sharded else state.optimizer,
                state.scheduler, state.step, state.stream.epoch, metrics, state.extra_state(),
                state.scaler, partial=job.partial,
            )
        stall_seconds = time.perf_counter() - started_seconds
        job.saving = Saving(begun, state.step, verdicts, stall_seconds)

    def _record(self, job: Job, *verdicts: ValidationResult) -> None:
        """Keep verdicts in the run folder and in MLflow.

        Under strict, a failure of QUICK or STANDARD stops the run; FULL and PRODUCTION decide what
        comes after it.
        """
        job.folder.append_verdict([row for verdict in verdicts for row in verdict.rows()])
        for verdict in verdicts:
            logger.debug("%s", verdict.summary())
            job.tracked.log_metrics(
                {f"gate/{verdict.level.value}/{result.gate.name}": float(result.passed)
                 for result in verdict.gates},
                verdict.evidence.step or 0,
            )
            for warning in verdict.warnings:
                self._console.print(f"warning: {verdict.level.name} gate {warning}")
        for verdict in verdicts:
            if verdict.passed:
                continue
            failures = "; ".join(verdict.failures)
            if verdict.level not in STOPPING:
                self._console.print(f"{verdict.level.value}: not passed: {failures}")
                continue
            line = f"{verdict.level.name} gate failed at step {verdict.evidence.step}: {failures}"
            if self.validator.strict:
                self._settle(job)
                record_verdicts(job.tracked, job.folder)
                raise GateFailure(line)
            self._console.print(f"warning: {line}")

    def _close_checkpoints(self, job: Job) -> None:
        """Wait for checkpoints on their way to another place; say so if some have not arrived."""
        if isinstance(job.manager, DriveCheckpointManager) and not job.manager.close():
            self._console.print(
                f"warning: not every checkpoint has arrived in {job.folder.path}; they are in "
                f"{job.manager.output_dir}, and arrive when the run is resumed on this machine"
            )

    def _stop(self, job: Job, signals: StopSignals) -> None:
        """Save, and end the run in a way that can be resumed."""
        assert signals.requested is not None
        self._settle(job)
        if job.saved_step < job.state.step:
            self._save(job, {})
            self._settle(job)
        record_verdicts(job.tracked, job.folder)
        raise Interrupted(
            f"interrupted by {signals.requested.name} at step {job.state.step} of "
            f"{job.plan.total_steps}, saved; the same command with resume=true goes on"
        )

    def _require_full(self, job: Job) -> None:
        """Under strict, raise GateFailure where the run had to pass FULL and did not."""
        verdict = job.full_verdict
        if verdict is None or verdict.passed or self.nested is None or not self.nested.gates_full:
            return
        line = f"FULL gate failed at step {verdict.evidence.step}: {'; '.join(verdict.failures)}"
        if self.validator.strict:
            raise GateFailure(line)
        self._console.print(f"warning: {line}")

    def _conclude(self, job: Job) -> None:
        """Put on record what the run's end says of the scaling law, and whether the loss fell."""
        slope_bound = job.state.trend.slope_bound()
        if math.isfinite(slope_bound):
            job.tracked.log_metrics({"train/loss_slope_bound": slope_bound}, job.state.step)
        end = job.manager.list_checkpoints()[-1]
        horizon = horizon_at(job, job.state.step, end.metrics["loss"])
        record_horizon(job, horizon)
        if self.nested is not None:
            self.nested.reached(job, horizon)

    def _consolidate(self, job: Job, checkpoint: Checkpoint) -> Checkpoint:
        """Have the weights in one file, as a version of the registry is; its hash is then theirs.

        What was decided on the parts was decided on these weights.
        """
        whole = job.manager.consolidate(checkpoint)
        if whole.weights_sha256 != checkpoint.weights_sha256:
            rows = job.folder.read_verdicts(checkpoint.weights_sha256)
            job.folder.append_verdict(
                [{**row, "checkpoint_sha256": whole.weights_sha256} for row in rows]
            )
        return whole

    def _finish(self, job: Job, signals: StopSignals) -> RegisteredVersion | None:
        """Evaluate the best checkpoint, register it with the levels that it passed, and report."""
        self._conclude(job)
        best = job.manager.best()
        if best is not None:
            best = self._consolidate(job, best)
            if best.step != job.state.step:
                job.call(load_weights, best.path)
                self._console.print(f"benchmarks: on {best.checkpoint_id}, the best")
            job.measured = {}
            verdicts = self._evaluate_benchmarks(job, signals)
            if not verdicts and self.nested is not None and self.nested.gates_full:
                verdicts = self._decide_full(job, {})
            self._record_on(job, best, verdicts)
        record_verdicts(job.tracked, job.folder)
        measured_gb = peak_bytes(job.device) / 1e9
        measured_seconds = time.monotonic() - job.started_seconds
        job.spent_seconds["data"] = job.state.stream.waited_seconds
        job.tracked.log_metrics(
            {
                "measured/peak_memory_gb": measured_gb,
                "measured/seconds": measured_seconds,
                "measured/start_seconds": job.start_seconds,
                **{f"measured/{part}_seconds": spent for part, spent in job.spent_seconds.items()},
            },
            job.state.step,
        )
        registered = None
        if best is not None and (self.nested is None or self.nested.registers):
            rows = job.folder.read_verdicts(best.weights_sha256)
            # What a version rests on is in the store before it is.
            job.tracked.flush(job.config.tracking_wait_seconds)
            with told_by_the_store(f"{job.model_name}, trained and saved but not registered"):
                registered = register_version(
                    job.tracked, job.folder, job.config, job.model_name, job.corpus, best,
                    self.validator, rows,
                    measurement_rows(job.measured, job.config, Evidence(
                        best.step, best.weights_sha256, job.corpus.fingerprint, job.tracked.run_id
                    )),
                )
            self._console.print(verdict_table(rows, f"Verdicts on {best.checkpoint_id}, the best"))
            decided = {row["level"] for row in rows}
            for level in (GateLevel.FULL, GateLevel.PRODUCTION):
                needed = ", ".join(gate.metric_name for gate in self.validator.gates[level])
                if level.value not in decided:
                    self._console.print(f"{level.value}: not decided; needs {needed}")
        show_measured(
            self._console, job.plan, measured_gb, measured_seconds, job.start_seconds,
            job.spent_seconds,
        )
        if self.nested is not None:
            self.nested.decided(job, job.full_verdict, registered)
        job.folder.mark_finished()
        show_next_steps(
            self._console, job.tracked.tracking_uri, job.tracked.experiment_id, job.tracked.run_id,
            job.folder.path, registered,
        )
        return registered


def follow_runs(config: PipelineConfig, *, once: bool) -> None:
    """Do this process's share of the runs that the first one leads: one, or until it says farewell.
    """
    runner = ScaleRunner(config)
    if once:
        runner.run()
        return
    stay_for_orders()
    keep_freed_memory()
    crew, device = runner.meet(find_place()), resolve_device(config.training.device)
    while not isinstance(follow_run(None, device, crew), Farewell):
        pass


def say_farewell(config: PipelineConfig) -> None:
    """Let the other processes go, where there are any, once no run comes any more."""
    place = find_place()
    if place.size > 1:
        ScaleRunner(config).meet(place).dismiss(Farewell())


def _within_experiment(config: PipelineConfig) -> PipelineConfig:
    """Return the config with the experiment that `mlflow run --experiment-name` chose, if any."""
    name = joined_experiment_name() or config.training.experiment_name
    return replace(config, training=replace(config.training, experiment_name=name))


def _folder_to_resume(config: PipelineConfig, force: bool) -> RunFolder:
    training = config.training
    folder = RunFolder.find_unfinished(
        config.checkpoint_dir, training.experiment_name, training.model_scale.value
    )
    if not force:
        folder.check_config(config)
    folder.hold()
    return folder
