"""What a run logs, kept on the disk and told to a real store: all of it, in order, once."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from svend.errors import TrackingError, UserError
from svend.pipeline.run_folder import RunFolder
from svend.pipeline.sync import sync
from svend.tracking import spool as spool_module
from svend.tracking.delivery import BATCH_ITEMS, Entry, EntryKind, deliver
from svend.tracking.run import TrackedRun
from svend.tracking.spool import RunAddress, Spool, SpoolSender
from svend.tracking.state import read_runs
from tests.registry import store

ADDRESS = RunAddress("r", "1", "name", "sqlite:///nowhere")


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real store for the tests of this module, each with experiments of its own."""
    with store(tmp_path_factory.mktemp("store")):
        yield str(mlflow.get_tracking_uri())


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether the store takes anything; what is delivered goes to the real one."""
    down = [False]

    def deliver_or_not(*arguments: object) -> None:
        if down[0]:
            raise MlflowException("Connection refused")
        deliver(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(spool_module, "deliver", deliver_or_not)
    monkeypatch.setattr(spool_module, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(spool_module, "LONGEST_PAUSE_SECONDS", 0.05)

    def set_down(value: bool) -> None:
        down[0] = value

    return set_down


def _spooled(folder: Path, experiment: str, lines: list[str] | None = None) -> TrackedRun:
    run = TrackedRun.begin(experiment, "run")
    run.spool_to(folder, [].append if lines is None else lines.append)
    return run


def _log_steps(run: TrackedRun, steps: range) -> None:
    for step in steps:
        run.log_metrics({"train/loss": 1 / step, "train/tokens": 8.0 * step}, step)


ENTRIES = st.one_of(
    st.builds(
        Entry.metrics,
        st.dictionaries(st.text(), st.floats(), min_size=1, max_size=3), st.integers(0, 99),
    ),
    st.builds(Entry.params, st.dictionaries(st.text(), st.text(), max_size=3)),
    st.builds(Entry.tags, st.dictionaries(st.text(), st.text(), max_size=3)),
    st.builds(Entry.status, st.sampled_from(["RUNNING", "FINISHED"])),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ENTRIES, max_size=12), st.data())
def test_entries_come_back_in_order_and_a_torn_line_is_cut(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Entry], data: st.DataObject
) -> None:
    spool = Spool.create(tmp_path_factory.mktemp("spool"), ADDRESS)
    for entry in entries:
        spool.tell(entry)
    spool.close()
    written = (spool.folder / "entries.jsonl").read_bytes()
    kept = data.draw(st.integers(0, len(written)))
    (spool.folder / "entries.jsonl").write_bytes(written[:kept])
    again = Spool.open(spool.folder)
    whole = written[:kept].count(b"\n")
    found, place = again.read(0, 100)
    assert [e.to_line() for e in found] == [e.to_line() for e in entries[:whole]]
    again.tell(Entry.tags({"after": "the kill"}))
    assert again.read(place, 100)[0] == [Entry.tags({"after": "the kill"})]
    again.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(ENTRIES, max_size=40))
def test_requests_keep_the_order_and_mlflows_limits(entries: list[Entry]) -> None:
    class Client:
        def __init__(self) -> None:
            self.calls: list[list[str]] = []

        def log_batch(self, run_id: str, metrics: list, params: list, tags: list) -> None:
            assert len(params) <= 100 and len(tags) <= 100
            assert len(metrics) + len(params) + len(tags) <= BATCH_ITEMS
            self.calls.append(["batch"] * (len(metrics) + len(params) + len(tags)))

        def update_run(self, run_id: str, status: str) -> None:
            self.calls.append([status])

        def set_terminated(self, run_id: str, status: str, end: int) -> None:
            self.calls.append([status])

    client = Client()
    deliver(client, "r", entries, Path())  # type: ignore[arg-type]
    wanted = [word for entry in entries for word in (
        [entry.content["status"]] if entry.kind is EntryKind.STATUS else ["batch"] * entry.items)]
    assert [word for call in client.calls for word in call] == wanted


def test_what_is_logged_in_an_outage_arrives_once_and_in_order(
    tmp_path: Path, tracking_uri: str, outage: Callable[[bool], None]
) -> None:
    lines: list[str] = []
    run = _spooled(tmp_path / "spool", "outage", lines)
    _log_steps(run, range(1, 11))
    run.flush(10)
    outage(True)
    _log_steps(run, range(11, 21))
    run.log_params({"late": 1})
    run.log_text("a verdict", "verdicts/one.txt")
    run.log_table(pd.DataFrame({"question": ["1+1"], "answer": ["two"]}), "tables/answers.json")
    with pytest.raises(TrackingError, match="Connection refused") as refusal:
        run.flush(0.3)
    assert "resume=true" in str(refusal.value)
    outage(False)
    _log_steps(run, range(21, 31))
    assert run.end("FINISHED", None, 10) == []
    (stored,) = read_runs(tracking_uri, "outage")
    assert stored.metrics["train/loss"] == [(step, 1 / step) for step in range(1, 31)]
    assert stored.metrics["train/tokens"] == [(step, 8.0 * step) for step in range(1, 31)]
    assert stored.params["late"] == "1" and stored.status == "FINISHED"
    assert stored.artifacts == ["tables/answers.json", "verdicts/one.txt"]
    assert json.loads(stored.tags["mlflow.loggedArtifacts"]) == [
        {"path": "tables/answers.json", "type": "table"}]
    table = MlflowClient().load_table(
        MlflowClient().get_run(stored.run_id).info.experiment_id, "tables/answers.json")
    assert table.to_dict("records") == [{"question": "1+1", "answer": "two"}]
    assert ["takes nothing" in line or "answers again" in line for line in lines] == [True, True]
    assert not list((tmp_path / "spool" / "files").glob("*"))


def test_what_was_sent_but_not_noted_is_not_doubled(tmp_path: Path, tracking_uri: str) -> None:
    run = _spooled(tmp_path / "spool", "noted")
    _log_steps(run, range(1, 11))
    run.log_table(pd.DataFrame({"a": [1]}), "a.json")
    run.end("KILLED", "by hand", 10)
    (tmp_path / "spool" / "sent").write_text("0")  # as if killed between the two
    again = TrackedRun.resume_spooled(tmp_path / "spool", print)
    assert again.end("FINISHED", None, 10) == []
    (stored,) = read_runs(tracking_uri, "noted")
    assert stored.metrics["train/loss"] == [(step, 1 / step) for step in range(1, 11)]
    assert stored.status == "FINISHED" and "svend.reason" not in stored.tags
    assert stored.artifacts == ["a.json"]


def test_steps_that_are_trained_again_are_not_logged_again(
    tmp_path: Path, tracking_uri: str
) -> None:
    run = _spooled(tmp_path / "spool", "repeated")
    _log_steps(run, range(1, 16))
    run.log_metrics({"gate": 1.0}, 12)
    run.log_metrics({"gate": 0.0}, 12)
    run.end("KILLED", None, 10)
    again = TrackedRun.resume_spooled(tmp_path / "spool", print)
    again.go_on_from(10)
    _log_steps(again, range(11, 21))
    for value in (1.0, 0.0, 0.5):  # two are on record, the third is new
        again.log_metrics({"gate": value}, 12)
    again.end("FINISHED", None, 10)
    (stored,) = read_runs(tracking_uri, "repeated")
    assert stored.metrics["train/loss"] == [(step, 1 / step) for step in range(1, 21)]
    assert [value for _, value in stored.metrics["gate"]] == [0.0, 0.5, 1.0]


def test_after_going_back_other_values_are_logged_though_the_steps_are_the_same(
    tmp_path: Path, tracking_uri: str
) -> None:
    run = _spooled(tmp_path / "spool", "back")
    _log_steps(run, range(1, 11))
    run.go_back(5)
    for step in range(6, 9):
        run.log_metrics({"train/loss": 9.0}, step)
    run.end("KILLED", None, 10)
    again = TrackedRun.resume_spooled(tmp_path / "spool", print)
    again.go_on_from(5)
    for step in range(6, 11):  # 6 to 8 are on record since the run went back, 9 and 10 are not
        again.log_metrics({"train/loss": 9.0}, step)
    again.end("FINISHED", None, 10)
    (stored,) = read_runs(tracking_uri, "back")
    second = [step for step, value in stored.metrics["train/loss"] if value == 9.0]
    assert second == [6, 7, 8, 9, 10]


def test_what_the_store_refuses_for_good_is_kept_and_said_and_holds_up_nothing(
    tmp_path: Path, tracking_uri: str
) -> None:
    lines: list[str] = []
    run = _spooled(tmp_path / "spool", "refused", lines)
    run.log_metrics({"loss @ home": 1.0}, 1)  # no name for MLflow
    _log_steps(run, range(1, 4))
    assert run.end("FINISHED", None, 10) == []
    (stored,) = read_runs(tracking_uri, "refused")
    assert [step for step, _ in stored.metrics["train/loss"]] == [1, 2, 3]
    assert "loss @ home" in (tmp_path / "spool" / "refused.jsonl").read_text()
    assert len(lines) == 1 and "refuses metrics for good" in lines[0]


def test_a_store_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def hang(*_: object) -> None:
        released.wait(60)

    run = _spooled(tmp_path / "spool", "hangs")
    monkeypatch.setattr(spool_module, "deliver", hang)
    started = time.monotonic()
    _log_steps(run, range(1, 4))
    (line,) = run.end("FINISHED", None, 0.5)
    assert time.monotonic() - started < 10
    assert "svend sync" in line and str(tmp_path) in line
    released.set()


def test_a_full_disk_loses_no_entry_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool.create(tmp_path, ADDRESS)
    write, full = os.pwrite, [True]

    def write_some(file: int, line: bytes, place: int) -> int:
        if full[0]:
            write(file, line[:7], place)
            raise OSError(28, "No space left on device")
        return write(file, line, place)

    monkeypatch.setattr(os, "pwrite", write_some)
    spool.tell(Entry.tags({"a": "1"}))
    spool.tell(Entry.tags({"b": "2"}))
    assert spool.read(0, 9)[0] == []
    full[0] = False
    spool.tell(Entry.tags({"c": "3"}))
    assert spool.read(0, 9)[0] == [Entry.tags({key: value}) for key, value in
                                   (("a", "1"), ("b", "2"), ("c", "3"))]


LOGS_AND_DIES = """
import os, signal, sys, mlflow
from svend.tracking import spool
from svend.tracking.run import TrackedRun
spool.FLUSH_SECONDS = 0.05
run = TrackedRun.begin("killed", "run")
run.spool_to(__import__("pathlib").Path(sys.argv[1]), print)
for step in range(1, 501):
    run.log_metrics({"train/loss": 1 / step}, step)
    if step % 100 == 0:
        run.log_text(str(step), f"step_{step}.txt")
