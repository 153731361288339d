"""Checkpoints that are whole or absent, on a disk or behind an unreliable mount."""

from __future__ import annotations

import errno
import math
import operator
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor, nn

from svend.errors import CheckpointError, ConfigError, RankLost
from svend.models.shards import is_sharded
from svend.pipeline.checkpoint_files import (
    EXTRA_STATE,
    METADATA,
    MODEL,
    Checkpoint,
    Snapshots,
    UnreachableError,
    check_loadable,
    copy_checkpoint,
    flush_folder,
    format_bytes,
    has_dead_writer,
    has_full_length,
    metadata_bytes,
    move_into_place,
    read_folder,
    reason_of,
    remove_checkpoints,
    tidy_folder,
    verify,
    write_bytes,
    write_state,
    writing_place,
)
from svend.pipeline.config import FullDisk
from svend.pipeline.drive_copier import DriveCopier, claim_cache, own_cache, reach_drive
from svend.pipeline.sharded_files import PartialSave, consolidate_weights, read_state_of
from svend.pipeline.state_files import read_state

__all__ = ["METADATA", "MODEL", "Checkpoint", "CheckpointManager", "DriveCheckpointManager",
           "Stateful", "verify"]


# The names, the metadata and what a state has beside its tensors.
BYTES_BESIDE_TENSORS = 200_000
# After each, a drive that vanished during a load is tried again.
FETCH_PAUSES_SECONDS = (0.5, 2.0, 5.0)


class Stateful(Protocol):
    """What has a state to save: an optimizer, a scheduler, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class _Content:
    """What a checkpoint is to hold."""

    step: int
    epoch: int
    metrics: dict[str, float]
    states: dict[str, Any]
    partial: PartialSave | None

    @property
    def bytes(self) -> int:
        """What it takes on the disk, a little more than its tensors."""
        if self.partial is not None:
            return self.partial.bytes + BYTES_BESIDE_TENSORS
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in _tensors_in(self.states)
        }
        return sum(storages.values()) + BYTES_BESIDE_TENSORS


class FullDiskError(CheckpointError):
    """A checkpoint for which the disk has no room; `what` is the line without the advice."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"{what}; make room, set training.on_full_disk=prune, or choose another "
                         "checkpoint_dir; earlier checkpoints are untouched")


