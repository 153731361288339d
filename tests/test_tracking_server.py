"""The script of docs/server.md: a server that asks for passwords, and the whole flow against it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import mlflow
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from svend.tracking.runs import check_tracking_store, run_shows, tags_of
from tests.conftest import ROOT, Workplace
from tests.postgres import PostgresServer, requires_postgres
from tests.refusals import refusal_of
from tests.servers import free_port, stop, wait_for_health
from tests.test_sweep import command as sweep_command

SCRIPT = ROOT / "docs" / "examples" / "tracking_server.py"
ADMIN_PASSWORD = "correct-horse-battery"
MODEL = "svend-debug"
PROMOTE = ["promote", "--model", MODEL, "--version", "1"]
SET = "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
CHECK = "; check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
ASK = "; whoever runs the server can give the permission (docs/server.md)"


def password_of(user: str) -> str:
    return f"{user}-has-this-one"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, in a folder of its own."""
    spec = importlib.util.spec_from_file_location("tracking_server", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_BACKEND_STORE_URI", raising=False)
    return module


@pytest.mark.parametrize(("options", "missing", "said"), [
    ([], None, "no database: give --database postgresql://USER@HOST/NAME"),
    (["--database", "sqlite:///mlflow.db"], None, "is no PostgreSQL"),
    (["--database", "nonsense"], None, "--database is no address"),
    (["--database", "postgresql://a:secret@127.0.0.1:{free}/mlflow"], None,
     "is PostgreSQL up, and the database made"),
    (["--port", "{taken}"], None, "another server may have it, give another --port"),
    ([], "flask_wtf", "the package flask-wtf is missing here: pip install 'svend[server]'"),
    ([], "psycopg", "the package psycopg is missing here: pip install 'svend[server]'"),
])
def test_what_the_server_needs_and_lacks_is_said_in_one_line(
    script: ModuleType, options: list[str], missing: str | None, said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    if missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"free": free_port(), "taken": taken.getsockname()[1]}
        given = [option.format(**ports) for option in ["--port", "{free}", *options]]
        assert script.main(["serve", *given]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert said in err
    assert "secret" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("place", "said"), [
    ("s3://bucket/path", "the package boto3 is missing here: pip install boto3"),
    ("file", "give a folder that can be written"),
])
def test_an_artifact_store_that_cannot_be_used_is_refused(
    script: ModuleType, place: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    (tmp_path / "file").touch()
    with pytest.raises(script.Refusal, match=said):
        script._checked_store(place)


@contextmanager
def answering(status: int, text: str) -> Iterator[str]:
    """A server that answers all that it is asked alike; yield its address."""

    class Answer(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


COMMANDS = [
    "train", "train --hparams sweep-tiny", "compare abc", f"promote --model {MODEL}",
    f"history {MODEL}", "audit", f"lineage models:/{MODEL}@full",
    f"evaluate --model models:/{MODEL}/1", f"export models:/{MODEL}/1 --to hf",
]


@pytest.mark.parametrize(("command", "status", "user", "said"), [
    *((command, 401, None, f"(it asks for a password){SET}") for command in COMMANDS),
    ("audit", 401, "ada", f"(it does not take the password of ada){CHECK}"),
    ("audit", 403, "ada", f"(ada may not do that){ASK}"),
])
def test_a_server_that_refuses_who_asks_is_told_in_one_line(
    command: str, status: int, user: str | None, said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("USERNAME", user), ("PASSWORD", user)):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
        if value is not None:
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    with answering(status, "You are not authenticated.") as address:
        mlflow.set_tracking_uri(address)
        try:
            line = refusal_of(command.split(), folder, capsys)
        finally:
            mlflow.set_tracking_uri("")
    assert address in line
    assert line.endswith(said)


@dataclass(frozen=True)
class Member(Workplace):
    """A workplace of someone with, or without, a name and a password; `server` is its address."""

    server: str = ""
    user: str = ""
    password: str = ""

    @property
    def tracking_uri(self) -> str:
        return self.server

    @property
    def environment(self) -> dict[str, str]:
        signed_in = {"MLFLOW_TRACKING_USERNAME": self.user,
                     "MLFLOW_TRACKING_PASSWORD": self.password}
        # Not as whoever this process is: the tests look at the store as its admin.
        own = {key: value for key, value in super().environment.items() if key not in signed_in}
        return {**own, "HOME": str(self.folder), "TMPDIR": str(self.temporary),
                **(signed_in if self.user else {})}

    @property
    def temporary(self) -> Path:
        return self.folder / "temporary"

    def svend(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run([sys.executable, "-m", "svend", *words])

    def refused(self, *words: str) -> str:
        """Return the one line that a command ends with."""
        done = self.svend(*words)
        assert done.returncode == 1, done.stdout
        assert "Traceback" not in done.stdout, done.stdout
        lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.stdout
        return lines[0]


class Team:
    """A PostgreSQL, the server that the script makes of it, and its people."""

    def __init__(self, folder: Path, postgres: PostgresServer) -> None:
        self.folder = folder
        self.postgres = postgres
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.artifacts = folder / "server" / "artifacts"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def script(
        self, *words: str, answer: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(SCRIPT), *words], cwd=self.folder, check=False, text=True,
            input=answer, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=180,
            env={**os.environ, **environment},
        )

    @property
    def serve(self) -> list[str]:
        return ["serve", "--database", self.postgres.url("mlflow", driver="postgresql"),
                "--folder", str(self.folder / "server"), "--port", str(self.port)]

    @contextmanager
    def server(self, **environment: str) -> Iterator[None]:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *self.serve], cwd=self.folder, stdout=log, stderr=log,
                env={**os.environ, **environment}, start_new_session=True,
            )
        try:
            wait_for_health(f"{self.address}/health", process, self.log)
            yield
        finally:
            stop(process, signal.SIGTERM)

    def tell(self, *words: str, answer: str = "") -> str:
        """Have the script do something as the server's admin; return what it says."""
        done = self.script(
            "user", *words, "--server", self.address, answer=answer,
            MLFLOW_TRACKING_USERNAME="admin", MLFLOW_TRACKING_PASSWORD=ADMIN_PASSWORD,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def member(self, user: str = "", password: str | None = None) -> Member:
        folder = self.folder / (user or "nobody")
        (folder / "temporary").mkdir(parents=True, exist_ok=True)
        return Member(folder, self.address, user,
                      password_of(user) if password is None else password)

    def client(self, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
        """Return a client that may do everything."""
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN_PASSWORD)
        return MlflowClient(self.address)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """A server with ada, who trains, and bob, who reads; ada has trained a version."""
    with ExitStack() as stack:
        team = Team(tmp_path_factory.mktemp("team"), stack.enter_context(PostgresServer()))
        for password, wrong in (("", "is not set"), ("short", "is too short"),
                                ("password1234", "is the one that MLflow shipped once")):
            refused = team.script(*team.serve, MLFLOW_AUTH_ADMIN_PASSWORD=password)
            assert refused.returncode == 1
            assert refused.stdout.startswith(f"error: MLFLOW_AUTH_ADMIN_PASSWORD {wrong}: ")
            assert refused.stdout.count("\n") == 1
        stack.enter_context(team.server(MLFLOW_AUTH_ADMIN_PASSWORD=ADMIN_PASSWORD))
        for words, told in (
            (["ada", "--may", "train"], "ada: added, may train"),
            (["bob"], "bob: added, may read"),
            (["ada"], "ada: known, may train"),
        ):
            assert team.tell(*words, answer=f"{password_of(words[0])}\n") == told
        trained = team.member("ada").run(team.member("ada").train_command())
        assert trained.returncode == 0, trained.stdout
        yield team


@pytest.mark.slow
@requires_postgres
def test_the_server_is_bound_to_loopback_and_keeps_artifacts_in_its_store(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening = {c.laddr.ip for c in psutil.net_connections("tcp")
                 if c.status == psutil.CONN_LISTEN and c.laddr.port == team.port}
    assert listening == {"127.0.0.1"}
    settings = team.folder / "server" / "basic_auth.ini"
    assert settings.stat().st_mode & 0o077 == 0
    weights = list(team.artifacts.rglob("model.safetensors"))
    assert len(weights) == 1 and weights[0].stat().st_size > 100_000
    assert list(team.artifacts.rglob("verdicts.html"))
    assert not list((team.folder / "ada").rglob("mlruns"))
    version = team.client(monkeypatch).get_model_version(MODEL, "1")
    assert set(version.aliases) == {"quick", "standard"}
    tables = team.postgres.query("SELECT username, is_admin FROM users ORDER BY 1", "mlflow")
    assert tables == ["ada|f", "admin|t", "bob|f"]


@pytest.mark.slow
@requires_postgres
def test_who_is_not_known_is_told_which_variables_to_set(team: Team) -> None:
    stranger, forgetful = team.member(), team.member("ada", "a wrong password")
    for words in (stranger.train_command()[3:], sweep_command(stranger)[3:]):
        assert stranger.refused(*words).endswith(f"(it asks for a password){SET}")
    for words in (["compare", "--experiment", "svend"], ["promote", "--model", MODEL]):
        assert forgetful.refused(*words).endswith(
            f"(it does not take the password of ada){CHECK}"
        )


@pytest.mark.slow
@requires_postgres
def test_who_may_read_compares_and_moves_nothing(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    bob, client = team.member("bob"), team.client(monkeypatch)
    before = client.get_registered_model(MODEL).aliases
    compared = bob.svend("compare", "--experiment", "svend")
    assert compared.returncode == 0, compared.stdout
    assert f"(bob may not do that){ASK}" in compared.stdout
    assert (bob.folder / "comparison" / "comparison.html").is_file()
    for words in ([*PROMOTE, "--to", "full", "--gates", "miniature"],
                  [*PROMOTE, "--to", "full", "--override", "I want it"],
                  ["evaluate", "--model", f"models:/{MODEL}/1", "--benchmarks", "accuracy"]):
        assert bob.refused(*words).endswith(f"(bob may not do that){ASK}")
    assert client.get_registered_model(MODEL).aliases == before
    assert team.tell("bob", "--may", "train") == "bob: known, may train"
    assert team.tell("bob", "--may", "read") == "bob: known, may read"
    assert bob.refused(*bob.train_command()[3:]).endswith(f"(bob may not do that){ASK}")


@pytest.mark.slow
@requires_postgres
def test_the_store_is_checked_by_who_may_not_delete(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = team.client(monkeypatch)
    mlflow.set_tracking_uri(team.address)
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password_of("ada"))
        assert check_tracking_store() == team.address
        (run,) = client.search_runs(["0"])
        assert run.data.tags["mlflow.note.content"] == "Of no use; may be deleted."
        # A server says of a run that is not there what it says of one that it does not show.
        assert tags_of("0" * 32) == {}
        assert not run_shows("0" * 32, "train/loss", 1.0)
    finally:
        mlflow.set_tracking_uri("")


@pytest.mark.slow
@requires_postgres
def test_who_may_train_sweeps_evaluates_promotes_and_compares(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = team.member("ada")
    # Her name and password in a file, as on a worker machine, in place of the environment.
    (ada.folder / ".mlflow").mkdir()
    (ada.folder / ".mlflow" / "credentials").write_text(
        f"[mlflow]\nmlflow_tracking_username = ada\nmlflow_tracking_password = {ada.password}\n"
    )
    ada = Member(ada.folder, ada.server)
    client = team.client(monkeypatch)
    sweep = ada.start(sweep_command(
        ada, "--trials", "2", "--workers", "2",
        "--storage", team.postgres.url("optuna", driver="postgresql"),
    ))
    output = sweep.communicate(timeout=600)[0]
    assert sweep.returncode == 0, output
    assert "trials: 2/2" in output
    few = ["--evaluation.problems", "6", "--gates", "miniature"]
    for words in (
        ["evaluate", "--model", f"models:/{MODEL}/1", "--benchmarks", "accuracy", *few[:2]],
        [*PROMOTE, "--to", "full", *few],
        [*PROMOTE, "--to", "production", "--override", "to try it"],
        ["compare", "--experiment", "svend"],
    ):
        done = ada.svend(*words)
        assert done.returncode == 0, done.stdout
    assert "logged        run " in done.stdout
    # What was fetched is gone with the process that fetched it.
    assert list(ada.temporary.rglob("model.safetensors")) == []
    assert client.get_registered_model(MODEL).aliases == dict.fromkeys(
        ("quick", "standard", "full", "production"), "1"
    )
    history = ada.svend("history", MODEL, "--json")
    # What people read stands before the document: both streams are one here.
    moves = json.loads(history.stdout[history.stdout.index("[\n"):])
    assert {move["by"] for move in moves} == {f"ada@{socket.gethostname()}"}
    audited = ada.svend("audit")
    found = [line.split("  ")[0] for line in audited.stdout.splitlines() if f" {MODEL} " in line]
    assert found == ["other gates", "other settings", "override"], audited.stdout
    experiment = client.get_experiment_by_name("search")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert {f"trial-{number}" for number in (0, 1)} <= {
        run.info.run_name for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert list(team.artifacts.rglob("hparams.yaml"))


@pytest.mark.slow
@requires_postgres
def test_an_interrupted_run_and_one_whose_server_went_away_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 300
    changes = {"training__max_steps": str(steps), "tracking_wait_seconds": "20"}
    with PostgresServer() as postgres:
        team = Team(tmp_path, postgres)
        ada, client = team.member("ada"), team.client(monkeypatch)
        resume = ada.train_command("--resume", training__experiment_name="cut-off", **changes)
        with team.server(MLFLOW_AUTH_ADMIN_PASSWORD=ADMIN_PASSWORD):
            team.tell("ada", "--may", "train", answer=password_of("ada"))
            process = ada.start(ada.mlflow_command(
                "--experiment-name", "cut-off", "-P", "scale=tiny", **changes))
            wait_for_saves(ada, process, 1)
            os.killpg(process.pid, signal.SIGINT)
            output = process.communicate(timeout=120)[0]
            # MLflow makes it FAILED as it exits; a process of its own puts it right.
            wait_for_status(client, "KILLED", output)
            process = ada.start(resume)
            wait_for_saves(ada, process, 1 + count_saves(ada))
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 1, output
        assert "takes nothing" in output
        assert f"step {steps}/{steps}" in output
        # Run again, and without the password that is on record by now.
        with team.server():
            refused = team.member().refused("sync", str(ada.checkpoints))
            assert refused.endswith(f"(it asks for a password){SET}")
            synced = ada.svend("sync", str(ada.checkpoints))
            assert synced.returncode == 0, synced.stdout
            assert " entries sent, run " in synced.stdout
            done = ada.run(resume)
            assert done.returncode == 0, done.stdout
            run = wait_for_status(client, "FINISHED", done.stdout)
            points = client.get_metric_history(run.info.run_id, "train/loss")
            assert [point.step for point in points] == list(range(1, steps + 1))
            assert client.get_model_version(MODEL, "1").run_id == run.info.run_id


def count_saves(member: Member) -> int:
    return len(list(member.checkpoints.glob("cut-off/step_*/metadata.json")))


def wait_for_saves(member: Member, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 180
    while count_saves(member) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_status(client: MlflowClient, status: str, output: str) -> Run:
    """Return the run that was interrupted, once it has a status."""
    deadline = time.monotonic() + 60
    experiment = client.get_experiment_by_name("cut-off")
    while True:
        (run,) = client.search_runs([experiment.experiment_id])
        if run.info.status == status:
            return run
        assert time.monotonic() < deadline, (run.info.status, output)
        time.sleep(0.2)
