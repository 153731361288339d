"""Checkpoints reach an unreliable drive in the end, and the newest whole one is found again."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

from svend.errors import CheckpointError, ConfigError
from svend.pipeline.checkpoints import (
    Checkpoint,
    CheckpointManager,
    DriveCheckpointManager,
    drive,
    drive_manager,
    verify,
)

ROOT = Path(__file__).resolve().parents[1]
Vanish = Callable[[Path], Callable[[], None]]


def _manager(folder: Path, cache: str = "cache", **settings: int) -> DriveCheckpointManager:
    return DriveCheckpointManager(folder / "mount" / "run", folder / cache, **settings)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[DriveCheckpointManager]:
    with _manager(tmp_path) as made:
        yield made
        assert made.flush(10)


def _model(mark: float, width: int = 8) -> nn.Linear:
    model = nn.Linear(width, width)
    nn.init.constant_(model.weight, mark)
    return model


def _save(manager: CheckpointManager, *steps: int, mark: float = 0.0, width: int = 8) -> None:
    for step in steps:
        manager.save(_model(mark or step, width), step=step, metrics={"loss": 1.0 / step},
                     extra_state={"mark": mark or step})


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".drive_path")


def _ids(*steps: int) -> list[str]:
    return [f"step_{step:08d}" for step in steps]


def _whole(folder: Path) -> list[Checkpoint]:
    """What a plain manager takes for a checkpoint; fails where one is not intact."""
    found = CheckpointManager(folder).list_checkpoints()
    for checkpoint in found:
        verify(checkpoint)
    return found


def _rename_away(mount: Path) -> Callable[[], None]:
    away = mount.with_name("away")
    mount.rename(away)
    return lambda: (away.rename(mount), None)[1]


def _replace_by_file(mount: Path) -> Callable[[], None]:
    back = _rename_away(mount)
    mount.write_text("not a folder")
    return lambda: (mount.unlink(), back())[1]


def _replace_by_bare_mount_point(mount: Path) -> Callable[[], None]:
    back = _rename_away(mount)
    mount.mkdir()
    return lambda: (mount.rmdir(), back())[1]


VANISHINGS = [_rename_away, _replace_by_file, _replace_by_bare_mount_point]


def _flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = [_flip_bit, _truncate, Path.unlink]


def test_the_code_of_the_guide_runs(tmp_path: Path) -> None:
    model = _model(1.0)
    manager = DriveCheckpointManager(
        drive_path=str(tmp_path / "drive" / "MyDrive" / "svend-checkpoints" / "my-run"),
        local_cache=str(tmp_path / "checkpoints"),
    )
    assert manager.save(model=model, step=1000, metrics={"loss": 0.5}) == "step_00001000"
    assert manager.flush(timeout_seconds=10)
    place = tmp_path / "drive" / "MyDrive" / "svend-checkpoints" / "my-run" / "step_00001000"
    assert _names(place) == ["extra_state.pt", "metadata.json", "model.pt"]
    assert _names(tmp_path / "checkpoints") == ["step_00001000"]


def test_resuming_without_naming_a_cache_finds_the_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with _manager(tmp_path) as manager:
        _save(manager, 3)
    for run, expected in (("run", 3), ("other/run", None)):
        resumed = DriveCheckpointManager(drive_path=tmp_path / "mount" / run)
        assert resumed.output_dir.is_relative_to(tmp_path / "home")
        if expected:
            assert resumed.load_latest(_model(0))[0] == expected
        else:
            assert resumed.list_checkpoints() == []


def test_copies_arrive_whole_and_are_pruned_by_the_same_rule(tmp_path: Path) -> None:
    with _manager(tmp_path, save_total_limit=2) as manager:
        for step, loss in enumerate([0.1, 0.5, 0.4, 0.3, 0.2], start=1):
            manager.save(_model(step), step=step, metrics={"loss": loss})
            assert manager.flush(10)
    for folder in (tmp_path / "mount" / "run", tmp_path / "cache"):
        assert _names(folder) == _ids(1, 4, 5)
        assert [c.step for c in _whole(folder)] == [1, 4, 5]


@pytest.mark.parametrize("vanish", VANISHINGS)
def test_saving_does_not_wait_for_a_drive_that_is_away(
    tmp_path: Path, manager: DriveCheckpointManager, vanish: Vanish,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _save(manager, 1)
    assert manager.flush(10)
    come_back = vanish(tmp_path / "mount")
    start = time.monotonic()
    _save(manager, 2, 3, 4)
    assert time.monotonic() - start < 2
    assert not manager.flush(timeout_seconds=1.2)
    assert [c.step for c in manager.list_checkpoints()] == [2, 3, 4]
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    (line,) = caplog.messages
    assert "cannot be copied there" in line
    assert len(line.splitlines()) == 1
    come_back()
    assert manager.flush(10)
    assert [c.step for c in _whole(tmp_path / "mount" / "run")] == [2, 3, 4]
    assert len(caplog.records) == 1


def test_each_outage_is_one_line(
    tmp_path: Path, manager: DriveCheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        come_back = _rename_away(tmp_path / "mount")
        _save(manager, step)
        assert not manager.flush(timeout_seconds=0.8)
        come_back()
        assert manager.flush(10)
        assert len(caplog.records) == step


def _wait_for_a_copy_to_begin(run: Path, limit_seconds: float = 5.0) -> bool:
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        if any(path.stat().st_size for path in run.glob(".writing-*/model.pt")):
            return True
        time.sleep(0.0005)
    return False


@pytest.mark.parametrize("vanish", VANISHINGS)
def test_a_mount_that_vanishes_in_the_middle_of_a_copy_has_everything_in_the_end(
    tmp_path: Path, manager: DriveCheckpointManager, vanish: Vanish,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mount = tmp_path / "mount"
    for step in (1, 2):
        _save(manager, step, width=2000)
        assert _wait_for_a_copy_to_begin(mount / "run")
        come_back = vanish(mount)
        _save(manager, step + 10)
        assert not manager.flush(timeout_seconds=0.7)
        come_back()
        half = list((mount / "run").glob(".writing-*"))
        assert half
        assert f"step_{step:08d}" not in _names(mount / "run")
        _whole(mount / "run")
        assert manager.flush(20)
    assert len(caplog.records) == 2
    # Four were saved, three are kept; nothing hidden is left behind.
    assert _names(mount / "run") == _ids(2, 11, 12)
    assert [c.step for c in _whole(mount / "run")] == [11, 2, 12]  # as they were saved


def test_what_arrives_garbled_is_not_taken_and_is_sent_again(
    tmp_path: Path, manager: DriveCheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "mount" / "run"
    _save(manager, 1, width=3000)
    assert _wait_for_a_copy_to_begin(run)
    (arriving,) = run.glob(".writing-*/model.pt")
    with arriving.open("r+b") as stream:
        stream.seek(100_000)
        stream.write(b"garbled")
    assert manager.flush(20)
    assert ["what arrived is not what was sent" in m for m in caplog.messages] == [True]
    assert [c.step for c in _whole(run)] == [1]


def test_a_slow_drive_still_sees_whole_copies_of_a_fast_run(tmp_path: Path) -> None:
    with _manager(tmp_path, save_total_limit=1) as manager:
        _save(manager, 1, width=2000)
        assert _wait_for_a_copy_to_begin(tmp_path / "mount" / "run")
        _save(manager, 2, 3)
        assert manager.flush(20)
    assert _names(tmp_path / "mount" / "run") == _ids(3)
    assert _names(tmp_path / "cache") == _ids(3)


def test_a_step_saved_again_while_it_is_copied_arrives_as_saved_last(
    tmp_path: Path, manager: DriveCheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    _save(manager, 1, width=2000)
    assert _wait_for_a_copy_to_begin(tmp_path / "mount" / "run")
    _save(manager, 1, mark=7.0)
    assert manager.flush(20)
    assert _names(tmp_path / "mount" / "run") == _ids(1)
    (arrived,) = _whole(tmp_path / "mount" / "run")
    assert manager.load(arrived)[2] == {"mark": 7.0}
    assert caplog.records == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_fresh_machine_passes_over_what_is_damaged_on_the_drive(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with _manager(tmp_path) as manager:
        _save(manager, 1, 2)
    damage(tmp_path / "mount" / "run" / "step_00000002" / "model.pt")
    with _manager(tmp_path, "fresh") as fresh:
        model = _model(0.0)
        with pytest.warns(UserWarning) as warned:
            assert fresh.load_latest(model) == (1, 0, {"mark": 1})
        assert bool((model.weight == 1).all())
        assert ["step_00000002/model.pt" in str(w.message) for w in warned] == [True]
        assert _names(tmp_path / "fresh") == _ids(1)
        with pytest.raises(CheckpointError, match=r"step_00000002/model\.pt"):
            fresh.load_best(model)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_in_the_cache_is_taken_from_the_drive(
    tmp_path: Path, manager: DriveCheckpointManager, damage: Callable[[Path], None]
) -> None:
    _save(manager, 1, 2)
    assert manager.flush(10)
    for load in (manager.load_latest, manager.load_best):
        damage(tmp_path / "cache" / "step_00000002" / "model.pt")
        with pytest.warns(UserWarning, match=r"cache/step_00000002/model\.pt") as warned:
            assert load(_model(0.0)) == (2, 0, {"mark": 2})
        assert len(warned) == 1
        assert [c.step for c in _whole(tmp_path / "cache")] == [1, 2]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_on_the_drive_does_not_hinder_a_whole_cache(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with _manager(tmp_path) as manager:
        _save(manager, 1, 2)
    damage(tmp_path / "mount" / "run" / "step_00000002" / "model.pt")
    with _manager(tmp_path) as again:
        assert again.load_latest(_model(0.0))[0] == 2
        assert again.flush(10)
    if damage is not _flip_bit:  # what can be seen without reading the drive is mended
        assert [c.step for c in _whole(tmp_path / "mount" / "run")] == [1, 2]


def test_the_newest_of_either_side_wins(tmp_path: Path) -> None:
    with _manager(tmp_path, "first") as first:
        _save(first, 1)
        assert first.flush(10)
        with _manager(tmp_path, "second") as second:
            _save(second, 2)
            assert second.flush(10)
        assert first.load_latest(_model(0.0))[2] == {"mark": 2}
        come_back = _rename_away(tmp_path / "mount")
        _save(first, 3)
        with pytest.warns(UserWarning, match="only .*first is looked at"):
            assert first.load_latest(_model(0.0))[2] == {"mark": 3}
        come_back()
        assert first.flush(10)
        assert second.load_best(_model(0.0))[2] == {"mark": 3}
        assert _names(tmp_path / "second") == _ids(2, 3)


def test_a_step_saved_twice_is_loaded_as_saved_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _manager(tmp_path, "first") as first:
        _save(first, 1, mark=1.5)
    time.sleep(1.1)  # the time of saving is known to the second
    with _manager(tmp_path, "second") as second:
        _save(second, 1, mark=2.5)
    with _manager(tmp_path, "first") as first:
        assert first.load_latest(_model(0.0))[2] == {"mark": 2.5}
    assert _whole(tmp_path / "mount" / "run") != []
    assert second.load(_whole(tmp_path / "mount" / "run")[0])[2] == {"mark": 2.5}


def test_the_last_whole_copy_on_the_drive_outlives_damaged_newer_ones(tmp_path: Path) -> None:
    run = tmp_path / "mount" / "run"
    with _manager(tmp_path) as manager:
        _save(manager, 7, 8, 9)
    for step in (7, 8, 9):
        _flip_bit(run / f"step_{step:08d}" / "model.pt")
    with _manager(tmp_path, "fresh") as fresh:
        _save(fresh, 1)
        assert fresh.flush(10)
        assert _names(tmp_path / "fresh") == _ids(1)
        verify(next(c for c in CheckpointManager(run).list_checkpoints() if c.step == 1))


def test_a_damaged_cache_entry_is_named_and_not_copied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    CheckpointManager(tmp_path / "cache").save(_model(1), step=1, metrics={"loss": 1.0})
    _flip_bit(tmp_path / "cache" / "step_00000001" / "model.pt")
    with _manager(tmp_path) as manager:
        assert not manager.flush(10)
    assert _names(tmp_path / "mount" / "run") == []
    assert [re.findall(r"cache/step_00000001/model\.pt: damaged", m) != []
            for m in caplog.messages] == [True]


KILLED = """
import itertools, sys, torch
from svend.pipeline.checkpoints import DriveCheckpointManager
torch.set_num_threads(1)
manager = DriveCheckpointManager(sys.argv[1], sys.argv[2], save_total_limit=2)
model = torch.nn.Linear(1000, 1000)
first = int(sys.argv[3])
for step in itertools.count(first):
    manager.save(model, step=step, metrics={"loss": 1.0 / step})
    if step == first:
        print("saving", flush=True)
