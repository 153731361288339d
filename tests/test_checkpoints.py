"""Checkpoints are whole or absent, and a run finds its own again."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from svend.errors import CheckpointError, ConfigError, UserError
from svend.pipeline.checkpoint_files import metadata_bytes, writer_name
from svend.pipeline.checkpoints import Checkpoint, CheckpointManager, verify
from svend.pipeline.config import (
    DataConfig,
    ModelScale,
    PipelineConfig,
    Precision,
    Schedule,
    TrainingConfig,
    load_config,
)
from svend.pipeline.loading import MAY_CHANGE
from svend.pipeline.run_folder import RunFolder, RunIdentity
from svend.pipeline.schema import flatten, to_tree

ROOT = Path(__file__).resolve().parents[1]
STATE_FILES = ["model.pt", "optimizer.pt", "scheduler.pt", "scaler.pt", "extra_state.pt"]
Training = tuple[nn.Module, torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]


def _half_life(step: int) -> float:
    return float(0.5 ** (step / 10))


def _training(seed: int = 0, steps: int = 0, width: int = 3) -> Training:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _half_life)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def _scaler(factor: float) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict({"scale": factor, "growth_factor": 3.0, "backoff_factor": 0.25,
                            "growth_interval": 7, "_growth_tracker": 2})
    return scaler


def _same(one: Any, other: Any) -> bool:
    """Whether two states agree bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        as_bytes = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(*as_bytes)
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float):
        return one.hex() == other.hex()
    return bool(one == other)


def _ids(manager: CheckpointManager) -> list[str]:
    return [checkpoint.checkpoint_id for checkpoint in manager.list_checkpoints()]


def _names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def _filled(folder: Path, steps: int = 2) -> CheckpointManager:
    manager = CheckpointManager(folder)
    for step in range(1, steps + 1):
        manager.save(*_training(step, step), step=step, metrics={"loss": 1.0 / step},
                     extra_state={"mark": step}, scaler=_scaler(float(2**step)))
    return manager


def _fake_hash(checkpoint: Checkpoint, name: str) -> None:
    """Make the metadata agree with the file as it is now."""
    content = (checkpoint.path / name).read_bytes()
    metadata = json.loads((checkpoint.path / "metadata.json").read_text())
    metadata["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(),
                               "bytes": len(content)}
    del metadata["metadata_sha256"]
    (checkpoint.path / "metadata.json").write_bytes(metadata_bytes(metadata))


def test_a_checkpoint_has_the_layout_of_the_guide(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "runs" / "own")
    model, optimizer, scheduler = _training(steps=1)
    assert manager.save(model, optimizer, scheduler, step=1000, epoch=2,
                        metrics={"loss": 0.5, "accuracy": 0.7},
                        scaler=_scaler(4.0)) == "step_00001000"
    folder = tmp_path / "runs" / "own" / "step_00001000"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*STATE_FILES, "metadata.json"])
    assert [p.name for p in folder.parent.iterdir()] == ["step_00001000"]
    (checkpoint,) = manager.list_checkpoints()
    assert (checkpoint.checkpoint_id, checkpoint.step, checkpoint.epoch) == (
        "step_00001000", 1000, 2)
    assert checkpoint.metrics == {"loss": 0.5, "accuracy": 0.7}
    assert checkpoint.weights_sha256 == hashlib.sha256(
        (folder / "model.pt").read_bytes()).hexdigest()
    assert checkpoint.bytes == sum((folder / name).stat().st_size for name in STATE_FILES)


def test_what_is_not_given_is_not_written(tmp_path: Path) -> None:
    CheckpointManager(tmp_path).save(model=_training()[0], step=1)
    names = {p.name for p in (tmp_path / "step_00000001").iterdir()}
    assert names == {"model.pt", "extra_state.pt", "metadata.json"}


