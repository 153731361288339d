"""Sweeps of several machines that share nothing but a PostgreSQL and a tracking server."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from optuna.storages import RDBStorage

from svend.pipeline.sweep.storage import Place
from tests import test_sweep_claim, test_sweep_study
from tests.conftest import ROOT, Workplace
from tests.hosts import NETWORK, Host, require_hosts, two_hosts
from tests.postgres import PostgresServer, requires_postgres
from tests.servers import tracking_server
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


@dataclass(frozen=True)
class Booted(Machine):
    """A machine that is a host of its own; what is started there is all that runs on it."""

    host: Host | None = None

    def booting(self, command: list[str]) -> list[str]:
        assert self.host is not None
        return self.host.booting(command)

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        return super().start(self.booting(command), **environment)

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return super().run(self.booting(command))

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "PYTHONPATH": str(self.folder / "copy")}


@pytest.fixture
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture
def machines(postgres: PostgresServer, tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    storage = postgres.url("optuna", driver="postgresql")
    with tracking_server(postgres.url("mlflow"), tmp_path / "server", workers=1) as address:
        yield (
            Machine(tmp_path / "here", address, storage).set_up(),
            Machine(tmp_path / "there", address, storage).set_up(),
        )


@pytest.fixture
def networked_postgres() -> Iterator[PostgresServer]:
    require_hosts()
    with PostgresServer(NETWORK) as server:
        yield server


@pytest.fixture
def hosts(
    networked_postgres: PostgresServer, tmp_path: Path
) -> Iterator[tuple[Booted, Booted]]:
    storage = networked_postgres.url("optuna", driver="postgresql")
    with (
        two_hosts() as pair,
        tracking_server(networked_postgres.url("mlflow"), tmp_path / "server", host="0.0.0.0",
                        workers=1) as address,
    ):
        def machine_of(host: Host) -> Booted:
            own = [url.replace("127.0.0.1", host.gateway) for url in (address, storage)]
            machine = Booted(tmp_path / host.name, *own, host)
            machine.set_up()
            return machine

        here, there = map(machine_of, pair)
        yield here, there


def as_seen_from_outside(machine: Booted) -> Machine:
    """Return the machine as this process reaches its server."""
    assert machine.host is not None
    address = machine.server.replace(machine.host.gateway, "127.0.0.1")
    return Machine(machine.folder, address, machine.storage)


def check_study(postgres: PostgresServer) -> None:
    """Check that nothing is left that still runs or waits."""
    counts = postgres.query("SELECT state, count(*) FROM trials GROUP BY state", "optuna")
    assert {line.split("|")[0] for line in counts} <= {"COMPLETE", "PRUNED", "FAIL"}, counts


def share_a_sweep(here: Machine, there: Machine, disturb: Callable[[], None]) -> None:
    """Run a sweep whose parent is here; what joins from there is killed, and the rest disturbed."""
    parent = here.start(here.sweep("--workers", "1"))
    wait_for_checkpoint_of_trial(here, parent)

    second = there.run(there.sweep("--workers", "1"))
    assert second.returncode == 1, second.stdout
    last = second.stdout.splitlines()[-1]
    assert last.startswith("error: study sweep-tiny: is being run by here, process "), last

    joined = there.start(there.sweep("--join"))
    wait_for_checkpoint_of_trial(there, joined)
    joined.kill()
    joined.communicate()
    disturb()
    again = there.start(there.sweep("--join"))
    output = parent.communicate(timeout=300)[0]
    assert parent.returncode == 0, output
    assert "in line again, lost with their worker: " in output
    told = again.communicate(timeout=60)[0]
    assert again.returncode == 0, told


def test_a_worker_elsewhere_is_killed_and_the_database_restarts_and_nothing_is_lost(
    machines: tuple[Machine, Machine], postgres: PostgresServer
) -> None:
    def restart() -> None:
        postgres.stop()
        postgres.start()

    here, there = machines
    share_a_sweep(here, there, restart)
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


def test_a_host_dies_a_cable_is_pulled_and_nothing_is_lost(
    hosts: tuple[Booted, Booted], networked_postgres: PostgresServer
) -> None:
    here, there = hosts

    def pull_and_plug_in() -> None:
        assert here.host is not None
        here.host.cut()
        time.sleep(SILENCE_SECONDS / 2)
        here.host.mend()

    share_a_sweep(here, there, pull_and_plug_in)  # what is killed takes its host with it
    assert check_runs(as_seen_from_outside(here), trials=4).info.status == "FINISHED"
    check_study(networked_postgres)


def test_another_host_takes_over_when_that_of_the_parent_dies(
    hosts: tuple[Booted, Booted], networked_postgres: PostgresServer
) -> None:
    here, there = hosts
    parent = here.start(here.sweep("--workers", "1"))
    wait_for_checkpoint_of_trial(here, parent)
    parent.kill()  # with its worker, and nobody is left who could say so
    parent.communicate()
    successor = there.run(there.sweep("--workers", "1"))
    assert successor.returncode == 0, successor.stdout
    assert check_runs(as_seen_from_outside(there), trials=4).info.status == "FINISHED"
    check_study(networked_postgres)


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
