"""`svend evaluate`: benchmarks on a registered version, in a real store."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from tests.conftest import Workplace
from tests.in_process import run_here

QUICK = {"evaluation.problems": "12", "evaluation.max_new_tokens": "24"}


@pytest.fixture(scope="module")
def trained(shared_workplace: Workplace) -> Workplace:
    """A workplace with one registered version of the debug model."""
    done = run_here(shared_workplace, shared_workplace.train_command(
        training__max_steps="20", evaluation__every_steps="10", training__save_steps="10",
        eval_benchmarks="[accuracy]", **{k.replace(".", "__"): v for k, v in QUICK.items()},
    ))
    assert done.returncode == 0, done.stdout
    return shared_workplace


def _evaluate(place: Workplace, model: str, benchmarks: str, **changes: str) -> Any:
    pairs = [word for key, value in {**QUICK, **changes}.items() for word in (f"--{key}", value)]
    return run_here(place, [sys.executable, "-m", "svend", "evaluate", "--model", model,
                      "--benchmarks", benchmarks, *pairs])


def _client(place: Workplace) -> MlflowClient:
    return MlflowClient(tracking_uri=place.tracking_uri)


def _version(place: Workplace) -> ModelVersion:
    return _client(place).get_model_version("svend-debug", "1")


def _samples(place: Workplace, run_id: str, benchmark: str, folder: Path) -> list[dict[str, Any]]:
    client = _client(place)
    (step,) = client.list_artifacts(run_id, "evaluation")
    path = client.download_artifacts(run_id, f"{step.path}/{benchmark}.json", str(folder))
    table = json.loads(Path(path).read_text(encoding="utf-8"))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def test_a_run_measures_its_benchmarks_by_schedule_and_at_the_end(trained: Workplace) -> None:
    client = _client(trained)
    run = client.get_run(_version(trained).run_id)
    history = client.get_metric_history(run.info.run_id, "eval/accuracy")
    assert [point.step for point in history] == [10, 20]
    assert run.data.metrics["eval/accuracy/n"] == 12
    assert run.data.metrics["eval/accuracy/low_95"] <= run.data.metrics["eval/accuracy"]
    steps = [item.path for item in client.list_artifacts(run.info.run_id, "evaluation")]
    assert steps == ["evaluation/step_00000010", "evaluation/step_00000020"]
    # tool_accuracy was not asked for, and what was not measured does not pass.
    assert run.data.metrics["gate/full/tool_accuracy"] == 0
    assert "full" not in _version(trained).aliases


def test_a_version_is_measured_and_the_record_leads_from_one_to_the_other(
    trained: Workplace, tmp_path: Path
) -> None:
    done = _evaluate(trained, "models:/svend-debug@standard",
                     "accuracy,tool_accuracy,latency_p99,perplexity",
                     **{"evaluation.latency_prompt_tokens": "8",
                        "evaluation.latency_new_tokens": "8", "evaluation.latency_answers": "5"})
    assert done.returncode == 0, done.stdout
    assert "production: not decided; needs gsm8k_accuracy, safety_accuracy too" in done.stdout
    version = _version(trained)
    run = _client(trained).get_run(version.tags["svend.evaluation_run_id"])
    assert run.data.tags["svend.model"] == "models:/svend-debug/1"
    assert run.data.tags["svend.checkpoint_sha256"] == version.tags["svend.checkpoint_sha256"]
    assert run.data.tags["mlflow.parentRunId"] == version.run_id
    assert run.info.status == "FINISHED"
    for metric in ("accuracy", "tool_accuracy", "latency_p99", "perplexity"):
        assert f"eval/{metric}" in run.data.metrics
        value = run.data.metrics[f"eval/{metric}"]
        assert version.tags[f"eval.{metric}"].startswith(f"{value:.6g}")
    assert "gate.full.tool_accuracy" in version.tags
    samples = _samples(trained, run.info.run_id, "tool_execution", tmp_path)
    assert len(samples) == 12
    assert {"problem", "group", "verdict", "prompt", "answer", "expected", "tool_calls"} <= set(
        samples[0]
    )
    assert all("tools: [" in sample["prompt"] for sample in samples)
    # A measurement of a gate is on record; no alias follows from it.
    assert sorted(version.aliases) == ["quick", "standard"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_answers_whatever_the_batch_size(
    trained: Workplace, tmp_path: Path
) -> None:
    answers = []
    for batch_size in ("1", "32"):
        done = _evaluate(
            trained, "models:/svend-debug/1", "tool_accuracy",
            **{"evaluation.batch_size": batch_size, "evaluation.temperature": "0.8",
               "evaluation.seed": "3"},
        )
        assert done.returncode == 0, done.stdout
        run_id = _version(trained).tags["svend.evaluation_run_id"]
        answers.append(_samples(trained, run_id, "tool_execution", tmp_path / batch_size))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("model", "benchmarks", "named"), [
    pytest.param("models:/svend-none@full", "accuracy", "there are the models svend-debug",
                 marks=pytest.mark.slow),
    pytest.param("models:/svend-debug@full", "accuracy", "svend-debug has the aliases @",
                 marks=pytest.mark.slow),
    pytest.param("models:/svend-debug/99", "accuracy", "models:/svend-debug/99",
                 marks=pytest.mark.slow),
    pytest.param("svend-debug", "accuracy", "give models:/NAME/VERSION or models:/NAME@ALIAS",
                 marks=pytest.mark.slow),
    ("models:/svend-debug/1", "acuracy", "eval_benchmarks = acuracy: must be one of"),
    ("models:/svend-debug/1", "gsm8k", "evaluation.paths"),
])
def test_what_cannot_be_evaluated_is_said_in_one_line(
    trained: Workplace, model: str, benchmarks: str, named: str
) -> None:
    done = _evaluate(trained, model, benchmarks)
    assert done.returncode == 1
    (error,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert named in error
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_a_promotion_measures_again_what_is_on_record_for_other_data(trained: Workplace) -> None:
    done = run_here(trained, [
        sys.executable, "-m", "svend", "promote", "--model", "svend-debug", "--version", "1",
        "--to", "standard", "--training.heldout_sequences", "4",
    ])
    assert done.returncode == 0, done.stdout
    assert "svend-debug version 1: renewed, standard" in done.stdout
    assert "gradient_norm: on record, measured by run" in done.stdout
    assert "loss: on record" not in done.stdout
    history = trained.run(
        [sys.executable, "-m", "svend", "history", "svend-debug", "--json"]
    ).stdout
    told = json.loads(history[history.index("["):])  # behind what goes to standard error
    rows = {row["metric"]: row for row in told[-1]["decided"]["rows"]}
    assert rows["loss"]["sample_size"] == 4
    run = _client(trained).get_run(rows["loss"]["run_id"])
    assert run.info.run_name == "promote-svend-debug-v1-to-standard"
    assert run.data.metrics["eval/heldout_loss"] == rows["loss"]["value"]
    assert rows["gradient_norm"]["run_id"] == _version(trained).run_id
    audited = run_here(
        trained, [sys.executable, "-m", "svend", "audit", "--model", "svend-debug"]
    )
    assert audited.returncode == 1
    assert "was decided with training.heldout_sequences = 4" in audited.stdout


def _files(place: Workplace) -> Path:
    return next(place.folder.glob("mlruns/**/models/*/artifacts/model.safetensors")).parent


@pytest.mark.parametrize(("spoil", "named"), [
    ("weights", "is not what was registered"),
    pytest.param("no weights", "model.safetensors is missing", marks=pytest.mark.slow),
    ("tokenizer", "is not what was registered"),
])
def test_a_version_whose_files_are_not_what_they_were_is_refused_in_one_line(
    trained: Workplace, spoil: str, named: str
) -> None:
    folder = _files(trained)
    name = "model.safetensors" if "weights" in spoil else "tokenizer.json"
    kept = trained.folder / f"kept-{name}"
    # A copy, for the file is a hard link of the run's own.
    shutil.move(folder / name, kept)
    try:
        if spoil != "no weights":
            (folder / name).write_bytes(kept.read_bytes()[:-1] + b"x")
        done = _evaluate(trained, "models:/svend-debug/1", "accuracy")
    finally:
        (folder / name).unlink(missing_ok=True)
        shutil.move(kept, folder / name)
    assert done.returncode == 1
    (error,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert named in error
    assert "Traceback" not in done.stdout
