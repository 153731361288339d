"""The audit: each kind of thing that may be wrong with a registry is planted, and named."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from svend.pipeline.console import make_console
from svend.pipeline.moves import MoveKind, Moves
from svend.pipeline.promotion import climb
from svend.pipeline.promotion.audit import audit_model, repair_aliases
from svend.pipeline.validation import GateLevel
from svend.tracking.registry import aliases_of
from tests.registry import GATES, GOOD, MadeVersion, history, make_version, promote, store

FULL = GateLevel.FULL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("audit")
    with store(place):
        yield place


@pytest.fixture(scope="module")
def kept(folder: Path) -> Iterator[tuple[MadeVersion, sqlite3.Connection, dict[str, bytes]]]:
    """A version that is full, by a record that is whole, with copies of its store and files."""
    made = make_version(folder, 1, model="a-whole")
    promote(FULL, made.version, model=made.model)
    assert audit_model(made.model, GATES) == []
    with closing(sqlite3.connect(":memory:")) as copy:
        with _database() as database:
            database.backup(copy)
        yield made, copy, {path.name: path.read_bytes() for path in made.folder.iterdir()}


@pytest.fixture
def made(kept: tuple[MadeVersion, sqlite3.Connection, dict[str, bytes]]) -> MadeVersion:
    """That version, as if no other test had been."""
    made, copy, files = kept
    with _database() as database:
        copy.backup(database)
    for name, content in files.items():
        (made.folder / name).write_bytes(content)
    return made


def _database() -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(mlflow.get_tracking_uri().removeprefix("sqlite:///")))


def _sql(statement: str, *values: str) -> None:
    """Change the store behind MLflow's back; exactly one row must be hit."""
    with _database() as database, database:
        assert database.execute(statement, values).rowcount == 1


def _kinds(model: str) -> list[tuple[str, str | None]]:
    return [(finding.kind, finding.level) for finding in audit_model(model, GATES)]


def _change_entry(model: str) -> None:
    ledger_run_id = Moves.find(model).ledger_run_id
    entry = history(model).record.entries[2]
    changed = json.dumps({**(entry.content or {}), "by": "someone else"}, sort_keys=True)
    _sql("update params set value = ? where run_uuid = ? and key = 'entry.000003'", changed,
         ledger_run_id)


def _drop_entry(model: str) -> None:
    _sql("delete from params where run_uuid = ? and key = 'entry.000003'",
         Moves.find(model).ledger_run_id)


def _garble_entry(model: str) -> None:
    _sql("update params set value = '{' where run_uuid = ? and key = 'entry.000004'",
         Moves.find(model).ledger_run_id)


def _change_verdict(model: str) -> None:
    digest = history(model).moves[-1].verdict
    assert digest is not None
    text = history(model).record.texts[digest]
    _sql("update params set value = ? where key = ? and run_uuid = ?",
         text.replace('"value": 7.4', '"value": 1.4'), f"text.{digest}.000",
         Moves.find(model).ledger_run_id)


def _drop_done(model: str) -> None:
    _sql("delete from params where run_uuid = ? and key = 'done.000004'",
         Moves.find(model).ledger_run_id)


def _move_alias(model: str) -> None:
    MlflowClient().set_registered_model_alias(model, "production", "1")


def _drop_alias(model: str) -> None:
    MlflowClient().delete_registered_model_alias(model, "full")


def _change_tag(model: str) -> None:
    MlflowClient().set_model_version_tag(model, "1", "gate.full.sharper", "passed: all is well")


def _change_stage(model: str) -> None:
    MlflowClient().set_model_version_tag(model, "1", "svend.stage", "production")


def _change_hash(model: str) -> None:
    MlflowClient().set_model_version_tag(model, "1", "svend.checkpoint_sha256", "f" * 64)


def _delete_version(model: str) -> None:
    MlflowClient().delete_model_version(model, "1")


def _override(model: str) -> None:
    climb.override(model, "1", GateLevel.PRODUCTION, "hotfix", make_console())


def _delete_measuring_run(model: str) -> None:
    run_id = MlflowClient().get_model_version(model, "1").run_id
    _sql("delete from metrics where run_uuid = ? and key = 'eval/perplexity'", str(run_id))


def _other_ledger(model: str) -> None:
    client = MlflowClient()
    other = client.create_run("0")
    client.set_registered_model_tag(model, "svend.ledger_run_id", other.info.run_id)


