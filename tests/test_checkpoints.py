"""A checkpoint brings back what was saved; the last few and the best are kept."""

from __future__ import annotations

import copy
import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from svend.errors import CheckpointError, ConfigError
from svend.pipeline.checkpoints import CheckpointManager, verify
from tests.saved import STATE_FILES, filled, names, same, small_scaler, small_training


def test_a_checkpoint_has_the_layout_of_the_guide(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "runs" / "own")
    model, optimizer, scheduler = small_training(steps=1)
    assert manager.save(model, optimizer, scheduler, step=1000, epoch=2,
                        metrics={"loss": 0.5, "accuracy": 0.7},
                        scaler=small_scaler(4.0)) == "step_00001000"
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
    CheckpointManager(tmp_path).save(model=small_training()[0], step=1)
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
        parts = (*small_training(seed, steps), small_scaler(32.0))
        others = (*small_training(seed + 1, 1), small_scaler(1.0))
        CheckpointManager(folder).save(*parts[:3], steps, epoch, None, extra, parts[3])
        loaded = CheckpointManager(folder).load_latest(*others)
        assert same(list(loaded), [steps, epoch, extra])
        assert same([part.state_dict() for part in others], [p.state_dict() for p in parts])


def test_training_goes_on_after_loading_as_if_nothing_had_happened(tmp_path: Path) -> None:
    model, optimizer, scheduler = small_training(3, 2)
    manager = CheckpointManager(tmp_path)
    manager.save(model, optimizer, scheduler, 2, extra_state={"rng": torch.get_rng_state()})
    results = []
    for parts in ((model, optimizer, scheduler), small_training(9)):
        if parts[0] is not model:
            manager.load_latest(*parts)
        torch.set_rng_state(manager.load_latest()[2]["rng"])
        for _ in range(3):
            parts[1].zero_grad()
            parts[0](torch.randn(2, 4)).square().sum().backward()
            parts[1].step()
            parts[2].step()
        results.append([part.state_dict() for part in parts])
    assert same(results[0], results[1])


@pytest.mark.parametrize(("mode", "best_step"), [("min", 2), ("max", 3)])
def test_latest_and_best_are_found_by_step_and_by_metric(
    tmp_path: Path, mode: str, best_step: int
) -> None:
    manager = CheckpointManager(tmp_path, 10, "score", mode)
    for step, score in enumerate([0.5, 0.1, 0.9, 0.4], start=1):
        manager.save(model=small_training(step)[0], step=step, metrics={"score": score})
    manager.save(step=5, metrics={"other": -1.0})
    manager.save(step=6, metrics={"score": math.nan})
    best = manager.best()
    assert best is not None
    assert best.step == best_step
    model = small_training(99)[0]
    assert manager.load_best(model)[0] == best_step
    assert same(model.state_dict(), small_training(best_step)[0].state_dict())
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
        assert names(folder) == [f"step_{s:08d}" for s in sorted(kept)]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for seed in (1, 2):
        manager.save(*small_training(seed, 1), step=1, metrics={"loss": float(seed)},
                     extra_state={"seed": seed})
    (checkpoint,) = manager.list_checkpoints()
    verify(checkpoint)
    assert checkpoint.metrics == {"loss": 2.0}
    parts = small_training(9)
    assert manager.load_latest(*parts) == (1, 0, {"seed": 2})
    assert same([p.state_dict() for p in parts], [p.state_dict() for p in small_training(2, 1)])
    assert names(tmp_path) == ["step_00000001"]


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(tmp_path: Path) -> None:
    manager = filled(tmp_path)
    with pytest.raises(CheckpointError) as refusal:
        manager.load_latest(small_training(width=5)[0])
    assert "model.pt does not fit this model" in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_an_optimizer_of_another_shape_is_refused_in_one_line(tmp_path: Path) -> None:
    manager = filled(tmp_path)
    other = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(CheckpointError, match=r"optimizer\.pt does not fit") as refusal:
        manager.load_latest(optimizer=other)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_part_that_was_not_saved_is_named(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(model=small_training()[0], step=1)
    other = small_training()
    before = copy.deepcopy(other[0].state_dict())
    with pytest.raises(CheckpointError, match=r"was saved without optimizer\.pt") as refusal:
        manager.load_latest(*other)
    assert len(str(refusal.value).splitlines()) == 1
    torch.testing.assert_close(other[0].state_dict(), before, rtol=0, atol=0)


def test_a_users_own_copy_is_no_checkpoint_and_is_never_removed(tmp_path: Path) -> None:
    manager = filled(tmp_path)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000001-backup")
    with pytest.warns(UserWarning, match="under another name"):
        assert [c.step for c in manager.list_checkpoints()] == [1, 2]
    for step in (3, 4, 5, 6):
        manager.save(step=step)
    assert (tmp_path / "step_00000001-backup" / "model.pt").is_file()


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


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(step=np.int64(3), epoch=np.int32(1),  # type: ignore[arg-type]
                 metrics={"loss": torch.tensor(0.5), "accuracy": np.float32(0.25)})
    (checkpoint,) = manager.list_checkpoints()
    assert (checkpoint.step, checkpoint.epoch) == (3, 1)
    assert checkpoint.metrics == {"loss": 0.5, "accuracy": 0.25}
    assert all(type(value) is float for value in checkpoint.metrics.values())


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
