"""Whole sweeps in real processes: workers killed, parents killed, everything ended and reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from svend.cli import main
from tests.conftest import Workplace
from tests.in_process import run_here
from tests.prepared import data_cache
from tests.refusals import tree_of

SETTINGS = {
    "sweep.steps": "16", "sweep.report_steps": "4", "sweep.confirm.top": "1",
    "sweep.confirm.seeds": "2", "sweep.confirm.second_width": "{}", "sweep.pruner": "none",
    "sweep.settings.data.num_samples": "200", "training.experiment_name": "search",
}


def command(workplace: Workplace, *options: str, **changes: str) -> list[str]:
    settings = {
        **SETTINGS, "checkpoint_dir": str(workplace.checkpoints),
        "data.cache_dir": str(data_cache()),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    pairs = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return [sys.executable, "-m", "svend", "sweep", "--sweep", "minute", *options, *pairs]


def runs_of(workplace: Workplace, experiment: str = "search") -> list[Run]:
    client = MlflowClient(workplace.tracking_uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def folder_of(workplace: Workplace) -> Path:
    return workplace.checkpoints / "sweeps" / "sweep-tiny"


def wait_for_checkpoint_of_trial(workplace: Workplace, sweep: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(folder_of(workplace).glob("trials/trial-*/checkpoints/*/step_*/metadata.json")):
        assert sweep.poll() is None, sweep.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers_of(sweep: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(sweep.pid)], text=True, check=False,
                            stdout=subprocess.PIPE)
    return [int(pid) for pid in listed.stdout.split()]


def check_runs(workplace: Workplace, trials: int) -> Run:
    """Check that every trial ended once, in its right state, with each point once."""
    client = MlflowClient(workplace.tracking_uri)
    runs = runs_of(workplace)
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    below = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in below} == {parent.info.run_id}
    ended = [run for run in below if run.info.status == "FINISHED"]
    assert max(Counter(run.info.run_name for run in ended).values()) == 1
    searched = [run for run in ended if run.info.run_name.removeprefix("trial-").isdecimal()]
    assert len(searched) == trials
    # What a kill cut off before its first checkpoint is on record as that, and as nothing else.
    assert {run.info.status for run in below} <= {"FINISHED", "KILLED"}
    for run in ended:
        for metric in ("train/loss", "eval/heldout_loss"):
            steps = [p.step for p in client.get_metric_history(run.info.run_id, metric)]
            assert len(steps) == len(set(steps)), (run.info.run_name, metric, steps)
        assert run.data.metrics["eval/heldout_loss"] > 0
    assert client.search_registered_models() == []
    return parent


@pytest.mark.slow
def test_a_sweep_survives_its_worker_and_ends_with_tables_plots_and_a_verdict(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    # So short a sweep is noisy: what is tried here is that a result that passes is carried.
    sweep = workplace.start(command(
        workplace, "--trials", "3", "--workers", "2", sweep__confirm__max_rise="9",
        sweep__confirm__errors_apart="0.5",
        sweep__confirm__second_width="{model.hidden_size: 32, model.num_attention_heads: 1}",
    ))
    wait_for_checkpoint_of_trial(workplace, sweep)
    os.kill(workers_of(sweep)[0], signal.SIGKILL)
    output = sweep.communicate(timeout=240)[0]
    assert sweep.returncode == 0, output
    assert "trials: 3/3" in output
    assert "May the result be carried upward?" in output
    assert "\npromotable\n" in output
    parent = check_runs(workplace, trials=3)
    assert parent.info.status == "FINISHED"
    client = MlflowClient(workplace.tracking_uri)
    kept = {item.path for item in client.list_artifacts(parent.info.run_id, "sweep")}
    assert {f"sweep/{name}" for name in (
        "summary.html", "plots.html", "trials.csv", "reruns.csv", "slice.png", "contour.png",
        "parallel_coordinate.png", "intermediate_values.png", "learning_rate.png",
    )} <= kept
    # No trial leaves its weights behind.
    assert not list(folder_of(workplace).glob("trials/*/checkpoints/*"))

    found = Path(parent.info.artifact_uri) / "hparams.yaml"
    assert main(["plan", "--scale", "xl", "--hparams", str(found),
                 "--training.max_steps", "10000"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "(2.9B)" in told
    for key in ("training.learning_rate", "training.weight_decay"):
        assert f"│ {key} │" in told
    assert "Hyperparameters, carried from a sweep" in told
    assert "times the batch to the power 0.5" in told

    trained = workplace.run(workplace.train_command(
        hparams="sweep-tiny", training__experiment_name="carried", training__max_steps="20",
    ))
    assert trained.returncode == 0, trained.stdout
    assert "Hyperparameters, carried from a sweep" in trained.stdout
    (run,) = runs_of(workplace, "carried")
    assert run.data.tags["svend.hparams.run_id"] == parent.info.run_id
    assert run.data.params["config.training.parametrisation"] == "completep"
    told = run.data.params["hparams.training.weight_decay"]
    assert told.startswith(f"{best_decay(parent, client)} -> ")
    assert float(run.data.params["config.training.weight_decay"]) == float(told.split()[2])
    assert run.data.params["hparams.training.learning_rate"].endswith("(set by hand)")

    refused = workplace.run(workplace.train_command(hparams="sweep-small"))
    assert refused.returncode == 1
    assert refused.stdout.splitlines()[-1].startswith(
        "error: hparams = sweep-small: no sweep of that name has a promotable result"
    )


def best_decay(parent: Run, client: MlflowClient) -> float:
    """The winner's weight decay, as the sweep's file has it."""
    text = (Path(parent.info.artifact_uri) / "hparams.yaml").read_text()
    return float(text.split("training.weight_decay:")[1].split()[0])


@pytest.mark.slow
def test_a_sweep_whose_parent_is_killed_goes_on_where_it_was(workplace: Workplace) -> None:
    asked = command(workplace, "--trials", "4", "--workers", "2")
    for _ in range(2):
        sweep = workplace.start(asked)
        wait_for_checkpoint_of_trial(workplace, sweep)
        workers = workers_of(sweep)
        os.kill(sweep.pid, signal.SIGKILL)
        sweep.communicate()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they see that it is gone
            assert time.monotonic() < deadline
            time.sleep(0.1)
    done = workplace.run(asked)
    assert done.returncode == 0, done.stdout
    assert check_runs(workplace, trials=4).info.status == "FINISHED"


@pytest.mark.slow
def test_another_process_joins_and_a_second_parent_is_refused(workplace: Workplace) -> None:
    asked = command(workplace, "--trials", "4", "--workers", "1")
    sweep = workplace.start(asked)
    wait_for_checkpoint_of_trial(workplace, sweep)
    second = workplace.run(asked)
    assert second.returncode == 1
    assert "study sweep-tiny: is being run by" in second.stdout.splitlines()[-1]
    joined = workplace.start([*asked, "--join"])
    output = sweep.communicate(timeout=240)[0]
    assert sweep.returncode == 0, output
    told = joined.communicate(timeout=60)[0]
    assert joined.returncode == 0, told
    assert "trial-" in told or "-proxy-seed-" in told
    check_runs(workplace, trials=4)


@pytest.mark.slow
def test_ctrl_c_keeps_everything_and_the_same_command_goes_on(workplace: Workplace) -> None:
    asked = command(workplace, "--trials", "3", "--workers", "2")
    sweep = workplace.start(asked)
    wait_for_checkpoint_of_trial(workplace, sweep)
    os.killpg(sweep.pid, signal.SIGINT)
    output = sweep.communicate(timeout=120)[0]
    assert sweep.returncode == 130, output
    assert "kept; the same command goes on" in output
    assert workplace.run(asked).returncode == 0
    check_runs(workplace, trials=3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trials", "0"], "error: sweep.trials = 0: must be at least 1"),
        (["--search", "{training.nope: [1, 2]}"], "error: unknown key training.nope"),
        pytest.param(["--name", "../x"],
                     "error: name = ../x: must be one that a folder can have",
                     marks=pytest.mark.slow),
        pytest.param(["--dry-run", "maybe"], "error: dry_run = maybe: must be true or false",
                     marks=pytest.mark.slow),
    ],
)
def test_bad_input_ends_in_one_line(
    workplace: Workplace, options: list[str], told: str
) -> None:
    done = run_here(workplace, command(workplace, *options))
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("error: ")
    assert told in last
    assert "Traceback" not in done.stdout


def test_a_dry_run_prints_space_budget_and_time_and_makes_nothing(workplace: Workplace) -> None:
    before = tree_of(workplace.folder)
    done = run_here(workplace, command(workplace, "--dry-run"))
    assert done.returncode == 0, done.stdout
    for text in ("training.learning_rate", "0.001 to 0.03, logarithmic", "12 trials by tpe",
                 "with pruner none about", "reruns of the best 1 and the default"):
        assert text in done.stdout
    assert tree_of(workplace.folder) == before
