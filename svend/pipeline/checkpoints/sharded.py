"""A checkpoint that every process writes a part of, by torch.distributed.checkpoint.

Beside the parts lies what is not sharded: counts, settings, and where in model and optimizer each
sharded tensor belongs. Any number of processes can read it, one alone too.
"""

from __future__ import annotations

import pickle
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from svend.errors import CheckpointError, RankLost, one_line
from svend.models.shards import is_sharded
from svend.pipeline.checkpoints.files import hash_file, write_state
from svend.pipeline.checkpoints.metadata import (
    LAYOUT,
    MODEL,
    PART_SUFFIX,
    PARTS_INDEX,
    Checkpoint,
    write_metadata,
)
from svend.pipeline.state_files import read_state
from svend.pipeline.whole_files import flush_folder
from svend.training.parallel import Ranks, is_about_a_connection

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

# For what another machine wrote to be seen here.
ARRIVAL_SECONDS = 20.0
PARTED = ("model", "optimizer")
PART = "part"  # in a layout, the key of what stands for a sharded tensor
# What the index of the parts may name: data alone.
INDEX_GLOBALS = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
}


class PartialSave:
    """The parts of a checkpoint on their way to a folder, from a copy in main memory.

    Every process begins one at the same time; `result` is the same call for each, in the background
    or not. states: of model and optimizer, by name.
    """

    def __init__(self, folder: Path, states: Mapping[str, Any], ranks: Ranks) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.layout, tensors = _split(dict(states))
        self.bytes = _bytes_of(tensors)
        self._folder, self._ranks = folder, ranks
        # It copies before it returns, and writes in a thread.
        saved = async_save(
            tensors, storage_writer=FileSystemWriter(folder), process_group=ranks.saving
        )
        assert isinstance(saved, Future)
        self._saved = saved

    def result(self) -> dict[str, dict[str, Any]]:
        """Wait for the parts; return, in the process that leads, hash and size of each file.

        Raises OSError where a process could not write, CheckpointError where a part is missing,
        RankLost where a process does not answer.
        """
        import torch.distributed as dist

        try:
            self._saved.result()
        except BaseException as error:  # torch's CheckpointException is no Exception
            raise self._told(error) from error
        own = sorted(self._folder.glob(f"__{self._ranks.rank}_*{PART_SUFFIX}"))
        entries: dict[str, dict[str, Any]] | str
        try:
            entries = {path.name: hash_file(path) for path in own}
        except OSError as error:
            entries = f"rank {self._ranks.rank}: {error}"  # the others wait for an answer
        leads = self._ranks.place.leads
        gathered: list[Any] = [None] * self._ranks.size
        try:
            dist.gather_object(entries, gathered if leads else None, group=self._ranks.saving)
        except RuntimeError as error:
            raise self._told(error) from error
        if not leads:
            return {}
        files: dict[str, dict[str, Any]] = {}
        for of_rank in gathered:
            if isinstance(of_rank, str):
                raise CheckpointError(f"{self._folder}: {of_rank}")
            files |= of_rank
        self._require_here(files)
        flush_folder(self._folder)
        return {**files, PARTS_INDEX: hash_file(self._folder / PARTS_INDEX)}

    def _require_here(self, files: Mapping[str, dict[str, Any]]) -> None:
        """Wait for what other machines wrote to be seen here; raise CheckpointError if it is not.
        """
        deadline = time.monotonic() + ARRIVAL_SECONDS
        for name, entry in files.items():
            path = self._folder / name
            while not path.is_file() or path.stat().st_size != entry["bytes"]:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{path}: was written by another machine and is not here; choose a "
                        "checkpoint_dir that all machines see"
                    )
                time.sleep(0.2)
                list(self._folder.iterdir())  # has a network file system look anew

    def _told(self, error: BaseException) -> BaseException:
        """Return what an error means: torch wraps those of each process."""
        from torch.distributed.checkpoint.api import CheckpointException

        causes = [error]
        if isinstance(error, CheckpointException):
            causes = [cause for cause, _ in error.failures.values()]
        if any(is_about_a_connection(cause) for cause in causes):
            return RankLost(f"a process did not answer while {self._folder.name} was written")
        for cause in causes:
            if isinstance(cause, OSError):
                return OSError(cause.errno, cause.strerror, cause.filename)
        if isinstance(error, CheckpointException):
            return CheckpointError(
                f"{self._folder}: cannot be written ({one_line(causes[0])[:200]})"
            )
        return error

    def result_in(self, background: ThreadPoolExecutor) -> Future[dict[str, dict[str, Any]]]:
        """Have `result` waited for in a thread, where nobody needs what it returns."""
        return background.submit(self.result)


