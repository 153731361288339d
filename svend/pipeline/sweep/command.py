"""`svend sweep`: its options, and what is called. Imports nothing heavy before it has to."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from svend.command import (
    Call,
    Command,
    Takes,
    add_switch,
    complete,
    is_on,
    tell_loading,
    tell_next,
)
from svend.errors import UserError
from svend.pipeline.groups import group_members
from svend.pipeline.sweep.options import Sweep, SweepConfig, load_sweep
from svend.ranks import require_alone

if TYPE_CHECKING:
    from svend.pipeline.sweep.parent import SweepResult
    from svend.pipeline.sweep.storage import Place


def _add_options(parser: argparse.ArgumentParser) -> None:
    complete(parser.add_argument(
        "--sweep", default="default", metavar="NAME",
        help=f"settings: {', '.join(group_members('sweep'))} (default: default)",
    ), group_members("sweep"))
    parser.add_argument("--search", metavar="YAML",
                        help="keys to add to the space, or null to take from it")
    parser.add_argument("--trials", metavar="N", help="short for --sweep.trials")
    parser.add_argument("--workers", metavar="N", help="short for --sweep.workers")
    parser.add_argument("--name", metavar="NAME", help="of the study (default: sweep-SCALE)")
    parser.add_argument("--storage", metavar="URI", help="postgresql://..., mysql://... or a "
                        "journal file (default: a journal file in the sweep's folder)")
    add_switch(parser, "--dry-run", "print the space, the budget and the expected time, and stop")
    parser.add_argument("--join", action="store_true",
                        help="be one more worker of a sweep that is being run, on any machine")
    # For the parent, which starts workers so.
    parser.add_argument("--number", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--parent-pid", type=int, default=None, help=argparse.SUPPRESS)


def _run(call: Call) -> int:
    options = call.options
    call.ends_joined_run = not options.join
    require_alone("a sweep starts its workers itself, each trial in one process")
    dry_run = is_on(options, "dry_run")
    short = [(f"sweep.{name}", getattr(options, name)) for name in ("trials", "workers")
             if getattr(options, name) is not None]
    sweep = load_sweep(options.sweep, {"scale": "tiny", **call.groups},
                       [*call.overrides, *short], options.search)
    tell_loading("torch, optuna and mlflow")
    from svend.pipeline.sweep.parent import place_of, run_sweep, show_dry_run, worker_command
    from svend.pipeline.sweep.worker import Worker, end_with_parent

    place = place_of(sweep, options.name, options.storage)
    if options.join:
        if options.parent_pid is not None:
            end_with_parent(options.parent_pid)
        number = os.getpid() if options.number is None else options.number
        Worker(sweep, place, number).run()
    elif dry_run:
        show_dry_run(sweep, place)
        call.answer = _plan_of(sweep, place)
        tell_next("sweep", call.words("--dry-run"))
    else:
        result = run_sweep(sweep, place, worker_command(call.arguments))
        call.answer = _result_of(result, place)
        if result.winner is None and sweep.config.confirm.top > 0:
            raise UserError(
                f"no result: no trial, or no rerun, came to its end; {place.folder} has the "
                "workers' logs, and the run's sweep/trials.csv the reasons"
            )
        if result.promotable:
            tell_next(f"plan --scale {_above(sweep.scale)} --hparams {place.study}")
        else:
            tell_next(f"compare {result.run_id}")
    return 0


def _above(scale: str) -> str:
    """Return the scale that a result is first carried to."""
    scales = group_members("scale")
    return scales[min(scales.index(scale) + 1, len(scales) - 1)]


def _plan_of(sweep: Sweep, place: Place) -> dict[str, Any]:
    return {
        "study": place.study, "storage": place.shown, "trials": sweep.wanted_trials,
        "steps_of_a_trial": sweep.config.steps, "workers": sweep.config.workers,
        "space": {dimension.key: dimension.describe() for dimension in sweep.space},
    }


def _result_of(result: SweepResult, place: Place) -> dict[str, Any]:
    winner = result.winner
    return {
        "study": place.study, "run_id": result.run_id, "folder": place.folder,
        "promotable": result.promotable,
        "winner": None if winner is None else {"name": winner.name, "values": winner.values},
        "rules": [asdict(rule) for rule in result.rules],
    }


SWEEP = Command(
    name="sweep",
    summary="search hyperparameters at small scale",
    description="Search hyperparameters at small scale: trials below one run, confirmed on fresh "
    "seeds. Stopped or killed, the same command goes on.",
    makes="a run with a run per trial below it, hparams.yaml, plots, a study in a folder",
    notes="""\
any key can be searched, and those of the sweep can be set too:
  --search '{training.learning_rate: {low: 1e-4, high: 1e-2, log: true}}'
  --search '{training.optimizer: [adamw, muon], training.adam_beta2: null}'
  --sweep.sampler gp   --sweep.steps 500
""",
    examples=(
        "svend sweep --sweep minute",
        "svend sweep --scale tiny --trials 40 --workers 2",
        "svend sweep --scale tiny --trials 40 --dry-run --json",
        "svend sweep --storage postgresql://user@host/optuna --join",
    ),
    answer="study, run_id, promotable, winner, rules; of --dry-run, the space and the budget",
    takes=Takes.GROUPS,
    sections={"sweep": SweepConfig},
    add_options=_add_options,
    run=_run,
)
