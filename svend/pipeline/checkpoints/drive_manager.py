"""Checkpoints behind a mount that is slow and unreliable, by way of a cache of this machine."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Self

from svend.errors import CheckpointError, ConfigError, reason_of
from svend.pipeline.checkpoints.files import UnreachableError, copy_checkpoint, verify
from svend.pipeline.checkpoints.manager import CheckpointManager
from svend.pipeline.checkpoints.metadata import Checkpoint, read_folder
from svend.pipeline.config import FullDisk
from svend.pipeline.checkpoints.drive import claim_cache, own_cache, reach_drive
from svend.pipeline.checkpoints.drive_copier import DriveCopier

# After each, a drive that vanished during a load is tried again.
FETCH_PAUSES_SECONDS = (0.5, 2.0, 5.0)


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