def size_of(states: Mapping[str, Any]) -> int:
    """Return what the parts of all processes take on the disk, a little more than their tensors."""
    return _bytes_of(_split(dict(states))[1])


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def read_parts(folder: Path, name: str, own: Any, like: Tensor | None) -> Any:
    """Return the state of a part of the checkpoint, such as the model.

    own: the state as it is, whose sharded tensors are read into where they are. like: a tensor that
    is laid out as the others are to be; None for whole ones.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    layout = read_state(folder / LAYOUT)
    reader, index = _open_index(folder)
    if not isinstance(layout, dict) or name not in layout:
        raise CheckpointError(f"{folder / LAYOUT}: holds no {name}; use another checkpoint")
    _, here = _split({name: own})
    targets: dict[str, Tensor] = {}
    for place in _parts_in(layout[name]):
        stored = index.state_dict_metadata.get(place)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{folder / PARTS_INDEX}: lacks {place}; use another checkpoint")
        if place in here and here[place].shape == stored.size:
            targets[place] = here[place]
        else:
            targets[place] = _empty(stored.size, stored.properties.dtype, like)
    try:
        with warnings.catch_warnings():
            # That it reads without a word to other processes is what it was asked for.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(targets, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - of made-up parts, whatever
        raise CheckpointError(f"{folder}: cannot be loaded ({one_line(error)[:200]})") from None
    return _joined(layout[name], targets)


def read_state_of(
    checkpoint: Checkpoint, name: str, own: Any, like: Tensor | None, *, on_cuda: bool
) -> Any:
    """Return the state that a checkpoint holds of a part, such as the model; see `read_parts`.

    Whichever way it was saved, it comes back whole, or cut as `like` is.
    """
    if f"{name}.pt" in checkpoint.files:
        # Several processes of a machine would each read the whole into memory.
        mapped = like is not None or on_cuda
        state = read_state(checkpoint.path / f"{name}.pt", mapped=mapped)
        return state if like is None else lay_out(state, like)
    if checkpoint.in_parts and name in PARTED:
        return read_parts(checkpoint.path, name, own, like)
    raise CheckpointError(
        f"{checkpoint.path}: was saved without {name}.pt; load it without {name}"
    )


def consolidate_weights(checkpoint: Checkpoint) -> Checkpoint:
    """Put the weights of a verified checkpoint together in one file; return it as it is then."""
    weights = read_parts(checkpoint.path, "model", {}, None)
    writing = checkpoint.path / f".writing-{MODEL}"
    entry = write_state(writing, weights)
    writing.replace(checkpoint.path / MODEL)
    with_weights = replace(checkpoint, files={**checkpoint.files, MODEL: entry})
    write_metadata(with_weights)
    return with_weights


def lay_out(state: Any, like: Tensor) -> Any:
    """Return a whole state with its tensors cut as `like` is; numbers stay whole."""
    from svend.models.shards import part_of

    if isinstance(state, Tensor):
        return part_of(state, like) if state.dim() else state
    if isinstance(state, dict):
        return {key: lay_out(value, like) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(lay_out(value, like) for value in state)
    return state


def _empty(size: torch.Size, dtype: torch.dtype, like: Tensor | None) -> Tensor:
    if like is None or not is_sharded(like):
        return torch.empty(size, dtype=dtype)
    from torch.distributed.tensor import empty

    return empty(size, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)


def _split(state: Any, place: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Return a state with a mark in place of each sharded tensor, and these by their places."""
    if isinstance(state, Tensor):
        return ({PART: place}, {place: state.detach()}) if is_sharded(state) else (state, {})
    if not isinstance(state, dict | list | tuple):
        return state, {}
    entries = state.items() if isinstance(state, dict) else enumerate(state)
    tensors: dict[str, Tensor] = {}
    marked = []
    for key, value in entries:
        entry, below = _split(value, f"{place}.{key}" if place else str(key))
        marked.append((key, entry))
        tensors |= below
    if isinstance(state, dict):
        return dict(marked), tensors
    return type(state)(entry for _, entry in marked), tensors


def _joined(layout: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return a state with the tensors in place of their marks."""
    if isinstance(layout, dict):
        if layout.keys() == {PART}:
            return tensors[layout[PART]]
        return {key: _joined(value, tensors) for key, value in layout.items()}
    if isinstance(layout, list | tuple):
        return type(layout)(_joined(value, tensors) for value in layout)
    return layout


def _parts_in(layout: Any) -> Iterator[str]:
    if isinstance(layout, dict):
        if layout.keys() == {PART}:
            yield layout[PART]
            return
        layout = list(layout.values())
    if isinstance(layout, list | tuple):
        for value in layout:
            yield from _parts_in(value)


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of the parts, which is a pickle, and runs nothing that is in it."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in INDEX_GLOBALS or is_dtype:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member  # by which Python 3.11.2 pickles a member of an enumeration
        raise pickle.UnpicklingError(f"names {module}.{name}, which could run code")


def _member(enumeration: Any, name: str) -> Any:
    """Return a member of an enumeration, and no attribute of anything else."""
    if isinstance(enumeration, type) and issubclass(enumeration, Enum):
        return enumeration[name]
    raise pickle.UnpicklingError("takes an attribute, which could run code")


def _open_index(folder: Path) -> tuple[FileSystemReader, Metadata]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            with (folder / PARTS_INDEX).open("rb") as stream:
                return _read_index(stream)

    reader = Reader(folder)
    try:
        index = reader.read_metadata()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError("is no index")
    except Exception as error:  # noqa: BLE001 - a made-up pickle raises whatever it likes
        raise CheckpointError(
            f"{folder / PARTS_INDEX}: cannot be loaded ({one_line(error)[:200]}); use another "
            "checkpoint"
        ) from None
    return reader, index


def _read_index(stream: IO[bytes]) -> Metadata:
    index: Metadata = _IndexUnpickler(stream).load()
    return index
