"""The parent of a sweep: the run that has workers run trials, confirms the result and reports."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from svend.device import describe_device, resolve_device, resolve_precision
from svend.errors import Interrupted, UserError
from svend.pipeline.config import PipelineConfig
from svend.pipeline.interruption import StopSignals
from svend.pipeline.report import format_seconds, make_console, show_next_steps
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
from svend.pipeline.sweep.options import Pruner, Sampler, Sweep
from svend.pipeline.sweep.report import record_sweep, rules_table, trials_table
from svend.pipeline.sweep.study import FINISHED, PARENT_RUN, RUN, Place, SweepStudy, origin_of
from svend.planning.plan import check_memory, plan_run
from svend.tracking.run import TrackedRun, end_orphans, environment_tags, joined_experiment_name

POLL_SECONDS = 0.5
# Deaths of workers, beyond one each, after which something other than bad luck is at work.
MAX_DEATHS = 10
GRACE_SECONDS = 60.0


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
    _show_plan(make_console(), sweep, place)


def run_sweep(sweep: Sweep, place: Place, worker_command: Sequence[str]) -> SweepResult:
    """Run a sweep to its end, or go on with it where it stopped.

    worker_command: starts a worker; `--number N` is appended. Raises UserError for what the user
    can mend, and Interrupted, with everything kept, after a signal.
    """
    console = make_console()
    config = sweep.trial_config({})
    place.folder.mkdir(parents=True, exist_ok=True)
    with _Lock(place.folder / ".lock"), StopSignals() as signals:
        with signals.deferred():
            search = SweepStudy.create(place, sweep)
            tracked = _track(config, search, place)
        status, reason = "FINISHED", None
        try:
            parent = _Parent(sweep, place, search, tracked, console, signals, worker_command)
            return parent.run()
        except UserError as error:
            status, reason = "FAILED", str(error)
            raise
        except Interrupted as interruption:
            status, reason = "KILLED", str(interruption)
            raise
        except BaseException as error:
            status, reason = "FAILED", f"{type(error).__name__}: {error}"
            raise
        finally:
            tracked.end(status, reason)


class _Parent:
    """What the parent works with, and the order of what it does."""

    def __init__(
        self, sweep: Sweep, place: Place, search: SweepStudy, tracked: TrackedRun,
        console: Console, signals: StopSignals, worker_command: Sequence[str],
    ) -> None:
        self._sweep = sweep
        self._place = place
        self._search = search
        self._confirmation = SweepStudy.confirmation_of(place)
        self._tracked = tracked
        self._console = console
        self._signals = signals
        self._workers = _Workers(worker_command, sweep.config.workers, place.folder)

    def run(self) -> SweepResult:
        _show_plan(self._console, self._sweep, self._place)
        self._recover()
        if self._sweep.config.sampler is Sampler.GRID:
            for values in self._sweep.grid_points():
                self._search.enqueue(values)
        with self._signals.deferred(), self._workers:
            self._wait_for(self._search, self._sweep.wanted_trials, "trials")
            candidates = choose_candidates(self._sweep, self._search)
            winner = self._confirm(candidates)
            self._search.study.set_user_attr(FINISHED, True)
        losses = measured(self._confirmation)
        rules = judge(self._sweep, candidates, winner, losses)
        result = SweepResult(self._tracked.run_id, winner, rules)
        record_sweep(
            self._tracked, self._sweep, self._place, self._search, candidates, winner, rules, losses
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
        for task in tasks:
            self._confirmation.enqueue_task(task)
        self._wait_for(self._confirmation, len(tasks), what)

    def _wait_for(self, study: SweepStudy, wanted: int, what: str) -> None:
        """Show the trials of a study as they end, until so many have; replace dead workers."""
        progress = _SweepProgress(self._console, study, wanted, what)
        with progress:
            while not progress.update():
                if self._signals.requested is not None:
                    raise Interrupted(
                        f"interrupted by {self._signals.requested.name} with {progress.ended} of "
                        f"{wanted} {what}, kept; the same command goes on"
                    )
                if self._workers.replace_dead():
                    self._recover()
                time.sleep(POLL_SECONDS)

    def _recover(self) -> None:
        """Put lost trials in line again, and end the runs that nobody continues."""
        living = set()
        for study in (self._search, self._confirmation):
            again = study.recover()
            if again:
                named = ", ".join(str(number) for number in again)
                self._console.print(f"in line again, lost with their worker: {named}")
            living |= {
                str(t.user_attrs[RUN]) for t in study.trials
                if RUN in t.user_attrs and not t.state.is_finished()
            }
        end_orphans(self._tracked.run_id, living, "its worker died before its first checkpoint")


class _Workers:
    """The worker processes of this machine, each with a log of its own."""

    def __init__(self, command: Sequence[str], count: int, folder: Path) -> None:
        self._command = command
        self._count = count
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._logs: list[IO[bytes]] = []
        self._deaths = 0

    def __enter__(self) -> _Workers:
        for number in range(self._count):
            self._start(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the workers, which see that the sweep is over; interrupt them if it failed."""
        if kind is not None:
            for process in self._processes.values():
                process.terminate()
        for process in self._processes.values():
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for log in self._logs:
            log.close()

    def replace_dead(self) -> bool:
        """Start a worker for each that has died; return whether one had.

        Raises UserError with a worker's last line if it gave up, or if too many died.
        """
        dead = [n for n, process in self._processes.items() if process.poll() is not None]
        for number in dead:
            code = self._processes[number].returncode
            self._deaths += 1
            if code > 0 or self._deaths > MAX_DEATHS:
                raise UserError(f"worker {number}: {self._last_line(number)}")
            self._start(number)
        return bool(dead)

    def _start(self, number: int) -> None:
        threads = max(1, (os.cpu_count() or 1) // self._count)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if torch.cuda.device_count() > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
        log = self._log(number).open("ab")
        self._logs.append(log)
        self._processes[number] = subprocess.Popen(
            [*self._command, "--number", str(number), "--parent-pid", str(os.getpid())],
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
        )

    def _log(self, number: int) -> Path:
        return self._folder / f"worker-{number}.log"

    def _last_line(self, number: int) -> str:
        lines = self._log(number).read_text(encoding="utf-8", errors="replace").split("\n")
        told = [line for line in lines if line.strip()]
        return (told[-1].removeprefix("error: ") if told else "died") + f" ({self._log(number)})"


class _SweepProgress:
    """A bar with the best so far; a plain line for each trial that ends elsewhere."""

    def __init__(self, console: Console, study: SweepStudy, wanted: int, what: str) -> None:
        self._console = console
        self._study = study
        self._wanted = wanted
        self.ended = 0
        self._bar = Progress(
            TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[best]}"), console=console, transient=True,
        )
        self._task = self._bar.add_task(what, total=wanted, best="")
        self._what = what

    def __enter__(self) -> _SweepProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def update(self) -> bool:
        """Show what has ended since; return whether all have."""
        ended = [t for t in self._study.trials if t.state.is_finished()]
        best = next(self._study.ended(), None)
        text = "" if best is None else f"best {best.value:.4f} (trial {origin_of(best)})"
        pruned = sum(t.state is TrialState.PRUNED for t in ended)
        failed = sum(t.state is TrialState.FAIL for t in ended)
        text += f"{', ' if text else ''}{pruned} stopped early" if pruned else ""
        text += f"{', ' if text else ''}{failed} failed" if failed else ""
        self._bar.update(self._task, completed=len(ended), best=text)
        if len(ended) != self.ended and not self._console.is_terminal:
            self._console.print(f"{self._what}: {len(ended)}/{self._wanted}  {text}")
        self.ended = len(ended)
        return self.ended >= self._wanted