@pytest.mark.parametrize(("plant", "found"), [
    (_change_entry, {("tampered record", None)}),
    (_drop_entry, {("lost record", None), ("alias", "standard")}),
    (_garble_entry, {("tampered record", None), ("alias", "full"), ("tampered tag", None),
                     ("lost record", None)}),
    (_change_verdict, {("tampered record", None), ("no verdict", "full")}),
    (_drop_done, {("half-moved", "full")}),
    (_move_alias, {("alias", "production")}),
    (_drop_alias, {("alias", "full")}),
    (_change_tag, {("tampered tag", None)}),
    (_change_stage, {("tampered tag", None)}),
    (_change_hash, {("tampered tag", None)}),
    (_delete_version, {("gone", None), ("alias", "quick"), ("alias", "standard"),
                       ("alias", "full")}),
    (_override, {("override", "production")}),
    (_delete_measuring_run, {("no measurement", "standard"), ("no measurement", "full")}),
    (_other_ledger, {("lost record", None), ("alias", "quick"), ("alias", "standard"),
                     ("alias", "full")}),
])
def test_what_is_planted_is_named(
    made: MadeVersion, plant: Callable[[str], None], found: set[tuple[str, str | None]]
) -> None:
    plant(made.model)
    assert set(_kinds(made.model)) == found


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
def test_files_that_are_not_what_was_registered_are_named(made: MadeVersion, name: str) -> None:
    (made.folder / name).write_bytes(b"others")
    (finding,) = audit_model(made.model, GATES)
    assert (finding.kind, finding.version) == ("files", "1")
    assert name in finding.detail


def test_a_level_that_other_gates_decided_is_named(made: MadeVersion) -> None:
    stricter = replace(GATES, full=[replace(GATES.full[0], threshold=8.0)])
    (finding,) = audit_model(made.model, stricter)
    assert (finding.kind, finding.level) == ("other gates", "full")
    assert "perplexity < 50" in finding.detail


def test_a_holder_that_has_been_refused_since_is_named(made: MadeVersion) -> None:
    stricter = replace(GATES, full=[replace(GATES.full[0], threshold=5.0)])
    with pytest.raises(climb.GateFailure):
        promote(FULL, "1", model=made.model, gates=stricter)
    assert ("refused since", "full") in _kinds(made.model)
    assert aliases_of(made.model)["full"] == "1"


def test_a_record_that_passes_by_its_word_and_not_by_its_values_is_named(folder: Path) -> None:
    made = make_version(folder, 1, {**GOOD, "perplexity": 60.0}, "a-forged")
    moves = Moves.find("a-forged")
    with pytest.raises(climb.GateFailure):
        promote(FULL, "1", model="a-forged")
    refused = history("a-forged").moves[-1]
    moves.add(replace(refused, kind=MoveKind.PROMOTED, token="0"))
    (finding,) = audit_model("a-forged", GATES)
    assert (finding.kind, finding.version) == ("no verdict", made.version)
    assert "does not pass sharper" in finding.detail


def test_a_verdict_on_other_weights_is_named(folder: Path) -> None:
    for number in (1, 2):
        make_version(folder, number, model="a-swapped")
    promote(FULL, "1", model="a-swapped")
    moves = Moves.find("a-swapped")
    moves.add(replace(history("a-swapped").moves[-1], version="2", token="0"))
    assert ("no verdict", "full") in _kinds("a-swapped")


def test_a_model_that_svend_did_not_make_has_nothing_behind_its_aliases(folder: Path) -> None:
    client = MlflowClient()
    client.create_registered_model("a-stranger")
    version = client.create_model_version("a-stranger", folder.as_uri()).version
    client.set_registered_model_alias("a-stranger", "production", str(version))
    client.set_registered_model_alias("a-stranger", "mine", str(version))
    assert _kinds("a-stranger") == [("no record", "production")]


def test_repair_puts_aliases_where_the_record_has_them(made: MadeVersion) -> None:
    _move_alias(made.model)
    _drop_alias(made.model)
    _drop_done(made.model)
    assert repair_aliases(made.model)
    assert _kinds(made.model) == []
    assert aliases_of(made.model) == dict.fromkeys(("quick", "standard", "full"), "1")
    assert repair_aliases(made.model) == []
