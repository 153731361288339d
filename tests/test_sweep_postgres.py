"""Sweeps of several machines that share nothing but a PostgreSQL and a tracking server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from optuna.storages import RDBStorage

from svend.pipeline.sweep.storage import Place
from tests import test_sweep_claim, test_sweep_study
from tests.conftest import ROOT, Workplace
from tests.postgres import PostgresServer, requires_postgres
from tests.test_sweep import (
    check_runs,
    command,
    folder_of,
    wait_for_checkpoint_of_trial,
    workers_of,
)

pytestmark = [pytest.mark.slow, requires_postgres]
SILENCE_SECONDS = 6
# A process calls itself after its machine's host name; these machines are one.
NAMED_MACHINE = 'import os, socket\nsocket.gethostname = lambda: os.environ["TEST_MACHINE"]\n'


@dataclass(frozen=True)
class Machine(Workplace):
    """A workplace with a home, a working copy and a host name of its own."""

    server: str = ""
    storage: str = ""

    @property
    def tracking_uri(self) -> str:
        return self.server

    @property
    def environment(self) -> dict[str, str]:
        return {
            **super().environment, "HOME": str(self.folder), "TEST_MACHINE": self.folder.name,
            "PYTHONPATH": os.pathsep.join(map(str, (self.folder / "named", self.folder / "copy"))),
        }

    def set_up(self) -> Machine:
        for name in ("svend", "conf"):
            shutil.copytree(ROOT / name, self.folder / "copy" / name)
        (self.folder / "named").mkdir()
        (self.folder / "named" / "sitecustomize.py").write_text(NAMED_MACHINE)
        return self

    def sweep(self, *options: str) -> list[str]:
        return command(
            self, "--storage", self.storage, "--trials", "4", *options,
            sweep__silence_seconds=str(SILENCE_SECONDS),
        )


@pytest.fixture
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture
def machines(postgres: PostgresServer, tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", tmp_path / "server.log"
    storage = postgres.url("optuna", driver="postgresql")
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port),
             "--backend-store-uri", postgres.url("mlflow"),
             "--artifacts-destination", str(tmp_path / "artifacts")],
            cwd=tmp_path, stdout=stream, stderr=stream, start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    try:
        wait_until(lambda: is_healthy(address), log)
        yield (
            Machine(tmp_path / "here", address, storage).set_up(),
            Machine(tmp_path / "there", address, storage).set_up(),
        )
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_until(holds: Callable[[], bool], log: Path) -> None:
    deadline_seconds = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline_seconds, log.read_text()
        time.sleep(0.2)


def check_study(postgres: PostgresServer) -> None:
    """Check that nothing is left that still runs or waits."""
    counts = postgres.query("SELECT state, count(*) FROM trials GROUP BY state", "optuna")
    assert {line.split("|")[0] for line in counts} <= {"COMPLETE", "PRUNED", "FAIL"}, counts


def test_a_worker_elsewhere_is_killed_and_the_database_restarts_and_nothing_is_lost(
    machines: tuple[Machine, Machine], postgres: PostgresServer
) -> None:
    here, there = machines
    parent = here.start(here.sweep("--workers", "1"))
    wait_for_checkpoint_of_trial(here, parent)

    second = there.run(there.sweep("--workers", "1"))
    assert second.returncode == 1, second.stdout
    last = second.stdout.splitlines()[-1]
    assert last.startswith("error: study sweep-tiny: is being run by here, process ")

    joined = there.start(there.sweep("--join"))
    wait_for_checkpoint_of_trial(there, joined)
    os.kill(joined.pid, signal.SIGKILL)
    joined.communicate()
    postgres.stop()
    postgres.start()
    again = there.start(there.sweep("--join"))
    output = parent.communicate(timeout=300)[0]
    assert parent.returncode == 0, output
    assert "in line again, lost with their worker: " in output
    told = again.communicate(timeout=60)[0]
    assert again.returncode == 0, told
    assert check_runs(here, trials=4).info.status == "FINISHED"
    check_study(postgres)


def test_a_parent_elsewhere_takes_over_from_one_that_was_killed(
    machines: tuple[Machine, Machine], postgres: PostgresServer
) -> None:
    here, there = machines
    parent = here.start(here.sweep("--workers", "1"))
    wait_for_checkpoint_of_trial(here, parent)
    workers = workers_of(parent)
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    # Its trial, which the worker released when it saw its parent gone, has a checkpoint there only.
    successor = there.run(there.sweep("--workers", "1"))
    assert successor.returncode == 0, successor.stdout
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert check_runs(there, trials=4).info.status == "FINISHED"
    assert folder_of(there).exists()
    check_study(postgres)


def test_racing_workers_and_parents_are_kept_apart_by_the_database(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[RDBStorage] = []
    really_open = Place.open

    def open_and_keep(place: Place) -> RDBStorage:
        storage = really_open(place)
        assert isinstance(storage, RDBStorage)
        opened.append(storage)
        return storage

    monkeypatch.setattr(Place, "open", open_and_keep)
    place = Place("s", postgres.url("races"), tmp_path)
    test_sweep_study.test_racing_workers_run_each_trial_once_and_no_more_than_wanted(place)
    for _ in range(3):
        test_sweep_claim.test_one_of_many_at_once_becomes_the_parent(place)
    test_sweep_claim.test_a_parent_that_was_killed_is_succeeded_at_once_on_its_machine(place)
    for storage in opened:
        storage.engine.dispose()
