"""Which runs are compared: those named, and the rungs of ladders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from svend.errors import ConfigError, TrackingError
from svend.pipeline.tags import LADDER_NAME_TAG, STRESS_TAG
from svend.tracking.history import (
    LoggedRun,
    find_run,
    newest_run_with_tag,
    runs_below,
    runs_of_experiment,
)
from svend.tracking.runs import newest_run

COMPARISON = "svend.comparison"  # the tag of a comparison's own run, with what it compares
LOSSES = ("train/loss", "eval/heldout_loss")


@dataclass(frozen=True)
class Wanted:
    """What was asked for: ids of runs, names or ids of ladders, an experiment."""

    runs: Sequence[str] = ()
    ladders: Sequence[str] = ()
    experiment: str | None = None


@dataclass(frozen=True)
class Chosen:
    """The runs to compare, and a line for each that is left out."""

    runs: list[LoggedRun]
    left_out: list[str]


def choose_runs(wanted: Wanted) -> Chosen:
    """Find the runs. Raises UserError where one is unknown or none has logged a loss."""
    runs: dict[str, LoggedRun] = {}
    left_out: list[str] = []
    for text in wanted.runs:
        _add(runs, _named_run(text, left_out))
    for text in wanted.ladders:
        _add(runs, _rungs(_ladder(text), left_out))
    if wanted.experiment is not None:
        _add(runs, _runs_of(wanted.experiment, left_out))
    if not (wanted.runs or wanted.ladders or wanted.experiment):
        newest = newest_run_with_tag(LADDER_NAME_TAG)
        if newest is None:
            raise ConfigError(
                "nothing to compare: the tracking store has no ladder; give runs by their ids, or "
                "--experiment NAME"
            )
        _add(runs, _rungs(newest, left_out))
    return Chosen(list(runs.values()), left_out)


def has_loss(run: LoggedRun) -> bool:
    """Return whether a run has logged a loss."""
    return any(key in run.metrics for key in LOSSES)


def _add(runs: dict[str, LoggedRun], more: Sequence[LoggedRun]) -> None:
    for run in more:
        runs.setdefault(run.run_id, run)


def _named_run(text: str, left_out: list[str]) -> list[LoggedRun]:
    run = find_run(text)
    if has_loss(run):
        return [run]
    if LADDER_NAME_TAG in run.tags:
        return _rungs(run, left_out)
    below = [other for other in runs_below(run.run_id) if has_loss(other)]
    if not below:
        raise TrackingError(
            f"run {text} ({run.name}, {run.status}): has logged no loss, and no run below it has; "
            "give one that has trained"
        )
    return below


def _ladder(text: str) -> LoggedRun:
    """Return the newest run of the ladder with a name, else the run with an id."""
    newest = newest_run({LADDER_NAME_TAG: text})
    if newest is not None:
        return find_run(newest)
    try:
        run = find_run(text)
    except TrackingError:
        raise TrackingError(
            f"ladder {text}: no ladder of the tracking store has this name, nor a run this id"
        ) from None
    if LADDER_NAME_TAG not in run.tags:
        raise TrackingError(f"ladder {text}: the run {run.name} is not a ladder's; give it as RUN")
    return run


def _rungs(ladder: LoggedRun, left_out: list[str]) -> list[LoggedRun]:
    """Return the newest attempt of each rung that has logged a loss."""
    attempts: dict[tuple[str, str], list[LoggedRun]] = {}
    for run in runs_below(ladder.run_id):
        if has_loss(run) and STRESS_TAG not in run.tags:
            of = (run.tags.get("svend.scale", ""), run.params.get("config.model.name", run.name))
            attempts.setdefault(of, []).append(run)
    if not attempts:
        raise TrackingError(
            f"ladder {ladder.tags[LADDER_NAME_TAG]} (run {ladder.run_id}): no run below it has "
            "logged a loss; wait for its first rung, or give other runs"
        )
    left_out += [
        f"{run.name} ({run.run_id[:8]}): an earlier attempt of a rung"
        for of_rung in attempts.values() for run in of_rung[:-1]
    ]
    return [of_rung[-1] for of_rung in attempts.values()]


def _runs_of(experiment: str, left_out: list[str]) -> list[LoggedRun]:
    found = [run for run in runs_of_experiment(experiment) if COMPARISON not in run.tags]
    with_loss = [run for run in found if has_loss(run)]
    if not with_loss:
        raise TrackingError(f"experiment {experiment}: none of its {len(found)} runs has logged a "
                            "loss; give an experiment with runs that have trained")
    if len(with_loss) < len(found):
        left_out.append(f"of {experiment}, what logged no loss: {len(found) - len(with_loss)} of "
                        f"{len(found)} runs")
    return with_loss[::-1]
