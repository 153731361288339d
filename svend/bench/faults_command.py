"""`svend bench faults`: ladders with planted faults, and healthy ones, each in its own process."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from svend.command import Call, Command, complete, tell
from svend.errors import ConfigError, UserError
from svend.pipeline.groups import group_members

PLANTED = ("none", "rate", "labels", "frozen", "leak", "warm-up")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="faults", metavar="FOLDER",
                        help="of results and runs (default: faults)")
    complete(parser.add_argument("--ladder", default="miniature", metavar="NAME",
                                 help="the ladder to climb (default: miniature)"),
             group_members("ladder"))
    parser.add_argument("--healthy", default="10", metavar="N",
                        help="ladders without a fault (default: 10)")
    complete(parser.add_argument(
        "--faulty-end", default="medium", metavar="SCALE",
        help="the rung with the fault, the last of its ladder (default: medium)",
    ), group_members("scale"))
    parser.add_argument("--jobs", default="1", metavar="N", help="ladders at a time (default: 1)")
    complete(parser.add_argument(
        "--only", action="append", default=[], metavar="FAULT",
        help=f"{', '.join(PLANTED)}; may be repeated (default: all)",
    ), PLANTED)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="a setting of every ladder; may be repeated")
    parser.add_argument("--case", metavar="FAULT:SEED", help=argparse.SUPPRESS)


def _run(call: Call) -> int:
    """Climb every ladder that has no result yet, print what was caught, and return the exit code.

    1 where a fault was not caught or a healthy ladder was stopped.
    """
    known = call.options
    folder = Path(known.out).expanduser().resolve()
    if known.case is not None:
        _run_case(known, folder)
        return 0
    healthy, jobs = _count("healthy", known.healthy, 0), _count("jobs", known.jobs, 1)
    from svend.bench.faults import read_outcomes

    cases = [("none", seed) for seed in range(healthy)] + [(fault, 0) for fault in PLANTED[1:]]
    if known.only:
        unknown = set(known.only) - {*PLANTED}
        if unknown:
            raise ConfigError(f"only = {min(unknown)}: must be one of {', '.join(PLANTED)}")
        cases = [case for case in cases if case[0] in known.only]
    done = {(outcome.fault, outcome.seed) for outcome in read_outcomes(folder)}
    left = [case for case in cases if case not in done]
    tell(f"climbing {len(left)} ladders, {jobs} at a time; {len(cases) - len(left)} have a result "
         f"in {folder}")
    _run_all(left, known, folder, jobs)
    outcomes = [o for o in read_outcomes(folder) if (o.fault, o.seed) in cases]
    from svend.bench.faults_report import is_as_it_should, show_outcomes

    show_outcomes(outcomes)
    if len(outcomes) < len(cases):
        raise UserError(f"{len(cases) - len(outcomes)} ladders left no result; {folder} has a log "
                        "of each")
    tell(f"wrote {folder}")
    return 0 if all(map(is_as_it_should, outcomes)) else 1


def _run_all(
    cases: Sequence[tuple[str, int]], known: argparse.Namespace, folder: Path, jobs: int
) -> None:
    """Run each case in a process of its own, so many at a time, with its share of the cores."""
    waiting, running = list(cases), dict[str, subprocess.Popen[bytes]]()
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        while waiting and len(running) < jobs:
            fault, seed = waiting.pop(0)
            name = f"{fault}-{seed}"
            store = f"sqlite:///{folder / 'stores' / name}.db"
            (folder / "stores").mkdir(exist_ok=True)
            command = [
                sys.executable, "-m", "svend", "bench", "faults", "--out", str(folder), "--ladder",
                known.ladder, "--faulty-end", known.faulty_end, "--case", f"{fault}:{seed}",
                *(word for text in known.set for word in ("--set", text)),
            ]
            with (logs / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": threads, "MLFLOW_TRACKING_URI": store},
                )
            tell(f"{name}: begun")
        for name, process in list(running.items()):
            if process.poll() is not None:
                tell(f"{name}: ended ({process.returncode}); {len(waiting)} wait")
                del running[name]
        time.sleep(0.5)


def _run_case(known: argparse.Namespace, folder: Path) -> None:
    from svend.bench.faults import climb_with, write_outcome
    from svend.pipeline.ladder.options import load_ladder

    fault, _, seed = known.case.partition(":")
    settings = [tuple(text.split("=", 1)) for text in known.set]
    settings += [
        ("checkpoint_dir", str(folder / "checkpoints")),
        ("training.seed", seed), ("training.data.seed", "0"),
    ]
    if fault != "none":
        settings.append(("ladder.end", known.faulty_end))
    ladder = load_ladder(known.ladder, {}, [(key, value) for key, value in settings])
    write_outcome(folder, climb_with(ladder, fault, int(seed)))


def _count(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name} = {text}: must be a number, at least {least}")
    return int(text)


FAULTS = Command(
    name="faults",
    summary="ladders with planted faults, and healthy ones",
    description="Climb small ladders, healthy and with a planted fault, each in a process of its "
    "own; say which are stopped. The exit code is 1 where a fault was not caught or a healthy "
    "ladder was stopped.",
    makes="a table; a folder with a result, a log and the runs of each ladder",
    examples=(
        "svend bench faults --out faults --only rate --only frozen",
        "svend bench faults --out faults --healthy 10 --jobs 2",
    ),
    add_options=_add_options,
    run=_run,
)
