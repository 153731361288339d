"""Promotion: what moves, by what evidence, and what is left where something goes wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from svend.cli import main
from svend.errors import CheckpointError, GateFailure, UserError
from svend.pipeline import moves as moves_module
from svend.pipeline.config import GatesConfig
from svend.pipeline.console import make_console
from svend.pipeline.moves import MoveKind, Moves
from svend.pipeline.promotion import climb
from svend.pipeline.promotion.audit import audit_model
from svend.pipeline.promotion.lineage import trace
from svend.pipeline.promotion.standing import next_level
from svend.pipeline.validation import GateLevel
from svend.tracking.registry import aliases_of, tags_of_version
from tests.registry import (
    GATES,
    GOOD,
    MadeVersion,
    history,
    make_version,
    model_of,
    promote,
    record_measurements,
    store,
)

QUICK, STANDARD, FULL, PRODUCTION = GateLevel
CONSOLE = make_console()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("promotion")
    with store(place):
        yield place


@pytest.fixture
def model(request: pytest.FixtureRequest, folder: Path) -> str:
    """A model of this test's own."""
    assert folder
    return model_of(request)


def _make(folder: Path, model: str, number: int = 1, **changes: float) -> MadeVersion:
    return make_version(folder, number, {**GOOD, **changes}, model)


def test_each_level_is_climbed_in_turn_and_its_alias_follows(folder: Path, model: str) -> None:
    made = _make(folder, model)
    moved = promote(PRODUCTION, made.version, model=model)
    assert [move.level for move in moved] == list(GateLevel)
    assert aliases_of(model) == dict.fromkeys(("quick", "standard", "full", "production"), "1")
    tags = tags_of_version(model, "1") or {}
    assert tags["svend.stage"] == "production"
    assert tags["gate.full.sharper"] == "passed: perplexity = 7.4, must be < 50"
    assert audit_model(model, GATES) == []
    verdict = history(model).verdict(moved[-1])
    assert verdict is not None
    assert {row["checkpoint_sha256"] for row in verdict["rows"]} == {made.checkpoint_sha256}
    assert {row["run_id"] for row in verdict["rows"]} == {made.run_id}  # reused, with its run


def test_the_first_level_that_fails_stops_the_climb(folder: Path, model: str) -> None:
    made = _make(folder, model, perplexity=60.0)
    with pytest.raises(GateFailure, match=r"does not pass full: perplexity = 60, must be < 50"):
        promote(PRODUCTION, made.version, model=model)
    assert aliases_of(model) == {"quick": "1", "standard": "1"}
    assert (tags_of_version(model, "1") or {})["svend.stage"] == "standard"
    kinds = [move.kind for move in history(model).moves]
    assert kinds == [MoveKind.REGISTERED, MoveKind.PROMOTED, MoveKind.PROMOTED, MoveKind.REFUSED]
    runs = MlflowClient().search_runs(
        [MlflowClient().get_experiment_by_name("made").experiment_id],
        f"tags.`svend.promotion` = '{model}'",
    )
    assert [run.info.status for run in runs] == ["FAILED"]
    assert "perplexity = 60" in runs[0].data.tags["svend.reason"]


def test_a_metric_that_nothing_can_measure_is_a_failure(folder: Path, model: str) -> None:
    made = _make(folder, model)
    gates = replace(GATES, full=[replace(GATES.full[0], metric_name="charm", name="charm")])
    with pytest.raises(GateFailure, match="charm was not measured"):
        promote(FULL, made.version, model=model, gates=gates)
    assert "full" not in aliases_of(model)


def test_without_a_version_the_newest_with_the_level_below_is_taken(
    folder: Path, model: str
) -> None:
    for number in (1, 2, 3):
        _make(folder, model, number)
    promote(STANDARD, "1", model=model)
    promote(STANDARD, "2", model=model)
    assert promote(FULL, model=model)[0].version == "2"
    assert promote(FULL, model=model)[0].version == "1"
    with pytest.raises(UserError, match="no version waits with the level standard"):
        promote(FULL, model=model)
    assert next_level(history(model), model, "3") is QUICK
    assert next_level(history(model), model, "2") is PRODUCTION


def test_a_version_that_is_looked_at_again_takes_no_lower_alias(folder: Path, model: str) -> None:
    for number in (1, 2):
        _make(folder, model, number)
        promote(STANDARD, str(number), model=model)
    stricter = replace(GATES, standard=[replace(g, threshold=g.threshold / 2)
                                        for g in GATES.standard])
    moved = promote(FULL, "1", model=model, gates=stricter)
    assert [(m.kind, m.level) for m in moved] == [
        (MoveKind.RENEWED, STANDARD), (MoveKind.PROMOTED, FULL)
    ]
    assert aliases_of(model) == {"quick": "2", "standard": "2", "full": "1"}


