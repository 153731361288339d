"""A registry with versions whose evidence is on record, made in moments: nothing is trained."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import mlflow
import pytest
from mlflow import MlflowClient

from svend.data.records import file_digest
from svend.pipeline.benchmarking import measured_how
from svend.pipeline.config import GatesConfig, PipelineConfig, load_config
from svend.pipeline.console import make_console
from svend.pipeline.moves import History, Move, MoveKind, Moves, Registration
from svend.pipeline.promotion.climb import Climb, Promotion
from svend.pipeline.promotion.evidence import LOGGED_AS
from svend.pipeline.schema import to_yaml
from svend.pipeline.validation import GateLevel
from svend.tracking.registry import open_version, register_checkpoint
from tests.conftest import DEBUG_OVERRIDES
from tests.prepared import lay_empty_store

MODEL = "svend-raced"
# What passes every level, but for the metrics that a benchmark must be read for.
GOOD = {"loss": 2.0, "nonfinite_parameters": 0.0, "gradient_norm": 1.0, "perplexity": 7.4,
        "latency_p99": 0.5}
# Gates of levels that are decided without problems to read.
GATES = GatesConfig()
GATES.full = [replace(gate, name="sharper", threshold=50.0) for gate in GATES.standard
              if gate.metric_name == "perplexity"]
GATES.production = [gate for gate in GATES.production if gate.metric_name == "latency_p99"]


@dataclass(frozen=True)
class MadeVersion:
    """A version with its number, its run and the folder of its files."""

    model: str
    version: str
    run_id: str
    folder: Path
    checkpoint_sha256: str


def model_of(request: pytest.FixtureRequest) -> str:
    """Return a model's name for one test alone."""
    return "m-" + "".join(c if c.isalnum() else "-" for c in request.node.name)[:80]


@contextmanager
def store(folder: Path) -> Iterator[str]:
    """Have MLflow use a store of its own in a folder, which becomes the current one."""
    lay_empty_store(folder / "mlflow.db")
    before, uri = Path.cwd(), f"sqlite:///{folder / 'mlflow.db'}"
    # MLflow keeps the experiment in the environment too, which other tests' processes inherit.
    with mock.patch.dict(os.environ):
        os.chdir(folder)
        mlflow.set_tracking_uri(uri)
        try:
            yield uri
        finally:
            mlflow.set_tracking_uri("")
            os.chdir(before)


@functools.cache
def config() -> PipelineConfig:
    """Return the configuration that the versions were made with."""
    return load_config({}, list(DEBUG_OVERRIDES.items()))


def make_version(
    folder: Path, number: int, measured: dict[str, float] | None = None, model: str = MODEL,
    more: dict[str, str] | None = None,
) -> MadeVersion:
    """Register a version with measurements on record that a run of its own shows.

    more: texts of files beside its config and its weights, by name.
    """
    source = folder / f"{model}-{number}"
    source.mkdir(parents=True)
    (source / "config.yaml").write_text(to_yaml(config()), encoding="utf-8")
    (source / "model.safetensors").write_bytes(f"weights {number} of {model}".encode())
    for name, text in (more or {}).items():
        (source / name).write_text(text, encoding="utf-8")
    sha256 = file_digest(source / "model.safetensors")
    client = MlflowClient()
    experiment = mlflow.set_experiment("made").experiment_id
    run_id = client.create_run(experiment, run_name=f"made-{number}").info.run_id
    moves = Moves.open(model, "made by a test")
    registered = register_checkpoint(
        model, sorted(source.iterdir()), run_id, 7, {},
        {"svend.checkpoint_sha256": sha256, "svend.stage": "none"}, "made",
    )
    registration = Registration(
        checkpoint_sha256=sha256, data_fingerprint="d" * 64, tokenizer_sha256="e" * 64, step=7,
        files=registered.files,
    )
    moves.add(Move(kind=MoveKind.REGISTERED, version=registered.version, run_id=run_id,
                   registration=registration))
    record_measurements(moves, run_id, sha256, GOOD if measured is None else measured)
    place = open_version(f"models:/{model}/{registered.version}").folder
    return MadeVersion(model, registered.version, run_id, place, sha256)


def record_measurements(
    moves: Moves, run_id: str, sha256: str, measured: dict[str, float], *, shown: bool = True
) -> None:
    """Put measurements on record; `shown` says whether the run shows them too."""
    client = MlflowClient()
    rows = []
    for metric, value in measured.items():
        if shown:
            client.log_metric(run_id, LOGGED_AS.get(metric, f"eval/{metric}"), value, step=7)
        rows.append({
            "metric": metric, "value": value, "low_95": None, "high_95": None, "low_bound": None,
            "high_bound": None, "confidence": None, "sample_size": None,
            "settings": measured_how(metric, config()), "step": 7, "checkpoint_sha256": sha256,
            "data_fingerprint": "d" * 64, "run_id": run_id,
        })
    moves.keep_rows(rows)


def promote(
    to: GateLevel, version: str | None = None, *, model: str = MODEL, gates: GatesConfig = GATES
) -> list[Move]:
    """Have a version climb, as `svend promote` does."""
    return Climb(
        Promotion(model=model, to=to, version=version, gates=gates), make_console()
    ).run()


def history(model: str = MODEL) -> History:
    """Return a model's moves up to now."""
    return Moves.find(model).history()

