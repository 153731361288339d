"""A run goes on as itself or not at all: refused, forced on record, and held by one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from svend.errors import UserError
from svend.pipeline.config import Precision, load_config
from svend.pipeline.loading import CONFIG_FILE
from svend.pipeline.run_folder import RunFolder
from svend.pipeline.runner import PipelineResult, ScaleRunner
from tests.conftest import DEBUG_OVERRIDES
from tests.prepared import data_cache
from tests.registry import store

SMALL = {
    **DEBUG_OVERRIDES, "model.hidden_size": "32", "model.num_hidden_layers": "1",
    "model.intermediate_size": "64", "data.max_seq_length": "64", "data.num_samples": "100",
    "training.batch_size": "2", "training.compile": "off", "training.max_steps": "20",
    "training.save_steps": "10", "training.validation_gates": "{perplexity: 1e9}",
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("resume")
    with store(folder):
        yield folder


def _train(
    workshop: Path, experiment: str, *, resume: bool = False, force: bool = False, **changes: str
) -> PipelineResult:
    settings = {
        **SMALL, "training.experiment_name": experiment,
        "checkpoint_dir": str(workshop / "checkpoints"), "data.cache_dir": str(data_cache()),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    runner = ScaleRunner(load_config({}, list(settings.items())))
    return runner.run(resume=resume, force=force)


def _reopen(result: PipelineResult, steps: int = 10) -> RunFolder:
    """Make a finished run one that was killed after its first checkpoint."""
    assert result.success and result.checkpoint_dir is not None
    path = result.checkpoint_dir
    for checkpoint in path.glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > steps:
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
    identity = (path / "run.json").read_text(encoding="utf-8")
    (path / "run.json").write_text(identity.replace('"finished": true', '"finished": false'))
    return RunFolder.open(path)


@pytest.fixture(scope="module")
def begun(workshop: Path) -> RunFolder:
    return _reopen(_train(workshop, "svend"))


@pytest.mark.parametrize(("changes", "named"), [
    ({"training__batch_size": "4"}, "training.batch_size was 2, now 4"),
    ({"training__gradient_accumulation_steps": "2"}, "gradient_accumulation_steps was 1, now 2"),
    ({"training__max_steps": "40"}, "training.max_steps was 20, now 40"),
    ({"training__num_epochs": "2"}, "training.num_epochs was 1, now 2"),
    ({"training__seed": "1"}, "training.seed was 0, now 1"),
    ({"training__learning_rate": "1e-3"}, "training.learning_rate was 0.003, now 0.001"),
    ({"training__schedule": "wsd"}, "training.schedule was cosine, now wsd"),
    ({"training__optimizer": "muon"}, "training.optimizer was adamw, now muon"),
    ({"data__max_seq_length": "32"}, "training.data.max_seq_length was 64, now 32"),
    ({"data__num_samples": "90"}, "training.data.num_samples was 100, now 90"),
    ({"data__loss_on": "answers"}, "training.data.loss_on was all, now answers"),
    ({"model__num_hidden_layers": "2"}, "model.num_hidden_layers was 1, now 2"),
    ({"model__hidden_size": "64"}, "model.hidden_size was 32, now 64"),
    ({"model__vocab_size": "2048"}, "model.vocab_size was 4096, now 2048"),
])
def test_a_setting_that_changes_what_a_step_is_is_refused(
    workshop: Path, begun: RunFolder, changes: dict[str, str], named: str
) -> None:
    before = {path: path.read_bytes() for path in sorted(begun.path.rglob("*")) if path.is_file()}
    result = _train(workshop, "svend", resume=True, **changes)
    assert not result.success
    line = str(result.reason)
    assert line.startswith("cannot resume ") and named in line and "resume=force" in line
    assert len(line.splitlines()) == 1
    after = {path: path.read_bytes() for path in sorted(begun.path.rglob("*")) if path.is_file()}
    assert after == before


def test_other_tokens_are_refused_though_the_settings_are_the_same(
    workshop: Path, begun: RunFolder
) -> None:
    identity = begun.path / "run.json"
    was = identity.read_text(encoding="utf-8")
    try:
        identity.write_text(was.replace(begun.identity.tokenizer_sha256, "0" * 64))
        result = _train(workshop, "svend", resume=True)
    finally:
        identity.write_text(was)
    assert "the tokenizer was 0000000000000000, now " in str(result.reason)


@pytest.mark.slow
def test_a_forced_resumption_goes_on_and_is_on_record(workshop: Path) -> None:
    folder = _reopen(_train(workshop, "forced"))
    changes = {"training__max_steps": "30", "data__num_samples": "90",
               "training__precision": "bf16"}
    result = _train(workshop, "forced", resume=True, force=True, **changes)
    assert result.success, result.reason
    forced = RunFolder.open(folder.path).identity.forced
    assert RunFolder.open(folder.path).identity.precision is Precision.BF16
    assert [text.split(" was ")[0] for text in forced] == [
        "step 10: training.data.num_samples", "step 10: training.max_steps",
        "step 10: training.precision",
        "step 10: the data's fingerprint", "step 10: the tokenizer",  # made of fewer documents
    ]
    tag = MlflowClient().get_run(str(result.run_id)).data.tags["svend.forced_resume"]
    assert tag == "; ".join(forced)
    before = yaml.safe_load((folder.path / "config.before-step-10.yaml").read_text())
    now = yaml.safe_load((folder.path / "config.yaml").read_text())
    assert (before["training"]["max_steps"], now["training"]["max_steps"]) == (20, 30)
    _reopen(result, 20)
    # What was forced is what the run is now: it goes on without force, and the old is refused.
    refused = _train(workshop, "forced", resume=True)
    assert "training.data.num_samples was 90, now 100" in str(refused.reason)
    assert _train(workshop, "forced", resume=True, **changes).success


@pytest.mark.slow
def test_an_architecture_that_the_weights_do_not_fit_cannot_be_forced(workshop: Path) -> None:
    folder = _reopen(_train(workshop, "unfit"))
    result = _train(workshop, "unfit", resume=True, force=True, model__hidden_size="64")
    assert "does not fit this model" in str(result.reason)
    assert len(str(result.reason).splitlines()) == 1
    assert RunFolder.open(folder.path).identity.forced == []


def test_forced_twice_at_a_step_the_config_it_was_trained_with_is_kept(begun: RunFolder) -> None:
    folder = RunFolder.open(begun.path)
    was = {path: path.read_bytes() for path in (begun.path / "run.json", begun.path / CONFIG_FILE)}
    try:
        for steps in (30, 40):
            config = load_config({}, [*SMALL.items(), ("training.max_steps", str(steps))])
            folder.force([f"training.max_steps was 20, now {steps}"], config, 10)
        before = yaml.safe_load((begun.path / "config.before-step-10.yaml").read_text())
        assert before["training"]["max_steps"] == 20
        assert RunFolder.open(begun.path).identity.forced == [
            f"step 10: training.max_steps was 20, now {steps}" for steps in (30, 40)
        ]
        assert not list(begun.path.glob(".config*")) and not list(begun.path.glob(".run*"))
    finally:
        (begun.path / "config.before-step-10.yaml").unlink(missing_ok=True)
        for path, content in was.items():
            path.write_bytes(content)


def test_a_user_without_a_name_can_hold_a_run(
    begun: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # as in a container of an arbitrary user
    begun.hold()
    begun.release()
    assert " of 54321 on " in (begun.path / ".lock").read_text(encoding="utf-8")


HOLDS = """
import sys, time
from pathlib import Path
from svend.pipeline.run_folder import RunFolder
folder = RunFolder.open(Path(sys.argv[1]))
folder.hold()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_says_who_holds_the_run_and_a_dead_one_holds_nothing(
    begun: RunFolder,
) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(begun.path)], text=True,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refusal:
            begun.hold()
        line = str(refusal.value)
        assert f"another process has this run, {holder.pid} of " in line
        assert " since 20" in line and len(line.splitlines()) == 1
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    begun.hold()
    begun.release()
