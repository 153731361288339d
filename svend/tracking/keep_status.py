"""Keeps the status with which a run ended, where `mlflow run` is about to overwrite it.

MLflow compares a run's status, a string, with numbers, and so never sees that the run it started
has ended itself: an interrupted run that is KILLED becomes FAILED when `mlflow run` exits
(mlflow.projects._maybe_set_run_terminated, MLflow 3.17). A process of its own outlives both and
sets it right.
"""

from __future__ import annotations

import subprocess
import sys
import time

from mlflow import MlflowClient

WAIT_SECONDS = 30.0
POLL_SECONDS = 0.2


def keep_status(run_id: str, status: str) -> None:
    """Start a process that puts the status back once, when it is overwritten."""
    subprocess.Popen(
        [sys.executable, "-m", "svend.tracking.keep_status", run_id, status],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _wait_and_restore(run_id: str, status: str) -> None:
    client = MlflowClient()
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        now = client.get_run(run_id).info.status
        if now == "RUNNING":
            return  # resumed in the meantime
        if now != status:
            client.set_terminated(run_id, status)
            return
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    _wait_and_restore(sys.argv[1], sys.argv[2])
