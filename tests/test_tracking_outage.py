"""A real tracking server that is killed, comes back, is slow, or answers errors, beside a run."""

from __future__ import annotations

import http.client
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import mlflow
import pytest

from svend.bench.chaos import MEASURED_PREFIXES
from svend.tracking import spool as spool_module
from svend.tracking.run import TrackedRun
from svend.tracking.state import StoredRun, read_runs
from tests.conftest import Workplace
from tests.registry import store
from tests.servers import free_port, tracking_server

OUTAGE_SECONDS = 120.0


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[tuple[str, dict[str, float]]]:
    """A server in front of another; `fault` says how many seconds it waits and what it answers."""
    fault: dict[str, float] = {"seconds": 0.0, "status": 0}
    place = urlparse(upstream)

    class Proxy(BaseHTTPRequestHandler):
        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            time.sleep(fault["seconds"])
            if fault["status"]:
                self.send_error(int(fault["status"]))
                return
            connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.getheader("Content-Type", ""))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            connection.close()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fault
    finally:
        server.shutdown()
        server.server_close()


def _points(run: StoredRun) -> dict[str, list[object]]:
    """Each metric's points: by step and value, or by step where the value is a time."""
    return {
        key: [step if key.startswith((*MEASURED_PREFIXES, "save/")) else (step, value)
              for step, value in points]
        for key, points in run.metrics.items() if not key.startswith("system/")
    }


@pytest.mark.slow
def test_a_server_that_is_slow_or_answers_errors_delays_the_points_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "FLUSH_SECONDS", 0.2)
    monkeypatch.setattr(spool_module, "LONGEST_PAUSE_SECONDS", 1.0)
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with (tracking_server(database, tmp_path / "server") as upstream,
          faulty_proxy(upstream) as (address, fault), store(tmp_path)):
        mlflow.set_tracking_uri(address)
        run = TrackedRun.begin("faulty", "run")
        run.spool_to(tmp_path / "spool", print)
        longest_seconds = 0.0
        for seconds, status in ((0, 0), (0, 503), (0, 500), (0, 429), (3, 0), (0, 404), (0, 0)):
            fault.update(seconds=seconds, status=status)
            until = time.monotonic() + 3
            while time.monotonic() < until:
                started = time.monotonic()
                step = round(1000 * started)
                run.log_metrics({"train/loss": 1 / step}, step)
                longest_seconds = max(longest_seconds, time.monotonic() - started)
                time.sleep(0.01)
        assert run.end("FINISHED", None, 60) == []
        (stored,) = read_runs(upstream, "faulty")
    logged = [line for line in (tmp_path / "spool" / "entries.jsonl").read_text().splitlines()
              if "train/loss" in line]
    assert len(stored.metrics["train/loss"]) == len(logged) > 500
    assert stored.status == "FINISHED"
    # Logging never waits for the server; the bound is that of a machine with other work.
    assert longest_seconds < 2


@pytest.mark.slow
def test_a_run_whose_server_is_killed_for_two_minutes_and_that_is_killed_itself_loses_nothing(
    tmp_path: Path,
) -> None:
    workplace = Workplace(tmp_path)
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    steps = 3000
    changes = {"training__max_steps": str(steps), "training__save_steps": "500",
               "training__quick_gate_steps": "100", "tracking_wait_seconds": "600"}
    with ExitStack() as second_life:
        with ExitStack() as first_life:
            address = first_life.enter_context(
                tracking_server(workplace.tracking_uri, tmp_path / "server", port))
            whole = workplace.start(workplace.train_command(
                training__experiment_name="whole", **changes), MLFLOW_TRACKING_URI=uri)
            output = whole.communicate(timeout=600)[0]
            assert whole.returncode == 0, output
            process = workplace.start(workplace.train_command(
                training__experiment_name="outage", **changes), MLFLOW_TRACKING_URI=uri)
            _wait_for_point(address, "outage", 100)
        # The server is gone, with all of its processes.
        down = time.monotonic()
        time.sleep(20)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
        process = workplace.start(workplace.train_command(
            "--resume", training__experiment_name="outage", **changes), MLFLOW_TRACKING_URI=uri)
        time.sleep(max(0.0, down + OUTAGE_SECONDS - time.monotonic()))
        assert process.poll() is None, process.communicate()[0]
        second_life.enter_context(
            tracking_server(workplace.tracking_uri, tmp_path / "server", port))
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output
        assert "takes nothing" in output and "answers again" in output
        (without,) = read_runs(address, "whole")
        (with_outage,) = read_runs(address, "outage")
    assert len(with_outage.metrics["train/loss"]) == steps
    assert _points(with_outage) == _points(without)
    assert with_outage.status == without.status == "FINISHED"
    assert with_outage.artifacts == without.artifacts
    assert [list(v["aliases"]) for v in with_outage.versions.values()] == [["quick", "standard"]]


def _wait_for_point(address: str, experiment: str, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for run in read_runs(address, experiment):
            if any(point[0] >= step for point in run.metrics.get("train/loss", [])):
                return
        time.sleep(0.5)
    raise AssertionError(f"no point at step {step} in two minutes")
