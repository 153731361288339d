"""The ledger: what two processes write at once, and what is read of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from svend.errors import TrackingError
from svend.tracking.ledger import NO_ENTRY, TEXT_CHARACTERS, Ledger, text_digest
from tests.registry import store


@pytest.fixture(scope="module", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with store(tmp_path_factory.mktemp("ledger")):
        yield


def test_of_two_entries_after_the_same_one_stays_and_the_other_is_told() -> None:
    ledger, other = Ledger.open("raced", "d"), Ledger.open("raced", "d")
    assert ledger.run_id == other.run_id
    seen = ledger.read()
    assert ledger.append({"by": "a"}, seen)
    assert not other.append({"by": "b"}, seen)
    assert other.append({"by": "b"}, other.read())
    entries = ledger.read().entries
    assert [(e.number, (e.content or {})["by"]) for e in entries] == [(1, "a"), (2, "b")]
    assert (entries[0].content or {})["previous"] == NO_ENTRY
    assert (entries[1].content or {})["previous"] == text_digest(entries[0].text)


def test_an_entry_that_arrived_before_the_connection_broke_is_recognised() -> None:
    ledger = Ledger.open("broken", "d")
    seen = ledger.read()
    assert ledger.append({"token": "x"}, seen)
    assert ledger.append({"token": "x"}, seen)
    assert len(ledger.read().entries) == 1


def test_processes_that_make_a_model_at_once_have_one_ledger() -> None:
    found: list[str] = []
    barrier = threading.Barrier(6)

    def make() -> None:
        barrier.wait()
        found.append(Ledger.open("new", "d").run_id)

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1


def test_long_texts_are_kept_whole() -> None:
    ledger = Ledger.open("long", "d")
    text = json.dumps(["x" * TEXT_CHARACTERS, "y" * TEXT_CHARACTERS, "z"])
    digest = ledger.keep(text)
    assert ledger.keep(text) == digest
    assert ledger.read().texts == {digest: text}


def test_an_entry_that_mlflow_would_cut_is_refused() -> None:
    ledger = Ledger.open("cut", "d")
    with pytest.raises(TrackingError, match="shorten the reason"):
        ledger.append({"reason": "x" * TEXT_CHARACTERS}, ledger.read())
    assert ledger.read().entries == []


def test_models_that_are_not_there_or_not_svends_are_told_apart() -> None:
    with pytest.raises(TrackingError, match="model nosuch: is not in the registry"):
        Ledger.find("nosuch")
    MlflowClient().create_registered_model("by-hand")
    assert Ledger.find("by-hand") is None
    with pytest.raises(TrackingError, match="made by something else than Svend"):
        Ledger.open("by-hand", "d")


def test_a_store_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with store(tmp_path):
        import mlflow

        mlflow.set_tracking_uri("http://127.0.0.1:9")
        with pytest.raises(TrackingError, match="check that it is up") as raised:
            Ledger.find("any")
    assert "\n" not in str(raised.value)