print("logged", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sync_sends_what_a_killed_process_left_and_ends_its_run(
    tmp_path: Path, tracking_uri: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "svend"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOGS_AND_DIES), str(folder / "tracking")],
        capture_output=True, text=True, check=False,
        env={**os.environ, "MLFLOW_TRACKING_URI": tracking_uri},
    )
    assert done.returncode == -signal.SIGKILL and "logged" in done.stdout
    (folder / "run.json").write_text(json.dumps({
        "run_id": "r", "tracking_uri": tracking_uri, "experiment": "killed", "scale": "tiny",
        "data_fingerprint": "d", "device": "cpu", "precision": "fp32", "compiled": False,
        "tokenizer_sha256": "t"}))
    held = RunFolder.open(folder)
    held.hold()
    with pytest.raises(UserError, match="process"):
        sync(tmp_path)
    held.release()
    assert [sent.entries_sent > 0 for sent in sync(tmp_path)] == [True]
    assert [sent.entries_sent for sent in sync(folder)] == [0]
    assert "nothing was left to send" in capsys.readouterr().out
    (stored,) = read_runs(tracking_uri, "killed")
    assert stored.metrics["train/loss"] == [(step, 1 / step) for step in range(1, 501)]
    assert stored.artifacts == [f"step_{step}.txt" for step in range(100, 501, 100)]
    assert stored.status == "KILLED" and "resume=true" in stored.tags["svend.reason"]


