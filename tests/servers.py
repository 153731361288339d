"""Throw-away servers for tests: PostgreSQL, and MLflow's tracking server on any database."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
START_SECONDS = 120


def find_postgres() -> Path:
    """Return the folder of PostgreSQL's programs; skip the test where there is none."""
    on_path = shutil.which("initdb")
    found = Path(on_path) if on_path else (BINARIES[-1] if BINARIES else None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (initdb is neither on PATH nor in "
                    "/usr/lib/postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    return found.resolve().parent


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run PostgreSQL in a folder; yield the address of its database, for SQLAlchemy.

    PostgreSQL does not run as root: there it is given to the user postgres or nobody.
    """
    programs, port = find_postgres(), free_port()
    data = folder / "postgres"
    data.mkdir(parents=True)
    prefix: list[str] = []
    if os.getuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in names else "nobody"
        shutil.chown(data, user)
        for parent in data.parents[:-2]:  # the folder of pytest is its user's alone
            parent.chmod(parent.stat().st_mode | 0o011)
        prefix = ["runuser", "-u", user, "--"]
    run = [*prefix, str(programs / "initdb"), "-D", str(data), "-U", "svend", "--auth=trust",
           "--no-sync"]
    subprocess.run(run, check=True, capture_output=True, cwd="/")
    server = subprocess.Popen(
        [*prefix, str(programs / "postgres"), "-D", str(data), "-p", str(port),
         "-h", "127.0.0.1", "-k", str(data)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
    )
    try:
        _wait_for_port(port, server)
        yield f"postgresql+psycopg://svend@127.0.0.1:{port}/postgres"
    finally:
        _stop(server, signal.SIGINT)


@contextmanager
def tracking_server(database: str, folder: Path, port: int | None = None) -> Iterator[str]:
    """Run MLflow's tracking server on a database; yield its address."""
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    environment.pop("PYTEST_CURRENT_TEST", None)  # with it MLflow's stores check themselves
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database,
             "--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1",
             "--port", str(port), "--workers", "2"],
            env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True,
        )
    try:
        _wait_for_health(f"http://127.0.0.1:{port}/health", server, folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(server, signal.SIGTERM)


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(10 * START_SECONDS):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "the server has ended"
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port}")


def _wait_for_health(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(5 * START_SECONDS):
        assert server.poll() is None, log.read_text(encoding="utf-8")[-2000:]
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text(encoding="utf-8")[-2000:])


def _stop(server: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """End a server with all of its processes."""
    if server.poll() is None:
        os.killpg(server.pid, how)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(20)
