"""A worker: one process that takes trial after trial, and runs each as any run is run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from svend.errors import DivergenceError, GateFailure, Interrupted, TrialPruned, UserError
from svend.pipeline.config import PipelineConfig
from svend.pipeline.nested import NestedRun
from svend.pipeline.run_folder import RunFolder
from svend.pipeline.runner import PipelineResult, ScaleRunner
from svend.pipeline.sweep.liveness import Heartbeat
from svend.pipeline.sweep.options import Sweep, Value
from svend.pipeline.sweep.storage import Place
from svend.pipeline.sweep.study import (
    ABANDONED,
    REASON,
    RUN,
    TASK,
    SweepStudy,
    name_of,
    suggest,
)
from svend.pipeline.whole_files import append_lines, read_lines
from svend.tracking.runs import end_abandoned, experiment_of

WAIT_SECONDS = 1.0
LOSSES_FILE, CHECKPOINTS = "losses.jsonl", "checkpoints"
DIVERGED = "diverged"
LOST = "its worker was not heard of, and the trial was given to another"
# Failures of a worker, without one trial that ran, after which the sweep or the machine is wrong.
FAILURES_TO_STOP = 3


@dataclass(frozen=True)
class Work:
    """A trial, what it is called, and what its run is to be."""

    study: SweepStudy
    trial: optuna.Trial
    name: str
    config: PipelineConfig
    folder: Path


class Worker:
    """Runs trials until the sweep is finished, or its parent or a signal ends it.

    number: makes the samples of one worker other than those of the next.
    """

    def __init__(self, sweep: Sweep, place: Place, number: int) -> None:
        self._sweep = sweep
        self._place = place
        self._search = SweepStudy.join(place, sweep, number)
        self._confirmation = SweepStudy.confirmation_of(place, sweep)
        self._parent_run_id = self._search.parent_run_id
        self._experiment = experiment_of(self._parent_run_id)
        self._failures, self._has_run_one = 0, False

    def run(self) -> None:
        """Take trials, then reruns, until there are no more. Raises UserError if none can run."""
        with self._place.in_use():
            while not self._search.finished:
                work = self._take_trial() or self._take_task()
                if work is None:
                    time.sleep(WAIT_SECONDS)
                elif not self._run(work):
                    return

    def _take_trial(self) -> Work | None:
        trial = self._search.claim(self._sweep.wanted_trials)
        if trial is None:
            return None
        values = suggest(trial, self._sweep.space)
        return self._work(self._search, trial, values, {})

    def _take_task(self) -> Work | None:
        trial = self._confirmation.claim(0)
        if trial is None:
            return None
        task: dict[str, Any] = json.loads(trial.user_attrs[TASK])
        changes = {"training.seed": task["seed"], **task["changes"]}
        return self._work(self._confirmation, trial, task["values"], changes)

    def _work(
        self, study: SweepStudy, trial: optuna.Trial, values: dict[str, Value],
        changes: dict[str, Any],
    ) -> Work:
        name = name_of(trial)
        folder = self._place.folder / "trials" / name
        config = self._sweep.trial_config(values, {
            **changes,
            "training.experiment_name": self._experiment,
            "checkpoint_dir": str(folder / CHECKPOINTS),
        })
        return Work(study, trial, name, config, folder)

    def _run(self, work: Work) -> bool:
        """Run a trial and tell the study how it ended; return False if this worker is to end."""
        study, trial, config = work.study, work.trial, work.config
        losses = _Losses(work.folder / LOSSES_FILE)
        heartbeat = Heartbeat(lambda: study.beat(trial), self._sweep.config.silence_seconds)
        print(f"\n{work.name}: {trial.params or trial.user_attrs.get(TASK)}", flush=True)
        reported = losses.read()
        for step, loss in reported.items():
            trial.report(loss, step)

        def judge(step: int, loss: float) -> None:
            if heartbeat.lost.is_set() or not study.holds(trial):
                raise Interrupted(LOST)
            losses.append(step, loss)
            if not math.isfinite(loss):
                raise GateFailure(f"diverged: held-out loss {loss} at step {step}")
            if step not in reported:
                trial.report(loss, step)
            if step < (config.training.max_steps or 0) and trial.should_prune():
                raise TrialPruned(f"stopped at step {step}: held-out loss {loss:.4f} is behind")

        with heartbeat:
            result = self._train(work, judge)
        if not study.holds(trial):
            print(f"{work.name}: {LOST}", flush=True)
            shutil.rmtree(work.folder, ignore_errors=True)
            return result is None or not result.interrupted or result.reason == LOST
        if result is not None and result.interrupted:
            study.release(trial)
            return False
        with contextlib.suppress(UpdateFinishedTrialError):  # it was given away just now
            self._tell(work, losses.read(), result.error if result else None)
        # Its losses stay: they are what the study was told.
        shutil.rmtree(work.folder / CHECKPOINTS, ignore_errors=True)
        return True

    def _train(self, work: Work, judge: Callable[[int, float], None]) -> PipelineResult | None:
        """Run the trial's run, or go on with it; None if all was done but to tell the study."""
        config = work.config

        def begun(run_id: str) -> None:
            former = work.trial.user_attrs.get(RUN)
            if former not in (None, run_id):  # what it left, if anything, is on another machine
                end_abandoned(former, ABANDONED)
            with contextlib.suppress(UpdateFinishedTrialError):  # it is not ours any more
                work.trial.set_user_attr(RUN, run_id)

        before = RunFolder.find_newest(config.checkpoint_dir, config.training.experiment_name)
        if before is not None and before.identity.finished:
            begun(before.identity.run_id)
            return None
        runner = ScaleRunner(config, nested=_TrialRun(
            parent_run_id=self._parent_run_id, name=work.name, registers=False, on_begun=begun,
            on_loss=judge,
        ))
        return runner.run(resume=before is not None)

    def _tell(self, work: Work, losses: dict[int, float], error: UserError | None) -> None:
        """Put on record how a trial ended."""
        study, trial, config = work.study, work.trial, work.config
        if error is not None:
            trial.set_user_attr(REASON, str(error))
        diverged = isinstance(error, GateFailure | DivergenceError)
        self._has_run_one |= diverged or error is None or isinstance(error, TrialPruned)
        if isinstance(error, TrialPruned):
            study.tell(trial, state=TrialState.PRUNED)
            return
        assert config.model is not None and config.training.max_steps is not None  # resolved
        loss = losses.get(config.training.max_steps, math.nan)
        if diverged or (error is None and not math.isfinite(loss)):
            # As bad as knowing nothing, and not allowed: samplers learn from that, from NaN not.
            trial.set_constraint(DIVERGED, 1.0)
            study.tell(trial, math.log(config.model.vocab_size))
        elif error is not None:
            study.tell(trial, state=TrialState.FAIL)
            self._failures += 1
            if self._failures >= FAILURES_TO_STOP and not self._has_run_one:
                raise UserError(f"no trial runs here: {error}")
        else:
            trial.set_constraint(DIVERGED, -1.0)
            study.tell(trial, loss)


@dataclass(kw_only=True)
class _TrialRun(NestedRun):
    """A run that is judged as it goes, and leaves no version in the registry."""

    on_begun: Callable[[str], None]
    on_loss: Callable[[int, float], None]

    def begun(self, run_id: str) -> None:
        self.on_begun(run_id)

    def judge(self, step: int, loss: float) -> None:
        self.on_loss(step, loss)


class _Losses:
    """The held-out losses of a trial on disk, so that a second attempt knows those of the first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, step: int, loss: float) -> None:
        append_lines(self._path, [[step, loss]])

    def read(self) -> dict[int, float]:
        """Return the loss by step."""
        return {int(step): float(loss) for step, loss in read_lines(self._path)}


def end_with_parent(parent_pid: int) -> None:
    """Have this process interrupt itself once its parent is gone."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(WAIT_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
