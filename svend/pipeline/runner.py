"""One run from top to bottom: plan, train, gate, save, register. The only wiring."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil

from svend.device import describe_device, keep_freed_memory, resolve_device, resolve_precision
from svend.errors import Interrupted, RankLost, ResourceError, UserError
from svend.pipeline.assignment import follow_run
from svend.pipeline.branches import find_branch, follow_branch
from svend.pipeline.checkpoints import DriveCheckpointManager
from svend.pipeline.checkpoints.drive import mount_google_drive
from svend.pipeline.conclusion import conclude_run
from svend.pipeline.config import Branch, PipelineConfig
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
from svend.pipeline.gatekeeper import STOPPING, Gatekeeper
from svend.pipeline.infrastructure import CheckResult, InfrastructureChecks
from svend.pipeline.interruption import StopSignals
from svend.pipeline.job import Job, prepare_job
from svend.pipeline.nested import NestedRun
from svend.pipeline.outcome import Ending, PipelineResult
from svend.pipeline.own_model import ModelFactory, describe_model, find_model_factory
from svend.pipeline.record import record_verdicts
from svend.pipeline.replica import stage_steps
from svend.pipeline.report import TrainingProgress, show_checks, show_plan
from svend.pipeline.run_evaluation import evaluate_benchmarks, evaluate_heldout
from svend.pipeline.run_folder import RunFolder
from svend.pipeline.run_model import build_model, planned_model
from svend.pipeline.saving import begin_save
from svend.pipeline.step_log import StepLog
from svend.pipeline.validation import PipelineValidator, ValidationGate
from svend.planning.plan import explain_out_of_memory, is_out_of_memory
from svend.ranks import Place, find_place
from svend.tracking.run import TrackedRun
from svend.tracking.runs import end_joined_run, joined_experiment_name
from svend.training.loop import StepMetrics, runs_uncompiled
from svend.training.parallel import join_ranks
from svend.training.profiling import profiled_steps

__all__ = ["PipelineResult", "ScaleRunner", "follow_runs", "say_farewell"]

# For telling the tracking store of an end that is to be at once.
LAST_WORD_SECONDS = 2.0


class ScaleRunner:
    """Runs one scale: `run()` trains it as a tracked run and returns how it ended.

    model_factory: builds the model of a scale in place of ReasoningTransformer; without one, what
    the configuration names as that, if anything. nested: what a
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
        self.model_factory = find_model_factory(config, model_factory)
        self.nested = nested
        self.owns_process = owns_process
        self.validator = PipelineValidator(
            strict=config.strict_validation,
            custom_gates=custom_gates,
            gates=config.gates,
            thresholds=config.training.validation_gates,
        )
        self._console = make_console()
        self._gatekeeper = Gatekeeper(self.validator, self._console, nested)

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
        ending, registered = Ending("FINISHED"), None
        with StopSignals(self.config.grace_seconds, exits=self.owns_process) as signals:
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
                    registered = conclude_run(
                        job, self.validator, self._gatekeeper, self.nested, self._console,
                        lambda: signals.requested is not None,
                    )
                self._gatekeeper.require_full(job)
            except BaseException as error:
                ending = Ending.by(error, self.config.checkpoint_dir)
                if ending.unexpected:
                    raise
            finally:
                signals.closing()
                if tracked is not None:
                    self._close(tracked, signals, ending)
                elif ending.reason is not None:
                    end_joined_run(ending.status, ending.reason)
                if folder is not None:
                    folder.release()
        result = PipelineResult(
            scale=self.config.training.model_scale,
            success=ending.reason is None,
            final_loss=self._job.final_loss if self._job else math.nan,
            training_time_seconds=time.monotonic() - started_seconds,
            reason=ending.reason,
            error=ending.mistake,
            interrupted=ending.status == "KILLED",
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
        factory = self.model_factory
        own = "" if factory is None else describe_model(job.state.model, factory, config)
        show_plan(self._console, job.config, job.plan, job.corpus, job.sequences,
                  describe_device(job.device), job.carried, job.sharing, own)
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

    def _close(self, tracked: TrackedRun, signals: StopSignals, ending: Ending) -> None:
        """Wait for what is on its way, as long as there is time, and end the run."""
        job = self._job
        # A checkpoint of which a part will never come is not waited for.
        saves = not isinstance(ending.mistake, RankLost)
        if job is not None and saves and not signals.at_once:
            self._close_checkpoints(job)
        at_once = signals.at_once
        wait_seconds = min(
            LAST_WORD_SECONDS if at_once else self.config.tracking_wait_seconds,
            0.8 * signals.remaining_seconds,
        )
        unsent = tracked.end(
            ending.status, ending.reason, wait_seconds, lambda: signals.at_once and not at_once
        )
        for line in unsent:
            say(self._console, line)
        if job is not None:
            waits = saves and not unsent and not signals.at_once
            if waits and not job.manager.list_checkpoints():
                job.folder.discard_if_empty()
            job.folder.release()

    def _close_checkpoints(self, job: Job) -> None:
        """Wait for checkpoints on their way to another place; say so if some have not arrived."""
        if isinstance(job.manager, DriveCheckpointManager) and not job.manager.close():
            self._console.print(
                f"warning: not every checkpoint has arrived in {job.folder.path}; they are in "
                f"{job.manager.output_dir}, and arrive when the run is resumed on this machine"
            )

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
        gatekeeper, log = self._gatekeeper, StepLog(job, self._console)
        self._begin(job, signals)
        save_due = False
        compiles_after = None
        if job.plan.compile:
            first = job.state.step + 1
            compiles_after = first if runs_uncompiled(first, job.state.device) else job.state.step
        progress = TrainingProgress(self._console, total_steps, job.state.step, compiles_after)
        with progress, signals.deferred():
            for metrics in self._steps(job):
                if math.isnan(job.start_seconds):
                    float(metrics.loss)  # waits for the device
                    job.start_seconds = time.time() - psutil.Process().create_time()
                step, last = metrics.step, metrics.step == total_steps
                branch = find_branch(job)
                log.add(metrics)
                quick = step % training.quick_gate_steps == 0 or last
                save_due = (
                    save_due or last or step % training.save_steps == 0 or branch is not None
                )
                read = step % training.logging_steps == 0 or quick or save_due
                readings: list[StepReading] = []
                if read or signals.requested:
                    readings, speed = log.read()
                    self._require_health(job, log)
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
                    gatekeeper.gate_quick(job)
                if save:
                    save_due = False
                    self._evaluate_and_save(job, signals)
                    if branch is not None and signals.requested is None:
                        self._follow(job, branch, signals)
                if last or (job.saving is not None and job.saving.done):
                    gatekeeper.settle(job)
                if signals.requested and not last:
                    self._stop(job, signals)
        signals.raise_if_requested()

    def _begin(self, job: Job, signals: StopSignals) -> None:
        """Do what belongs to the step that the run begins or goes on from."""
        if job.state.step == 0:
            evaluate_heldout(job)
            return
        self._gatekeeper.decide_if_undecided(job)
        branch = find_branch(job)  # of a process that was killed on it
        if branch is not None:
            self._follow(job, branch, signals)

    def _follow(self, job: Job, branch: Branch, signals: StopSignals) -> None:
        """See what the run would have reached, had it ended at a horizon."""
        self._gatekeeper.settle(job)
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

    def _require_health(self, job: Job, log: StepLog) -> None:
        """End the run by HealthError where a look found what it may not go on with."""
        if log.health_failure is not None:
            self._gatekeeper.settle(job)
            record_verdicts(job.tracked, job.folder.read_verdicts())
            raise log.health_failure

    def _rewind(self, job: Job, divergence: Divergence) -> None:
        """Go back to the last good checkpoint, once; then, or where there is none, fail."""
        self._gatekeeper.settle(job)
        if job.state.rewinds:
            raise fail(job, divergence, "it had gone back to a checkpoint before")
        checkpoint = find_good_checkpoint(job)
        if checkpoint is None:
            raise fail(job, divergence, "there is no good checkpoint to go back to")
        metrics = go_back(job, divergence, checkpoint)
        begin_save(job, metrics)
        self._gatekeeper.settle(job)
        self._console.print(
            f"step {divergence.at.step}: {divergence.reason}; back at step {job.state.step}, and "
            "on behind the data in between", soft_wrap=True,
        )

    def _evaluate_and_save(self, job: Job, signals: StopSignals) -> None:
        """Measure the weights, decide on them, and begin to save them.

        Benchmarks are measured at the first checkpoint after each `evaluation.every_steps`; those
        of the end come when it is known which checkpoint is the best.
        """
        gatekeeper = self._gatekeeper
        gatekeeper.settle(job)
        measured = evaluate_heldout(job)
        if self.nested is not None:
            self.nested.judge(job.state.step, measured.loss)
        _, norm = job.state.guard.last_accepted() or (math.nan, math.nan)
        values = {"loss": measured.loss, "perplexity": measured.perplexity, "gradient_norm": norm}
        verdicts = gatekeeper.decide(job, measured, norm)
        every, step = job.config.evaluation.every_steps, job.state.step
        if every and step < job.plan.total_steps and step // every > job.saved_step // every:
            measurements = evaluate_benchmarks(
                job, self._console, lambda: signals.requested is not None
            )
            if measurements is not None:
                verdicts += gatekeeper.decide_full(job, measurements)
        begin_save(job, values, verdicts)
        if not all(verdict.passed for verdict in verdicts if verdict.level in STOPPING):
            gatekeeper.settle(job)

    def _stop(self, job: Job, signals: StopSignals) -> None:
        """Save, and end the run in a way that can be resumed."""
        assert signals.requested is not None
        self._gatekeeper.settle(job)
        if job.saved_step < job.state.step:
            begin_save(job, {})
            self._gatekeeper.settle(job)
        record_verdicts(job.tracked, job.folder.read_verdicts())
        raise Interrupted(
            f"interrupted by {signals.requested.name} at step {job.state.step} of "
            f"{job.plan.total_steps}, saved; the same command with resume=true goes on"
        )


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
    while not isinstance(follow_run(runner.model_factory, device, crew), Farewell):
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
