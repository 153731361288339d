"""Checkpoints are whole or absent: what is killed, damaged or planted spoils no other."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from svend.errors import CheckpointError, ConfigError
from svend.pipeline.checkpoints import Checkpoint, CheckpointManager, verify
from svend.pipeline.checkpoints.files import writer_name
from svend.pipeline.checkpoints.metadata import metadata_bytes
from svend.pipeline.config import Schedule
from tests.saved import (
    STATE_FILES,
    checkpoint_ids,
    filled,
    flip_bit,
    names,
    same,
    small_scaler,
    small_training,
    truncate,
)

ROOT = Path(__file__).resolve().parents[1]


def _fake_hash(checkpoint: Checkpoint, name: str) -> None:
    """Make the metadata agree with the file as it is now."""
    content = (checkpoint.path / name).read_bytes()
    metadata = json.loads((checkpoint.path / "metadata.json").read_text())
    metadata["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(),
                               "bytes": len(content)}
    del metadata["metadata_sha256"]
    (checkpoint.path / "metadata.json").write_bytes(metadata_bytes(metadata))


@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
@pytest.mark.parametrize("name", STATE_FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_loaded(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    manager = filled(tmp_path)
    damage(tmp_path / "step_00000002" / name)
    parts = (*small_training(9), small_scaler(1.0))
    with pytest.warns(UserWarning) as warned:
        step, _, extra = manager.load_latest(*parts)
    assert [f"step_00000002/{name}" in str(w.message) for w in warned] == [True]
    assert (step, extra) == (1, {"mark": 1})
    expected = (*small_training(1, 1), small_scaler(2.0))
    assert same([p.state_dict() for p in parts], [p.state_dict() for p in expected])


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_a_checkpoint_without_whole_metadata_is_named_and_passed_over(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    manager = filled(tmp_path)
    damage(tmp_path / "step_00000002" / "metadata.json")
    with pytest.warns(UserWarning, match="step_00000002"):
        assert manager.load_latest()[0] == 1


def test_when_every_checkpoint_is_damaged_there_is_nothing_to_load(tmp_path: Path) -> None:
    manager = filled(tmp_path)
    for step in (1, 2):
        flip_bit(tmp_path / f"step_{step:08d}" / "model.pt")
    with (pytest.warns(UserWarning, match="step_0000000[12]"),
          pytest.raises(CheckpointError, match="no intact checkpoint")):
        manager.load_latest()


def test_a_damaged_best_checkpoint_is_refused(tmp_path: Path) -> None:
    manager = filled(tmp_path)
    flip_bit(tmp_path / "step_00000002" / "model.pt")
    with pytest.raises(CheckpointError, match=r"step_00000002/model\.pt: damaged"):
        manager.load_best(small_training()[0])


class _Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("container", ["pickle", "torch"])
@pytest.mark.parametrize("name", STATE_FILES)
def test_a_planted_pickle_is_refused_and_does_not_run(
    tmp_path: Path, name: str, container: str
) -> None:
    manager = filled(tmp_path / "run", steps=1)
    marker = tmp_path / "executed"
    (checkpoint,) = manager.list_checkpoints()
    with (checkpoint.path / name).open("wb") as stream:
        if container == "pickle":
            pickle.dump(_Exploit(marker), stream)
        else:
            torch.save({"weight": _Exploit(marker)}, stream)
    _fake_hash(checkpoint, name)
    (checkpoint,) = manager.list_checkpoints()
    verify(checkpoint)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as refusal:
        manager.load(checkpoint, *small_training(), small_scaler(1.0))
    assert len(str(refusal.value).splitlines()) == 1
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Exploit(marker)))
    assert marker.exists()


SAVER = """
import os, signal, sys, time
import torch
from svend.pipeline.checkpoints import CheckpointManager