class _Lock:
    """Keeps a second parent of the same sweep out, until this process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise UserError(
                f"{self._path.parent}: this sweep is being run by another process; wait for it, "
                "stop it, or add workers to it with --join"
            ) from None

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


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


def _show_plan(console: Console, sweep: Sweep, place: Place) -> None:
    """Print what the sweep will do and cost, before it does."""
    settings, config = sweep.config, sweep.trial_config({})
    model, training = config.model, config.training
    assert model is not None  # set by PipelineConfig.resolve
    table = Table(title=f"Sweep: {place.study}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    default = sweep.default_values()
    for dimension in sweep.space:
        table.add_row(dimension.key, f"{dimension.describe()} (now {default[dimension.key]})")
    table.add_row("proxy", f"{model.name}: width {model.hidden_size}, {model.num_hidden_layers} "
                           f"layers, {model.num_parameters():,} parameters")
    table.add_row("data", f"{training.data.recipe}: {', '.join(training.data.sources)}")
    device = resolve_device(training.device)
    training = replace(training, precision=resolve_precision(training.precision, device))
    plan = plan_run(
        training, model, settings.steps, check_memory(model, training, device), device, None
    )
    table.add_row("a trial", f"{settings.steps} steps of {plan.tokens_per_step:,} tokens, "
                             f"{format_seconds(plan.seconds)} on {describe_device(device)}")
    trials = sweep.wanted_trials
    share = _expected_share(sweep)
    table.add_row(
        "search", f"{trials} trials by {settings.sampler.value}, at most "
        f"{format_seconds(trials * plan.seconds)}; with pruner {settings.pruner.value} about "
        f"{format_seconds(trials * plan.seconds * share)}",
    )
    confirm = settings.confirm
    reruns = (confirm.top + 1) * confirm.seeds * (2 if confirm.second_width else 1)
    reruns += confirm.seeds if any(d.key == LEARNING_RATE for d in sweep.space) else 0
    reruns = reruns if confirm.top else 0
    table.add_row("confirmation", f"{reruns} reruns of the best {confirm.top} and the default, at "
                                  f"most {format_seconds(reruns * plan.seconds)}")
    table.add_row("workers", f"{settings.workers} here; more join with --join")
    table.add_row("kept in", f"{place.storage}")
    console.print(table)


def _expected_share(sweep: Sweep) -> float:
    """Return the share of all steps that halving leaves: a part of the trials at each rung."""
    settings = sweep.config
    if settings.pruner is not Pruner.HALVING:
        return 1.0
    rung = max(settings.report_steps, round(settings.prune_from * settings.steps))
    share, reached, left = 0.0, 0, 1.0
    while rung < settings.steps:
        share += left * (rung - reached) / settings.steps
        reached, rung, left = rung, rung * settings.reduction, left / settings.reduction
    return share + left * (settings.steps - reached) / settings.steps


def worker_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that starts a worker with the options that this process was given."""
    return [sys.executable, "-m", "svend", "sweep", *arguments, "--join"]