TENSORS = st.builds(
    lambda values, dtype: torch.tensor(values, dtype=torch.float64).to(dtype),
    st.lists(st.floats(-1e4, 1e4) | st.sampled_from([math.nan, math.inf, -0.0]), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
PLAIN = (st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats() | TENSORS
         | st.text(st.characters(codec="utf-8"), max_size=8))
EXTRA = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.integers(0, 9), inner, max_size=3), max_leaves=6), max_size=4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(0, 3), epoch=st.integers(0, 99), extra=EXTRA)
def test_a_round_trip_is_bit_for_bit(
    seed: int, steps: int, epoch: int, extra: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parts = (*_training(seed, steps), _scaler(32.0))
        others = (*_training(seed + 1, 1), _scaler(1.0))
        CheckpointManager(folder).save(*parts[:3], steps, epoch, None, extra, parts[3])
        loaded = CheckpointManager(folder).load_latest(*others)
        assert _same(list(loaded), [steps, epoch, extra])
        assert _same([part.state_dict() for part in others], [p.state_dict() for p in parts])


def test_training_goes_on_after_loading_as_if_nothing_had_happened(tmp_path: Path) -> None:
    model, optimizer, scheduler = _training(3, 2)
    manager = CheckpointManager(tmp_path)
    manager.save(model, optimizer, scheduler, 2, extra_state={"rng": torch.get_rng_state()})
    results = []
    for parts in ((model, optimizer, scheduler), _training(9)):
        if parts[0] is not model:
            manager.load_latest(*parts)
        torch.set_rng_state(manager.load_latest()[2]["rng"])
        for _ in range(3):
            parts[1].zero_grad()
            parts[0](torch.randn(2, 4)).square().sum().backward()
            parts[1].step()
            parts[2].step()
        results.append([part.state_dict() for part in parts])
    assert _same(results[0], results[1])


@pytest.mark.parametrize(("mode", "best_step"), [("min", 2), ("max", 3)])
def test_latest_and_best_are_found_by_step_and_by_metric(
    tmp_path: Path, mode: str, best_step: int
) -> None:
    manager = CheckpointManager(tmp_path, 10, "score", mode)
    for step, score in enumerate([0.5, 0.1, 0.9, 0.4], start=1):
        manager.save(model=_training(step)[0], step=step, metrics={"score": score})
    manager.save(step=5, metrics={"other": -1.0})
    manager.save(step=6, metrics={"score": math.nan})
    best = manager.best()
    assert best is not None
    assert best.step == best_step
    model = _training(99)[0]
    assert manager.load_best(model)[0] == best_step
    assert _same(model.state_dict(), _training(best_step)[0].state_dict())
    assert manager.load_latest()[0] == 6


@pytest.mark.parametrize("call", [CheckpointManager.load_latest, CheckpointManager.load_best])
def test_nothing_to_load_is_an_error_in_one_line(
    tmp_path: Path, call: Callable[[CheckpointManager], Any]
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        call(CheckpointManager(tmp_path / "absent"))
    assert str(tmp_path / "absent") in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(("changes", "named"), [
    ({"save_total_limit": 0}, "save_total_limit = 0"),
    ({"best_metric_mode": "least"}, "best_metric_mode = 'least'"),
])
def test_impossible_settings_are_refused(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        CheckpointManager(tmp_path, **changes)


@settings(max_examples=30, deadline=None)
@given(
    scores=st.lists(st.none() | st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf]) | st.floats(),
                    min_size=1, max_size=8),
    limit=st.integers(1, 4), mode=st.sampled_from(["min", "max"]),
)
def test_the_last_few_and_the_best_survive(
    scores: list[float | None], limit: int, mode: str
) -> None:
    sign = 1 if mode == "min" else -1
    kept: dict[int, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        manager = CheckpointManager(folder, limit, "score", mode)
        for step, score in enumerate(scores, start=1):
            manager.save(step=step, metrics={} if score is None else {"score": score})
            kept[step] = score
            finite = {s: v for s, v in kept.items() if v is not None and math.isfinite(v)}
            best = min(finite, key=lambda s: (sign * finite[s], -s), default=step)
            kept = {s: v for s, v in kept.items() if s > step - limit or s == best}
            assert [c.step for c in manager.list_checkpoints()] == sorted(kept)
        assert _names(folder) == [f"step_{s:08d}" for s in sorted(kept)]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for seed in (1, 2):
        manager.save(*_training(seed, 1), step=1, metrics={"loss": float(seed)},
                     extra_state={"seed": seed})
    (checkpoint,) = manager.list_checkpoints()
    verify(checkpoint)
    assert checkpoint.metrics == {"loss": 2.0}
    parts = _training(9)
    assert manager.load_latest(*parts) == (1, 0, {"seed": 2})
    assert _same([p.state_dict() for p in parts], [p.state_dict() for p in _training(2, 1)])
    assert _names(tmp_path) == ["step_00000001"]


def _flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_flip_bit, _truncate, Path.unlink])
@pytest.mark.parametrize("name", STATE_FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_loaded(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    manager = _filled(tmp_path)
    damage(tmp_path / "step_00000002" / name)
    parts = (*_training(9), _scaler(1.0))
    with pytest.warns(UserWarning) as warned:
        step, _, extra = manager.load_latest(*parts)
    assert [f"step_00000002/{name}" in str(w.message) for w in warned] == [True]
    assert (step, extra) == (1, {"mark": 1})
    expected = (*_training(1, 1), _scaler(2.0))
    assert _same([p.state_dict() for p in parts], [p.state_dict() for p in expected])


@pytest.mark.parametrize("damage", [_truncate, Path.unlink])
def test_a_checkpoint_without_whole_metadata_is_named_and_passed_over(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    manager = _filled(tmp_path)
    damage(tmp_path / "step_00000002" / "metadata.json")
    with pytest.warns(UserWarning, match="step_00000002"):
        assert manager.load_latest()[0] == 1


def test_when_every_checkpoint_is_damaged_there_is_nothing_to_load(tmp_path: Path) -> None:
    manager = _filled(tmp_path)
    for step in (1, 2):
        _flip_bit(tmp_path / f"step_{step:08d}" / "model.pt")
    with (pytest.warns(UserWarning, match="step_0000000[12]"),
          pytest.raises(CheckpointError, match="no intact checkpoint")):
        manager.load_latest()


def test_a_damaged_best_checkpoint_is_refused(tmp_path: Path) -> None:
    manager = _filled(tmp_path)
    _flip_bit(tmp_path / "step_00000002" / "model.pt")
    with pytest.raises(CheckpointError, match=r"step_00000002/model\.pt: damaged"):
        manager.load_best(_training()[0])


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(tmp_path: Path) -> None:
    manager = _filled(tmp_path)
    with pytest.raises(CheckpointError) as refusal:
        manager.load_latest(_training(width=5)[0])
    assert "model.pt does not fit this model" in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_an_optimizer_of_another_shape_is_refused_in_one_line(tmp_path: Path) -> None:
    manager = _filled(tmp_path)
    other = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(CheckpointError, match=r"optimizer\.pt does not fit") as refusal:
        manager.load_latest(optimizer=other)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_part_that_was_not_saved_is_named(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(model=_training()[0], step=1)
    other = _training()
    before = copy.deepcopy(other[0].state_dict())
    with pytest.raises(CheckpointError, match=r"was saved without optimizer\.pt") as refusal:
        manager.load_latest(*other)
    assert len(str(refusal.value).splitlines()) == 1
    torch.testing.assert_close(other[0].state_dict(), before, rtol=0, atol=0)


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
    manager = _filled(tmp_path / "run", steps=1)
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
        manager.load(checkpoint, *_training(), _scaler(1.0))
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
        assert _names(tmp_path / "run") == ["step_00000001", "step_00000002"]
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
    _filled(tmp_path)
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
    assert _ids(manager) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("new_is_in_place", [True, False])
def test_a_replacement_that_was_cut_short_is_finished_or_undone(
    tmp_path: Path, new_is_in_place: bool
) -> None:
    _filled(tmp_path)
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


def test_a_users_own_copy_is_no_checkpoint_and_is_never_removed(tmp_path: Path) -> None:
    manager = _filled(tmp_path)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000001-backup")
    with pytest.warns(UserWarning, match="under another name"):
        assert [c.step for c in manager.list_checkpoints()] == [1, 2]
    for step in (3, 4, 5, 6):
        manager.save(step=step)
    assert (tmp_path / "step_00000001-backup" / "model.pt").is_file()


@pytest.mark.parametrize("change", [
    ('"step": 2', '"step": 7'), ('"loss": 0.5', '"loss": 0.0'), ('"epoch": 0', '"epoch": null'),
])
def test_changed_metadata_is_noticed(tmp_path: Path, change: tuple[str, str]) -> None:
    manager = _filled(tmp_path)
    path = tmp_path / "step_00000002" / "metadata.json"
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.warns(UserWarning, match=r"metadata\.json is damaged"):
        assert manager.load_latest()[2] == {"mark": 1}


def test_a_run_that_went_back_keeps_and_resumes_its_new_course(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, save_total_limit=3)
    for step in (300, 400, 500):
        manager.save(step=step, metrics={"loss": step})
    assert manager.load_best()[0] == 300
    for step in (310, 320, 330):
        manager.save(step=step, metrics={"loss": step})
    assert [c.step for c in manager.list_checkpoints()] == [300, 310, 320, 330]
    assert manager.load_latest()[0] == 330


def test_steps_of_more_than_eight_digits_are_in_order(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, save_total_limit=2)
    for step in (99_999_998, 99_999_999, 100_000_000, 100_000_001):
        manager.save(step=step)
    assert [c.step for c in manager.list_checkpoints()] == [100_000_000, 100_000_001]
    assert manager.load_latest()[0] == 100_000_001


@pytest.mark.parametrize("value", [np.arange(3), np.float64(1), Path("x"), Schedule.COSINE])
def test_state_that_could_not_be_loaded_is_refused_by_key(tmp_path: Path, value: object) -> None:
    manager = _filled(tmp_path)
    with pytest.raises(CheckpointError, match=r"^extra_state\['odd'\]: ") as refusal:
        manager.save(step=3, extra_state={"fine": [1, "a"], "odd": {"in": value}})
    assert len(str(refusal.value).splitlines()) == 1
    assert _names(tmp_path) == ["step_00000001", "step_00000002"]


def test_what_cannot_be_saved_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    manager = _filled(tmp_path)
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
    assert _names(tmp_path) == ["step_00000001", "step_00000002"]
    with pytest.raises(ConfigError, match="save_total_limit"):
        CheckpointManager(tmp_path, save_total_limit="3")  # type: ignore[arg-type]


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(step=np.int64(3), epoch=np.int32(1),  # type: ignore[arg-type]
                 metrics={"loss": torch.tensor(0.5), "accuracy": np.float32(0.25)})
    (checkpoint,) = manager.list_checkpoints()
    assert (checkpoint.step, checkpoint.epoch) == (3, 1)
    assert checkpoint.metrics == {"loss": 0.5, "accuracy": 0.25}
    assert all(type(value) is float for value in checkpoint.metrics.values())


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
    assert _names(tmp_path) == ["step_00000003"]


def test_a_run_whose_only_checkpoint_was_being_replaced_is_found(tmp_path: Path) -> None:
    run = _create(tmp_path)
    run.release()
    (run.path / "step_00000001").rename(run.path / ".replaced-step_00000001")
    run.discard_if_empty()
    assert RunFolder.find_unfinished(str(tmp_path), "svend", "tiny").identity.run_id == "r"


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
        manager.save(model=_training()[0], step=1)
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
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path), str(room)], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)
    assert _names(tmp_path) == ["step_00000001"]
    assert "Traceback" not in done.stderr
    assert "step_00000002: cannot be written" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_the_summary_lists_every_checkpoint_and_marks_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = CheckpointManager(tmp_path)
    for step, loss in ((1, 0.25), (2, 0.5)):
        manager.save(step=step, metrics={"loss": loss})
    manager.print_summary()
    head, first, second = capsys.readouterr().out.splitlines()
    assert head == f"{tmp_path}: 2 checkpoints"
    assert first.strip().startswith("step_00000001")
    assert first.endswith("loss=0.2500  best")
    assert second.endswith("loss=0.5000")


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
        "compiled": False, "tokenizer_sha256": "t0ken", "finished": False, "forced": []}


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
    "training.shard_processes": "4", "rank_timeout_seconds": "7",
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
    _truncate(run.path / "run.json")
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
    assert _names(tmp_path) == []


def test_a_run_folder_with_a_checkpoint_or_files_of_others_is_kept(tmp_path: Path) -> None:
    saved, noted = _create(tmp_path), _create(tmp_path, saved=False)
    (noted.path / "notes.txt").write_text("mine")
    for run in (saved, noted):
        run.discard_if_empty()
    assert _names(saved.path) == [".lock", "config.yaml", "run.json", "step_00000001", "tracking"]
    assert (noted.path / "notes.txt").read_text() == "mine"