torch.set_num_threads(1)
print("ready", flush=True)
for generation, line in enumerate(sys.stdin, start=1):
    child = os.fork()
    if child == 0:
        manager = CheckpointManager(sys.argv[1], save_total_limit=2)
        model = torch.nn.Linear(64, 64)
        count = 0
        while True:
            count += 1
            for step in (1, 2):
                mark = generation * 1000000 + count
                with torch.no_grad():
                    model.weight.fill_(float(mark))
                manager.save(model, step=step, metrics={"loss": float(step)},
                             extra_state={"mark": mark})
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print("killed", flush=True)
"""


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[Callable[[float], None]]:
    """Saves steps 1 and 2 over and over for so many seconds, then dies by SIGKILL."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path / "run")], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    def save_and_die(seconds: float) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "killed\n"

    yield save_and_die
    process.stdin.close()
    process.stdout.close()
    process.wait(timeout=10)


def test_a_kill_at_any_moment_leaves_whole_checkpoints_only(
    tmp_path: Path, saver: Callable[[float], None]
) -> None:
    first = CheckpointManager(tmp_path / "run", save_total_limit=2)
    for step in (1, 2):
        first.save(nn.Linear(64, 64), step=step, metrics={"loss": float(step)},
                   extra_state={"mark": -1})
    marks: list[int] = []
    kills = 0
    # On a busy machine more of them come before the first save is whole.
    while kills < 12 or (kills < 60 and len(set(marks)) <= 4):
        kills += 1
        saver(random.uniform(0.02, 0.15))
        manager = CheckpointManager(tmp_path / "run", save_total_limit=2)
        assert names(tmp_path / "run") == ["step_00000001", "step_00000002"]
        checkpoints = manager.list_checkpoints()
        assert sorted(c.step for c in checkpoints) == [1, 2]
        for checkpoint in checkpoints:
            verify(checkpoint)
            model = nn.Linear(64, 64)
            step, _, extra = manager.load(checkpoint, model)
            assert step == checkpoint.step
            assert extra["mark"] == -1 or bool((model.weight == extra["mark"]).all())
            marks.append(extra["mark"])
    assert len(set(marks)) > 4


def _ended_process_id() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_leftovers_of_dead_writers_are_removed_and_those_of_live_ones_kept(
    tmp_path: Path,
) -> None:
    filled(tmp_path)
    # A container's first process has the same id after every start.
    earlier = tmp_path / f".writing-step_00000003-0123abcd-{os.getpid()}"
    dead = tmp_path / f".writing-step_00000003-0123abcd-{_ended_process_id()}"
    garbage = tmp_path / f".writing-step_00000003-0123abcd-{10**20}"
    live = tmp_path / f".writing-step_00000003-{writer_name()}"
    other = tmp_path / f".writing-step_00000003-0123abcd-{os.getppid()}"
    for leftover in (earlier, dead, garbage, live, other):
        leftover.mkdir()
        (leftover / "model.pt").write_bytes(b"half")
    (tmp_path / ".replaced-mine").mkdir()
    manager = CheckpointManager(tmp_path)
    left = [leftover.exists() for leftover in (earlier, dead, garbage, live, other)]
    assert left == [False, False, False, True, True]
    assert (tmp_path / ".replaced-mine").is_dir()
    assert checkpoint_ids(manager) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("new_is_in_place", [True, False])
def test_a_replacement_that_was_cut_short_is_finished_or_undone(
    tmp_path: Path, new_is_in_place: bool
) -> None:
    filled(tmp_path)
    place, replaced = tmp_path / "step_00000002", tmp_path / ".replaced-step_00000002"
    place.rename(replaced)
    if new_is_in_place:
        other = CheckpointManager(tmp_path / "other")
        other.save(step=2, extra_state={"mark": "new"})
        shutil.copytree(tmp_path / "other" / "step_00000002", place)
    manager = CheckpointManager(tmp_path)
    assert not replaced.exists()
    found = {c.step: manager.load(c)[2]["mark"] for c in manager.list_checkpoints()}
    assert found == {1: 1, 2: "new" if new_is_in_place else 2}


