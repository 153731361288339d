"""The files of a checkpoint: written, read, copied and removed whole or not at all.

A checkpoint is written into a hidden folder beside its place, flushed, hashed, and moved into
place by one rename, so that a process killed at any instant leaves the old state or the new.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from svend.errors import CheckpointError

METADATA = "metadata.json"
MODEL = "model.pt"
EXTRA_STATE = "extra_state.pt"  # in every checkpoint
CHUNK_BYTES = 4 * 2**20


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

    @property
    def age_key(self) -> tuple[int, str]:
        """Sorts checkpoints from old to new; one step saved twice is told apart by its time."""
        return self.step, self.created

    def is_copy_of(self, other: Checkpoint) -> bool:
        """Whether both say they hold the same, wherever they lie."""
        return (self.checkpoint_id, self.created, self.files) == (
            other.checkpoint_id, other.created, other.files)


def read_folder(folder: Path) -> tuple[list[Checkpoint], list[str]]:
    """Return the checkpoints in order of their step, unverified, and what is said of the others."""
    found, complaints = [], []
    for path in sorted(folder.glob("step_*")):
        try:
            found.append(read_metadata(path))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            complaints.append(f"{path}: not a checkpoint ({error}); passed over")
    return found, complaints


def read_metadata(path: Path) -> Checkpoint:
    """Read what a checkpoint says of itself."""
    return _parse_metadata(path, (path / METADATA).read_bytes())


def _parse_metadata(path: Path, content: bytes) -> Checkpoint:
    checkpoint = Checkpoint(path=path, **json.loads(content))
    for name in checkpoint.files:
        # A file named ../../x would be copied out of the folder.
        if name in ("", ".", "..", METADATA) or "/" in name:
            raise ValueError(f"'{name}' is no name of a checkpoint's file")
    return checkpoint


def verify(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every file is there and has the hash that was recorded."""
    verify_sizes(checkpoint)
    for name, entry in checkpoint.files.items():
        path = checkpoint.path / name
        try:
            digest = _sha256(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({reason_of(error)})") from error
        if digest != entry["sha256"]:
            raise _damaged(path)


def verify_sizes(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every file is there in its full length; reads none of them."""
    if EXTRA_STATE not in checkpoint.files:
        raise CheckpointError(f"{checkpoint.path / METADATA}: lists no {EXTRA_STATE}")
    for name, entry in checkpoint.files.items():
        path = checkpoint.path / name
        try:
            found = path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({reason_of(error)})") from error
        if found is None:
            raise CheckpointError(f"{path}: missing")
        if found != entry["bytes"]:
            raise CheckpointError(f"{path}: {found} bytes, {entry['bytes']} were written")


def has_full_length(checkpoint: Checkpoint) -> bool:
    """Whether `verify_sizes` has nothing to object to."""
    try:
        verify_sizes(checkpoint)
    except CheckpointError:
        return False
    return True


def copy_checkpoint(source: Checkpoint, folder: Path, writer: str | None = None) -> Checkpoint:
    """Copy a checkpoint into another folder, whole or not at all; return the copy.

    `writer` tells apart those who may write there at the same time.

    Raises CheckpointError if the source is damaged, and OSError if what arrived is not what was
    sent or if either folder cannot be reached.
    """
    verify_sizes(source)
    metadata = (source.path / METADATA).read_bytes()
    place = folder / source.path.name
    writing = writing_place(place, writer)
    writing.mkdir()
    try:
        for name, entry in source.files.items():
            _copy_file(source.path / name, writing / name, entry["sha256"])
        write_bytes(writing / METADATA, metadata)
        copy = _parse_metadata(place, (writing / METADATA).read_bytes())
        if not copy.is_copy_of(source):
            # Saved anew since `source` was read, or garbled on the way: neither is to be taken.
            raise OSError(errno.EIO, "the metadata changed on the way", str(writing / METADATA))
        flush_folder(writing)
        move_into_place(writing, place)
    except ValueError as error:
        raise OSError(errno.EIO, f"arrived garbled: {error}", str(writing / METADATA)) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return copy


def _copy_file(source: Path, target: Path, sha256: str) -> None:
    sent = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            sent.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
        if hasattr(os, "posix_fadvise"):
            # Or the file is read back from this machine's memory, not from where it went.
            os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sent.hexdigest() != sha256:
        raise _damaged(source)
    if _sha256(target) != sha256:
        raise OSError(errno.EIO, "what arrived is not what was sent", str(target))


def writing_place(place: Path, writer: str | None = None) -> Path:
    """Return the hidden folder of a writer, or of this process, for what goes to `place`."""
    return place.with_name(f".writing-{place.name}-{writer or os.getpid()}")


def move_into_place(writing: Path, place: Path) -> None:
    """Make a finished folder the checkpoint at `place`, replacing one that is there."""
    replaced = place.with_name(f".replaced-{place.name}")
    if place.exists():
        # Two renames: what a kill leaves between them, finish_replacements puts right.
        place.rename(replaced)
    writing.rename(place)
    flush_folder(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def finish_replacements(folder: Path) -> None:
    """Finish or undo what was cut short between the two renames of a replacement."""
    for replaced in folder.glob(".replaced-*"):
        place = folder / replaced.name.removeprefix(".replaced-")
        if place.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(place)


def remove_leftovers(folder: Path, is_abandoned: Callable[[Path], bool]) -> None:
    """Remove the hidden folders of writers that are gone."""
    for writing in folder.glob(".writing-step_*-*"):
        if is_abandoned(writing):
            shutil.rmtree(writing)


def has_dead_writer(writing: Path) -> bool:
    """Whether the process that a hidden folder is named after has ended on this machine."""
    process = writing.name.rsplit("-", 1)[1]
    return process.isdecimal() and not psutil.pid_exists(int(process))


def remove_checkpoints(checkpoints: Iterable[Checkpoint], writer: str | None = None) -> None:
    """Remove checkpoints so that a kill never leaves a half-deleted one in sight."""
    for checkpoint in checkpoints:
        doomed = writing_place(checkpoint.path, writer)
        checkpoint.path.rename(doomed)
        shutil.rmtree(doomed)


def write_state(path: Path, state: Any) -> dict[str, Any]:
    """Write a state through to the disk; return its hash and size."""
    with path.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes through to the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def read_state(path: Path) -> Any:
    """Read a state onto the CPU; no pickled code is ever run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be loaded ({reason[:200]})") from None


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


def reason_of(error: Exception) -> str:
    """Return why it failed, in part of a line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return getattr(error, "strerror", None) or lines[0][:200]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: damaged (its hash is not the recorded one)")