LOGS = """
import sys
from pathlib import Path
from svend.tracking import spool
from svend.tracking.run import TrackedRun
spool.FLUSH_SECONDS = 0.05  # to be in each other's way often
run = TrackedRun.begin(sys.argv[2], "run")
run.spool_to(Path(sys.argv[1]), print)
for step in range(1, 3001):
    run.log_metrics({"train/loss": 1 / step, "train/tokens": 8.0 * step}, step)
unsent = run.end("FINISHED", None, 120)
sys.exit(len(unsent))
"""


@pytest.mark.slow
def test_runs_at_once_on_one_sqlite_file_lose_and_double_nothing(
    tmp_path: Path, tracking_uri: str
) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", LOGS, str(tmp_path / name), name],
                         env={**os.environ, "MLFLOW_TRACKING_URI": tracking_uri})
        for name in ("one", "other")
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    for name in ("one", "other"):
        (stored,) = read_runs(tracking_uri, name)
        assert stored.metrics["train/loss"] == [(step, 1 / step) for step in range(1, 3001)]
        assert stored.metrics["train/tokens"] == [(step, 8.0 * step) for step in range(1, 3001)]
        assert stored.status == "FINISHED"


def test_sync_says_in_one_line_what_is_wrong(
    tmp_path: Path, tracking_uri: str, outage: Callable[[bool], None]
) -> None:
    with pytest.raises(UserError, match="no run's folder"):
        sync(tmp_path)
    run = _spooled(tmp_path / "svend" / "tracking", "unsynced")
    _log_steps(run, range(1, 4))
    run.end("FINISHED", None, 10)
    (tmp_path / "svend" / "run.json").write_text(json.dumps({
        "run_id": "r", "tracking_uri": tracking_uri, "experiment": "unsynced", "scale": "tiny",
        "data_fingerprint": "d", "device": "cpu", "precision": "fp32", "compiled": False,
        "tokenizer_sha256": "t"}))
    (tmp_path / "svend" / "tracking" / "sent").write_text("0")
    outage(True)
    with pytest.raises(TrackingError, match="does not take what waits") as refusal:
        sync(tmp_path)
    assert len(str(refusal.value).splitlines()) == 1
    (tmp_path / "svend" / "tracking" / "address.json").write_text("{")
    with pytest.raises(TrackingError, match="no record of a run's tracking"):
        sync(tmp_path)


def test_only_what_can_never_be_taken_counts_as_refused() -> None:
    refused = MlflowException("no such name", error_code=INVALID_PARAMETER_VALUE)
    assert spool_module.is_refusal(refused)
    assert not spool_module.is_refusal(MlflowException("API request failed with 503"))
    assert not spool_module.is_refusal(OSError("Connection refused"))


def test_numbers_that_json_does_not_know_come_back(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, ADDRESS)
    spool.tell(Entry.metrics({"nan": math.nan, "inf": math.inf}, 1))
    ((entry,), _) = spool.read(0, 1)
    assert math.isnan(entry.content["values"]["nan"]) and entry.content["values"]["inf"] == math.inf


def test_the_sender_goes_on_where_another_process_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, delivered = Spool.create(tmp_path, ADDRESS), []
    monkeypatch.setattr(spool_module, "deliver",
                        lambda client, run_id, entries, folder: delivered.extend(entries))
    for number in range(5):
        spool.tell(Entry.tags({"n": str(number)}))
    _, place = spool.read(0, 3)
    spool.mark_sent(place)
    sender = SpoolSender(Spool.open(tmp_path), print)
    sender.start()
    assert sender.close(10)
    assert [entry.content["n"] for entry in delivered] == ["3", "4"]
