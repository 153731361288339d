"""The parent of a sweep: the run that has workers run trials, confirms the result and reports."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from svend.errors import Interrupted, UserError
from svend.pipeline.config import PipelineConfig
from svend.pipeline.console import make_console
from svend.pipeline.interruption import StopSignals
from svend.pipeline.outcome import Ending
from svend.pipeline.report import show_next_steps
from svend.pipeline.sweep.claim import ParentClaim, TakenOver
from svend.pipeline.sweep.confirmation import (
    DOUBLE_RATE,
    LEARNING_RATE,
    PROXY,
    SECOND_WIDTH,
    Candidate,
    Rule,
    choose_candidates,
    judge,
    measured,
    tasks_at,
    winner_of,
)
from svend.pipeline.sweep.display import SweepProgress, show_plan
from svend.pipeline.sweep.liveness import LOOKS_IN_SILENCE
from svend.pipeline.sweep.options import Sampler, Sweep
from svend.pipeline.sweep.processes import WorkerProcesses
from svend.pipeline.sweep.report import record_sweep, rules_table, trials_table
from svend.pipeline.sweep.storage import Place
from svend.pipeline.sweep.study import (
    ABANDONED,
    FINISHED,
    PARENT_RUN,
    RUN,
    TASK,
    SweepStudy,
    name_of,
)
from svend.tracking.environment import environment_tags
from svend.tracking.run import TrackedRun
from svend.tracking.runs import end_orphans, joined_experiment_name

POLL_SECONDS = 0.5
LOOK_SECONDS = 20.0


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended; `winner` is None where no trial did."""

    run_id: str
    winner: Candidate | None
    rules: list[Rule]

    @property
    def promotable(self) -> bool:
        return bool(self.rules) and all(rule.holds for rule in self.rules)


def place_of(sweep: Sweep, name: str | None, storage: str | None) -> Place:
    """Return where a sweep is kept: beside the checkpoints, unless a storage is given."""
    study = name or f"sweep-{sweep.scale}"
    if Path(study).name != study or study.startswith("."):
        raise UserError(f"name = {study}: must be one that a folder can have")
    checkpoint_dir = Path(sweep.trial_config({}).checkpoint_dir).expanduser()
    folder = checkpoint_dir / "sweeps" / study
    return Place(study, storage or str(folder / "study.journal"), folder)


def show_dry_run(sweep: Sweep, place: Place) -> None:
    """Print the space, the budget and the expected time, and do nothing."""
    show_plan(make_console(), sweep, place)


def run_sweep(sweep: Sweep, place: Place, worker_command: Sequence[str]) -> SweepResult:
    """Run a sweep to its end, or go on with it where it stopped.

    worker_command: starts a worker; `--number N` is appended. Raises UserError for what the user
    can mend, and Interrupted, with everything kept, after a signal.
    """
    console = make_console()
    config = sweep.trial_config({})
    claim = ParentClaim(place, sweep.config.silence_seconds, console.print)
    with place.in_use(), StopSignals() as signals, claim:
        place.folder.mkdir(parents=True, exist_ok=True)
        with signals.deferred():
            search = SweepStudy.create(place, sweep)
            tracked = _track(config, search, place)
        ending = Ending("FINISHED")
        try:
            parent = _Parent(
                sweep, place, claim, search, tracked, console, signals, worker_command
            )
            return parent.run()
        except BaseException as error:
            ending = Ending.by(error)
            raise
        finally:
            if isinstance(ending.mistake, TakenOver):
                tracked.leave()
            else:
                tracked.end(ending.status, ending.reason)


