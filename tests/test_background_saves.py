"""A checkpoint saved while training goes on is the one that a waiting training would have saved."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from svend.errors import CheckpointError
from svend.pipeline.checkpoints import CheckpointManager, DriveCheckpointManager
from svend.pipeline.checkpoints import manager as checkpoint_manager
from svend.pipeline.checkpoints.states import Snapshots

Release = Callable[[], None]


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Release]:
    """Writing waits until the returned function is called."""
    may_write = threading.Event()
    write_state = checkpoint_manager.write_state

    def write_when_released(path: Path, state: Any) -> dict[str, Any]:
        assert may_write.wait(60)
        return write_state(path, state)

    monkeypatch.setattr(checkpoint_manager, "write_state", write_when_released)
    yield may_write.set
    may_write.set()


def make_training() -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def test_what_trains_on_does_not_reach_a_checkpoint_on_its_way(
    tmp_path: Path, slow_disk: Release
) -> None:
    model, optimizer = make_training()
    manager = CheckpointManager(tmp_path / "background")
    saving = manager.save_in_background(model, optimizer, step=1, extra_state={"seen": [1, 2]})
    assert not saving.done()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [entry["exp_avg"].clone() for entry in optimizer.state_dict()["state"].values()]
    train(model, optimizer)
    slow_disk()
    assert saving.result() == "step_00000001"
    loaded, loaded_optimizer = make_training()
    assert manager.load_latest(loaded, loaded_optimizer) == (1, 0, {"seen": [1, 2]})
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name])
        assert not torch.equal(value, model.state_dict()[name])
    for entry, moment in zip(loaded_optimizer.state_dict()["state"].values(), moments, strict=True):
        assert torch.equal(entry["exp_avg"], moment)


def test_it_is_the_file_that_waiting_would_have_written(tmp_path: Path) -> None:
    model, optimizer = make_training()
    now, later = CheckpointManager(tmp_path / "now"), CheckpointManager(tmp_path / "later")
    now.save(model, optimizer, step=1)
    later.save_in_background(model, optimizer, step=1).result()
    assert now.list_checkpoints()[0].files == later.list_checkpoints()[0].files


def test_who_reads_or_saves_waits_for_it(tmp_path: Path, slow_disk: Release) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save_in_background(nn.Linear(2, 2), step=1, metrics={"loss": 1.0})
    threading.Timer(0.2, slow_disk).start()
    assert [c.step for c in manager.list_checkpoints()] == [1]
    manager.save_in_background(nn.Linear(2, 2), step=2, metrics={"loss": 2.0})
    manager.save(nn.Linear(2, 2), step=3)
    best = manager.best()
    assert best is not None
    assert best.step == 1
    assert [c.sequence for c in manager.list_checkpoints()] == [1, 2, 3]


def test_what_goes_wrong_is_told_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    folder, aside = tmp_path / "checkpoints", tmp_path / "aside"
    manager = CheckpointManager(folder)
    manager.save(nn.Linear(2, 2), step=1)
    folder.rename(aside)
    folder.write_text("no folder")
    saving = manager.save_in_background(nn.Linear(2, 2), step=2)
    with pytest.raises(CheckpointError, match="step_00000002: cannot be written"):
        saving.result()
    with pytest.raises(CheckpointError, match="step 3: holds what cannot be copied"):
        manager.save_in_background(extra_state={"lock": threading.Lock()}, step=3)
    folder.unlink()
    aside.rename(folder)
    assert [c.step for c in manager.list_checkpoints()] == [1]


def test_on_a_drive_closing_waits_for_the_save_and_the_copy(
    tmp_path: Path, slow_disk: Release
) -> None:
    (tmp_path / "drive").mkdir()
    with DriveCheckpointManager(tmp_path / "drive", tmp_path / "cache") as manager:
        manager.save_in_background(nn.Linear(2, 2), step=1)
        threading.Timer(0.2, slow_disk).start()
    assert [c.step for c in CheckpointManager(tmp_path / "drive").list_checkpoints()] == [1]


def test_a_snapshot_keeps_ties_types_and_attributes() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    state = module.state_dict()
    taken = Snapshots().take(state)
    assert type(taken) is type(state)
    assert taken._metadata == state._metadata
    assert taken["0.weight"].data_ptr() == taken["1.weight"].data_ptr()
    assert taken["0.weight"].data_ptr() != state["0.weight"].data_ptr()
    nested = {"list": [torch.ones(2), (1, "a")], "empty": torch.zeros(0), "none": None}
    again = Snapshots().take(nested)
    nested["list"].append(1)  # type: ignore[union-attr]
    assert torch.equal(again["list"][0], torch.ones(2))
    assert again["list"][1:] == [(1, "a")]
    assert again["empty"].shape == (0,)
    assert again["none"] is None


def test_a_snapshot_takes_no_new_memory_unless_shapes_change() -> None:
    snapshots = Snapshots()
    first = snapshots.take({"a": torch.ones(3), "b": [torch.ones(2)]})
    second = snapshots.take({"a": torch.full((3,), 2.0), "b": [torch.ones(4)]})
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert torch.equal(second["a"], torch.full((3,), 2.0))
    assert torch.equal(second["b"][0], torch.ones(4))
