"""`svend sync`: its options, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = """\
a run writes what it logs into its folder first, and tells the tracking store as it can. This sends
what a store that was down, or a process that was killed, left unsent; nothing is there twice.

examples:
  python -m svend sync checkpoints/svend
  python -m svend sync checkpoints
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `svend sync`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER",
                        help="of a run, or the checkpoint_dir that holds those of several")


def run(known: argparse.Namespace) -> None:
    """Send what is left, a line for each run."""
    print("starting: loading mlflow", flush=True)
    from svend.pipeline.sync import sync

    sync(known.folder)
