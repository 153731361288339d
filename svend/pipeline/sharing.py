"""A command that several processes share: who starts them, who leads, and who follows."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from svend.command import Call
from svend.errors import RankLost, UserError, one_line
from svend.pipeline.config import PipelineConfig
from svend.pipeline.launcher import launch, read_processes
from svend.ranks import find_place


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how many processes there are to be."""
    parser.add_argument(
        "--nproc", default="1", metavar="N",
        help="processes on this machine, one per GPU, that share each step (default: 1); under "
             "torchrun or srun, which start them, leave it out",
    )


def share(call: Call, read_config: Callable[[], PipelineConfig], *, once: bool) -> int | None:
    """Start the processes of a command, or do the share of one that is not the first.

    None for a process that is to run the command: alone, or as the first. once: whether there is
    one run to follow, or as many as the first leads.
    """
    place, processes = find_place(), read_processes(call.options.nproc)
    if place.size > 1:
        # Read where torch is imported: what it would say over many lines is said in one.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if place.leads and (place.size > 1 or processes == 1):
        return None
    # Here, what does not fit is said once, and at once.
    config = read_config()
    if place.size == 1:
        return launch(processes, [call.options.top, *call.arguments], config.grace_seconds)
    from svend.pipeline.runner import follow_runs

    try:
        follow_runs(config, once=once)
    except RankLost:
        return 1  # the first has died, or has said which one did
    except Exception as error:  # noqa: BLE001 - told in one line: the first says what comes of it
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        print(f"error: rank {place.rank}: {kind}{one_line(error)}", file=sys.stderr, flush=True)
        return 1
    return 0
