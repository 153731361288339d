"""Whole runs in real processes: tracked, gated, registered, killed, resumed, refused."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file

from svend import __version__
from svend.pipeline import replica
from svend.pipeline.checkpoints import CheckpointManager, verify
from svend.pipeline.config import PipelineConfig
from svend.pipeline.schema import build, read_yaml
from svend.training.loop import StepMetrics, train_steps
from svend.training.state import TrainState
from tests.conftest import SHARED_DATA, Workplace
from tests.in_process import run_here

GSM8K = SHARED_DATA / "gsm8k"


def only_run(workplace: Workplace, experiment: str) -> Run:
    runs = runs_of(workplace, experiment)
    assert len(runs) == 1
    return runs[0]


def runs_of(workplace: Workplace, experiment: str) -> list[Run]:
    client = MlflowClient(workplace.tracking_uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def losses(workplace: Workplace, run: Run, metric: str = "train/loss") -> list[tuple[int, float]]:
    history = MlflowClient(workplace.tracking_uri).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.value) for point in history)


def wait_for_checkpoint(workplace: Workplace, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not list(workplace.checkpoints.glob("*/step_*/metadata.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(shared_workplace: Workplace) -> tuple[Run, str]:
    done = shared_workplace.run(
        shared_workplace.mlflow_command("--experiment-name", "finished", "-P", "scale=tiny")
    )
    assert done.returncode == 0, done.stdout
    return only_run(shared_workplace, "finished"), done.stdout


def test_a_run_is_the_one_that_mlflow_run_made_and_ends_finished(
    finished: tuple[Run, str],
) -> None:
    run, output = finished
    assert run.info.status == "FINISHED"
    assert f"in run with ID '{run.info.run_id}'" in output
    assert run.info.run_name == "tiny-embedded"


def test_the_plan_comes_first_and_the_next_steps_last(finished: tuple[Run, str]) -> None:
    run, output = finished
    order = ["Plan: svend-debug", "peak memory", "step 1/40", "step 40/40", "Verdicts on step_",
             "checkpoints ", "registered ", "mlflow ui --backend-store-uri", run.info.run_id]
    places = [output.index(order[0])]
    for text in order[1:]:
        places.append(output.index(text, places[-1]))
    assert "for trying the pipeline" in output


def test_parameters_tags_and_artifacts_are_enough_to_run_it_again(
    finished: tuple[Run, str], shared_workplace: Workplace
) -> None:
    run, _ = finished
    assert run.data.params["config.training.learning_rate"] == "0.003"
    assert run.data.params["config.model.hidden_size"] == "64"
    assert run.data.params["config.gates.standard.perplexity"] == "perplexity < 1000"
    for tag in ("svend.data_fingerprint", "svend.tokenizer_sha256", "svend.device",
                "svend.package.torch"):
        assert run.data.tags[tag]
    assert run.data.tags["svend.version"] == __version__
    client = MlflowClient(shared_workplace.tracking_uri)
    names = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert names >= {"config.yaml", "tokenizer.json", "packages.txt", "verdicts.csv",
                     "tokenizer_config.json", "data_report.html", "data_report.csv"}
    config_path = client.download_artifacts(run.info.run_id, "config.yaml")
    config = build(PipelineConfig, read_yaml(Path(config_path)))
    assert config == config.resolve()
    assert config.training.learning_rate == 3e-3


def test_every_step_is_logged_once_on_every_axis(
    finished: tuple[Run, str], shared_workplace: Workplace
) -> None:
    run, _ = finished
    for metric in ("train/loss", "train/learning_rate", "train/gradient_norm", "train/tokens",
                   "train/flops", "train/tokens_per_second", "train/peak_fraction"):
        steps = [step for step, _ in losses(shared_workplace, run, metric)]
        assert steps == list(range(1, 41)), metric
    heldout = dict(losses(shared_workplace, run, "eval/heldout_loss"))
    assert sorted(heldout) == [0, 20, 40]
    assert heldout[40] < heldout[20] < heldout[0]
    quick = [step for step, _ in losses(shared_workplace, run, "gate/quick/no_nan")]
    assert {10, 20, 30, 40} <= set(quick)
    standard = [step for step, _ in losses(shared_workplace, run, "gate/standard/perplexity")]
    assert standard == [20, 40]
    assert any(name.startswith("system/") for name in run.data.metrics)
    epochs = {name: value for name, value in run.data.metrics.items() if "data/epochs/" in name}
    assert len(epochs) == 3
    assert all(value > 0 for value in epochs.values())
    assert 0 < run.data.metrics["eval/bits_per_byte"] < run.data.metrics["eval/heldout_loss"]


def test_what_training_waited_for_is_measured(finished: tuple[Run, str]) -> None:
    run, output = finished
    metrics = run.data.metrics
    parts = ("evaluating", "saving", "tracking", "data")
    spent = [metrics[f"measured/{part}_seconds"] for part in parts]
    assert all(seconds > 0 for seconds in spent)
    assert sum(spent) < metrics["measured/seconds"]
    assert metrics["measured/start_seconds"] > 0
    assert "first step after" in output


@pytest.mark.slow
def test_a_profile_is_a_trace_and_a_table_in_the_run(workplace: Workplace) -> None:
    done = workplace.run(workplace.train_command(
        "--profile", training__max_steps="2", training__validation_gates__perplexity="1e9"
    ))
    assert done.returncode == 0, done.stdout
    run = only_run(workplace, "svend")
    assert run.data.tags["svend.profile"] == "profile/"
    client = MlflowClient(workplace.tracking_uri)
    parts = Path(client.download_artifacts(run.info.run_id, "profile/parts.txt")).read_text()
    assert len(parts.splitlines()) == 1 + 10  # the heading, and the most expensive parts
    assert parts.splitlines()[1].strip() in done.stdout
    assert "aten::mm" in parts
    trace = client.download_artifacts(run.info.run_id, "profile/trace.json.gz")
    with gzip.open(trace) as stream:
        events = json.load(stream)["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)


def test_the_datasets_are_inputs_of_the_run(finished: tuple[Run, str]) -> None:
    run, _ = finished
    inputs = {
        (entry.dataset.name, tag.value)
        for entry in run.inputs.dataset_inputs for tag in entry.tags
        if tag.key == "mlflow.data.context"
    }
    sources = ("gym_reasoning", "gym_tool_use", "gym_general")
    assert inputs == {(name, part) for name in sources for part in ("train", "heldout")}


def test_the_best_checkpoint_is_registered_with_its_evidence_and_as_safetensors(
    finished: tuple[Run, str], shared_workplace: Workplace
) -> None:
    run, _ = finished
    client = MlflowClient(shared_workplace.tracking_uri)
    aliases = client.get_registered_model("svend-debug").aliases
    assert set(aliases) == {"quick", "standard"}
    version = client.get_model_version_by_alias("svend-debug", "standard")
    best = CheckpointManager(shared_workplace.checkpoints / "finished").best()
    assert best is not None
    assert version.tags["svend.checkpoint_sha256"] == best.weights_sha256
    assert version.tags["svend.run_id"] == run.info.run_id
    assert version.tags["svend.version"] == __version__
    assert version.tags["gate.standard.perplexity"].startswith("passed: perplexity = ")
    location = client.get_logged_model(version.source.removeprefix("models:/")).artifact_location
    folder = Path(location.removeprefix("file://"))
    state = load_file(folder / "model.safetensors")
    saved = torch.load(best.path / "model.pt", weights_only=True)
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    # Nothing of it is left in the run's folder, and nothing in the version's is a pickle.
    assert not list(shared_workplace.checkpoints.glob("*/.registering-*"))
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ".yaml", ".txt",
                                                          ""}
    assert sum(tensor.numel() for tensor in state.values()) == run.data.metrics["plan/parameters"]


def test_a_run_killed_and_resumed_equals_the_one_that_never_was(
    workplace: Workplace, finished: tuple[Run, str], shared_workplace: Workplace
) -> None:
    whole, _ = finished
    # Other folders, a cache before them, and not through `mlflow run`: none may change what is
    # computed. The cache is lost with its machine; what had arrived is enough.
    cache = workplace.folder / "local"
    process = workplace.start(workplace.train_command(checkpoint_cache_dir=str(cache)))
    wait_for_checkpoint(workplace, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    killed = only_run(workplace, "svend")
    assert killed.info.status == "RUNNING"
    assert list(cache.glob("svend-*/step_*"))
    shutil.rmtree(cache)
    resumed = run_here(
        workplace, workplace.train_command("--resume", checkpoint_cache_dir=str(cache))
    )
    assert resumed.returncode == 0, resumed.stdout
    again = only_run(workplace, "svend")
    assert (again.info.run_id, again.info.status) == (killed.info.run_id, "FINISHED")
    assert losses(workplace, again) == losses(shared_workplace, whole)
    folders = workplace.checkpoints / "svend", shared_workplace.checkpoints / "finished"
    for name in ("model.pt", "optimizer.pt", "scheduler.pt", "extra_state.pt"):
        mine, theirs = (
            torch.load(folder / "step_00000040" / name, weights_only=True) for folder in folders
        )
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_an_interrupted_run_is_killed_with_a_reason_and_goes_on_from_where_it_stopped(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted_at_15(state: TrainState, *others: Any) -> Iterator[StepMetrics]:
        for metrics in train_steps(state, *others):
            if state.step == 15:
                os.kill(os.getpid(), signal.SIGINT)
            yield metrics

    with monkeypatch.context() as patch:
        patch.setattr(replica, "train_steps", interrupted_at_15)
        stopped = run_here(workplace, workplace.train_command())
    assert stopped.returncode == 130, stopped.stdout
    assert "Traceback" not in stopped.stdout
    killed = only_run(workplace, "svend")
    assert killed.info.status == "KILLED"
    assert killed.data.tags["svend.reason"].startswith("interrupted by SIGINT at step 15 of 40")
    [last] = CheckpointManager(workplace.checkpoints / "svend").list_checkpoints()
    assert last.step == 15
    verify(last)
    resumed = run_here(workplace, workplace.train_command("--resume"))
    assert resumed.returncode == 0, resumed.stdout
    again = only_run(workplace, "svend")
    assert (again.info.run_id, again.info.status) == (killed.info.run_id, "FINISHED")
    assert [step for step, _ in losses(workplace, again)] == list(range(1, 41))


@pytest.mark.slow
def test_an_interrupted_mlflow_run_is_killed_with_a_reason_and_goes_on_in_the_same_run(
    workplace: Workplace,
) -> None:
    options = ("--experiment-name", "stop", "-P", "scale=tiny")
    changes = {"training__max_steps": "2000", "training__validation_gates__perplexity": "1e9"}
    process = workplace.start(workplace.mlflow_command(*options, **changes))
    wait_for_checkpoint(workplace, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in output.split("interrupted by")[0]
    deadline = time.monotonic() + 30
    while (run := only_run(workplace, "stop")).info.status != "KILLED":
        assert time.monotonic() < deadline, (run.info.status, output)
        time.sleep(0.2)
    assert run.data.tags["svend.reason"].startswith("interrupted by SIGINT at step ")
    manager = CheckpointManager(workplace.checkpoints / "stop")
    last = manager.list_checkpoints()[-1]
    assert f"at step {last.step} of 2000" in run.data.tags["svend.reason"]
    verify(last)

    refused = workplace.run(workplace.mlflow_command(*options, "-P", "resume=true"))
    assert "training.max_steps was 2000, now 40" in refused.stdout
    assert refused.returncode != 0
    [attempt] = [r for r in runs_of(workplace, "stop") if r.info.run_id != run.info.run_id]
    assert attempt.info.status == "FAILED"
    assert attempt.data.tags["svend.reason"].startswith("cannot resume ")
    [untouched] = [r for r in runs_of(workplace, "stop") if r.info.run_id == run.info.run_id]
    assert untouched.info.status == "KILLED"
    assert untouched.data.tags["svend.reason"] == run.data.tags["svend.reason"]

    process = workplace.start(
        workplace.mlflow_command(*options, "-P", "resume=true", **changes)
    )
    deadline = time.monotonic() + 90
    while manager.list_checkpoints()[-1].step == last.step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # What the killed process had not told the store yet is on the disk.
    sent = workplace.run(
        [sys.executable, "-m", "svend", "sync", str(workplace.checkpoints / "stop")]
    )
    assert sent.returncode == 0 and "entries sent" in sent.stdout, sent.stdout
    by_name = {r.info.run_name: r for r in runs_of(workplace, "stop")}
    resumption = by_name["resumption of tiny-embedded"]
    assert resumption.data.tags["mlflow.parentRunId"] == run.info.run_id
    assert len(by_name) == 3
    steps = [step for step, _ in losses(workplace, by_name["tiny-embedded"])]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > last.step


def write_lines(path: Path, count: int, *, broken_line: int | None = None) -> Path:
    lines = [json.dumps({"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"})
             for n in range(count)]
    if broken_line is not None:
        lines[broken_line - 1] = '{"question": "What is 1 + 1?", "answer":'
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "changes", "named"),
    [
        pytest.param(("--data", "gsm8k"), {"data__path": "broken.jsonl"},
                     ("broken.jsonl:17", "not JSON"), marks=pytest.mark.slow),
        pytest.param(("--data", "gsm8k"), {"data__path": "empty.jsonl"}, ("gsm8k", "empty"),
                     marks=pytest.mark.slow),
        (("--data", "gsm8k"), {"data__path": "nowhere"}, ("nowhere", "no such file")),
        ((), {"training__device": "cuda"}, ("training.device", "cuda")),
        pytest.param((), {"training__device": "cpu", "training__float8": "true"},
                     ("training.float8", "H100"), marks=pytest.mark.slow),
        ((), {"training__validation_gates__perplexity": "1.5"},
         ("STANDARD gate failed at step 20", "perplexity")),
        ((), {"model__hidden_size": "65536", "model__num_hidden_layers": "400"},
         ("needs about", "available")),
    ],
    ids=["malformed", "empty", "missing", "no-cuda", "float8", "gate", "memory"],
)
def test_a_mistake_ends_the_run_failed_with_the_line_that_is_printed(
    workplace: Workplace, options: tuple[str, ...], changes: dict[str, str],
    named: tuple[str, ...],
) -> None:
    if changes.get("training__device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    write_lines(workplace.folder / "broken.jsonl", 40, broken_line=17)
    write_lines(workplace.folder / "empty.jsonl", 0)
    done = run_here(workplace, workplace.train_command(*options, **changes))
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    [line] = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert all(text in line for text in named)
    run = only_run(workplace, "svend")
    assert run.info.status == "FAILED"
    assert run.data.tags["svend.reason"] == line.removeprefix("error: ")
    left = {path.name for path in workplace.checkpoints.glob("svend/*")}
    assert left <= {
        ".lock", "run.json", "config.yaml", "tracking", "verdicts.jsonl", "step_00000020"
    }
    assert bool(left) == ("gate" in line)


def test_a_mistake_in_the_configuration_fails_the_run_that_was_made_for_it(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(workplace.tracking_uri)
    run_id = client.create_run(client.create_experiment("wrong")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    done = run_here(workplace, workplace.train_command("--scale", "huge"))
    assert done.returncode == 1
    run = only_run(workplace, "wrong")
    assert (run.info.run_id, run.info.status) == (run_id, "FAILED")
    assert run.data.tags["svend.reason"].startswith("unknown scale 'huge': choose one of tiny")


@pytest.mark.slow
def test_a_mistake_in_the_configuration_fails_the_run_that_mlflow_run_made(
    workplace: Workplace,
) -> None:
    done = workplace.run(
        workplace.mlflow_command("--experiment-name", "wrong", "-P", "scale=huge")
    )
    assert done.returncode != 0
    run = only_run(workplace, "wrong")
    assert run.info.status == "FAILED"
    assert run.data.tags["svend.reason"].startswith("unknown scale 'huge': choose one of tiny")


@pytest.mark.slow
def test_without_strict_validation_a_failed_gate_is_recorded_and_the_run_goes_on(
    workplace: Workplace,
) -> None:
    done = workplace.run(workplace.train_command(
        strict_validation="false", training__validation_gates__perplexity="1.5"
    ))
    assert done.returncode == 0, done.stdout
    run = only_run(workplace, "svend")
    assert run.data.metrics["gate/standard/perplexity"] == 0.0
    assert run.data.metrics["gate/quick/no_nan"] == 1.0
    client = MlflowClient(workplace.tracking_uri)
    assert set(client.get_registered_model("svend-debug").aliases) == {"quick"}


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_dir(), reason="the real GSM8K is not on this machine")
def test_the_real_gsm8k_trains_with_its_own_test_set_held_out(workplace: Workplace) -> None:
    done = workplace.run(workplace.train_command("--data", "gsm8k", data__path=str(GSM8K)))
    assert done.returncode == 0, done.stdout
    assert "7,356 train and 1,319 held-out documents" in done.stdout
    run = only_run(workplace, "svend")
    heldout = dict(losses(workplace, run, "eval/heldout_loss"))
    assert heldout[40] < heldout[0] - 1


@pytest.mark.slow
def test_a_run_killed_before_its_verdict_gets_it_when_resumed(workplace: Workplace) -> None:
    # The verdict on the only checkpoint, the last, is taken away, as a kill right after the save
    # would leave it.
    done = workplace.run(workplace.train_command(training__save_steps="40"))
    assert done.returncode == 0, done.stdout
    folder = workplace.checkpoints / "svend"
    identity = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps({**identity, "finished": False}))
    (folder / "verdicts.jsonl").unlink()
    resumed = workplace.run(workplace.train_command("--resume", training__save_steps="40"))
    assert resumed.returncode == 0, resumed.stdout
    lines = (folder / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["level"] for line in lines if line} == {"quick", "standard"}
    # The same weights of the same run are the same version.
    client = MlflowClient(workplace.tracking_uri)
    assert client.get_registered_model("svend-debug").aliases["standard"] == 1


@pytest.mark.slow
def test_a_resumed_run_may_log_otherwise_and_only_one_process_may_train_it(
    workplace: Workplace,
) -> None:
    long = {"training__max_steps": "4000", "training__validation_gates__perplexity": "1e9"}
    process = workplace.start(workplace.train_command(**long))
    wait_for_checkpoint(workplace, process)
    second = workplace.run(workplace.train_command("--resume", **long))
    assert second.returncode == 1
    assert "another process has this run, " in second.stdout
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    first = CheckpointManager(workplace.checkpoints / "svend").list_checkpoints()[-1].step
    resumed = workplace.start(
        workplace.train_command("--resume", training__logging_steps="3", **long)
    )
    deadline = time.monotonic() + 90
    while CheckpointManager(workplace.checkpoints / "svend").list_checkpoints()[-1].step == first:
        assert resumed.poll() is None, resumed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(resumed.pid, signal.SIGKILL)
    resumed.communicate()


@pytest.mark.slow
def test_a_gate_that_failed_still_stands_when_the_run_is_resumed(workplace: Workplace) -> None:
    strict = {"training__validation_gates__perplexity": "1.5"}
    assert workplace.run(workplace.train_command(**strict)).returncode == 1
    resumed = workplace.run(workplace.train_command("--resume", **strict))
    assert resumed.returncode == 1
    assert "the checkpoint at step 20 failed its gate" in resumed.stdout
    assert only_run(workplace, "svend").info.status == "FAILED"
