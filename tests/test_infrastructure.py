"""`svend validate`: every check does the thing, and each failure says what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Workplace
from tests.in_process import run_here
from tests.prepared import data_cache

CHECKS = ["device", "precision", "compile", "memory", "disk", "data", "tokenizer",
          "tracking store", "forward and backward", "overfits one batch", "checkpoint"]


def validate(
    workplace: Workplace, *options: str,
    run: Callable[[Workplace, list[str]], subprocess.CompletedProcess[str]] = run_here,
) -> tuple[int, dict[str, tuple[str, str]]]:
    """Run the command; return its exit code and each check's mark and detail."""
    done = run(workplace, [
        sys.executable, "-m", "svend", "validate", "--preset", "quick_test",
        "--training.compile", "off", "--checkpoint_dir", str(workplace.checkpoints),
        "--data.cache_dir", str(data_cache()), *options,
    ])
    assert "Traceback" not in done.stdout
    report = {}
    for line in done.stdout.splitlines():
        mark, _, rest = line.partition("  ")
        for name in CHECKS:
            if mark in ("pass", "FAIL") and rest.startswith(name + " "):
                report[name] = (mark, rest.removeprefix(name).strip())
    return done.returncode, report


def test_a_sound_machine_passes_every_check_and_nothing_is_left_behind(
    workplace: Workplace,
) -> None:
    code, report = validate(workplace)
    assert code == 0
    assert list(report) == CHECKS
    assert {mark for mark, _ in report.values()} == {"pass"}
    assert list(workplace.checkpoints.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "check", "remedy", "not_run"),
    [
        (("--data", "gsm8k", "--data.path", "nowhere"), "data", "nowhere: no such file",
         {"tokenizer", "forward and backward", "overfits one batch", "checkpoint"}),
        pytest.param(
            ("--data.num_samples", "12"), "data", "in the heldout part; raise training.data",
            {"tokenizer", "forward and backward", "overfits one batch", "checkpoint"},
            marks=pytest.mark.slow,
        ),
        pytest.param(("--training.learning_rate", "1e-12"), "overfits one batch",
                     "check training.learning_rate", set(), marks=pytest.mark.slow),
        pytest.param(("--checkpoint_dir", "taken/deeper"), "checkpoint", "choose another", set(),
                     marks=pytest.mark.slow),
        (("--model.hidden_size", "65536", "--model.num_hidden_layers", "400"), "memory",
         "choose a smaller scale",
         {"forward and backward", "overfits one batch", "checkpoint"}),
    ],
    ids=["data", "heldout", "overfit", "checkpoint_dir", "memory"],
)
def test_a_failed_check_names_the_remedy_and_what_builds_on_it_is_not_run(
    workplace: Workplace, options: tuple[str, ...], check: str, remedy: str, not_run: set[str]
) -> None:
    (workplace.folder / "taken").write_text("a file where a folder should be")
    code, report = validate(workplace, *options)
    assert code == 1
    assert report[check][0] == "FAIL"
    assert remedy in report[check][1]
    assert {name for name, (_, detail) in report.items() if detail.startswith("not run")} == not_run


@pytest.mark.slow
def test_a_tracking_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    class Unwritable(Workplace):
        @property
        def tracking_uri(self) -> str:
            return f"sqlite:///{tmp_path / 'no' / 'such' / 'folder' / 'mlflow.db'}"

    (tmp_path / "no").write_text("a file where a folder should be")
    code, report = validate(Unwritable(tmp_path), run=Workplace.run)  # here it has a store
    assert code == 1
    assert report["tracking store"][0] == "FAIL"
    assert "check MLFLOW_TRACKING_URI" in report["tracking store"][1]
    assert report["checkpoint"][0] == "pass"