def test_a_verdict_by_other_gates_or_on_other_data_does_not_count(
    folder: Path, model: str
) -> None:
    made = _make(folder, model)
    promote(FULL, made.version, model=model)
    stricter = replace(GATES, full=[replace(GATES.full[0], threshold=5.0)])
    with pytest.raises(GateFailure, match="must be < 5"):
        promote(PRODUCTION, made.version, model=model, gates=stricter)
    assert "production" not in aliases_of(model)
    # Other settings: what is on record was measured on 8 sequences, and the data are not there.
    again = climb.Promotion(model=model, to=FULL, version="1", gates=GATES,
                            overrides=[("training.heldout_sequences", "9")])
    with pytest.raises((UserError, CheckpointError)):
        climb.Climb(again, CONSOLE).run()


def test_a_measurement_that_its_run_does_not_show_is_not_used(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _make(folder, model, perplexity=60.0)
    record_measurements(Moves.find(model), made.run_id, made.checkpoint_sha256,
                        {"perplexity": 3.0}, shown=False)
    with pytest.raises(GateFailure, match="perplexity = 60"):
        climb.Climb(climb.Promotion(model=model, to=FULL, version="1", gates=GATES),
                    make_console()).run()
    assert "does not show the value on record" in capsys.readouterr().out


def test_an_override_moves_the_alias_and_shows_as_such(folder: Path, model: str) -> None:
    made = _make(folder, model, perplexity=60.0)
    climb.override(model, made.version, PRODUCTION, "hotfix 12", CONSOLE)
    assert aliases_of(model) == {"production": "1"}
    tags = tags_of_version(model, "1") or {}
    assert tags["svend.stage"] == "production (overridden)"
    assert "overridden by" in tags["svend.production"]
    assert "hotfix 12" in tags["svend.production"]
    page = MlflowClient().get_model_version(model, "1").description
    assert "**production**: **OVERRIDDEN** by" in page
    assert "hotfix 12" in page
    (finding,) = audit_model(model, GATES)
    assert (finding.kind, finding.level) == ("override", "production")
    assert "hotfix 12" in finding.detail
    # An override is no pass: the levels below are still to be climbed.
    with pytest.raises(GateFailure, match="does not pass full"):
        promote(PRODUCTION, made.version, model=model)
    with pytest.raises(UserError, match="needs a reason"):
        climb.override(model, made.version, FULL, "  ", CONSOLE)


def test_what_a_person_writes_is_printed_as_it_was_written(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _make(folder, model)
    reason = "[bold]hotfix[/b] `12` {x}"
    climb.override(model, made.version, QUICK, reason, CONSOLE)
    capsys.readouterr()
    assert main(["history", model]) == 0
    assert "[bold]hotfix[/b]" in capsys.readouterr().out
    assert main(["history", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[-1]["reason"] == reason


def test_a_promotion_takes_the_place_of_an_override(folder: Path, model: str) -> None:
    made = _make(folder, model)
    climb.override(model, made.version, QUICK, "in a hurry", CONSOLE)
    promote(QUICK, made.version, model=model)
    assert audit_model(model, GATES) == []
    assert (tags_of_version(model, "1") or {})["svend.stage"] == "quick"


def test_a_roll_back_restores_the_holder_before(folder: Path, model: str) -> None:
    for number in (1, 2, 3):
        _make(folder, model, number)
        promote(PRODUCTION, str(number), model=model)
    moved = climb.roll_back(model, PRODUCTION, "refuses too much", CONSOLE)
    assert (moved.version, moved.former) == ("2", "3")
    assert aliases_of(model) == {"quick": "3", "standard": "3", "full": "3", "production": "2"}
    assert (tags_of_version(model, "3") or {})["svend.stage"] == "full"
    assert (tags_of_version(model, "2") or {})["svend.stage"] == "production"
    climb.roll_back(model, PRODUCTION, None, CONSOLE)
    assert aliases_of(model)["production"] == "1"
    with pytest.raises(UserError, match="the first that is production; there is none to go back"):
        climb.roll_back(model, PRODUCTION, None, CONSOLE)
    assert audit_model(model, GATES) == []
    # What was rolled back has to be promoted again.
    assert next_level(history(model), model, "3") is PRODUCTION
    promote(PRODUCTION, "3", model=model)
    assert aliases_of(model)["production"] == "3"


def test_a_promotion_that_was_overtaken_moves_nothing_and_says_by_whom(
    folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        _make(folder, model, number)
        promote(STANDARD, str(number), model=model)
    decide = climb.Climb._decide

    def decide_late(self: climb.Climb, level: GateLevel, *rest: object) -> object:
        decided = decide(self, level, *rest)  # type: ignore[arg-type]
        monkeypatch.setattr(climb.Climb, "_decide", decide)
        # In a thread of its own, for MLflow has one active run in each.
        rival = threading.Thread(target=promote, args=(FULL, "2"), kwargs={"model": model})
        rival.start()
        rival.join()
        return decided

    monkeypatch.setattr(climb.Climb, "_decide", decide_late)
    with pytest.raises(UserError, match="version 2 became full meanwhile, by"):
        promote(FULL, "1", model=model)
    assert aliases_of(model)["full"] == "2"
    assert audit_model(model, GATES) == []


def _promote_and_die(uri: str, model: str, doomed_call: str, which: int) -> None:
    """Kill this process, for good, just before the `which`th call of a function."""
    mlflow.set_tracking_uri(uri)
    target = moves_module if hasattr(moves_module, doomed_call) else moves_module.Ledger
    original, calls = getattr(target, doomed_call), []

    def dying(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == which:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(target, doomed_call, dying)
    promote(QUICK, "1", model=model)


@pytest.mark.parametrize(("doomed_call", "which", "moved"), [
    # The verdict is kept, no move is on record.
    pytest.param("append", 1, False, marks=pytest.mark.slow),
    pytest.param("tag_version", 1, True, marks=pytest.mark.slow),
    ("set_alias", 1, True),  # on record, the alias not moved
    pytest.param("mark_done", 1, True, marks=pytest.mark.slow),
])
def test_what_a_killed_promotion_left_is_finished_by_the_next(
    folder: Path, model: str, doomed_call: str, which: int, moved: bool
) -> None:
    _make(folder, model)
    process = multiprocessing.get_context("spawn").Process(
        target=_promote_and_die, args=(mlflow.get_tracking_uri(), model, doomed_call, which)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    kinds = [finding.kind for finding in audit_model(model, GATES)]
    assert kinds == (["half-moved"] if moved else [])
    promote(QUICK, "1", model=model)
    assert aliases_of(model) == {"quick": "1"}
    assert audit_model(model, GATES) == []
    promoted = [m for m in history(model).moves if m.kind is MoveKind.PROMOTED]
    assert len(promoted) == 1


@pytest.mark.parametrize(("name", "message"), [
    ("model.safetensors", "it is not what was registered"), ("config.yaml", "is missing"),
])
def test_a_version_whose_files_are_not_what_they_were_is_refused(
    folder: Path, model: str, name: str, message: str
) -> None:
    made = _make(folder, model)
    if "missing" in message:
        (made.folder / name).unlink()
    else:
        (made.folder / name).write_bytes(b"others")
    with pytest.raises(CheckpointError, match=message):
        promote(QUICK, made.version, model=model)
    with pytest.raises(CheckpointError, match=message):
        climb.override(model, made.version, QUICK, "in a hurry", CONSOLE)
    assert aliases_of(model) == {}


def test_a_version_whose_artifacts_are_gone_is_one_line(folder: Path, model: str) -> None:
    made = _make(folder, model)
    shutil.rmtree(made.folder)
    with pytest.raises(UserError) as raised:
        promote(QUICK, made.version, model=model)
    assert "\n" not in str(raised.value)
    assert aliases_of(model) == {}


def test_an_alias_that_was_moved_by_other_means_stops_the_promotion(
    folder: Path, model: str
) -> None:
    made = _make(folder, model)
    MlflowClient().set_registered_model_alias(model, "full", made.version)
    with pytest.raises(UserError, match=r"alias full points at version 1, on record is none: it "
                                        r"was moved by other means; svend audit .* --repair"):
        promote(FULL, made.version, model=model)


def test_a_version_that_is_not_on_record_is_named(folder: Path, model: str) -> None:
    _make(folder, model)
    with pytest.raises(UserError, match="its registration is not on record; there are the "
                                        "versions 1"):
        promote(QUICK, "7", model=model)


def test_lineage_leads_to_everything(folder: Path, model: str) -> None:
    made = _make(folder, model)
    MlflowClient().set_tag(made.run_id, "svend.parent_scale_run_id", "below")
    MlflowClient().set_tag(made.run_id, "svend.hparams.run_id", "sweep")
    promote(FULL, made.version, model=model)
    told = trace(f"models:/{model}@full").record()
    assert told["checkpoint_sha256"] == made.checkpoint_sha256
    assert told["run"].startswith(made.run_id)
    assert (told["parent_scale_run"], told["sweep_run"]) == ("below", "sweep")
    assert len(told["verdict"]) == 3
    assert f"perplexity 7.4 (< 50, run {made.run_id[:8]})" in told["verdict"][2]
    assert "promote-" in told["evaluated_by"]


def test_the_default_gates_are_the_guides() -> None:
    assert [gate.name for gate in GatesConfig().production] == [
        "gsm8k_accuracy", "tool_accuracy", "safety_accuracy", "latency_p99"
    ]
