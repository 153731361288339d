"""Files that are on the disk when they are written, or whole at any instant."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes through to the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is the old one or the new one, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}")
    write_bytes(temporary, content.encode() if isinstance(content, str) else content)
    temporary.rename(path)


def flush_folder(folder: Path) -> None:
    """Write a folder's list of names through to the disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE mounts flush files only.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
