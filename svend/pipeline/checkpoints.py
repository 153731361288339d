"""Checkpoints that are whole or absent, on a disk or behind an unreliable mount."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from svend.errors import CheckpointError, ConfigError
from svend.pipeline.checkpoint_files import (
    EXTRA_STATE,
    METADATA,
    MODEL,
    Checkpoint,
    finish_replacements,
    flush_folder,
    has_dead_writer,
    move_into_place,
    read_folder,
    read_state,
    reason_of,
    remove_checkpoints,
    remove_leftovers,
    verify,
    write_bytes,
    write_state,
    writing_place,
)

__all__ = ["METADATA", "MODEL", "Checkpoint", "CheckpointManager", "DriveCheckpointManager",
           "Stateful", "verify"]


class Stateful(Protocol):
    """What has a state to save: an optimizer, a scheduler, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


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
    ) -> None:
        if save_total_limit < 1:
            raise ConfigError(f"save_total_limit = {save_total_limit}: must be at least 1")
        if best_metric_mode not in ("min", "max"):
            raise ConfigError(f"best_metric_mode = '{best_metric_mode}': must be min or max")
        self.output_dir = Path(output_dir)
        self.save_total_limit = save_total_limit
        self.best_metric = best_metric
        self.best_metric_mode = best_metric_mode
        finish_replacements(self.output_dir)
        remove_leftovers(self.output_dir, has_dead_writer)

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
    ) -> str:
        """Save what is given; return the checkpoint's id, such as `step_00001000`.

        Raises CheckpointError, and leaves what was there, if the disk is full or not writable.
        """
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        states["extra_state"] = dict(extra_state or {})
        checkpoint_id = f"step_{step:08d}"
        writing = writing_place(self.output_dir / checkpoint_id)
        try:
            writing.mkdir(parents=True)
            files = {f"{name}.pt": write_state(writing / f"{name}.pt", state)
                     for name, state in states.items()}
            metadata = {
                "checkpoint_id": checkpoint_id,
                "step": step,
                "epoch": epoch,
                "metrics": dict(metrics or {}),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "files": files,
            }
            write_bytes(writing / METADATA, json.dumps(metadata, indent=1).encode())
            flush_folder(writing)
            move_into_place(writing, self.output_dir / checkpoint_id)
        except (OSError, RuntimeError) as error:
            # torch.save raises RuntimeError where the disk is full.
            raise CheckpointError(
                f"{self.output_dir / checkpoint_id}: cannot be written ({reason_of(error)}); free "
                "disk space or choose another checkpoint_dir; earlier checkpoints are untouched"
            ) from error
        finally:
            shutil.rmtree(writing, ignore_errors=True)
        self._prune()
        return checkpoint_id

    def list_checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints in order of their step, unverified."""
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

        A damaged one is named in a warning and passed over. Raises CheckpointError if none is
        left.
        """
        for checkpoint in reversed(self._look()):
            try:
                intact = self._intact(checkpoint)
            except CheckpointError as error:
                warnings.warn(f"{error}; using the one before it", stacklevel=2)
                continue
            return self.load(intact, model, optimizer, scheduler, scaler)
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
        parts: dict[str, Stateful | nn.Module | None] = {
            "model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler,
        }
        for name, part in parts.items():
            if part is None:
                continue
            state = read_state(checkpoint.path / f"{name}.pt")
            try:
                part.load_state_dict(state)
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{checkpoint.path / name}.pt does not fit this {name}: "
                    f"{' '.join(str(error).split())[:300]}"
                ) from None
        return checkpoint.step, checkpoint.epoch, read_state(checkpoint.path / EXTRA_STATE)

    def print_summary(self) -> None:
        """Print a line for each checkpoint, the best one marked."""
        best = self.best()
        print(f"{self.output_dir}: {len(self.list_checkpoints())} checkpoints")
        for checkpoint in self.list_checkpoints():
            metrics = ", ".join(f"{k}={v:.4f}" for k, v in checkpoint.metrics.items())
            mark = "  best" if best and best.checkpoint_id == checkpoint.checkpoint_id else ""
            size = f"{checkpoint.bytes / 1e6:.0f} MB"
            print(f"  {checkpoint.checkpoint_id}  {checkpoint.created}  {size}  {metrics}{mark}")

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
        return min(measured, key=lambda c: (sign * c.metrics[self.best_metric], -c.step),
                   default=None)

    def _worth_keeping(self, checkpoints: Sequence[Checkpoint]) -> set[str]:
        """Return the ids of the most recent checkpoints and of the best one."""
        kept = {c.checkpoint_id for c in checkpoints[-self.save_total_limit :]}
        best = self._best_of(checkpoints)
        return kept | {best.checkpoint_id} if best else kept

    def _prune(self) -> None:
        checkpoints, _ = read_folder(self.output_dir)
        kept = self._worth_keeping(checkpoints)
        remove_checkpoints(c for c in checkpoints if c.checkpoint_id not in kept)
