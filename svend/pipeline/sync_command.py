"""`svend sync`: what runs could not tell their tracking store."""

from __future__ import annotations

import argparse
from pathlib import Path

from svend.command import Call, Command, tell_loading, tell_next

MOST_NAMED = 5


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER",
                        help="of a run, or the checkpoint_dir that holds those of several")


def _run(call: Call) -> int:
    tell_loading("mlflow")
    from svend.pipeline.sync import sync

    sent = sync(call.options.folder)
    call.answer = {"runs": sent}
    tell_next("compare", *(run.run_id for run in sent if len(sent) <= MOST_NAMED))
    return 0


SYNC = Command(
    name="sync",
    summary="tell the tracking store what it missed",
    description="Send the tracking store what runs could not, for it was down or they were killed. "
    "A run writes what it logs into its folder first; nothing is there twice.",
    makes="entries in the tracking store",
    examples=("svend sync checkpoints", "svend sync checkpoints/svend"),
    answer="runs, each with its folder, run_id, tracking_uri and entries_sent",
    add_options=_add_options,
    run=_run,
)
