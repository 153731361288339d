"""A real full disk: a small file system of its own, in the middle of a save and before a run."""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from svend.errors import CheckpointError
from svend.pipeline.checkpoints import MODEL, CheckpointManager, DriveCheckpointManager, verify
from svend.pipeline.checkpoints import manager as checkpoint_manager
from svend.pipeline.config import FullDisk, load_config
from svend.pipeline.run_folder import RunFolder
from svend.pipeline.runner import ScaleRunner
from tests.conftest import DEBUG_OVERRIDES
from tests.prepared import data_cache
from tests.registry import store

DISK_BYTES = 8 * 2**20
MODEL_BYTES = 2 * 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB; only root can mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)],
        capture_output=True, text=True, check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _model(value: float = 0.0) -> nn.Module:
    model = nn.Linear(MODEL_BYTES // 4 // 1024, 1024, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def _steps(folder: Path) -> list[int]:
    return [c.step for c in CheckpointManager(folder).list_checkpoints()]


def _fill(disk: Path, left_bytes: int) -> Path:
    """Leave so much of the disk free; return the file that takes the rest."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler = disk / "filler"
    filler.write_bytes(bytes(free - left_bytes))
    return filler


def test_a_checkpoint_that_does_not_fit_is_not_begun_and_says_what_is_missing(
    small_disk: Path,
) -> None:
    manager = CheckpointManager(small_disk / "run")
    manager.save(_model(1.0), step=1)
    filler = _fill(small_disk, 2**20)
    with pytest.raises(CheckpointError) as refusal:
        manager.save(_model(2.0), step=2)
    line = str(refusal.value)
    assert len(line.splitlines()) == 1
    assert "needs 2.3 MB, 1.2 MB are missing" in line or "needs 2.3 MB, 1.3 MB are missing" in line
    assert "step_00000002" in line and "on_full_disk=prune" in line
    (left,) = manager.list_checkpoints()
    verify(left)
    assert left.step == 1
    assert not list((small_disk / "run").glob(".*"))
    filler.unlink()
    assert manager.save(_model(2.0), step=2) == "step_00000002"


def test_a_disk_that_fills_up_in_the_middle_of_a_save_leaves_the_checkpoint_before(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(small_disk / "run")
    manager.save(_model(1.0), step=1)
    write_state = checkpoint_manager.write_state

    def fill_and_write(path: Path, state: object) -> dict[str, object]:
        _fill(small_disk, 2**19)  # somebody else's file, after the space was looked at
        return write_state(path, state)

    monkeypatch.setattr(checkpoint_manager, "write_state", fill_and_write)
    saving = manager.save_in_background(_model(2.0), step=2)
    with pytest.raises(CheckpointError, match=r"needs 2\.3 MB, .* are missing"):
        saving.result()
    (left,) = manager.list_checkpoints()
    verify(left)
    model = _model()
    assert manager.load_latest(model)[0] == 1
    assert torch.equal(model.weight, _model(1.0).weight)
    assert not list((small_disk / "run").glob(".writing-*"))


def test_pruning_for_room_keeps_the_newest_intact_and_the_best(small_disk: Path) -> None:
    manager = CheckpointManager(small_disk / "run", save_total_limit=9,
                                on_full_disk=FullDisk.PRUNE)
    for step, loss in ((1, 9.0), (2, 1.0), (3, 5.0)):
        manager.save(_model(float(step)), step=step, metrics={"loss": loss})
    # The newest is damaged: the one before it must stay, or none is left to go on from.
    damaged = small_disk / "run" / "step_00000003" / MODEL
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match="older checkpoints were removed"):
        manager.save(_model(4.0), step=4, metrics={"loss": 3.0})
    assert _steps(small_disk / "run") == [2, 3, 4]
    with pytest.warns(UserWarning, match="older checkpoints were removed"):
        manager.save(_model(5.0), step=5, metrics={"loss": 2.0})
    assert _steps(small_disk / "run") == [2, 4, 5]
    for checkpoint in manager.list_checkpoints():
        verify(checkpoint)


def test_where_pruning_is_not_enough_nothing_that_is_needed_is_removed(small_disk: Path) -> None:
    manager = CheckpointManager(small_disk / "run", on_full_disk=FullDisk.PRUNE)
    manager.save(_model(1.0), step=1, metrics={"loss": 1.0})
    _fill(small_disk, 2**20)
    with pytest.raises(CheckpointError, match="are missing"):
        manager.save(_model(2.0), step=2, metrics={"loss": 2.0})
    assert _steps(small_disk / "run") == [1]


def test_a_damaged_checkpoint_takes_no_others_place_among_those_that_are_kept(
    tmp_path: Path,
) -> None:
    manager = CheckpointManager(tmp_path, save_total_limit=2)
    for step in (1, 2):
        manager.save(_model(float(step)), step=step)
    (tmp_path / "step_00000002" / MODEL).write_bytes(b"torn")
    manager.save(_model(3.0), step=3)
    assert _steps(tmp_path) == [1, 2, 3]
    (tmp_path / "step_00000003" / MODEL).write_bytes(b"torn")
    model = _model()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert CheckpointManager(tmp_path).load_latest(model)[0] == 1
    assert [str(w.message).split(":")[0] for w in told] == [
        str(tmp_path / f"step_0000000{step}" / MODEL) for step in (3, 2)
    ]
    assert torch.equal(model.weight, _model(1.0).weight)


def test_pruning_for_room_leaves_what_is_being_copied_to_a_drive(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DriveCheckpointManager(tmp_path / "drive", small_disk / "cache", save_total_limit=9,
                                on_full_disk=FullDisk.PRUNE) as manager:
        for step in (1, 2, 3):
            manager.save(_model(float(step)), step=step, metrics={"loss": float(step)})
        assert manager.flush()
        monkeypatch.setattr(manager._copier, "in_flight", {"step_00000002"})
        with pytest.raises(CheckpointError, match="are missing"):
            manager.save(_model(4.0), step=4, metrics={"loss": 4.0})
        assert _steps(small_disk / "cache") == [1, 2, 3]  # the best, in flight, the newest
        monkeypatch.setattr(manager._copier, "in_flight", set())
        with pytest.warns(UserWarning, match="older checkpoints were removed"):
            manager.save(_model(4.0), step=4, metrics={"loss": 4.0})
        assert _steps(small_disk / "cache") == [1, 3, 4]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full-disk")
    with store(folder):
        yield folder


def _runner(folder: Path, checkpoint_dir: Path, **changes: str) -> ScaleRunner:
    settings = {
        **DEBUG_OVERRIDES, "checkpoint_dir": str(checkpoint_dir),
        "data.cache_dir": str(data_cache()), "training.max_steps": "20",
        "training.save_steps": "10", "training.compile": "off",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return ScaleRunner(load_config({}, list(settings.items())))


@pytest.mark.parametrize(("on_full_disk", "needed"), [
    # Checkpoints of 7.2 MB: the kept three, the best and the one being written;
    ("stop", "5 checkpoints need 35.9 MB more"),
    ("prune", "3 checkpoints need 21.5 MB more"),  # the last, the best and the one being written.
])
def test_a_run_that_cannot_fit_stops_before_it_begins(
    workshop: Path, small_disk: Path, on_full_disk: str, needed: str
) -> None:
    runner = _runner(workshop, small_disk, training__experiment_name="large",
                     training__on_full_disk=on_full_disk)
    result = runner.run()
    assert not result.success and result.checkpoint_dir is None
    line = str(result.reason)
    assert needed in line and "are missing" in line
    assert len(line.splitlines()) == 1
    assert not list(small_disk.iterdir())


@pytest.mark.slow
def test_a_run_whose_disk_fills_up_ends_in_one_line_and_goes_on_when_there_is_room(
    workshop: Path, small_disk: Path
) -> None:
    small = {
        "model__hidden_size": "32", "model__num_hidden_layers": "1", "model__vocab_size": "1024",
        "model__intermediate_size": "64", "training__experiment_name": "fills-up",
        "training__validation_gates": "{perplexity: 1e9}",
    }
    filler: list[Path] = []

    def begin(resume: bool) -> str:
        runner = _runner(workshop, small_disk, **small)
        evaluate = runner._evaluate_and_save

        def fill_first(job: object, signals: object) -> None:
            if not resume and len(list((small_disk / "fills-up").glob("step_*"))) == 1:
                filler.append(_fill(small_disk, 100_000))
            evaluate(job, signals)  # type: ignore[arg-type]

        runner._evaluate_and_save = fill_first  # type: ignore[method-assign]
        result = runner.run(resume=resume)
        return "" if result.success else str(result.reason)

    line = begin(resume=False)
    assert "the disk is full, the checkpoint needs" in line and "are missing" in line
    assert len(line.splitlines()) == 1
    assert _steps(small_disk / "fills-up") == [10]
    filler[0].unlink()
    assert begin(resume=True) == ""
    assert _steps(small_disk / "fills-up") == [10, 20]
    run_id = RunFolder.open(small_disk / "fills-up").identity.run_id
    client = MlflowClient()
    history = {name: client.get_metric_history(run_id, f"save/{name}")
               for name in ("stall_seconds", "write_seconds", "bytes")}
    assert {name: [point.step for point in points] for name, points in history.items()} == {
        name: [10, 20] for name in history
    }
    assert all(point.value > 0 for points in history.values() for point in points)
    sizes = [checkpoint.bytes for checkpoint in
             CheckpointManager(small_disk / "fills-up").list_checkpoints()]
    assert [point.value for point in history["bytes"]] == sizes
