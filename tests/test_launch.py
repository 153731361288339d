"""Whole runs of several processes: started, killed, stopped, resumed on other numbers of them."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.conftest import Workplace
from tests.servers import free_port
from tests.test_run import only_run

PATIENCE_SECONDS = 300
# What several processes do to a run is nothing: so is it held against one that was trained alone.
PARTS = ("--nproc", "2", "--training.parallel", "fsdp")
# In bf16, which a CPU may have, sums in another order would round to other losses.
EXACT = {"training__compile": "off", "training__precision": "fp32"}
# More steps than a test waits for; what a model is like after so few is not judged.
LONG = {"training__max_steps": "4000", "strict_validation": "false"}


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def train(
    workplace: Workplace, *options: str, act: Callable[[psutil.Process], None] | None = None,
    **changes: str,
) -> tuple[int, str, str]:
    """Run `svend train`; return exit code, output and errors. act: with its process, meanwhile."""
    process = subprocess.Popen(
        workplace.train_command(*options, **{**EXACT, **changes}),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=workplace.environment,
    )
    try:
        if act is not None:
            act(psutil.Process(process.pid))
        out, errors = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    return process.returncode, out, errors


def rank_of(launcher: psutil.Process, rank: int) -> psutil.Process:
    """Wait for a process of a run."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        for child in launcher.children(recursive=True):
            try:
                if child.environ().get("RANK") == str(rank):
                    return child
            except psutil.Error:
                continue
        time.sleep(0.05)
    raise AssertionError(f"no rank {rank}")


def at(place: Path, act: Callable[[psutil.Process], None]) -> Callable[[psutil.Process], None]:
    """Return what waits for something to be in a folder, and then acts."""

    def wait(launcher: psutil.Process) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and not any(place.parent.glob(place.name)):
            time.sleep(0.002)
        act(launcher)

    return wait


def losses_of(workplace: Workplace, run_id: str) -> dict[int, float]:
    client = MlflowClient(workplace.tracking_uri)
    return {m.step: m.value for m in client.get_metric_history(run_id, "train/loss")}


def newest_run(workplace: Workplace):  # type: ignore[no-untyped-def]
    client = MlflowClient(workplace.tracking_uri)
    experiment = client.get_experiment_by_name("svend")
    return client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the run by one process."""
    workplace = Workplace(tmp_path_factory.mktemp("alone"))
    code, _, errors = train(workplace)
    assert code == 0, errors
    return losses_of(workplace, newest_run(workplace).info.run_id)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step_00000020", ".writing-step_00000040*"])
def test_a_killed_process_ends_the_job_named_and_the_run_goes_on_alone(
    workplace: Workplace, alone: dict[int, float], where: str
) -> None:
    begun = 0.0

    def kill(launcher: psutil.Process) -> None:
        nonlocal begun
        rank_of(launcher, 1).kill()
        begun = time.monotonic()

    folder = workplace.checkpoints / "svend" / where
    code, out, errors = train(workplace, *PARTS, act=at(folder, kill))
    assert code == 1, out + errors
    assert time.monotonic() - begun < 60
    assert re.search(r"rank 1 \(process \d+", errors)
    assert "Traceback" not in errors
    run = newest_run(workplace)
    assert run.info.status == "FAILED"
    code, out, errors = train(workplace, "--resume")
    assert code == 0, errors
    assert "resuming run" in out
    assert newest_run(workplace).info.run_id == run.info.run_id
    measured = losses_of(workplace, run.info.run_id)
    assert measured == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_a_run_begun_alone_goes_on_in_parts_and_is_registered(
    workplace: Workplace, alone: dict[int, float]
) -> None:
    def stop(launcher: psutil.Process) -> None:
        launcher.send_signal(signal.SIGTERM)

    first = workplace.checkpoints / "svend" / "step_00000020"
    code, _, errors = train(workplace, act=at(first, stop))
    assert code == 130, errors
    code, out, errors = train(workplace, "--resume", *PARTS)
    assert code == 0, errors
    assert re.search(r"registered +svend-debug version 1 \(@quick, @standard\)", out)
    run = newest_run(workplace)
    assert losses_of(workplace, run.info.run_id) == pytest.approx(alone, rel=1e-4)
    (version,) = MlflowClient(workplace.tracking_uri).search_model_versions("name='svend-debug'")
    assert version.run_id == run.info.run_id


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_the_others_are_let_go(workplace: Workplace) -> None:
    def stop(launcher: psutil.Process) -> None:
        launcher.send_signal(signal.SIGTERM)

    first = workplace.checkpoints / "svend" / "step_00000020"
    code, _, errors = train(workplace, *PARTS, act=at(first, stop), **LONG)
    assert code == 130, errors
    assert "Traceback" not in errors
    assert newest_run(workplace).info.status == "KILLED"
    later = first.with_name("step_00000100")
    code, out, errors = train(workplace, "--resume", *PARTS, act=at(later, stop), **LONG)
    assert code == 130, errors
    assert re.search(r"resuming run \w+ from step [1-9]", out)


@pytest.mark.slow
def test_a_stopped_process_is_named_within_the_time_out(workplace: Workplace) -> None:
    def freeze(launcher: psutil.Process) -> None:
        rank_of(launcher, 1).suspend()

    first = workplace.checkpoints / "svend" / "step_00000020"
    code, _, errors = train(
        workplace, *PARTS, act=at(first, freeze), rank_timeout_seconds="5", **LONG
    )
    assert code == 1
    assert re.search(r"error: rank 1 \(process \d+ on .*\) is stopped", errors), errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_mlflow_run_starts_the_processes_of_one_run(workplace: Workplace) -> None:
    command = workplace.mlflow_command(
        "--experiment-name", "svend", "-P", "nproc=2", **EXACT
    )
    done = subprocess.run(
        command, capture_output=True, text=True, env=workplace.environment, cwd=workplace.folder,
        timeout=PATIENCE_SECONDS, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(workplace, "svend")
    assert run.info.status == "FINISHED"
    assert run.data.params["nproc"] == "2"
    assert run.data.tags["svend.processes"] == "2, each with the whole model (ddp)"


@pytest.mark.parametrize(("options", "told"), [
    (("--nproc", "0"), "nproc = 0: must be a whole number of at least 1"),
    (("--nproc", "two"), "nproc = two: must be a whole number of at least 1"),
    (("--nproc", "2", "--training.batch_size", "no"), "training.batch_size: Value"),
])
def test_a_wrong_number_of_processes_is_refused_before_any_starts(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], told: str
) -> None:
    from svend import cli

    assert cli.main(["train", *options]) == 1
    captured = capsys.readouterr()
    assert told in captured.err
    assert len(captured.err.splitlines()) == 1
    assert "processes" not in captured.out


@pytest.mark.slow
def test_more_processes_than_sequences_are_refused(workplace: Workplace) -> None:
    code, _, errors = train(workplace, "--nproc", "2", training__batch_size="1",
                            training__gradient_accumulation_steps="1")
    assert code == 1
    assert "training.batch_size x training.gradient_accumulation_steps = 1" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_process_that_finds_no_other_says_so(workplace: Workplace) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        workplace.train_command(rank_timeout_seconds="3"), capture_output=True, text=True,
        env={**workplace.environment, **place}, timeout=PATIENCE_SECONDS, check=False,
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: rank 1: the other processes are not found at 127\.0\.0\.1:\d+ .*\n", done.stderr
    )
