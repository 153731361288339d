"""W&B beside MLflow: real runs in offline mode, read back from the files that they leave."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

OFFLINE = {"WANDB_MODE": "offline"}
RUN_ID = "0123456789abcdef0123456789abcdef"
CONFIG = {"training": {"learning_rate": 3e-4, "max_steps": None}, "scale": "tiny", "strict": True}
# Train, eval and gates come apart; a diverged loss is kept as what it is.
FIRST = [
    (0, {"eval/heldout_loss": 8.25, "eval/perplexity": 3827.6}),
    (1, {"train/loss": 8.0, "train/tokens": 512}),
    (2, {"train/loss": float("nan"), "train/tokens": 1024}),
    (2, {"eval/heldout_loss": 7.5}),
    (2, {"gate/quick/loss_finite": 0.0, "gate/quick/gradient_norm": 1.0}),
    (3, {"train/loss": float("inf")}),
]
# The checkpoint's step is measured again, after rows of later steps.
RESUMED = [(2, {"eval/heldout_loss": 7.5}), (4, {"train/loss": 6.0})]
LOG = """
import json, sys
from pathlib import Path
from svend.errors import TrackingError
from svend.tracking.wandb import WandbRun

project, name, run_id, config, calls, folder, exit_code = json.loads(sys.argv[1])
try:
    run = WandbRun.begin(project, name, run_id, config, Path(folder))
except TrackingError as error:
    sys.exit(f"TrackingError: {error}")
for step, metrics in calls:
    run.log_metrics(metrics, step)
assert run.end(exit_code) is None
Path(folder, "place").write_text(run.place)
"""


def log_run(
    folder: Path, calls: list[tuple[int, dict[str, float]]], exit_code: int = 0, *,
    before: str = "", options: tuple[str, ...] = ("-W", "error"),
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Log calls as one run, in a process that has of W&B's variables only those given."""
    arguments = ["svend", "tiny-default", RUN_ID, CONFIG, calls, str(folder), exit_code]
    words = [*options, "-c", before + LOG, json.dumps(arguments)]
    return run_python(folder, words, environment or {})


def run_python(
    folder: Path, words: list[str], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, text=True, check=False, timeout=60,
        capture_output=True, stdin=subprocess.DEVNULL,
        env={**inherited, "HOME": str(folder), "PYTHONPATH": str(ROOT), **environment},
    )


@dataclass(frozen=True)
class OfflineRun:
    """What a `.wandb` file says."""

    records: list[Any]

    @classmethod
    def read(cls, folder: Path) -> OfflineRun:
        from wandb.proto.wandb_internal_pb2 import Record

        (path,) = folder.glob("*.wandb")
        return cls([Record.FromString(data) for data in log_entries(path.read_bytes())])

    def of_kind(self, kind: str) -> list[Any]:
        return [getattr(r, kind) for r in self.records if r.WhichOneof("record_type") == kind]

    @property
    def config(self) -> dict[str, Any]:
        (run,) = self.of_kind("run")
        values = {entry.key: json.loads(entry.value_json) for entry in run.config.update}
        return {key: value for key, value in values.items() if key != "_wandb"}

    @property
    def calls(self) -> list[tuple[int, dict[str, float]]]:
        """The rows as they were logged, without what W&B adds under names with an underscore."""
        rows = []
        for row in self.of_kind("history"):
            values = {item.nested_key[0]: json.loads(item.value_json) for item in row.item}
            step = values.pop("step")
            rows.append((step, {k: v for k, v in values.items() if not k.startswith("_")}))
        return rows


