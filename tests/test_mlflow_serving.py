"""MLflow's own ways to use a registered version: load_model, and its scoring server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from svend.pipeline.config import load_config
from svend.pipeline.runner import ScaleRunner
from tests.conftest import DEBUG_OVERRIDES
from tests.prepared import data_cache
from tests.registry import store
from tests.servers import free_port

pytestmark = [
    pytest.mark.slow,
    # MLflow warns of itself as mlflow.pyfunc is imported.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]
QUESTION = {"messages": [{"role": "user", "content": "What is 3 * 4?"}], "max_tokens": 8}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    with store(folder) as address:
        result = ScaleRunner(load_config({}, list({
            **DEBUG_OVERRIDES, "training.max_steps": "20", "training.save_steps": "20",
            "training.compile": "off",
            "checkpoint_dir": str(folder / "checkpoints"), "data.cache_dir": str(data_cache()),
        }.items()))).run()
        assert result.success, result.reason
        yield address


def test_load_model_answers_chats(uri: str) -> None:
    import mlflow.pyfunc
    import pandas as pd

    assert uri
    model = mlflow.pyfunc.load_model("models:/svend-debug@standard")
    (one,) = model.predict(QUESTION)
    assert one["choices"][0]["message"]["role"] == "assistant"
    assert one["usage"]["completion_tokens"] == 8
    both = model.predict(pd.DataFrame({"messages": [QUESTION["messages"]] * 2,
                                       "max_tokens": [8, 8]}))
    assert [answer["choices"] for answer in both] == [one["choices"]] * 2


def test_mlflow_models_serve_answers_on_a_cpu(uri: str, tmp_path: Path) -> None:
    import json

    port = free_port()
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri,
                   "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    server = subprocess.Popen(
        ["mlflow", "models", "serve", "-m", "models:/svend-debug@standard", "--env-manager",
         "local", "-p", str(port)],
        env=environment, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        answer: Any = None
        deadline = time.monotonic() + 120
        while answer is None and time.monotonic() < deadline and server.poll() is None:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations", json.dumps(QUESTION).encode(),
                {"Content-Type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    answer = json.load(response)
            except urllib.error.URLError:
                time.sleep(0.5)
        assert answer[0]["usage"]["completion_tokens"] == 8
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
