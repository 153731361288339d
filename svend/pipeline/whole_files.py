"""Files and folders that are on the disk when they are written, or whole at any instant."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


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


@contextlib.contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into, which is at `place` once the context is left.

    Where it is left by an error nothing is; what a kill leaves, the next of the name removes.
    """
    writing = place.with_name(f".writing-{place.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        yield writing
        writing.rename(place)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def append_lines(path: Path, values: Iterable[Any]) -> None:
    """Append values through to the disk, each as a line of JSON."""
    with path.open("a", encoding="utf-8") as stream:
        # The line break comes first, so that a line torn by a kill spoils no other.
        stream.write("".join("\n" + json.dumps(value) for value in values))
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(path: Path) -> Iterator[Any]:
    """Yield what `append_lines` wrote, but for a line torn by a kill; nothing if no file is."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(line)


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
