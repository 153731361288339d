"""`svend sync`: tell tracking stores what they missed, being down, or their runs being killed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from svend.errors import UserError
from svend.pipeline.console import make_console, say
from svend.pipeline.progress import CountProgress
from svend.pipeline.run_folder import RUN_FILE, RunFolder
from svend.tracking.spool import Spool, send_rest


@dataclass(frozen=True)
class Sent:
    """What was left of a run, and where it went."""

    folder: Path
    run_id: str
    tracking_uri: str
    entries_sent: int


def sync(place: Path) -> list[Sent]:
    """Send what is left of the runs in a folder, or of the one whose folder it is.

    Raises UserError if there is no run, one is being trained, or the store does not take it.
    """
    console = make_console()
    paths = [place] if (place / RUN_FILE).is_file() else sorted(
        path.parent for path in place.glob(f"*/{RUN_FILE}")
    )
    if not paths:
        raise UserError(f"{place}: no run's folder, nor one that holds some; give checkpoint_dir")
    return [_sync_run(RunFolder.open(path), console) for path in paths]


def _sync_run(folder: RunFolder, console: Console) -> Sent:
    folder.hold()
    try:
        spool = Spool.open(folder.spool_path)
        if "MLFLOW_TRACKING_URI" in os.environ:
            # The store may have moved since.
            uri = os.environ["MLFLOW_TRACKING_URI"]
            spool.address = replace(spool.address, tracking_uri=uri)
        with CountProgress(console, "bytes sent") as progress:
            count = send_rest(
                spool, lambda line: say(console, line),
                lambda sent, total: progress.advance(folder.path.name, sent, total),
            )
    finally:
        folder.release()
    told = f"{count} entries sent" if count else "nothing was left to send"
    say(console, f"{folder.path}: {told}, run {spool.address.run_id} in "
                 f"{spool.address.tracking_uri}")
    return Sent(folder.path, spool.address.run_id, spool.address.tracking_uri, count)