class CheckpointManager:
    """Saves, lists, loads and prunes the checkpoints of one run.

    Keeps the `save_total_limit` most recent and the best by `best_metric` ("min" or "max").
    """

    def __init__(
        self,
        output_dir: str | Path,
        save_total_limit: int = 3,
        best_metric: str = "loss",
        best_metric_mode: str = "min",
        *,
        on_full_disk: FullDisk = FullDisk.STOP,
    ) -> None:
        if not isinstance(save_total_limit, int) or save_total_limit < 1:
            raise ConfigError(f"save_total_limit = {save_total_limit!r}: must be at least 1")
        if best_metric_mode not in ("min", "max"):
            raise ConfigError(f"best_metric_mode = '{best_metric_mode}': must be min or max")
        self.output_dir = Path(output_dir).expanduser().absolute()
        self.save_total_limit = save_total_limit
        self.best_metric = best_metric
        self.best_metric_mode = best_metric_mode
        self.on_full_disk = on_full_disk
        self.write_seconds = 0.0  # of the newest save
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: Future[str] | None = None
        self._snapshots = Snapshots()
        try:
            tidy_folder(self.output_dir, has_dead_writer)
        except OSError as error:
            # What cannot be written may still be read.
            warnings.warn(f"{self.output_dir}: what killed processes left cannot be removed "
                          f"({reason_of(error)})", stacklevel=2)

    def save(
        self,
        model: nn.Module | None = None,
        optimizer: Stateful | None = None,
        scheduler: Stateful | None = None,
        step: int = 0,
        epoch: int = 0,
        metrics: Mapping[str, float] | None = None,
        extra_state: Mapping[str, Any] | None = None,
        scaler: Stateful | None = None,
        *,
        partial: PartialSave | None = None,
    ) -> str:
        """Save what is given; return the checkpoint's id, such as `step_00001000`.

        partial: model and optimizer, which every process writes its part of, into `prepare_folder`.

        Raises CheckpointError, and leaves what was there, if the disk is full or not writable, or
        if something given could not be loaded again.
        """
        self._wait_for_background()
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        return self._write(_content(parts, step, epoch, metrics, extra_state, partial))

    def save_in_background(
        self,
        model: nn.Module | None = None,
        optimizer: Stateful | None = None,
        scheduler: Stateful | None = None,
        step: int = 0,
        epoch: int = 0,
        metrics: Mapping[str, float] | None = None,
        extra_state: Mapping[str, Any] | None = None,
        scaler: Stateful | None = None,
        *,
        partial: PartialSave | None = None,
    ) -> Future[str]:
        """Copy what is given into main memory, and save the copy while the caller goes on.

        The future's result is what `save` returns or raises. One save runs at a time, and whatever
        reads the checkpoints waits for it, as a normal end of the process does.
        """
        self._wait_for_background()
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        content = _content(parts, step, epoch, metrics, extra_state, partial)
        try:
            content = replace(content, states=self._snapshots.take(content.states))
        except TypeError as error:
            raise CheckpointError(
                f"step {content.step}: holds what cannot be copied ({reason_of(error)}); give "
                "tensors, numbers, strings, lists and dicts of them"
            ) from error
        self._saving = self._background.submit(self._write, content)
        return self._saving

    def prepare_folder(self, step: int, size_bytes: int) -> Path:
        """Return a folder for the parts of a checkpoint of this size, which `save` then completes.

        Raises CheckpointError where the disk has no room for it.
        """
        self._wait_for_background()
        place = self.output_dir / _checkpoint_id(step)
        needed_bytes = size_bytes + BYTES_BESIDE_TENSORS
        if self._missing_bytes(needed_bytes) > 0 and not (
            self.on_full_disk is FullDisk.PRUNE and self._make_room(needed_bytes)
        ):
            raise self._full_disk(place, needed_bytes)
        writing = writing_place(place)
        shutil.rmtree(writing, ignore_errors=True)
        try:
            writing.mkdir(parents=True)
        except OSError as error:
            raise _unwritable(place, error) from error
        return writing

    def _wait_for_background(self) -> None:
        if self._saving is not None:
            wait([self._saving])

    def _write(self, content: _Content) -> str:
        """Save, and where the disk is full, as `on_full_disk` says."""
        started_seconds = time.perf_counter()
        try:
            checkpoint_id = self._write_once(content)
        except FullDiskError as error:
            # Parts are gathered once: there was room for them, or they were not begun.
            prunes = self.on_full_disk is FullDisk.PRUNE and content.partial is None
            if not prunes or not self._make_room(content.bytes):
                raise
            warnings.warn(f"{error.what}; older checkpoints were removed for it", stacklevel=3)
            checkpoint_id = self._write_once(content)
        self.write_seconds = time.perf_counter() - started_seconds
        return checkpoint_id

    def _make_room(self, needed_bytes: int) -> bool:
        """Remove the oldest checkpoints until a new one fits; return whether it does.

        The newest that is intact stays, and the best, and what is being read.
        """
        checkpoints, _ = read_folder(self.output_dir)
        intact = next(filter(_is_intact, reversed(checkpoints)), None)
        best = self._best_of(checkpoints)
        for checkpoint in checkpoints:
            if self._missing_bytes(needed_bytes) <= 0:
                break
            if (intact is not None and checkpoint not in (intact, best)
                    and checkpoint.checkpoint_id not in self._in_use()):
                remove_checkpoints([checkpoint])
        return self._missing_bytes(needed_bytes) <= 0

    def _in_use(self) -> set[str]:
        return set()

    def _missing_bytes(self, needed_bytes: int) -> int:
        places = (self.output_dir, *self.output_dir.parents)
        existing = next(path for path in places if os.path.lexists(path))
        return needed_bytes - shutil.disk_usage(existing).free

    def _full_disk(self, place: Path, needed_bytes: int) -> FullDiskError:
        return FullDiskError(
            f"{place}: the disk is full, the checkpoint needs {format_bytes(needed_bytes)}, "
            f"{format_bytes(self._missing_bytes(needed_bytes))} are missing"
        )

    def _write_once(self, content: _Content) -> str:
        checkpoint_id = _checkpoint_id(content.step)
        place = self.output_dir / checkpoint_id
        writing = writing_place(place)
        try:
            if content.partial is None and self._missing_bytes(content.bytes) > 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            writing.mkdir(parents=True, exist_ok=content.partial is not None)
            files = {} if content.partial is None else content.partial.result()
            files |= {f"{name}.pt": write_state(writing / f"{name}.pt", state)
                      for name, state in content.states.items()}
            check_loadable(writing / EXTRA_STATE, content.states["extra_state"])
            metadata = {
                "checkpoint_id": checkpoint_id,
                "sequence": 1 + max((c.sequence for c in self._known()), default=0),
                "step": content.step,
                "epoch": content.epoch,
                "metrics": content.metrics,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "files": files,
            }
            write_bytes(writing / METADATA, metadata_bytes(metadata))
            flush_folder(writing)
            move_into_place(writing, place)
        except (CheckpointError, RankLost):
            raise
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise CheckpointError(
                f"{place}: holds what cannot be saved "
                f"({reason_of(error)}); give tensors, numbers, strings, lists and dicts of them"
            ) from error
        except (OSError, RuntimeError) as error:
            # torch.save raises RuntimeError where the disk is full.
            shutil.rmtree(writing, ignore_errors=True)
            if self._missing_bytes(content.bytes) > 0:
                raise self._full_disk(place, content.bytes) from error
            raise _unwritable(place, error) from error
        finally:
            shutil.rmtree(writing, ignore_errors=True)
        self._saved(checkpoint_id)
        return checkpoint_id

    def list_checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints from old to new, unverified."""
        self._wait_for_background()
        found, complaints = read_folder(self.output_dir)
        for complaint in complaints:
            warnings.warn(complaint, stacklevel=2)
        return found

    def best(self) -> Checkpoint | None:
        """Return the best checkpoint among those that measured `best_metric`."""
        return self._best_of(self.list_checkpoints())

    def load_latest(
        self,
        model: nn.Module | None = None,
        optimizer: Stateful | None = None,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
        wanted: Callable[[Checkpoint], bool] = lambda _: True,
    ) -> tuple[int, int, dict[str, Any]]:
        """Load the newest checkpoint that is intact; return step, epoch and extra state.

        A damaged one is named in a warning and passed over, one not `wanted` in silence. Raises
        CheckpointError if none is left.
        """
        checkpoint = self.find_latest(wanted)
        return self.load(checkpoint, model, optimizer, scheduler, scaler)

    def find_latest(self, wanted: Callable[[Checkpoint], bool] = lambda _: True) -> Checkpoint:
        """Return the newest checkpoint that is intact, as `load_latest` does."""
        for checkpoint in filter(wanted, reversed(self._look())):
            try:
                return self._intact(checkpoint)
            except UnreachableError:
                raise  # it may well be intact: no reason to go back to an older one
            except CheckpointError as error:
                warnings.warn(f"{error}; using the one before it", stacklevel=3)
        raise CheckpointError(f"{self.output_dir}: no intact checkpoint to load")

    def load_best(
        self,
        model: nn.Module | None = None,
        optimizer: Stateful | None = None,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
    ) -> tuple[int, int, dict[str, Any]]:
        """Load the best checkpoint; return step, epoch and extra state."""
        best = self._best_of(self._look())
        if best is None:
            raise CheckpointError(
                f"{self.output_dir}: no checkpoint has a finite metric '{self.best_metric}'"
            )
        return self.load(self._intact(best), model, optimizer, scheduler, scaler)

    def load(
        self,
        checkpoint: Checkpoint,
        model: nn.Module | None = None,
        optimizer: Stateful | None = None,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
    ) -> tuple[int, int, dict[str, Any]]:
        """Load what is given from a verified checkpoint; no pickled code is ever run."""
        return load_parts(checkpoint, {
            "model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler,
        })

    def consolidate(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return a checkpoint that holds the weights in one file, put together from its parts."""
        if MODEL in checkpoint.files:
            return checkpoint
        whole = self._intact(checkpoint)
        try:
            return consolidate_weights(whole)
        except OSError as error:
            raise _unwritable(whole.path / MODEL, error) from error

    def print_summary(self) -> None:
        """Print a line for each checkpoint, the best one marked."""
        best = self.best()
        print(f"{self.output_dir}: {len(self.list_checkpoints())} checkpoints")
        for checkpoint in self.list_checkpoints():
            metrics = ", ".join(f"{k}={v:.4f}" for k, v in checkpoint.metrics.items())
            mark = "  best" if best and best.checkpoint_id == checkpoint.checkpoint_id else ""
            size = f"{checkpoint.bytes / 1e6:.0f} MB"
            print(f"  {checkpoint.checkpoint_id}  {checkpoint.created}  {size}  {metrics}{mark}")

    def _known(self) -> list[Checkpoint]:
        """Return every checkpoint whose number the next one must exceed."""
        return read_folder(self.output_dir)[0]

    def _look(self) -> list[Checkpoint]:
        """Return the checkpoints as they are at this moment, in order of their step."""
        return self.list_checkpoints()

    def _intact(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint to load, verified; raise CheckpointError if it is damaged."""
        verify(checkpoint)
        return checkpoint

    def _best_of(self, checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
        measured = [c for c in checkpoints
                    if math.isfinite(c.metrics.get(self.best_metric, math.nan))]
        sign = 1 if self.best_metric_mode == "min" else -1
        return min(measured, key=lambda c: (sign * c.metrics[self.best_metric], -c.sequence),
                   default=None)

    def _worth_keeping(self, checkpoints: Sequence[Checkpoint]) -> set[str]:
        """Return the ids of the most recent checkpoints and of the best one."""
        kept = {c.checkpoint_id for c in checkpoints[-self.save_total_limit :]}
        best = self._best_of(checkpoints)
        return kept | {best.checkpoint_id} if best else kept

    def _saved(self, checkpoint_id: str) -> None:
        """Do what a new checkpoint calls for."""
        self._prune({checkpoint_id})

    def _prune(self, spared: set[str]) -> list[Checkpoint]:
        """Remove what is not worth keeping, and return it."""
        # One that is not there in full takes no other's place among those that are kept.
        checkpoints = [c for c in read_folder(self.output_dir)[0] if has_full_length(c)]
        kept = self._worth_keeping(checkpoints) | spared
        superfluous = [c for c in checkpoints if c.checkpoint_id not in kept]
        try:
            remove_checkpoints(superfluous)
        except OSError as error:
            # The new one is saved: the run goes on, and the next save tries again.
            warnings.warn(f"{self.output_dir}: an old checkpoint cannot be removed "
                          f"({reason_of(error)})", stacklevel=4)
        return superfluous


class DriveCheckpointManager(CheckpointManager):
    """Saves into a local cache at once, and copies to a slow, unreliable folder in the background.

    The folder may vanish and come back at any time. What is loaded is the newest checkpoint that
    is intact on either side. Used as a context manager, or closed, it waits for the copies; a
    normal end of the process waits too, for a bounded time.
    """

    def __init__(
        self,
        drive_path: str | Path,
        local_cache: str | Path | None = None,
        save_total_limit: int = 3,
        best_metric: str = "loss",
        best_metric_mode: str = "min",
        *,
        on_full_disk: FullDisk = FullDisk.STOP,
    ) -> None:
        """Mount Drive if `drive_path` lies on it, and copy what an earlier process could not.

        Without a `local_cache`, each `drive_path` has its own under ~/.cache/svend.
        """
        self.drive_path = Path(drive_path).expanduser().absolute()
        cache = Path(local_cache).expanduser().absolute() if local_cache else own_cache(
            self.drive_path)
        if cache == self.drive_path:
            raise ConfigError(f"local_cache = {local_cache}: is drive_path itself; choose another")
        super().__init__(
            cache, save_total_limit, best_metric, best_metric_mode, on_full_disk=on_full_disk
        )
        reach_drive(self.drive_path)
        claim_cache(cache, self.drive_path)
        self._copier = DriveCopier(cache, self.drive_path, self._worth_keeping)
        self._copy_what_is_missing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def flush(self, timeout_seconds: float = 600.0) -> bool:
        """Wait until every checkpoint has arrived; return whether all have."""
        self._wait_for_background()
        arrived = self._copier.flush(timeout_seconds)
        self._prune_cache(self._copier.in_flight)
        return arrived

    def close(self, timeout_seconds: float = 600.0) -> bool:
        """Wait as `flush` does, though not long for a drive that is away; then stop trying.

        What has not arrived stays in the cache, and is copied by the next manager of both.
        """
        self._wait_for_background()
        return self._copier.close(timeout_seconds)

    def list_checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints of both sides from old to new, unverified.

        The drive's are those of the last look at it, for it may be slow: loading and every
        finished copy look anew.
        """
        return self._newest_of_each(super().list_checkpoints())

    def print_summary(self) -> None:
        """Print a line for each checkpoint, the best one marked, and how the drive stands."""
        super().print_summary()
        waiting = self._copier.waiting()
        state = f"waiting to be copied: {', '.join(waiting)}" if waiting else "nothing waits"
        print(f"{self.drive_path}: {len(self._copier.on_drive)} checkpoints, {state}")

    def _saved(self, checkpoint_id: str) -> None:
        self._copier.add(checkpoint_id)
        # A drive slower than the training would otherwise never see a copy finished.
        self._prune_cache({checkpoint_id} | self._in_use())

    def _in_use(self) -> set[str]:
        return self._copier.in_flight

    def _prune_cache(self, spared: set[str]) -> None:
        self._copier.forget(c.checkpoint_id for c in self._prune(spared))

    def _known(self) -> list[Checkpoint]:
        return [*super()._known(), *self._copier.on_drive]

    def _look(self) -> list[Checkpoint]:
        try:
            complaints = self._copier.look()
        except OSError as error:
            complaints = [f"{self.drive_path}: cannot be read ({reason_of(error)}); "
                          f"only {self.output_dir} is looked at"]
        for complaint in complaints:
            warnings.warn(complaint, stacklevel=3)
        return self.list_checkpoints()

    def _newest_of_each(self, cached: list[Checkpoint]) -> list[Checkpoint]:
        # The sort is stable: of two equal copies the cached one comes last, and is taken.
        both = sorted([*self._copier.on_drive, *cached], key=lambda c: c.age_key)
        return list({c.checkpoint_id: c for c in both}.values())

    def _copy_what_is_missing(self) -> None:
        try:
            self._copier.look()
        except OSError as error:
            raise CheckpointError(
                f"{self.drive_path}: cannot be read ({reason_of(error)}); mount the drive again"
            ) from error
        cached, _ = read_folder(self.output_dir)
        kept = self._worth_keeping(self._newest_of_each(cached))
        for checkpoint in cached:
            if checkpoint.checkpoint_id in kept and not self._copier.has(checkpoint):
                self._copier.add(checkpoint.checkpoint_id)

    def _intact(self, checkpoint: Checkpoint) -> Checkpoint:
        cached, _ = read_folder(self.output_dir)
        copies = [c for c in [*cached, *self._copier.on_drive]
                  if c.checkpoint_id == checkpoint.checkpoint_id]
        *rest, last = sorted(copies, key=lambda c: c.created, reverse=True) or [checkpoint]
        for copy in rest:
            try:
                return self._verified(copy)
            except CheckpointError as error:
                warnings.warn(f"{error}; using the copy on the other side", stacklevel=3)
        return self._verified(last)

    def _verified(self, checkpoint: Checkpoint) -> Checkpoint:
        if checkpoint.path.parent == self.output_dir:
            verify(checkpoint)
            return checkpoint
        for pause_seconds in FETCH_PAUSES_SECONDS:
            try:
                return self._fetched(checkpoint)
            except (OSError, CheckpointError):
                if self._copier.is_there(checkpoint):
                    raise
            time.sleep(pause_seconds)
        raise UnreachableError(
            f"{checkpoint.path}: the drive went away while it was read; mount it and try again"
        )

    def _fetched(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return a verified copy in the cache, or the drive's own where the cache is full."""
        try:
            fetched = copy_checkpoint(checkpoint, self.output_dir)
        except OSError as error:
            # A full cache is no reason to go back to an older state.
            verify(checkpoint)
            warnings.warn(f"{checkpoint.path}: read from the drive, for it cannot be copied to "
                          f"{self.output_dir} ({reason_of(error)})", stacklevel=5)
            fetched = checkpoint
        self._copier.note_verified(checkpoint.checkpoint_id)
        return fetched


def _content(
    parts: Mapping[str, Stateful | nn.Module | None],
    step: int,
    epoch: int,
    metrics: Mapping[str, float] | None,
    extra_state: Mapping[str, Any] | None,
    partial: PartialSave | None,
) -> _Content:
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    return _Content(
        _whole_number("step", step),
        _whole_number("epoch", epoch),
        {name: _number(name, value) for name, value in (metrics or {}).items()},
        {**states, "extra_state": dict(extra_state or {}),
         **({} if partial is None else {"layout": partial.layout})},
        partial,
    )


def load_parts(
    checkpoint: Checkpoint, parts: Mapping[str, Stateful | nn.Module | None]
) -> tuple[int, int, dict[str, Any]]:
    """Load what is given, by its name, from a verified checkpoint; None for what is not wanted.

    Saved whole or in parts, it is loaded whole or in parts, as model and optimizer are laid out.
    Where several processes each hold a part, each calls this.
    """
    wanted = {name: part for name, part in parts.items() if part is not None}
    like, on_cuda = _sharded_tensor(wanted.get("model")), _is_on_cuda(wanted.get("model"))
    # All are read before the first is changed, but for a sharded model, which is read into its
    # place: there is no room for it twice.
    states = {
        name: read_state_of(checkpoint, name, part.state_dict(), like, on_cuda=on_cuda)
        for name, part in wanted.items()
    }
    extra_state = read_state(checkpoint.path / EXTRA_STATE)
    if not isinstance(extra_state, dict):
        raise CheckpointError(f"{checkpoint.path / EXTRA_STATE}: holds no state")
    for name, part in wanted.items():
        try:
            part.load_state_dict(states.pop(name))
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{checkpoint.path / name}.pt does not fit this {name}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from None
    return checkpoint.step, checkpoint.epoch, extra_state


def _sharded_tensor(model: Stateful | nn.Module | None) -> Tensor | None:
    """Return a tensor of the model by which this process cuts what it loads, if it does."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next(filter(is_sharded, parameters), None)


def _is_on_cuda(model: Stateful | nn.Module | None) -> bool:
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return any(parameter.device.type == "cuda" for parameter in parameters)


def _checkpoint_id(step: int) -> str:
    return f"step_{step:08d}"


def _unwritable(place: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{place}: cannot be written ({reason_of(error)}); make room, or choose another "
        "checkpoint_dir; earlier checkpoints are untouched"
    )


def _tensors_in(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors_in(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors_in(value)


def _is_intact(checkpoint: Checkpoint) -> bool:
    try:
        verify(checkpoint)
    except CheckpointError:
        return False
    return True


def _whole_number(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise CheckpointError(f"{name} = {value!r}: must be a whole number of at least 0")
    return number


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointError(f"metrics['{name}'] = {value!r}: must be a number") from None
