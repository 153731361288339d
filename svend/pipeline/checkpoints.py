"""Checkpoints that are whole or absent.

A checkpoint is written into a hidden folder beside its place, flushed, hashed, and moved into
place by one rename, so that a process killed at any instant leaves the old state or the new.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import nn

from svend.errors import CheckpointError, ConfigError

METADATA = "metadata.json"
MODEL = "model.pt"
EXTRA_STATE = "extra_state.pt"  # in every checkpoint


class Stateful(Protocol):
    """What has a state to save: an optimizer, a scheduler, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint without loading it."""

    checkpoint_id: str
    path: Path
    step: int
    epoch: int
    metrics: dict[str, float]
    created: str
    files: dict[str, dict[str, Any]]

    @property
    def weights_sha256(self) -> str:
        """The hash of the weights' file: what a verdict and a registered version refer to."""
        digest: str = self.files[MODEL]["sha256"]
        return digest

    @property
    def bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.files.values())


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
        self._recover()

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
        writing = self.output_dir / f".writing-{checkpoint_id}-{os.getpid()}"
        try:
            writing.mkdir(parents=True)
            files = {f"{name}.pt": _write(writing / f"{name}.pt", s) for name, s in states.items()}
            metadata = {
                "checkpoint_id": checkpoint_id,
                "step": step,
                "epoch": epoch,
                "metrics": dict(metrics or {}),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "files": files,
            }
            _write_text(writing / METADATA, json.dumps(metadata, indent=1))
            _flush_folder(writing)
            self._move_into_place(writing, self.output_dir / checkpoint_id)
        except (OSError, RuntimeError) as error:
            # torch.save raises RuntimeError where the disk is full.
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
            raise CheckpointError(
                f"{self.output_dir / checkpoint_id}: cannot be written ({reason}); free "
                "disk space or choose another checkpoint_dir; earlier checkpoints are untouched"
            ) from error
        finally:
            shutil.rmtree(writing, ignore_errors=True)
        self._prune()
        return checkpoint_id

    def list_checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints in order of their step, unverified."""
        found = []
        for path in sorted(self.output_dir.glob("step_*")):
            try:
                metadata = json.loads((path / METADATA).read_text(encoding="utf-8"))
                found.append(Checkpoint(path=path, **metadata))
            except (OSError, ValueError, TypeError) as error:
                warnings.warn(f"{path}: not a checkpoint ({error}); passed over", stacklevel=2)
        return found

    def best(self) -> Checkpoint | None:
        """Return the best checkpoint among those that measured `best_metric`."""
        measured = [c for c in self.list_checkpoints()
                    if math.isfinite(c.metrics.get(self.best_metric, math.nan))]
        sign = 1 if self.best_metric_mode == "min" else -1
        return min(measured, key=lambda c: (sign * c.metrics[self.best_metric], -c.step),
                   default=None)

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
        for checkpoint in reversed(self.list_checkpoints()):
            try:
                verify(checkpoint)
            except CheckpointError as error:
                warnings.warn(f"{error}; using the one before it", stacklevel=2)
                continue
            return self.load(checkpoint, model, optimizer, scheduler, scaler)
        raise CheckpointError(f"{self.output_dir}: no intact checkpoint to load")

    def load_best(
        self,
        model: nn.Module | None = None,
        optimizer: Stateful | None = None,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
    ) -> tuple[int, int, dict[str, Any]]:
        """Load the best checkpoint; return step, epoch and extra state."""
        best = self.best()
        if best is None:
            raise CheckpointError(
                f"{self.output_dir}: no checkpoint has a finite metric '{self.best_metric}'"
            )
        verify(best)
        return self.load(best, model, optimizer, scheduler, scaler)

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
            state = _read(checkpoint.path / f"{name}.pt")
            try:
                part.load_state_dict(state)
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{checkpoint.path / name}.pt does not fit this {name}: "
                    f"{' '.join(str(error).split())[:300]}"
                ) from None
        return checkpoint.step, checkpoint.epoch, _read(checkpoint.path / EXTRA_STATE)

    def print_summary(self) -> None:
        """Print a line for each checkpoint, the best one marked."""
        best = self.best()
        print(f"{self.output_dir}: {len(self.list_checkpoints())} checkpoints")
        for checkpoint in self.list_checkpoints():
            metrics = ", ".join(f"{k}={v:.4f}" for k, v in checkpoint.metrics.items())
            mark = "  best" if best and best.checkpoint_id == checkpoint.checkpoint_id else ""
            size = f"{checkpoint.bytes / 1e6:.0f} MB"
            print(f"  {checkpoint.checkpoint_id}  {checkpoint.created}  {size}  {metrics}{mark}")

    def _move_into_place(self, writing: Path, place: Path) -> None:
        replaced = self.output_dir / f".replaced-{place.name}"
        if place.exists():
            # Two renames: what a kill leaves between them, _recover puts right.
            place.rename(replaced)
        writing.rename(place)
        _flush_folder(self.output_dir)
        shutil.rmtree(replaced, ignore_errors=True)

    def _recover(self) -> None:
        """Finish or undo what a killed process left half-done."""
        for replaced in self.output_dir.glob(".replaced-*"):
            place = self.output_dir / replaced.name.removeprefix(".replaced-")
            if place.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(place)
        for writing in self.output_dir.glob(".writing-step_*-*"):
            process = writing.name.rsplit("-", 1)[1]
            if process.isdecimal() and not psutil.pid_exists(int(process)):
                shutil.rmtree(writing)

    def _prune(self) -> None:
        checkpoints = self.list_checkpoints()
        kept = {c.checkpoint_id for c in checkpoints[-self.save_total_limit :]}
        best = self.best()
        if best is not None:
            kept.add(best.checkpoint_id)
        for checkpoint in checkpoints:
            if checkpoint.checkpoint_id not in kept:
                # Out of sight by one rename first: a kill never leaves a half-deleted checkpoint.
                doomed = checkpoint.path.with_name(
                    f".writing-{checkpoint.checkpoint_id}-{os.getpid()}"
                )
                checkpoint.path.rename(doomed)
                shutil.rmtree(doomed)


def verify(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every file is there and has the hash that was recorded."""
    if EXTRA_STATE not in checkpoint.files:
        raise CheckpointError(f"{checkpoint.path / METADATA}: lists no {EXTRA_STATE}")
    for name, entry in checkpoint.files.items():
        path = checkpoint.path / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, {entry['bytes']} were written"
            )
        if _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: damaged (its hash is not the recorded one)")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(path: Path, state: Any) -> dict[str, Any]:
    with path.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be loaded ({reason[:200]})") from None


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
