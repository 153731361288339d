"""The study: which trials there are, and which of them were lost with their worker.

Trials are claimed by Optuna's own step from waiting to running, which one worker alone can take. A
trial whose worker died is closed as lost and put in line again, with its values, its number and its
MLflow run: what was trained until its last checkpoint is not trained again.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from svend.errors import UserError
from svend.pipeline.sweep.liveness import BEAT, WORKER, Watch, process_name
from svend.pipeline.sweep.options import Dimension, Pruner, Sampler, Sweep, Value
from svend.pipeline.sweep.storage import Place

DEFINITION, FINISHED, PARENT_RUN = "svend.definition", "svend.finished", "svend.parent_run"
LOST = "svend.lost."  # and the number of a trial
# What a trial carries.
IN_LINE, ORIGIN, RUN, SURPLUS, TASK, REASON = (
    "in_line", "origin", "run_id", "surplus", "task", "reason"
)
# Why a run below the parent was ended by another process.
ABANDONED = "its worker died, and its trial was run again from the beginning"
CONFIRMATION_SUFFIX = ".confirmation"
optuna.logging.set_verbosity(optuna.logging.WARNING)


class SweepStudy:
    """A study as the sweep uses it."""

    def __init__(self, study: optuna.Study, sweep: Sweep) -> None:
        self.study = study
        self._watch = Watch(sweep.config.silence_seconds)

    @classmethod
    def create(cls, place: Place, sweep: Sweep) -> SweepStudy:
        """Return the study of this name, new or as far as it got.

        Raises UserError if its space or settings were others, or if it is not a sweep's.
        """
        storage = place.open()
        names = {summary.study_name for summary in optuna.get_all_study_summaries(storage)}
        study = optuna.create_study(
            storage=storage, study_name=place.study, direction="minimize", load_if_exists=True
        )
        definition = sweep.definition()
        told = study.user_attrs.get(DEFINITION)
        if told is None and place.study in names and study.get_trials(deepcopy=False):
            raise UserError(
                f"study {place.study}: {place.shown} has one of that name that is no sweep of "
                "Svend; give the sweep another name with --name, or another storage"
            )
        if told is None:
            study.set_user_attr(DEFINITION, definition)
        elif told != definition:
            raise UserError(
                f"study {place.study}: {_first_difference(told, definition)}; go on with what it "
                "was, or give the sweep another name with --name"
            )
        return cls(study, sweep)

    @classmethod
    def join(cls, place: Place, sweep: Sweep, worker: int) -> SweepStudy:
        """Return the study for a worker, whose samples are its own."""
        try:
            study = optuna.load_study(study_name=place.study, storage=place.open())
        except KeyError:
            raise UserError(
                f"study {place.study}: not in {place.shown}; begin it with svend sweep without "
                "--join, or check --name and --storage"
            ) from None
        if study.user_attrs.get(DEFINITION) != sweep.definition():
            told = study.user_attrs.get(DEFINITION, "{}")
            raise UserError(
                f"study {place.study}: {_first_difference(told, sweep.definition())}; join it with "
                "the options that it was begun with"
            )
        # Not what this worker's number has drawn before: it may be the successor of a dead one.
        seed = np.random.SeedSequence([sweep.config.seed, worker, len(study.trials)])
        study.sampler = make_sampler(sweep, int(seed.generate_state(1)[0]))
        study.pruner = make_pruner(sweep)
        return cls(study, sweep)

    @classmethod
    def confirmation_of(cls, place: Place, sweep: Sweep) -> SweepStudy:
        """Return the study of reruns that belongs to a sweep, made if need be."""
        return cls(optuna.create_study(
            storage=place.open(), study_name=place.study + CONFIRMATION_SUFFIX,
            direction="minimize", load_if_exists=True, sampler=RandomSampler(seed=0),
            pruner=optuna.pruners.NopPruner(),
        ), sweep)

    @property
    def trials(self) -> list[FrozenTrial]:
        """Every trial that counts, in order: neither lost nor surplus, and its newest attempt."""
        lost = self._lost()
        newest = {origin_of(t): t for t in self.study.get_trials(deepcopy=False)
                  if t.number not in lost and not t.user_attrs.get(SURPLUS)}
        return sorted(newest.values(), key=lambda trial: trial.number)

    @property
    def finished(self) -> bool:
        return bool(self.study.user_attrs.get(FINISHED))

    @property
    def parent_run_id(self) -> str:
        run_id = self.study.user_attrs.get(PARENT_RUN)
        if run_id is None:
            raise UserError(
                f"study {self.study.study_name}: has no run yet; join it once its parent has begun"
            )
        return str(run_id)

    def claim(self, wanted: int) -> optuna.Trial | None:
        """Return a trial to run, one put in line first; None if there is none for now.

        wanted: how many trials there are to be in all; 0 where only those in line are.
        """
        if not any(t.state is TrialState.WAITING for t in self.trials) and (
            self._begun(math.inf) >= wanted
        ):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self.study.ask()
        if not trial.user_attrs.get(IN_LINE) and self._begun(trial.number) >= wanted:
            trial.set_user_attr(SURPLUS, True)  # another worker was faster
            self.tell(trial, state=TrialState.FAIL)
            return None
        self.beat(trial)
        trial.set_user_attr(WORKER, process_name())
        return trial

    def _begun(self, below: float) -> int:
        """Count the trials with lower numbers; one that is lost, and soon in line again, is one."""
        return len({origin_of(t) for t in self.study.get_trials(deepcopy=False)
                    if t.number < below and not t.user_attrs.get(SURPLUS)})

    def holds(self, trial: optuna.Trial) -> bool:
        """Return whether a trial is still its worker's, and not closed as lost."""
        return any(t.number == trial.number and t.state is TrialState.RUNNING
                   for t in self.study.get_trials(deepcopy=False))

    def tell(
        self, trial: FrozenTrial | optuna.Trial, loss: float | None = None,
        state: TrialState | None = None,
    ) -> None:
        """Put on record how a trial ended; nothing if it was closed before, by whoever did it."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self.study.tell(trial.number, loss, state=state, skip_if_finished=True)

    def beat(self, trial: optuna.Trial) -> None:
        """Say that the trial's worker lives."""
        trial.set_user_attr(BEAT, time.time())

    def release(self, trial: FrozenTrial | optuna.Trial) -> None:
        """Close a trial that its worker cannot end; `recover` puts it in line again."""
        # In this order: whatever is interrupted, `recover` can tell where it was.
        self.study.set_user_attr(f"{LOST}{trial.number}", True)
        self.tell(trial, state=TrialState.FAIL)

    def recover(self) -> list[str]:
        """Put in line again what was released or lost with a dead worker; return the names.

        For one process at a time, the parent, so that nothing is put in line twice.
        """
        trials = self.study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state is TrialState.RUNNING and self._watch.lives(trial) is False:
                self.release(trial)
        lost, newest = self._lost(), {origin_of(trial): trial for trial in trials}
        again = []
        for trial in newest.values():
            if trial.number in lost:
                self.tell(trial, state=TrialState.FAIL)  # if it was killed before it could
                self._enqueue_again(trial)
                again.append(name_of(trial))
        return again

    def _lost(self) -> set[int]:
        return {int(name.removeprefix(LOST)) for name in self.study.user_attrs
                if name.startswith(LOST)}

    def _enqueue_again(self, trial: FrozenTrial | optuna.Trial) -> None:
        kept = {name: trial.user_attrs[name] for name in (RUN, TASK) if name in trial.user_attrs}
        self.study.enqueue_trial(trial.params, {**kept, IN_LINE: True, ORIGIN: origin_of(trial)})

    def enqueue(self, values: Mapping[str, Value]) -> None:
        """Put a trial with these values in line, unless there is one."""
        wanted = dict(values)
        if all(t.params != wanted and t.system_attrs.get("fixed_params") != wanted
               for t in self.trials):
            self.study.enqueue_trial(wanted, {IN_LINE: True})

    def enqueue_task(self, task: Mapping[str, Any]) -> str:
        """Put a task in line, unless it is there or done already; return its text."""
        told = json.dumps(task, sort_keys=True)
        if all(t.user_attrs.get(TASK) != told for t in self.trials):
            self.study.enqueue_trial({}, {TASK: told, IN_LINE: True})
        return told

    def ended(self) -> list[FrozenTrial]:
        """Return the trials that ran to their end, the best first."""
        return best_first(self.trials)


