"""A run finds its own folder again, and is not resumed as another run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svend.errors import UserError
from svend.pipeline.config import (
    DataConfig,
    ModelScale,
    PipelineConfig,
    Precision,
    TrainingConfig,
    load_config,
)
from svend.pipeline.loading import MAY_CHANGE
from svend.pipeline.run_folder import RunFolder, RunIdentity
from svend.pipeline.schema import flatten, to_tree
from tests.saved import names, truncate


def _config(
    folder: Path, experiment: str = "svend", scale: str = "tiny", **changes: Any
) -> PipelineConfig:
    training = TrainingConfig(experiment_name=experiment, model_scale=ModelScale(scale), **changes)
    return PipelineConfig(training=training, checkpoint_dir=str(folder))


def _create(
    folder: Path, run_id: str = "r", scale: str = "tiny", experiment: str = "svend",
    begun: bool = True, saved: bool = True,
) -> RunFolder:
    identity = RunIdentity(run_id, "sqlite:///x", experiment, scale, "da7a", "cpu",
                           Precision.FP32, False, "t0ken")
    run = RunFolder.create(_config(folder, experiment, scale), identity)
    if begun:
        run.spool_path.mkdir()
        (run.spool_path / "address.json").touch()
    if begun and saved:
        (run.path / "step_00000001").mkdir()
    return run


def test_run_folders_are_numbered(tmp_path: Path) -> None:
    runs = [_create(tmp_path / "new", str(i)) for i in range(3)]
    assert [run.path.name for run in runs] == ["svend", "svend-2", "svend-3"]
    assert json.loads((runs[1].path / "run.json").read_text()) == {
        "run_id": "1", "tracking_uri": "sqlite:///x", "experiment": "svend", "scale": "tiny",
        "data_fingerprint": "da7a", "device": "cpu", "precision": "fp32",
        "compiled": False, "tokenizer_sha256": "t0ken", "model_factory_sha256": "",
        "finished": False, "forced": []}


@pytest.mark.parametrize("experiment", ["../../escape", "a/b", "..", ".hidden", "é ü", "   "])
def test_a_run_folder_stays_inside_the_checkpoint_dir(tmp_path: Path, experiment: str) -> None:
    run = _create(tmp_path / "runs", experiment=experiment)
    assert run.path.resolve().parent == (tmp_path / "runs").resolve()
    assert not run.path.name.startswith(".")


def test_a_checkpoint_dir_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="cannot be written") as refusal:
        _create(tmp_path / "taken")
    assert len(str(refusal.value).splitlines()) == 1


def test_the_newest_unfinished_run_of_the_scale_is_found(tmp_path: Path) -> None:
    _create(tmp_path, "oldest")
    _create(tmp_path, "wanted")
    _create(tmp_path, "finished").mark_finished()
    _create(tmp_path, "another scale", "small")
    _create(tmp_path, "that the tracking store does not know", begun=False)
    _create(tmp_path, "another experiment", experiment="other")
    found = RunFolder.find_unfinished(str(tmp_path), "svend", "tiny")
    assert found.identity == RunIdentity(
        "wanted", "sqlite:///x", "svend", "tiny", "da7a", "cpu", Precision.FP32, False, "t0ken"
    )
    assert found.path == tmp_path / "svend-2"


@pytest.mark.parametrize(("prepare", "named"), [
    (lambda folder: None, "no run of experiment 'svend' at scale tiny"),
    (lambda folder: _create(folder, scale="small"), "no run"),
    (lambda folder: _create(folder, begun=False), "no run"),
    (lambda folder: _create(folder).mark_finished(), "is finished"),
])
def test_nothing_to_resume_is_said_in_one_line(
    tmp_path: Path, prepare: Callable[[Path], Any], named: str
) -> None:
    prepare(tmp_path)
    with pytest.raises(UserError, match=r"^nothing to resume") as refusal:
        RunFolder.find_unfinished(str(tmp_path), "svend", "tiny")
    assert named in str(refusal.value)
    assert str(tmp_path / "svend") in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_run_is_found_when_the_folder_of_an_earlier_one_is_gone(tmp_path: Path) -> None:
    earlier = _create(tmp_path, "earlier", begun=False)
    _create(tmp_path, "later")
    earlier.discard_if_empty()
    assert RunFolder.find_unfinished(str(tmp_path), "svend", "tiny").identity.run_id == "later"


def test_a_run_that_was_killed_before_its_first_checkpoint_goes_on(tmp_path: Path) -> None:
    _create(tmp_path, "killed early", saved=False)
    assert RunFolder.find_unfinished(str(tmp_path), "svend", "tiny").identity.run_id == (
        "killed early")


def test_a_run_of_an_experiment_with_a_similar_name_is_not_resumed(tmp_path: Path) -> None:
    _create(tmp_path, "1", experiment="svend")
    _create(tmp_path, "2", experiment="svend")
    with pytest.raises(UserError, match="nothing to resume"):
        RunFolder.find_unfinished(str(tmp_path), "svend-2", "tiny")


def test_a_run_of_an_experiment_with_a_similar_name_hides_none(tmp_path: Path) -> None:
    own = _create(tmp_path, "own", experiment="svend")
    _create(tmp_path, "foreign", experiment="svend-2")
    found = RunFolder.find_unfinished(str(tmp_path), "svend", "tiny")
    assert found.identity == own.identity


MAY_CHANGE_TO = {
    "checkpoint_dir": "moved", "checkpoint_cache_dir": "cache", "grace_seconds": "7",
    "tracking_wait_seconds": "7", "training.data.cache_dir": "elsewhere",
    "training.data.path": "moved.jsonl", "training.data.heldout_path": "moved.jsonl",
    "training.logging_steps": "3", "training.on_full_disk": "prune", "training.profile": "true",
    "training.save_total_limit": "9", "health.every_steps": "7", "health.max_attention_logit": "7",
    "health.min_relative_update": "0.5", "health.min_branch_share": "0.5", "health.max_spikes": "7",
    "health.action": "fail", "health.patience": "7", "training.parallel": "fsdp",
    "training.shard_processes": "4", "training.micro_batch": "fixed", "rank_timeout_seconds": "7",
}


def test_each_setting_that_may_change_has_its_case() -> None:
    assert set(MAY_CHANGE_TO) == MAY_CHANGE


@pytest.mark.parametrize("key", MAY_CHANGE_TO)
def test_a_setting_that_may_change_makes_no_other_run(tmp_path: Path, key: str) -> None:
    sources = [("data.sources", "[gsm8k]"), ("data.path", "here.jsonl")]
    if key == "training.data.heldout_path":
        sources = [("data.sources", "[gsm8k]"), ("data.heldout_path", "here.jsonl")]
    own = [("checkpoint_dir", str(tmp_path)), *sources]
    identity = RunIdentity("r", "uri", "svend", "tiny", "da7a", "cpu", Precision.FP32, False)
    run = RunFolder.create(load_config({}, own), identity)
    changed = load_config({}, [*own, (key, MAY_CHANGE_TO[key])])
    assert flatten(to_tree(changed)) != flatten(to_tree(load_config({}, own)))
    run.check_config(changed)


def test_a_run_that_is_older_than_the_tokenizers_hash_can_be_resumed(tmp_path: Path) -> None:
    run = _create(tmp_path)
    told = json.loads((run.path / "run.json").read_text())
    for younger in ("tokenizer_sha256", "forced"):
        del told[younger]
    (run.path / "run.json").write_text(json.dumps(told))
    found = RunFolder.find_unfinished(str(tmp_path), "svend", "tiny")
    found.check_machine("da7a", "t0ken", "cpu")
    with pytest.raises(UserError, match="the data's fingerprint"):
        found.check_machine("0ther", "t0ken", "cpu")


@pytest.mark.parametrize("changes", [
    {}, {"logging_steps": 3}, {"save_total_limit": 9}, {"data": DataConfig(cache_dir="elsewhere")},
])
def test_a_run_can_be_resumed_with_its_own_settings(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    run = RunFolder.create(_config(tmp_path, data=DataConfig()).resolve(),
                           RunIdentity(
                               "r", "sqlite:///x", "svend", "tiny", "da7a", "cpu",
                               Precision.FP32, False, "t0ken",
                           ))
    moved = _config(tmp_path / "moved", **{"data": DataConfig(), **changes}).resolve()
    run.check_config(moved)
    run.check_machine("da7a", "t0ken", "cpu")


def test_a_run_from_before_a_key_was_there_goes_on_with_the_keys_default(tmp_path: Path) -> None:
    run = _create(tmp_path)
    saved = run.path / "config.yaml"
    lines = saved.read_text().splitlines(keepends=True)
    saved.write_text("".join(line for line in lines if "skip_spike_deviations" not in line))
    assert len(saved.read_text()) < sum(map(len, lines))
    run.check_config(_config(tmp_path))
    with pytest.raises(UserError, match=r"training\.skip_spike_deviations was 6\.0, now None"):
        run.check_config(_config(tmp_path, skip_spike_deviations=None))


@pytest.mark.parametrize(("changes", "fingerprint", "device", "named"), [
    ({"seed": 1}, "da7a", "cpu", "training.seed was 0, now 1"),
    ({"max_steps": 5}, "da7a", "cpu", "training.max_steps was None, now 5"),
    ({"precision": Precision.FP32}, "da7a", "cpu", "training.precision was auto, now fp32"),
    ({"scale": "small"}, "da7a", "cpu", "model."),
    ({"experiment": "other"}, "da7a", "cpu", "training.experiment_name was svend, now other"),
    ({"validation_gates": {"max_loss": 5.0}}, "da7a", "cpu", "training.validation_gates"),
    ({"data": DataConfig(max_seq_length=64)}, "da7a", "cpu", "training.data.max_seq_length"),
    ({}, "da7a", "cuda", "the device was cpu, now cuda"),
    ({}, "0ther", "cpu", "the data's fingerprint was da7a, now 0ther"),
    ({}, "da7a", "cpu", "the tokenizer"),
])
def test_a_run_is_not_resumed_as_another_run(
    tmp_path: Path, changes: dict[str, Any], fingerprint: str, device: str, named: str
) -> None:
    run = RunFolder.create(_config(tmp_path, data=DataConfig()).resolve(),
                           RunIdentity(
                               "r", "sqlite:///x", "svend", "tiny", "da7a", "cpu",
                               Precision.FP32, False, "t0ken",
                           ))
    with pytest.raises(UserError, match=r"^cannot resume") as refusal:
        run.check_config(_config(tmp_path, **{"data": DataConfig(), **changes}).resolve())
        run.check_machine(fingerprint, "other" if named == "the tokenizer" else "t0ken", device)
    assert named in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_torn_run_file_is_named_in_one_line(tmp_path: Path) -> None:
    run = _create(tmp_path)
    truncate(run.path / "run.json")
    with pytest.raises(UserError) as refusal:
        RunFolder.find_unfinished(str(tmp_path), "svend", "tiny")
    assert len(str(refusal.value).splitlines()) == 1


ROWS = st.lists(st.fixed_dictionaries({
    "gate": st.text(max_size=8), "value": st.none() | st.floats(allow_nan=False)}), max_size=4)


@settings(max_examples=30, deadline=None)
@given(first=ROWS, second=ROWS, cut=st.integers(0, 10**6))
def test_a_torn_verdict_line_is_left_out_and_spoils_no_other(
    first: list[dict[str, Any]], second: list[dict[str, Any]], cut: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = _create(Path(folder))
        assert run.read_verdicts() == []
        run.append_verdict(first)
        path = run.path / "verdicts.jsonl"
        content = path.read_bytes()
        assert run.read_verdicts() == first
        path.write_bytes(content[: cut % (len(content) + 1)])
        whole = run.read_verdicts()
        assert whole == first[: len(whole)]
        run.append_verdict(second)
        assert run.read_verdicts() == whole + second
        ends = [content.index(b"\n", i + 1) if b"\n" in content[i + 1:] else len(content)
                for i, byte in enumerate(content) if byte == 10]
        assert len(whole) == sum(end <= cut % (len(content) + 1) for end in ends)


def test_an_empty_run_folder_is_discarded(tmp_path: Path) -> None:
    run = _create(tmp_path, saved=False)
    run.append_verdict([{"gate": "a"}])
    run.discard_if_empty()
    assert names(tmp_path) == []


def test_a_run_folder_with_a_checkpoint_or_files_of_others_is_kept(tmp_path: Path) -> None:
    saved, noted = _create(tmp_path), _create(tmp_path, saved=False)
    (noted.path / "notes.txt").write_text("mine")
    for run in (saved, noted):
        run.discard_if_empty()
    assert names(saved.path) == [".lock", "config.yaml", "run.json", "step_00000001", "tracking"]
    assert (noted.path / "notes.txt").read_text() == "mine"


def test_a_run_whose_only_checkpoint_was_being_replaced_is_found(tmp_path: Path) -> None:
    run = _create(tmp_path)
    run.release()
    (run.path / "step_00000001").rename(run.path / ".replaced-step_00000001")
    run.discard_if_empty()
    assert RunFolder.find_unfinished(str(tmp_path), "svend", "tiny").identity.run_id == "r"