def log_entries(data: bytes) -> Iterator[bytes]:
    """Entries of a LevelDB log, the format of `.wandb` files; wandb 0.31 has no reader for it."""
    assert data[:4] == b":W&B"
    place, entry = 7, b""
    while place + 7 <= len(data):
        left_in_block = 32768 - place % 32768
        if left_in_block < 7:
            place += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        entry += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in {1, 4}:  # a whole entry, or the last part of one
            yield entry
            entry = b""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a finished run and its resumption share."""
    pytest.importorskip("wandb.errors")
    folder = tmp_path_factory.mktemp("finished")
    for calls, exit_code in ((FIRST, 1), (RESUMED, 0)):
        done = log_run(folder, calls, exit_code, environment=OFFLINE)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        Path(folder / "place").rename(folder / f"place-{exit_code}")
    return folder


def first_and_resumed(folder: Path) -> tuple[OfflineRun, OfflineRun]:
    places = [Path((folder / f"place-{code}").read_text()) for code in (1, 0)]
    assert sorted(folder.glob(f"wandb/offline-run-*-{RUN_ID}*")) == sorted(places)
    first, resumed = map(OfflineRun.read, places)
    return first, resumed


def as_texts(calls: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, str]]]:
    """NaN equals itself only as text."""
    return [(step, {key: repr(float(value)) for key, value in row.items()}) for step, row in calls]


def test_an_offline_run_holds_exactly_what_was_logged(finished: Path) -> None:
    first, _ = first_and_resumed(finished)
    assert as_texts(first.calls) == as_texts(FIRST)
    assert first.config == CONFIG


def test_a_resumed_run_goes_on_under_the_same_id(finished: Path) -> None:
    first, resumed = first_and_resumed(finished)
    for run in (first, resumed):
        (record,) = run.of_kind("run")
        assert (record.run_id, record.resume) == (RUN_ID, True)
        assert (record.project, record.display_name) == ("svend", "tiny-default")
    assert resumed.calls == RESUMED
    assert [run.of_kind("exit")[0].exit_code for run in (first, resumed)] == [1, 0]


def test_the_optimizer_step_is_the_axis_of_every_metric(finished: Path) -> None:
    for run in first_and_resumed(finished):
        step, others = run.of_kind("metric")
        assert (step.name, step.step_metric) == ("step", "")
        assert (others.glob_name, others.step_metric) == ("*", "step")


def test_many_rows_come_back_whole(tmp_path: Path) -> None:
    pytest.importorskip("wandb.errors")
    calls = [(step, {"train/loss": 1 / (step + 1)}) for step in range(2000)]
    done = log_run(tmp_path, calls, environment=OFFLINE)
    assert done.returncode == 0, done.stderr
    assert OfflineRun.read(Path((tmp_path / "place").read_text())).calls == calls


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused run printed, and nothing beside it."""
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("TrackingError: ")
    return line


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path) -> None:
    line = refusal(log_run(tmp_path, [], before="import sys; sys.modules['wandb'] = None\n"))
    assert 'pip install "svend[wandb]"' in line
    assert "training.use_wandb=false" in line


def test_a_folder_called_wandb_does_not_pass_for_the_package(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    # -S: no site-packages, so the package is truly absent and the folder importable.
    line = refusal(log_run(tmp_path, [], options=("-S",)))
    assert 'pip install "svend[wandb]"' in line


@pytest.mark.parametrize(("environment", "says"), [
    ({"WANDB_MODE": "online"}, "no API key"),
    ({"WANDB_MODE": "online", "WANDB_API_KEY": "short"}, "API key must have 40+ characters"),
    ({"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40,
      "WANDB_HTTP_TIMEOUT": "1"}, "http://127.0.0.1:9"),
    ({"WANDB_MODE": "ofline"}, "'online', 'offline'"),
], ids=["no login", "wrong key", "no server", "wrong mode"])
def test_without_login_or_server_one_line_names_offline_mode(
    tmp_path: Path, environment: dict[str, str], says: str
) -> None:
    pytest.importorskip("wandb.errors")
    line = refusal(log_run(tmp_path, [], environment=environment))
    assert says in line
    assert "WANDB_MODE=offline" in line


DIE = """
import os, pathlib, signal, sys
from svend.errors import TrackingError
from svend.tracking.wandb import WandbRun

run = WandbRun.begin("svend", "tiny-default", "1" * 32, {}, pathlib.Path.cwd())
processes = [p for p in pathlib.Path("/proc").glob("[0-9]*/stat")
             if p.read_text().split("(")[1].startswith("wandb-core)")
             and p.read_text().rsplit(")")[-1].split()[1] == str(os.getpid())]
for process in processes:
    os.kill(int(process.parent.name), signal.SIGKILL)
try:
    for step in range(1_000_000):
        run.log_metrics({"train/loss": 1.0}, step)
except TrackingError as error:
    print(error)
print(run.end(1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
def test_the_death_of_wandbs_own_process_is_told_in_a_line(tmp_path: Path) -> None:
    pytest.importorskip("wandb.errors")
    done = run_python(tmp_path, ["-c", DIE], OFFLINE)
    died, unsent = done.stdout.splitlines()
    assert "wandb-core has died" in died
    assert "wandb sync" in unsent


KILLED = """
import os, pathlib, signal, time
from svend.tracking.wandb import WRITE_SECONDS, WandbRun

run = WandbRun.begin("svend", "tiny-default", "2" * 32, {}, pathlib.Path.cwd())
for step in range(100):
    run.log_metrics({"train/loss": 1 / (step + 1)}, step)
time.sleep(2 * WRITE_SECONDS)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_loses_no_rows_but_those_of_the_last_moment(tmp_path: Path) -> None:
    pytest.importorskip("wandb.errors")
    assert run_python(tmp_path, ["-c", KILLED], OFFLINE).returncode == -signal.SIGKILL
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    run = OfflineRun.read(folder)
    assert run.calls == [(step, {"train/loss": 1 / (step + 1)}) for step in range(100)]
