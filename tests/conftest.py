"""What the tests of whole runs share: a small model, and real processes against a real store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from svend.pipeline import record
from svend.planning import plan
from tests.prepared import data_cache, keep_in, lay_empty_store

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

# The smallest model that still learns the embedded data's first regularities in seconds.
DEBUG_OVERRIDES = {
    "model.name": "svend-debug",
    "model.hidden_size": "64",
    "model.num_hidden_layers": "2",
    "model.num_attention_heads": "4",
    "model.num_key_value_heads": "2",
    "model.intermediate_size": "128",
    "model.vocab_size": "4096",
    "model.max_position_embeddings": "256",
    "data.max_seq_length": "128",
    "data.num_samples": "200",
    "training.learning_rate": "3e-3",
    "training.max_steps": "40",
    "training.save_steps": "20",
    "training.quick_gate_steps": "10",
    "training.heldout_sequences": "8",
    "eval_benchmarks": "[]",
}


@dataclass(frozen=True)
class Workplace:
    """A folder with its own tracking store and checkpoints."""

    folder: Path

    def __post_init__(self) -> None:
        lay_empty_store(self.folder / "mlflow.db")

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {
            **os.environ,
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1",
            # Two processes with two spinning threads each starve one another on two cores.
            "OMP_NUM_THREADS": "1",
        }

    def overrides(self, **changes: str) -> dict[str, str]:
        """The debug model's settings, with places in this folder; `__` stands for a dot."""
        return {
            **DEBUG_OVERRIDES,
            "checkpoint_dir": str(self.checkpoints),
            "data.cache_dir": str(data_cache()),
            **{key.replace("__", "."): value for key, value in changes.items()},
        }

    def train_command(self, *options: str, **changes: str) -> list[str]:
        pairs = [word for k, v in self.overrides(**changes).items() for word in (f"--{k}", v)]
        return [sys.executable, "-m", "svend", "train", *options, *pairs]

    def mlflow_command(self, *options: str, **changes: str) -> list[str]:
        pairs = [w for k, v in self.overrides(**changes).items() for w in ("-P", f"{k}={v}")]
        return ["mlflow", "run", str(ROOT), "--env-manager", "local", *options, *pairs]

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        # The folder is this one: what a run leaves must not land in the project's.
        return subprocess.Popen(
            command, cwd=self.folder, env={**self.environment, **environment}, text=True,
            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, text=True, check=False, timeout=180,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="session", autouse=True)
def _prepared_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    shared = tmp_path_factory.getbasetemp()
    # xdist gives each process a folder in that of the session.
    keep_in((shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "prepared")


@pytest.fixture(scope="session", autouse=True)
def _machine_looked_at_once() -> Iterator[None]:
    """Have runs in this process measure the machine and list its packages only once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "installed_packages", cache(record.installed_packages))
        patch.setattr(plan, "measure_matmul_peak", cache(plan.measure_matmul_peak))
        yield


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture(scope="module")
def shared_workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("workplace"))
