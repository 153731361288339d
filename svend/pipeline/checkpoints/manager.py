"""The checkpoints of one run: saved, listed, loaded and pruned, each whole or absent."""

from __future__ import annotations

import errno
import math
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from svend.errors import CheckpointError, ConfigError, RankLost, reason_of
from svend.pipeline.checkpoints.files import (
    UnreachableError,
    check_loadable,
    format_bytes,
    has_dead_writer,
    has_full_length,
    move_into_place,
    remove_checkpoints,
    tidy_folder,
    verify,
    write_state,
    writing_place,
)
from svend.pipeline.checkpoints.metadata import (
    EXTRA_STATE,
    METADATA,
    MODEL,
    Checkpoint,
    metadata_bytes,
    read_folder,
)
from svend.pipeline.checkpoints.states import (
    BYTES_BESIDE_TENSORS,
    Content,
    Snapshots,
    Stateful,
    gather_content,
    load_parts,
)
from svend.pipeline.config import FullDisk
from svend.pipeline.checkpoints.sharded import PartialSave, consolidate_weights
from svend.pipeline.whole_files import flush_folder, write_bytes


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
        return self._write(gather_content(parts, step, epoch, metrics, extra_state, partial))

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
        content = gather_content(parts, step, epoch, metrics, extra_state, partial)
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

    def _write(self, content: Content) -> str:
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

    def _write_once(self, content: Content) -> str:
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
    ) -> tuple[int, int, dict[str, Any]]:
        """Load the newest checkpoint that is intact; return step, epoch and extra state.

        A damaged one is named in a warning and passed over. Raises CheckpointError if none is left.
        """
        return self.load(self.find_latest(), model, optimizer, scheduler, scaler)

    def find_latest(self, wanted: Callable[[Checkpoint], bool] = lambda _: True) -> Checkpoint:
        """Return the newest checkpoint that is intact, as `load_latest` does.

        One that is not `wanted` is passed over in silence.
        """
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


def _checkpoint_id(step: int) -> str:
    return f"step_{step:08d}"


def _unwritable(place: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{place}: cannot be written ({reason_of(error)}); make room, or choose another "
        "checkpoint_dir; earlier checkpoints are untouched"
    )


def _is_intact(checkpoint: Checkpoint) -> bool:
    try:
        verify(checkpoint)
    except CheckpointError:
        return False
    return True