class _Parent:
    """What the parent works with, and the order of what it does."""

    def __init__(
        self, sweep: Sweep, place: Place, claim: ParentClaim, search: SweepStudy,
        tracked: TrackedRun, console: Console, signals: StopSignals,
        worker_command: Sequence[str],
    ) -> None:
        self._sweep = sweep
        self._place = place
        self._claim = claim
        self._search = search
        self._confirmation = SweepStudy.confirmation_of(place, sweep)
        self._tracked = tracked
        self._console = console
        self._signals = signals
        self._workers = WorkerProcesses(worker_command, sweep.config.workers, place.folder)

    def run(self) -> SweepResult:
        show_plan(self._console, self._sweep, self._place)
        self._recover()
        if self._sweep.config.sampler is Sampler.GRID:
            for values in self._sweep.grid_points():
                self._search.enqueue(values)
        with self._signals.deferred(), self._workers:
            self._wait_for("trials", self._sweep.wanted_trials, lambda: self._search.trials)
            candidates = choose_candidates(self._sweep, self._search)
            winner = self._confirm(candidates)
            self._search.study.set_user_attr(FINISHED, True)
        self._recover()
        reruns = measured(self._confirmation)
        rules = judge(self._sweep, candidates, winner, reruns)
        result = SweepResult(self._tracked.run_id, winner, rules)
        record_sweep(
            self._tracked, self._sweep, self._place, self._search, winner, rules, reruns
        )
        self._console.print(trials_table(self._search))
        self._console.print(rules_table(rules))
        verdict = "promotable" if result.promotable else "not promotable: the default stays"
        self._console.print(f"[bold]{verdict}[/bold]")
        show_next_steps(
            self._console, self._tracked.tracking_uri, self._tracked.experiment_id,
            self._tracked.run_id, self._place.folder, None,
        )
        return result

    def _confirm(self, candidates: list[Candidate]) -> Candidate | None:
        """Have the best run again on fresh seeds, there and at another width; return the winner."""
        confirm = self._sweep.config.confirm
        if confirm.top == 0 or len(candidates) == 1:
            return None
        tasks = tasks_at(self._sweep, candidates, PROXY)
        if confirm.second_width:
            tasks += tasks_at(self._sweep, candidates, SECOND_WIDTH)
        self._run_tasks(tasks, "reruns")
        winner = winner_of(candidates, measured(self._confirmation))
        if winner is not None and LEARNING_RATE in winner.values:
            self._run_tasks(
                [*tasks, *tasks_at(self._sweep, [winner], DOUBLE_RATE)], "at twice the rate"
            )
        return winner

    def _run_tasks(self, tasks: list[dict[str, object]], what: str) -> None:
        named = {self._confirmation.enqueue_task(task) for task in tasks}
        self._wait_for(what, len(named), lambda: [
            trial for trial in self._confirmation.trials if trial.user_attrs.get(TASK) in named
        ])

    def _wait_for(self, what: str, wanted: int, look: Callable[[], list[FrozenTrial]]) -> None:
        """Show trials as they end, until so many have; replace dead workers."""
        progress = SweepProgress(self._console, what, wanted, look)
        looked_seconds = time.monotonic()
        pause_seconds = min(LOOK_SECONDS, self._sweep.config.silence_seconds / LOOKS_IN_SILENCE)
        with progress:
            while not progress.update():
                if self._signals.requested is not None:
                    raise Interrupted(
                        f"interrupted by {self._signals.requested.name} with {progress.ended} of "
                        f"{wanted} {what}, kept; the same command goes on"
                    )
                if self._claim.lost:
                    self._claim.confirm()
                # Workers of other machines die unseen.
                due = time.monotonic() - looked_seconds > pause_seconds
                if self._workers.replace_dead() or due:
                    self._recover()
                    looked_seconds = time.monotonic()
                time.sleep(POLL_SECONDS)

    def _recover(self) -> None:
        """Put lost trials in line again, and end the runs that nobody continues."""
        self._claim.confirm()
        living, beginning = set(), set()
        for study in (self._search, self._confirmation):
            again = study.recover()
            if again:
                self._console.print(f"in line again, lost with their worker: {', '.join(again)}")
            unfinished = [t for t in study.trials if not t.state.is_finished()]
            living |= {str(t.user_attrs[RUN]) for t in unfinished if RUN in t.user_attrs}
            # A worker begins a run before it can say which.
            beginning |= {name_of(t) for t in unfinished if t.state is TrialState.RUNNING}
        end_orphans(self._tracked.run_id, living, beginning, ABANDONED)


def _track(config: PipelineConfig, search: SweepStudy, place: Place) -> TrackedRun:
    """Begin the sweep's run, or go on with it."""
    search.study.set_user_attr(FINISHED, False)
    run_id = search.study.user_attrs.get(PARENT_RUN)
    if run_id is not None:
        return TrackedRun.resume(run_id)
    experiment = joined_experiment_name() or config.training.experiment_name
    tracked = TrackedRun.begin(experiment, place.study)
    search.study.set_user_attr(PARENT_RUN, tracked.run_id)
    tracked.set_tags({
        **environment_tags(),
        "svend.sweep": place.study,
        "svend.scale": config.training.model_scale.value,
        "svend.recipe": config.training.data.recipe,
    })
    return tracked


def worker_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that starts a worker with the options that this process was given."""
    own = [word for word in arguments if word != "--json"]
    return [sys.executable, "-m", "svend", "sweep", *own, "--join"]
