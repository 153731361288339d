"""A throw-away tracking server for tests, on any database."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 120


@contextmanager
def tracking_server(
    database: str, folder: Path, port: int | None = None, host: str = "127.0.0.1",
    workers: int = 2,
) -> Iterator[str]:
    """Run MLflow's tracking server on a database; yield its address on this machine.

    host: where it listens. workers: its processes.
    """
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    environment.pop("PYTEST_CURRENT_TEST", None)  # with it MLflow's stores check themselves
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database,
             "--artifacts-destination", str(folder / "artifacts"), "--host", host,
             "--port", str(port), "--workers", str(workers)],
            env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True,
        )
    try:
        wait_for_health(f"http://127.0.0.1:{port}/health", server, folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(server, signal.SIGTERM)


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_health(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Return when a server says that it is well; `log` is shown where it does not come to that."""
    for _ in range(5 * START_SECONDS):
        assert server.poll() is None, log.read_text(encoding="utf-8")[-2000:]
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text(encoding="utf-8")[-2000:])


def stop(server: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """End a server with all of its processes."""
    if server.poll() is None:
        os.killpg(server.pid, how)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(20)
