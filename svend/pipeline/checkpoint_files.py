"""The files of a checkpoint: written, read, copied and removed whole or not at all.

A checkpoint is written into a hidden folder beside its place, flushed, hashed, and moved into
place by one rename, so that a process killed at any instant leaves the old state or the new.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import io
import json
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from svend import cuda
from svend.errors import CheckpointError, one_line
from svend.pipeline.state_files import read_state

METADATA = "metadata.json"
METADATA_SHA256 = "metadata_sha256"
MODEL = "model.pt"
EXTRA_STATE = "extra_state.pt"  # in every checkpoint
# Of one that was written in parts: what is not sharded, and where the parts lie.
LAYOUT, PARTS_INDEX, PART_SUFFIX = "layout.pt", ".metadata", ".distcp"
METADATA_TYPES = {"checkpoint_id": str, "sequence": int, "step": int, "epoch": int,
                  "metrics": dict, "created": str, "files": dict}
ENTRY_TYPES = {"sha256": str, "bytes": int}
CHUNK_BYTES = 4 * 2**20
# A container's processes have the same id after every start: this tells them apart.
PROCESS_TOKEN = secrets.token_hex(4)


class UnreachableError(CheckpointError):
    """A checkpoint that cannot be read now, and may well be intact."""


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint without loading it."""

    checkpoint_id: str
    path: Path
    sequence: int  # counts the saves into a folder
    step: int
    epoch: int
    metrics: dict[str, float]
    created: str
    files: dict[str, dict[str, Any]]

    @property
    def weights_sha256(self) -> str:
        """The hash of the weights' file: what a verdict and a registered version refer to.

        Of parts, until they are put together, it is that of their hashes.
        """
        if MODEL in self.files:
            digest: str = self.files[MODEL]["sha256"]
            return digest
        if not self.in_parts:
            raise CheckpointError(f"{self.path}: was saved without a model")
        parts = {name: entry["sha256"] for name, entry in self.files.items()
                 if name.endswith(PART_SUFFIX) or name == PARTS_INDEX}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def in_parts(self) -> bool:
        """Whether several processes each wrote a part of model and optimizer."""
        return LAYOUT in self.files

    @property
    def bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.files.values())

    @property
    def age_key(self) -> tuple[int, str]:
        """Sorts checkpoints from old to new, whatever their steps: a run may have gone back."""
        return self.sequence, self.created

    def is_copy_of(self, other: Checkpoint) -> bool:
        """Whether both say they hold the same, wherever they lie."""
        return replace(self, path=other.path) == other


def read_folder(folder: Path) -> tuple[list[Checkpoint], list[str]]:
    """Return the checkpoints from old to new, unverified, and what is said of the others."""
    found, complaints = [], []
    for path in sorted(folder.glob("step_*")):
        try:
            found.append(read_metadata(path))
        except (OSError, ValueError) as error:
            complaints.append(f"{path}: not a checkpoint ({one_line(error)}); passed over")
    return sorted(found, key=lambda c: c.age_key), complaints


def read_metadata(path: Path) -> Checkpoint:
    """Read what a checkpoint says of itself."""
    return _parse_metadata(path, (path / METADATA).read_bytes())


def metadata_bytes(metadata: dict[str, Any]) -> bytes:
    """Return the content of a metadata file, which ends with a hash of itself."""
    return json.dumps({**metadata, METADATA_SHA256: _metadata_sha256(metadata)}, indent=1).encode()


def write_metadata(checkpoint: Checkpoint) -> None:
    """Write anew what a checkpoint says of itself, whole or not at all."""
    told = {name: value for name, value in vars(checkpoint).items() if name != "path"}
    writing = checkpoint.path / f".writing-{METADATA}"
    write_bytes(writing, metadata_bytes(told))
    writing.replace(checkpoint.path / METADATA)
    flush_folder(checkpoint.path)


def _metadata_sha256(metadata: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _parse_metadata(path: Path, content: bytes) -> Checkpoint:
    """Return what a metadata file says; raise ValueError if it is not what was written."""
    try:
        metadata = json.loads(content)
        recorded = metadata.pop(METADATA_SHA256, None) if isinstance(metadata, dict) else None
        damaged = recorded != _metadata_sha256(metadata)
    except RecursionError:
        damaged = True
    if damaged:
        raise ValueError(f"{METADATA} is damaged (its hash is not the recorded one)")
    _check_types(metadata)
    checkpoint = Checkpoint(path=path, **metadata)
    if path.name != checkpoint.checkpoint_id:
        raise ValueError(f"is a copy of {checkpoint.checkpoint_id} under another name")
    for name in checkpoint.files:
        # A file named ../../x would be copied out of the folder.
        if name in ("", ".", "..", METADATA) or "/" in name or "\0" in name:
            raise ValueError(f"'{name}' is no name of a checkpoint's file")
    return checkpoint


def _check_types(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError unless everything has its type: a stranger can compute a hash too."""
    for name, kind in METADATA_TYPES.items():
        if type(metadata.get(name)) is not kind:
            raise ValueError(f"{METADATA}: {name} is no {kind.__name__}")
    if metadata.keys() != METADATA_TYPES.keys():
        raise ValueError(f"{METADATA}: holds more than it should")
    if min(metadata["sequence"], metadata["step"], metadata["epoch"]) < 0:
        raise ValueError(f"{METADATA}: sequence, step and epoch must be at least 0")
    if not all(type(value) in (int, float) for value in metadata["metrics"].values()):
        raise ValueError(f"{METADATA}: a metric is no number")
    for name, entry in metadata["files"].items():
        if not isinstance(entry, dict) or {k: type(v) for k, v in entry.items()} != ENTRY_TYPES:
            raise ValueError(f"{METADATA}: '{name}' must have a sha256 and a number of bytes")


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
        arrived = _parse_metadata(place, (writing / METADATA).read_bytes())
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


class Snapshots:
    """Copies of states in main memory, each in the memory of the one before.

    On CUDA the memory is pinned, so that copying runs at the full speed of the bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def take(self, state: Any) -> Any:
        """Return a copy that training does not change, and that the next call overwrites.

        Tensors that share their memory, such as tied weights, share it in the copy too.
        """
        taken: dict[tuple[Any, ...], torch.Tensor] = {}

        def copy_of(value: Any, place: tuple[Any, ...]) -> Any:
            if isinstance(value, torch.Tensor):
                key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
                if value.numel() == 0 or key not in taken:
                    taken[key] = self._filled(place, value.detach())
                return taken[key]
            if isinstance(value, dict):
                # A shallow copy first: a module's state has attributes beside its entries.
                changed = copy.copy(value)
                changed.update({k: copy_of(entry, (*place, k)) for k, entry in value.items()})
                return changed
            if type(value) in (list, tuple):
                return type(value)(copy_of(v, (*place, i)) for i, v in enumerate(value))
            return copy.deepcopy(value)

        whole = copy_of(state, ())
        if any(tensor.is_pinned() for tensor in self._buffers.values()):
            cuda.synchronize()
        return whole

    def _filled(self, place: tuple[Any, ...], value: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(
                value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda"
            )
            self._buffers[place] = buffer
        return buffer.copy_(value, non_blocking=True)


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


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes through to the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


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


def format_bytes(count: float) -> str:
    """Return a size as people read it: 12 KB, 3.4 MB, 52.0 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{max(0.0, count) / 1e3:.0f} KB"


def reason_of(error: Exception) -> str:
    """Return why it failed, in part of a line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return getattr(error, "strerror", None) or lines[0][:200]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: damaged (its hash is not the recorded one)")