@pytest.mark.parametrize("change", [
    ('"step": 2', '"step": 7'), ('"loss": 0.5', '"loss": 0.0'), ('"epoch": 0', '"epoch": null'),
])
def test_changed_metadata_is_noticed(tmp_path: Path, change: tuple[str, str]) -> None:
    manager = filled(tmp_path)
    path = tmp_path / "step_00000002" / "metadata.json"
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.warns(UserWarning, match=r"metadata\.json is damaged"):
        assert manager.load_latest()[2] == {"mark": 1}


@pytest.mark.parametrize("value", [np.arange(3), np.float64(1), Path("x"), Schedule.COSINE])
def test_state_that_could_not_be_loaded_is_refused_by_key(tmp_path: Path, value: object) -> None:
    manager = filled(tmp_path)
    with pytest.raises(CheckpointError, match=r"^extra_state\['odd'\]: ") as refusal:
        manager.save(step=3, extra_state={"fine": [1, "a"], "odd": {"in": value}})
    assert len(str(refusal.value).splitlines()) == 1
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_what_cannot_be_saved_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    manager = filled(tmp_path)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"metrics": {"loss": None}}, r"metrics\['loss'\] = None"),
        ({"metrics": {"loss": "low"}}, r"metrics\['loss'\] = 'low'"),
        ({"step": 1.0}, "step = 1.0"), ({"step": -1}, "step = -1"), ({"epoch": "2"}, "epoch"),
        ({"extra_state": {"f": lambda: 1}}, "cannot be saved"),
    ]
    for arguments, message in mistakes:
        with pytest.raises(CheckpointError, match=message) as refusal:
            manager.save(**({"step": 3} | arguments))
        assert len(str(refusal.value).splitlines()) == 1
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    with pytest.raises(ConfigError, match="save_total_limit"):
        CheckpointManager(tmp_path, save_total_limit="3")  # type: ignore[arg-type]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path, save_total_limit=1)
    manager.save(step=1)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "step_00000001":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.warns(UserWarning, match="an old checkpoint cannot be removed"):
        manager.save(step=2)
    monkeypatch.undo()
    assert manager.load_latest()[0] == 2
    manager.save(step=3)
    assert names(tmp_path) == ["step_00000003"]


def _file_in_place_of_folder(folder: Path) -> CheckpointManager:
    folder.write_text("a file")
    return CheckpointManager(folder)


def _file_in_place_of_parent(folder: Path) -> CheckpointManager:
    folder.write_text("a file")
    return CheckpointManager(folder / "run")


@pytest.mark.parametrize("blocked", [_file_in_place_of_folder, _file_in_place_of_parent])
def test_a_place_that_cannot_be_written_is_an_error_in_one_line(
    tmp_path: Path, blocked: Callable[[Path], CheckpointManager]
) -> None:
    manager = blocked(tmp_path / "taken")
    with pytest.raises(CheckpointError) as refusal:
        manager.save(model=small_training()[0], step=1)
    assert "step_00000001: cannot be written" in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert (tmp_path / "taken").read_text() == "a file"


FULL_DISK = """
import resource, signal, sys, torch
from svend.errors import CheckpointError
from svend.pipeline.checkpoints import CheckpointManager, verify

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
manager = CheckpointManager(sys.argv[1])
manager.save(torch.nn.Linear(100, 100), step=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    manager.save(torch.nn.Linear(100, 100), step=2)
except CheckpointError as error:
    print(error)
verify(*manager.list_checkpoints())
"""


@pytest.mark.parametrize("room", [500, 20000])
def test_a_disk_that_fills_up_while_saving_is_an_error_in_one_line(
    tmp_path: Path, room: int
) -> None:
    # Where lines are counted (make coverage), the count could not be written either.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path), str(room)], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert names(tmp_path) == ["step_00000001"]
    assert "Traceback" not in done.stderr
    assert "step_00000002: cannot be written" in done.stdout
    assert len(done.stdout.splitlines()) == 1
