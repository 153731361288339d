"""`svend sweep`: its options, and what is called. Imports nothing heavy before it has to."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence

from svend.errors import ConfigError, UserError
from svend.pipeline.groups import group_members
from svend.pipeline.sweep.options import load_sweep
from svend.ranks import require_alone

HELP = """\
any key of the configuration can be searched, and any be set for all trials:
  --search '{training.learning_rate: {low: 1e-4, high: 1e-2, log: true}}'
  --search '{training.optimizer: [adamw, muon], training.adam_beta2: null}'
  --sweep.sampler gp   --sweep.steps 500   --training.batch_size 16

examples:
  python -m svend sweep --scale tiny --trials 40 --workers 2
  python -m svend sweep --scale tiny --trials 40 --dry-run
  python -m svend sweep --storage postgresql://user@host/optuna --join
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are not the configuration's."""
    parser.add_argument("--sweep", default="default", metavar="NAME",
                        help=f"settings: {', '.join(group_members('sweep'))}")
    parser.add_argument("--search", metavar="YAML",
                        help="keys to add to the space, or null to take from it")
    parser.add_argument("--trials", metavar="N", help="short for --sweep.trials")
    parser.add_argument("--workers", metavar="N", help="short for --sweep.workers")
    parser.add_argument("--name", metavar="NAME", help="of the study; default: sweep-SCALE")
    parser.add_argument("--storage", metavar="URI", help="postgresql://..., mysql://... or a "
                        "journal file; default: a journal file in the sweep's folder")
    parser.add_argument("--dry-run", nargs="?", const="true", default="false",
                        metavar="true|false",
                        help="print the space, the budget and the expected time, and stop")
    parser.add_argument("--join", action="store_true",
                        help="be one more worker of a sweep that is being run, on any machine")
    # For the parent, which starts workers so.
    parser.add_argument("--number", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--parent-pid", type=int, default=None, help=argparse.SUPPRESS)


def run(
    known: argparse.Namespace, groups: Mapping[str, str], overrides: Sequence[tuple[str, str]],
    arguments: Sequence[str],
) -> None:
    """Run, show or join a sweep.

    arguments: the command line behind `sweep`, with which workers are started too. Raises
    UserError for what the user can mend, Interrupted after a signal.
    """
    require_alone("a sweep starts its workers itself, each trial in one process")
    if known.dry_run not in ("true", "false"):
        raise ConfigError(f"dry_run = {known.dry_run}: must be true or false")
    short = [(f"sweep.{name}", getattr(known, name)) for name in ("trials", "workers")
             if getattr(known, name) is not None]
    sweep = load_sweep(known.sweep, {"scale": "tiny", **groups}, [*overrides, *short],
                       known.search)
    print("starting: loading torch, optuna and mlflow", flush=True)
    from svend.pipeline.sweep.parent import place_of, run_sweep, show_dry_run, worker_command
    from svend.pipeline.sweep.worker import Worker, end_with_parent

    place = place_of(sweep, known.name, known.storage)
    if known.join:
        if known.parent_pid is not None:
            end_with_parent(known.parent_pid)
        number = os.getpid() if known.number is None else known.number
        Worker(sweep, place, number).run()
    elif known.dry_run == "true":
        show_dry_run(sweep, place)
    else:
        result = run_sweep(sweep, place, worker_command(arguments))
        if result.winner is None and sweep.config.confirm.top > 0:
            raise UserError(
                f"no result: no trial, or no rerun, came to its end; {place.folder} has the "
                "workers' logs, and the run's sweep/trials.csv the reasons"
            )
