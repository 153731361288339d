"""The files of a checkpoint: written, read, copied and removed whole or not at all.

A checkpoint is written into a hidden folder beside its place, flushed, hashed, and moved into
place by one rename, so that a process killed at any instant leaves the old state or the new.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from svend.errors import CheckpointError, reason_of
from svend.pipeline.checkpoints.metadata import EXTRA_STATE, METADATA, Checkpoint, parse_metadata
from svend.pipeline.state_files import read_state
from svend.pipeline.whole_files import flush_folder, write_bytes

CHUNK_BYTES = 4 * 2**20
# A container's processes have the same id after every start: this tells them apart.
PROCESS_TOKEN = secrets.token_hex(4)


class UnreachableError(CheckpointError):
    """A checkpoint that cannot be read now, and may well be intact."""


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
        arrived = parse_metadata(place, (writing / METADATA).read_bytes())
        if not arrived.is_copy_of(source):
            # Saved anew since `source` was read, or garbled on the way: neither is to be taken.
            raise OSError(errno.EIO, "the metadata changed on the way", str(writing / METADATA))
        flush_folder(writing)
        move_into_place(writing, place)
    except ValueError as error:
        raise OSError(errno.EIO, f"arrived garbled: {error}", str(writing / METADATA)) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return arrived


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
    return place.with_name(f".writing-{place.name}-{writer or writer_name()}")


def writer_name(part: str = "") -> str:
    """Return a name for this process, or for a part of it that writes by itself."""
    return f"{PROCESS_TOKEN}{part}-{os.getpid()}"


def has_dead_writer(writing: Path) -> bool:
    """Whether the process that a hidden folder is named after has ended on this machine."""
    token, process = writing.name.rsplit("-", 2)[-2:]
    if not process.isdecimal() or int(process) >= 2**31:
        return process.isdecimal()
    if int(process) == os.getpid():
        return not token.startswith(PROCESS_TOKEN)
    return not psutil.pid_exists(int(process))


def move_into_place(writing: Path, place: Path) -> None:
    """Make a finished folder the checkpoint at `place`, replacing one that is there."""
    replaced = place.with_name(f".replaced-{place.name}")
    if place.exists():
        # Two renames: what a kill leaves between them, tidy_folder puts right.
        place.rename(replaced)
    writing.rename(place)
    flush_folder(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def tidy_folder(folder: Path, is_abandoned: Callable[[Path], bool]) -> None:
    """Put right what killed writers left: replacements cut short, and their hidden folders.

    What a living writer is at work on is left alone, and so is what is gone by now.
    """
    for replaced in folder.glob(".replaced-step_*"):
        place = folder / replaced.name.removeprefix(".replaced-")
        writings = folder.glob(f".writing-{place.name}-*")
        if not replaced.is_dir() or not all(is_abandoned(writing) for writing in writings):
            continue
        if place.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                replaced.rename(place)
    for writing in folder.glob(".writing-step_*-*"):
        if is_abandoned(writing):
            shutil.rmtree(writing, ignore_errors=True)


def remove_checkpoints(checkpoints: Iterable[Checkpoint], writer: str | None = None) -> None:
    """Remove checkpoints so that a kill never leaves a half-deleted one in sight."""
    for checkpoint in checkpoints:
        doomed = writing_place(checkpoint.path, writer)
        try:
            checkpoint.path.rename(doomed)
        except FileNotFoundError:
            continue  # someone else has removed it
        shutil.rmtree(doomed)


def write_state(path: Path, state: Any) -> dict[str, Any]:
    """Write a state through to the disk; return its hash and size."""
    # By name: into a Python stream each tensor would be copied once more.
    torch.save(state, path)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return hash_file(path)


def hash_file(path: Path) -> dict[str, Any]:
    """Return a file's hash and size."""
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


def check_loadable(path: Path, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the key, if a written state cannot be read back safely."""
    try:
        read_state(path)
    except CheckpointError:
        for key, value in state.items():
            buffer = io.BytesIO()
            torch.save(value, buffer)
            buffer.seek(0)
            try:
                torch.load(buffer, weights_only=True)
            except (RuntimeError, pickle.UnpicklingError):
                raise CheckpointError(
                    f"extra_state['{key}']: {type(value).__name__} holds what cannot be loaded "
                    "safely; give tensors, numbers, strings, lists and dicts of them"
                ) from None
        raise


def format_bytes(count: float) -> str:
    """Return a size as people read it: 12 KB, 3.4 MB, 52.0 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{max(0.0, count) / 1e3:.0f} KB"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: damaged (its hash is not the recorded one)")