"""


def test_a_kill_during_copying_leaves_whole_checkpoints_on_the_drive(tmp_path: Path) -> None:
    run, cache = tmp_path / "mount" / "run", tmp_path / "cache"
    seen = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(run), str(cache), str(seen + 1)], cwd=ROOT,
            stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        time.sleep(random.uniform(0.1, 0.5))
        process.kill()
        process.wait()
        process.stdout.close()
        # Read as it lies, before any manager has put anything right.
        for path in run.glob("step_*"):
            verify(next(c for c in CheckpointManager(run).list_checkpoints() if c.path == path))
        seen = max([seen, *(int(path.name[5:]) for path in cache.glob("step_*"))])
    with _manager(tmp_path, save_total_limit=2) as manager:
        model = nn.Linear(1000, 1000)
        assert manager.load_latest(model)[0] == seen
        assert manager.flush(10)
    assert _names(run)[-1] == f"step_{seen:08d}"
    assert not [name for name in _names(run) if name.startswith(".")]


ENDING = """
import sys, torch
from svend.pipeline.checkpoints import DriveCheckpointManager
manager = DriveCheckpointManager(sys.argv[1], sys.argv[2])
manager.save(torch.nn.Linear(2000, 2000), step=1)
"""


def test_a_normal_end_of_the_process_waits_for_the_copies(tmp_path: Path) -> None:
    run = tmp_path / "mount" / "run"
    done = subprocess.run([sys.executable, "-c", ENDING, str(run), str(tmp_path / "cache")],
                          cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    assert [c.step for c in _whole(run)] == [1]


def test_closing_with_the_drive_away_says_what_is_left_and_the_next_manager_copies_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = _manager(tmp_path)
    come_back = _rename_away(tmp_path / "mount")
    _save(manager, 1)
    assert not manager.close(timeout_seconds=0.3)
    assert "step_00000001 did not arrive" in caplog.messages[-1]
    come_back()
    with _manager(tmp_path) as again:
        assert again.flush(10)
    assert [c.step for c in _whole(tmp_path / "mount" / "run")] == [1]


def test_two_runs_do_not_share_a_cache(tmp_path: Path) -> None:
    DriveCheckpointManager(tmp_path / "mount" / "run", tmp_path / "cache")
    with pytest.raises(CheckpointError, match="choose another local_cache") as refusal:
        DriveCheckpointManager(tmp_path / "mount" / "other", tmp_path / "cache")
    assert len(str(refusal.value).splitlines()) == 1


def test_the_summary_says_what_waits(
    tmp_path: Path, manager: DriveCheckpointManager, capsys: pytest.CaptureFixture[str]
) -> None:
    come_back = _rename_away(tmp_path / "mount")
    _save(manager, 1)
    manager.print_summary()
    assert "waiting to be copied: step_00000001" in capsys.readouterr().out
    come_back()
    assert manager.flush(10)
    manager.print_summary()
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{tmp_path / 'mount' / 'run'}: 1 checkpoints, nothing waits")


@pytest.mark.parametrize("blocked", ["mount", "mount/run"])
def test_a_drive_that_cannot_be_made_is_one_line_that_says_what_to_do(
    tmp_path: Path, blocked: str
) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("a file")
    with pytest.raises(CheckpointError, match="give drive_path a folder that exists") as refusal:
        _manager(tmp_path)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.skipif(Path("/content").exists(), reason="this is Colab, or looks like it")
def test_without_colab_the_path_of_the_guide_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        DriveCheckpointManager(drive_path="/content/drive/MyDrive/svend-checkpoints/my-run",
                               local_cache=tmp_path / "cache")
    assert "google.colab" in str(refusal.value)
    assert "give a folder elsewhere, or mount the drive first" in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert not Path("/content").exists()


def _colab(monkeypatch: pytest.MonkeyPatch, mount: Callable[[str], None]) -> None:
    """Let google.colab, which exists in Colab only, be importable."""
    drive = types.ModuleType("google.colab.drive")
    vars(drive)["mount"] = mount
    for name in ("google", "google.colab"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "google.colab.drive", drive)


def test_in_colab_the_drive_is_mounted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted: list[str] = []
    # What a program that ran too early has left there is not Drive.
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    monkeypatch.setattr(Path, "is_mount", lambda path: str(path) in mounted)
    _colab(monkeypatch, mounted.append)
    monkeypatch.setattr(drive, "MOUNT_POINT", tmp_path / "drive")
    for run in ("drive/MyDrive/a", "drive/MyDrive/b", "elsewhere/c"):
        with DriveCheckpointManager(tmp_path / run, tmp_path / f"cache-{run[-1]}") as manager:
            _save(manager, 1)
        assert [c.step for c in _whole(tmp_path / run)] == [1]
    assert mounted == [str(tmp_path / "drive")]


def test_a_refused_mount_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mount(place: str) -> None:
        raise ValueError("mount failed\nin more than one line")

    _colab(monkeypatch, mount)
    monkeypatch.setattr(drive, "MOUNT_POINT", tmp_path / "drive")
    with pytest.raises(CheckpointError, match="mount failed") as refusal:
        DriveCheckpointManager(tmp_path / "drive" / "MyDrive" / "run", tmp_path / "cache")
    assert len(str(refusal.value).splitlines()) == 1
    assert not (tmp_path / "drive").exists()


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[bool], None]]:
    """Mounts a real file system of 1 MB at `mount`, or takes it away."""
    place, is_mounted = tmp_path / "mount", False
    place.mkdir()

    def put(there: bool) -> None:
        nonlocal is_mounted
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs"] if there else ["umount", "-l"]
        done = subprocess.run([*command, str(place)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("this process may not mount file systems")
        is_mounted = there

    yield put
    if is_mounted:
        put(False)


def test_nothing_is_written_under_a_bare_mount_point(
    tmp_path: Path, tmpfs: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    bare = tmp_path / "mount" / "run"
    bare.mkdir()  # what an earlier program left on the local disk
    tmpfs(True)
    manager = DriveCheckpointManager(bare, tmp_path / "cache")
    _save(manager, 1)
    assert manager.flush(10)
    tmpfs(False)
    _save(manager, 2)
    assert not manager.flush(timeout_seconds=0.7)
    assert list(bare.iterdir()) == []
    assert "nothing is mounted there" in caplog.text
    manager.close(timeout_seconds=0.1)


def test_a_full_drive_makes_room_for_what_comes(
    tmp_path: Path, tmpfs: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    tmpfs(True)
    with DriveCheckpointManager(
        tmp_path / "mount" / "run", tmp_path / "cache", save_total_limit=2
    ) as manager:
        for step in (1, 2, 3, 4):  # of 0.36 MB each
            _save(manager, step, width=300)
            assert manager.flush(10)
        assert [c.step for c in _whole(tmp_path / "mount" / "run")] == [3, 4]


def test_a_checkpoint_that_vanished_from_the_cache_has_not_arrived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = _manager(tmp_path)
    come_back = _rename_away(tmp_path / "mount")
    _save(manager, 1)
    assert not manager.flush(timeout_seconds=0.3)
    for path in sorted(manager.output_dir.glob("step_*/*")):
        path.unlink()
    come_back()
    assert not manager.flush(10)
    assert "vanished from the cache" in caplog.text


def test_a_drive_that_goes_away_during_a_load_is_no_reason_to_go_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _manager(tmp_path) as manager:
        _save(manager, 1, 2)
    fresh = DriveCheckpointManager(manager.drive_path, tmp_path / "other-machine")
    come_back: Callable[[], None] | None = None
    copy_checkpoint = drive_manager.copy_checkpoint

    def vanish_once(*arguments: object) -> Checkpoint:
        nonlocal come_back
        if come_back is None:
            come_back = _rename_away(tmp_path / "mount")
        return copy_checkpoint(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(drive_manager, "copy_checkpoint", vanish_once)
    monkeypatch.setattr(drive_manager, "FETCH_PAUSES_SECONDS", (0.01, 0.01))
    with pytest.raises(CheckpointError, match="mount it and try again"):
        fresh.load_latest(_model(0.0))
    assert come_back is not None
    come_back()
    assert fresh.load_latest(_model(0.0))[2] == {"mark": 2}
    fresh.close()


def test_a_cache_must_not_be_the_drive_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose another"):
        DriveCheckpointManager(tmp_path / "run", tmp_path / "run")


def test_a_claim_cut_short_by_a_kill_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".drive_path").write_bytes(b"")
    DriveCheckpointManager(tmp_path / "one", tmp_path / "cache").close()
    with pytest.raises(CheckpointError, match="is the cache of"):
        DriveCheckpointManager(tmp_path / "two", tmp_path / "cache")
