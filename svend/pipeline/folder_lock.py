"""Folders that one process has at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import shlex
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

from svend.errors import UserError, one_line

LOCK_FILE = ".lock"


class FolderLock:
    """Keeps other processes out of a folder, until this one ends, however it ends."""

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        self._what = what
        self._lock: int | None = None

    def hold(self) -> None:
        """Take the folder. Raises UserError, with who it is, if another process has it."""
        self._lock = os.open(self._path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 1000, 0).decode(errors="replace").strip()
            self.release()
            raise UserError(
                f"{self._path}: another process has this {self._what}, {one_line(holder)}; wait "
                "for it, or stop it"
            ) from None
        except OSError as error:
            # Mounted folders without locks, such as Drive.
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = (f"{os.getpid()} of {_user()} on {socket.gethostname()} since {since}, "
                  f"{shlex.join(sys.argv[:3])}")
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, holder.encode(), 0)

    def release(self) -> None:
        """Let other processes, or another object of this one, have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _user() -> str:
    """Return the user's name; the number where it has none, as in many containers."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
