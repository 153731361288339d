"""The example of docs/promotion.md: a line where production moves, from a real tracking server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from svend.pipeline.validation import GateLevel
from tests.registry import make_version, promote, store
from tests.servers import free_port, tracking_server

EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "production_webhook.py"


@pytest.mark.slow
def test_a_receiver_is_told_when_production_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A local address, and not https: both only for trying it out.
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http,https")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    with store(tmp_path), tracking_server(f"sqlite:///{tmp_path}/server.db",
                                          tmp_path / "server") as address:
        mlflow.set_tracking_uri(address)
        receiver = subprocess.Popen(
            [sys.executable, str(EXAMPLE), "--server", address, "--port", str(free_port())],
            stdout=subprocess.PIPE, text=True,
        )
        try:
            assert receiver.stdout is not None
            assert receiver.stdout.readline().startswith("listening")
            for number in (1, 2):
                make_version(tmp_path / "made", number)
                promote(GateLevel.PRODUCTION, str(number))
            told = [receiver.stdout.readline().strip() for _ in range(2)]
        finally:
            receiver.kill()
            receiver.communicate()
    assert told == ["production of svend-raced is now version 1",
                    "production of svend-raced is now version 2"]