def best_first(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that ran to their end, the best first, those that diverged last."""
    done = [t for t in trials if t.state is TrialState.COMPLETE and t.value is not None]
    return sorted(done, key=lambda t: (any(c > 0 for c in t.constraints.values()),
                                       math.inf if t.value is None else t.value, t.number))


def suggest(trial: optuna.Trial, space: tuple[Dimension, ...]) -> dict[str, Value]:
    """Return the trial's value of each dimension, chosen by the study's sampler."""
    values: dict[str, Value] = {}
    for d in space:
        if d.choices:
            values[d.key] = trial.suggest_categorical(d.key, list(d.choices))
        elif d.integer:
            values[d.key] = trial.suggest_int(
                d.key, int(d.low), int(d.high), log=d.log, step=int(d.step or 1)
            )
        else:
            values[d.key] = trial.suggest_float(d.key, d.low, d.high, log=d.log, step=d.step)
    return values


def make_sampler(sweep: Sweep, seed: int) -> BaseSampler:
    """Return what chooses trials."""
    kind = sweep.config.sampler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if kind is Sampler.GP:
            return GPSampler(seed=seed, deterministic_objective=False)
        if kind is Sampler.TPE:
            return TPESampler(seed=seed)
        return RandomSampler(seed=seed)  # the points of a grid are put in line from the start


def make_pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    """Return what stops trials: not before `prune_from`, which is beyond the warm-up."""
    config = sweep.config
    first = max(config.report_steps, round(config.prune_from * config.steps))
    if config.pruner is Pruner.HALVING:
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=first, reduction_factor=config.reduction
        )
    if config.pruner is Pruner.MEDIAN:
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=first - 1)
    return optuna.pruners.NopPruner()


def origin_of(trial: FrozenTrial | optuna.Trial) -> int:
    """Return the number of a trial's first attempt, by which a person knows it."""
    return int(trial.user_attrs.get(ORIGIN, trial.number))


def name_of(trial: FrozenTrial | optuna.Trial) -> str:
    """Return what a trial or a rerun is called."""
    task = trial.user_attrs.get(TASK)
    return f"trial-{origin_of(trial)}" if task is None else str(json.loads(task)["name"])


def _first_difference(was: str, now: str) -> str:
    """Say in which point two definitions differ first."""
    before, after = json.loads(was), json.loads(now)
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            for inner in sorted({*old, *new}):
                if old.get(inner) != new.get(inner):
                    return f"{key}.{inner} was {old.get(inner)}, now {new.get(inner)}"
        elif old != new:
            return f"{key} was {old}, now {new}"
    return "its definition has changed"
