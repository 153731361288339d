"""The far side of a checkpoint folder: a mount that is slow, and may vanish and come back."""

from __future__ import annotations

import atexit
import errno
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from svend.errors import CheckpointError, reason_of
from svend.pipeline.checkpoints.files import (
    copy_checkpoint,
    has_full_length,
    remove_checkpoints,
    tidy_folder,
    writer_name,
)
from svend.pipeline.checkpoints.metadata import Checkpoint, read_folder, read_metadata

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0
AWAY_PATIENCE_SECONDS = 30.0

_log = logging.getLogger(__name__)


def _mount_of(folder: Path) -> Path | None:
    """Return the mount point that a folder lies under, None for the machine's own disk."""
    mounts = (path for path in (folder, *folder.parents[:-1]) if path.is_mount())
    return next(mounts, None)


_copiers = itertools.count()


class DriveCopier:
    """Copies checkpoints from a cache to a drive, one thread at work while there are any.

    A copy that fails for whatever reason of the drive's is tried again, after pauses that grow,
    until it succeeds. The newest goes first: it is the one to resume from.
    """

    def __init__(
        self,
        cache: Path,
        drive: Path,
        worth_keeping: Callable[[Sequence[Checkpoint]], set[str]],
    ) -> None:
        self._cache = cache
        self._drive = drive
        self._worth_keeping = worth_keeping
        self._mount = _mount_of(drive)
        self._process = os.getpid()
        self._writer = writer_name(f".{next(_copiers)}")
        self._tickets = itertools.count()
        # Guards what follows, and wakes whoever waits for a change of it.
        self._changed = threading.Condition()
        self._pending: dict[str, int] = {}  # a checkpoint that is saved anew gets a new ticket
        self._given_up: set[str] = set()
        self._verified: set[str] = set()
        self._thread: threading.Thread | None = None
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._is_away = False
        self._is_urgent = False
        self._is_stopping = False
        self.in_flight: set[str] = set()
        self.on_drive: list[Checkpoint] = []  # as last seen

    def add(self, checkpoint_id: str) -> None:
        """Have a checkpoint of the cache copied; return at once."""
        with self._changed:
            self._pending[checkpoint_id] = next(self._tickets)
            self._given_up.discard(checkpoint_id)
            self._is_stopping = False
            if self._thread is None or not self._thread.is_alive():
                # A daemon, for a mount may hang for ever; a normal end waits in close.
                self._thread = threading.Thread(
                    target=self._work, name="svend-drive-copier", daemon=True)
                self._thread.start()
                atexit.unregister(self.close)
                atexit.register(self.close)

    def forget(self, checkpoint_ids: Iterable[str]) -> None:
        """Copy these no more: they have been removed from the cache as superfluous."""
        with self._changed:
            for checkpoint_id in checkpoint_ids:
                self._pending.pop(checkpoint_id, None)
            self._changed.notify_all()

    def is_there(self, checkpoint: Checkpoint) -> bool:
        """Whether the drive answers, and still lists this checkpoint."""
        try:
            self.look()
        except OSError:
            return False
        return any(c.is_copy_of(checkpoint) for c in self.on_drive)

    def waiting(self) -> list[str]:
        """Return the ids of what has not arrived yet."""
        with self._changed:
            return sorted(self._pending)

    def has(self, checkpoint: Checkpoint) -> bool:
        """Whether the drive, as last seen, has this or a later save of the step in full length."""
        return any(
            c.checkpoint_id == checkpoint.checkpoint_id and has_full_length(c)
            and (c.age_key > checkpoint.age_key or c.is_copy_of(checkpoint))
            for c in self.on_drive
        )

    def note_verified(self, checkpoint_id: str) -> None:
        """Note that the drive's copy of a checkpoint has been read and found intact."""
        self._verified.add(checkpoint_id)

    def look(self) -> list[str]:
        """Read what is on the drive; return what is said of what is no checkpoint."""
        try:
            self._check_drive()
            self.on_drive, complaints = read_folder(self._drive)
        except OSError:
            self.on_drive = []
            raise
        return complaints

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until nothing is left to copy; return whether everything has arrived."""
        return self._wait(timeout_seconds, timeout_seconds)

    def close(self, timeout_seconds: float = 600.0) -> bool:
        """Wait as `flush` does, but less for a drive that is away, then give up what is left."""
        atexit.unregister(self.close)
        if os.getpid() != self._process:
            return True  # a fork has no copying thread, and its parent waits
        arrived = self._wait(timeout_seconds, AWAY_PATIENCE_SECONDS)
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if waiting := self.waiting():
            _log.warning("%s: %s did not arrive; kept in %s, and copied when a manager of both is "
                         "made again", self._drive, ", ".join(waiting), self._cache)
        return arrived

    def _wait(self, timeout_seconds: float, away_timeout_seconds: float) -> bool:
        start = time.monotonic()
        with self._changed:
            self._is_urgent = True
            self._changed.notify_all()
            while self._pending:
                limit = min(timeout_seconds, away_timeout_seconds) if self._is_away else (
                    timeout_seconds)
                left = start + limit - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return not self._pending and not self._given_up

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            checkpoint_id, ticket = taken
            try:
                self._attempt(checkpoint_id)
            except OSError as error:
                self._pause(checkpoint_id, error)
            except CheckpointError as error:
                _log.warning("%s; not copied to %s", error, self._drive)
                self._settle(checkpoint_id, ticket, arrived=False)
            except BaseException:
                # A bug: whoever waits must not wait for a thread that is gone.
                with self._changed:
                    self._given_up |= set(self._pending)
                    self._pending.clear()
                    self._changed.notify_all()
                raise
            else:
                self._settle(checkpoint_id, ticket, arrived=True)

    def _take(self) -> tuple[str, int] | None:
        with self._changed:
            if self._is_stopping or not self._pending:
                self._thread = None
                return None
            newest = max(self._pending, key=lambda pending: self._pending[pending])
            self.in_flight = {newest}
            return newest, self._pending[newest]

    def _settle(self, checkpoint_id: str, ticket: int, *, arrived: bool) -> None:
        with self._changed:
            self.in_flight = set()
            if self._pending.get(checkpoint_id) == ticket:
                del self._pending[checkpoint_id]
                if not arrived:
                    self._given_up.add(checkpoint_id)
            self._is_away = False
            self._pause_seconds = FIRST_PAUSE_SECONDS
            self._changed.notify_all()

    def _pause(self, checkpoint_id: str, error: OSError) -> None:
        with self._changed:
            self.in_flight = set()
            if not self._is_away:
                self._is_away = True
                _log.warning("%s: %s cannot be copied there (%s); it stays in %s and is tried "
                             "again until it arrives",
                             self._drive, checkpoint_id, reason_of(error), self._cache)
            if self._is_urgent:
                # Someone has begun to wait: what they wait for is tried again soon.
                self._is_urgent = False
                self._pause_seconds = FIRST_PAUSE_SECONDS
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_urgent or self._is_stopping,
                                   self._pause_seconds)
            self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _attempt(self, checkpoint_id: str) -> None:
        while (source := self._find(checkpoint_id)) is not None:
            try:
                self._deliver(source)
                return
            except (OSError, CheckpointError):
                # Pruned or saved anew in the meantime: no fault of either folder.
                if self._find(checkpoint_id) == source:
                    raise
        if checkpoint_id in self._pending:
            raise CheckpointError(f"{self._cache / checkpoint_id}: vanished from the cache")

    def _find(self, checkpoint_id: str) -> Checkpoint | None:
        path = self._cache / checkpoint_id
        try:
            return read_metadata(path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CheckpointError(f"{path}: not a checkpoint ({error})") from error

    def _deliver(self, source: Checkpoint) -> None:
        self.look()
        tidy_folder(self._drive, lambda path: path.name.endswith(self._writer))
        self.look()
        if not self.has(source):
            try:
                copy_checkpoint(source, self._drive, self._writer)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    self._prune(source)  # the next attempt finds the room
                raise
            self._verified.add(source.checkpoint_id)
        self._prune()

    def _prune(self, coming: Checkpoint | None = None) -> None:
        """Remove what is not worth keeping, and what will not be when `coming` has come."""
        self.look()
        # Damaged ones are left for the user to see, and do not take the place of others.
        complete = [c for c in self.on_drive if has_full_length(c)]
        kept = self._worth_keeping([*complete, *([coming] if coming else [])])
        # Full length is not yet intact: one that was read back stays, whatever its age.
        read_back = [c.checkpoint_id for c in complete if c.checkpoint_id in self._verified]
        kept |= set(read_back[-1:])
        superfluous = [c for c in complete if c.checkpoint_id not in kept]
        if superfluous:
            remove_checkpoints(superfluous, self._writer)
            self.look()

    def _check_drive(self) -> None:
        """Raise OSError where the drive is away.

        The folder is never made anew: under the bare mount point it would be on the local disk.
        """
        if not self._drive.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder is not there", str(self._drive))
        if self._mount is not None and not self._mount.is_mount():
            raise OSError(errno.ENOTCONN, "nothing is mounted there", str(self._mount))
