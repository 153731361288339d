"""`svend sync`: tell tracking stores what they missed, being down, or their runs being killed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from svend.errors import UserError
from svend.pipeline.report import make_console, say
from svend.pipeline.run_folder import RUN_FILE, RunFolder
from svend.tracking.spool import Spool, send_rest


def sync(place: Path) -> int:
    """Send what is left of the runs in a folder, or of the one whose folder it is; return how much.

    Raises UserError if there is no run, one is being trained, or the store does not take it.
    """
    console = make_console()
    paths = [place] if (place / RUN_FILE).is_file() else sorted(
        path.parent for path in place.glob(f"*/{RUN_FILE}")
    )
    if not paths:
        raise UserError(f"{place}: no run's folder, nor one that holds some; give checkpoint_dir")
    return sum(_sync_run(RunFolder.open(path), console) for path in paths)


def _sync_run(folder: RunFolder, console: Console) -> int:
    folder.hold()
    try:
        spool = Spool.open(folder.spool_path)
        if "MLFLOW_TRACKING_URI" in os.environ:
            # The store may have moved since.
            uri = os.environ["MLFLOW_TRACKING_URI"]
            spool.address = replace(spool.address, tracking_uri=uri)
        progress = Progress(
            TextColumn(folder.path.name), BarColumn(), TimeRemainingColumn(), console=console,
            transient=True,
        )
        with progress:
            task = progress.add_task("")
            count = send_rest(
                spool, lambda line: say(console, line),
                lambda sent, total: progress.update(task, completed=sent, total=total),
            )
    finally:
        folder.release()
    told = f"{count} entries sent" if count else "nothing was left to send"
    say(console, f"{folder.path}: {told}, run {spool.address.run_id} in "
                 f"{spool.address.tracking_uri}")
    return count
