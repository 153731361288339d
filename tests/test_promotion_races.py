"""Processes that promote at once: one wins each race, the others are told, no record is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from svend.errors import TrackingError, UserError
from svend.pipeline import moves as moves_module
from svend.pipeline.moves import LEVELS, MoveKind
from svend.pipeline.promotion.audit import audit_model
from svend.pipeline.validation import GateLevel
from svend.tracking.registry import aliases_of
from tests.postgres import PostgresServer
from tests.registry import GATES, MODEL, history, make_version, promote, store
from tests.servers import tracking_server

FULL = GateLevel.FULL
Spawned = multiprocessing.get_context("spawn")


def _race(uri: str, racer: int, rounds: int, barrier: Barrier, told: Any) -> None:
    """Promote a version to FULL again and again, each time at once with the other process.

    Of three versions each takes one of the two that do not hold the level.
    """
    mlflow.set_tracking_uri(uri)
    for _ in range(rounds):
        barrier.wait(300)
        holder = history().holder(FULL)
        version = [v for v in ("1", "2", "3") if holder is None or v != holder.version][racer]
        barrier.wait(300)
        try:
            made = promote(FULL, version)
            told.put((version, "won" if made else "had it", ""))
        except UserError as error:
            told.put((version, "lost", str(error)))


def _watch(uri: str, over: Event, seen: Any) -> None:
    """Look at the alias all the time: whom it names must have a passing verdict on record."""
    mlflow.set_tracking_uri(uri)
    looks = 0
    while not over.is_set():
        version = aliases_of(MODEL).get("full")
        if version is not None and history().passed(version, FULL) is None:
            seen.put((looks, f"version {version} was full without a verdict"))
            return
        looks += 1
    seen.put((looks, ""))


@pytest.fixture
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store with three versions that have passed STANDARD: on SQLite, or behind a server."""
    with ExitStack() as stack:
        address = stack.enter_context(store(tmp_path))
        if request.param == "postgres":
            database = stack.enter_context(PostgresServer())
            address = stack.enter_context(
                tracking_server(database.url("mlflow"), tmp_path / "server")
            )
            mlflow.set_tracking_uri(address)
        for number in (1, 2, 3):
            make_version(tmp_path / "made", number)
            promote(GateLevel.STANDARD, str(number))
        yield address


@pytest.mark.parametrize(("uri", "rounds"), [
    pytest.param("sqlite", 4, marks=pytest.mark.slow),
    pytest.param("sqlite", 200, marks=pytest.mark.slow),
    pytest.param("postgres", 200, marks=pytest.mark.slow),
], indirect=["uri"])
def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(uri: str, rounds: int) -> None:
    barrier, told, seen, over = (
        Spawned.Barrier(2), Spawned.Queue(), Spawned.Queue(), Spawned.Event()
    )
    racers = [Spawned.Process(target=_race, args=(uri, racer, rounds, barrier, told))
              for racer in (0, 1)]
    watcher = Spawned.Process(target=_watch, args=(uri, over, seen))
    started_seconds = time.monotonic()
    for process in (*racers, watcher):
        process.start()
    results = [told.get(timeout=600) for _ in range(2 * rounds)]
    seconds = time.monotonic() - started_seconds
    over.set()
    looks, complaint = seen.get(timeout=60)
    for process in (*racers, watcher):
        process.join(60)
        assert process.exitcode == 0
    counts = Counter(outcome for _, outcome, _ in results)
    place = uri.split(":", maxsplit=1)[0]
    print(f"{rounds} races on {place}: {dict(counts)}, {looks} looks, {seconds:.0f} s")
    assert complaint == ""
    # Who was overtaken is told by whom. Where both won, one came after the other.
    lines = [line for _, outcome, line in results if outcome == "lost"]
    assert [line for line in lines if "meanwhile" not in line] == []
    assert counts["won"] >= rounds
    assert counts["won"] + counts["lost"] == 2 * rounds
    moves = [move for move in history().moves if move.level is FULL]
    assert sum(move.kind is MoveKind.PROMOTED for move in moves) == counts["won"]
    assert audit_model(MODEL, GATES) == []
    holder = history().holder(FULL)
    assert holder is not None
    assert aliases_of(MODEL)["full"] == holder.version


def _kill_the_server(pid: int) -> Any:
    original = moves_module.set_alias

    def kill_and_go_on(name: str, alias: str, version: str) -> None:
        os.killpg(pid, signal.SIGKILL)
        original(name, alias, version)

    return kill_and_go_on


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_leaves_nothing_half_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    database = f"sqlite:///{tmp_path / 'server.db'}"
    with store(tmp_path):
        with tracking_server(database, tmp_path / "server") as address:
            mlflow.set_tracking_uri(address)
            made = make_version(tmp_path / "made", 1)
            port = int(address.rsplit(":", 1)[1])
            pid = _listening_process(port)
            monkeypatch.setattr(moves_module, "set_alias", _kill_the_server(pid))
            with pytest.raises((TrackingError, mlflow.exceptions.MlflowException)):
                promote(GateLevel.QUICK, made.version)
            monkeypatch.undo()
        with tracking_server(database, tmp_path / "server", port):
            assert MlflowClient().get_registered_model(MODEL).aliases == {}
            assert [f.kind for f in audit_model(MODEL, GATES)] == ["half-moved"]
            promote(GateLevel.QUICK, made.version)
            assert aliases_of(MODEL) == {"quick": "1"}
            assert audit_model(MODEL, GATES) == []
            promoted = [m for m in history().moves if m.kind is MoveKind.PROMOTED]
            assert [m.level for m in promoted] == [LEVELS[0]]


def _listening_process(port: int) -> int:
    """Return the leader of the group of processes that a server on a port is."""
    import psutil

    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr.port == port and connection.pid and (
            connection.status == psutil.CONN_LISTEN
        ):
            return os.getpgid(connection.pid)
    raise AssertionError(f"nothing listens on {port}")
