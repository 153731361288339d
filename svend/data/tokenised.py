"""A part of a source, tokenised once: shards on disk with an index, named by what went into them.

    <key>/00000.tokens   token ids of whole documents, memory-mapped
    <key>/00000.npz      the index: what is known of each document, and how far reading had come
    <key>/part.json      written last
    <key>.lock           held by the process that writes

An index is there once its shard is whole; a process that was killed goes on after the last one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from svend.data.chat import TEMPLATE_VERSION
from svend.data.encoding import EncodedDocuments, EncodingSpec, encode_chunks
from svend.data.sources import SourcePart
from svend.errors import DataError, one_line

SHARD_TOKENS = 1 << 25
# Rows that were left out and are named in the report; all are counted.
NAMED_ROWS = 20
REPORT_SECONDS = 5.0
# Fewer chunks than this are tokenised here: starting processes would take longer.
CHUNKS_FOR_PROCESSES = 16

Progress = Callable[[str], None]
FIELDS = ("lengths", "text_bytes", "questions", "digests", "leaked", "signatures")


@dataclass(frozen=True)
class PartInfo:
    """What `part.json` says of a tokenised part."""

    documents: int
    tokens: int
    sha256: str
    dtype: str
    dropped_rows: int
    named_rows: list[str]
    identity: dict[str, Any]


class TokenisedPart:
    """A tokenised part, read from its folder; arrays have an entry for each document.

    Only the lengths stay in memory: hashes are read when they are asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = _read_info(folder / "part.json")
        self.shards = sorted(folder.glob("*.tokens"))
        self.lengths: npt.NDArray[np.uint32] = self._read("lengths")
        found = sum(shard.stat().st_size for shard in self.shards)
        tokens = int(self.lengths.sum(dtype=np.int64))
        if found != tokens * np.dtype(self.info.dtype).itemsize:
            raise _damaged(folder, "the shards are not as long as the index says")

    @property
    def text_bytes(self) -> npt.NDArray[np.uint32]:
        return self._read("text_bytes")

    @property
    def questions(self) -> npt.NDArray[np.uint64]:
        return self._read("questions")

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        return self._read("digests")

    @property
    def leaked(self) -> npt.NDArray[np.bool_]:
        return self._read("leaked")

    @property
    def signatures(self) -> npt.NDArray[np.uint32]:
        return self._read("signatures")

    def _read(self, name: str) -> npt.NDArray[Any]:
        indexes = sorted(self.folder.glob("*.npz"))
        if not indexes:
            raise _damaged(self.folder, "it has no index")
        return np.concatenate([_read_index(path, name) for path in indexes])


def _read_info(path: Path) -> PartInfo:
    try:
        info = PartInfo(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(path.parent, f"{path.name}: {one_line(error)[:100]}") from None
    # The shards are mapped as this: an array of objects would take any bytes for pointers.
    if info.dtype not in ("uint16", "uint32") or not isinstance(info.sha256, str):
        raise _damaged(path.parent, f"{path.name}: dtype {info.dtype}")
    return info


def _read_index(path: Path, name: str) -> npt.NDArray[Any]:
    """Return an array of a shard's index; one of objects, which is a pickle, is never loaded."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array: npt.NDArray[Any] = arrays[name]
    except Exception as error:  # noqa: BLE001 - a damaged archive fails in whatever it becomes
        raise _damaged(path.parent, f"{path.name}: {one_line(error)[:100]}") from None
    if name == "lengths" and (array.dtype != np.uint32 or array.ndim != 1):
        raise _damaged(path.parent, f"{path.name}: lengths are {array.dtype}")
    return array


def _damaged(folder: Path, reason: str) -> DataError:
    return DataError(
        f"tokenised data {folder}: damaged ({reason}); remove the folder, and it is made again"
    )


def tokenise(
    part: SourcePart, spec: EncodingSpec, tokenizer_sha256: str, cache: Path, processes: int,
    progress: Progress,
) -> TokenisedPart:
    """Return a part tokenised, from the cache where it has been made before.

    Raises DataError for what cannot be read, and for a file that changes meanwhile; what is
    whole by then stays.
    """
    folder = cache / _key(part, spec, tokenizer_sha256)
    if not (folder / "part.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock"), f"{part.name} is being tokenised", progress):
            if not (folder / "part.json").is_file():
                _write(folder, part, spec, processes, progress)
    return TokenisedPart(folder)


@contextlib.contextmanager
def locked(path: Path, occupation: str, progress: Progress) -> Iterator[None]:
    """Hold a lock that ends with the process; wait, and say so, while another holds it."""
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"{occupation} by another process; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _key(part: SourcePart, spec: EncodingSpec, tokenizer_sha256: str) -> str:
    leaks = None
    if spec.leaks is not None:
        leaks = [Path(spec.leaks).stem, spec.leak_words]
    identity = {
        "part": part.identity,
        "template": TEMPLATE_VERSION,
        "tokenizer": tokenizer_sha256,
        "leaks": leaks,
        "drop_broken": spec.drop_broken,
        "near_duplicates": spec.near_duplicates,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _write(
    folder: Path, part: SourcePart, spec: EncodingSpec, processes: int, progress: Progress
) -> None:
    stamps = part.stamps()
    done_chunks, shards = _resume(folder)
    progress(f"tokenising {part.name}" + (f": going on after {shards} shards" if shards else ""))
    chunks = itertools.islice(part.read(), done_chunks, None)
    head = list(itertools.islice(chunks, CHUNKS_FOR_PROCESSES))
    if len(head) < CHUNKS_FOR_PROCESSES:
        processes = 1
    held: list[EncodedDocuments] = []
    held_tokens, held_chunks = 0, 0
    documents, told_seconds = 0, time.monotonic()
    for encoded in encode_chunks(itertools.chain(head, chunks), spec, processes):
        held.append(encoded)
        held_chunks += 1
        held_tokens += len(encoded.tokens)
        documents += len(encoded.lengths)
        if held_tokens >= SHARD_TOKENS:
            _check_unchanged(part, stamps)
            done_chunks += held_chunks
            _write_shard(folder, shards, held, done_chunks)
            shards, held, held_tokens, held_chunks = shards + 1, [], 0, 0
        if time.monotonic() - told_seconds > REPORT_SECONDS:
            told_seconds = time.monotonic()
            progress(f"tokenising {part.name}: {documents:,} documents")
    _check_unchanged(part, stamps)
    if held:
        _write_shard(folder, shards, held, done_chunks + held_chunks)
        shards += 1
    if not shards:
        place = ", ".join(str(path) for path in part.files) or part.name
        raise DataError(f"source '{spec.source}' ({place}): empty; give more data")
    _finish(folder, part)


def _resume(folder: Path) -> tuple[int, int]:
    """Return how many chunks the whole shards hold, and how many shards; remove the rest."""
    chunks = shards = 0
    while (index := folder / f"{shards:05d}.npz").is_file():
        chunks = int(_read_index(index, "chunks"))
        shards += 1
    whole = {f"{number:05d}{suffix}" for number in range(shards) for suffix in (".npz", ".tokens")}
    for path in folder.iterdir():
        if path.name not in whole:
            path.unlink()
    return chunks, shards


def _write_shard(
    folder: Path, number: int, held: Sequence[EncodedDocuments], chunks: int
) -> None:
    tokens = np.concatenate([encoded.tokens for encoded in held])
    with (folder / f"{number:05d}.tokens").open("wb") as stream:
        tokens.tofile(stream)
        stream.flush()
        os.fsync(stream.fileno())
    dropped = [row for encoded in held for row in encoded.dropped]
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(encoded, name) for encoded in held])
        for name in FIELDS if getattr(held[0], name) is not None
    }
    digest = hashlib.sha256(tokens.tobytes())
    digest.update(arrays["lengths"].tobytes())
    writing = folder / f"{number:05d}.writing"
    with writing.open("wb") as stream:
        np.savez(
            stream, **arrays, chunks=chunks, sha256=digest.hexdigest(), dtype=str(tokens.dtype),
            dropped_rows=len(dropped), named_rows=np.array(dropped[:NAMED_ROWS], dtype=np.str_),
        )
        stream.flush()
        os.fsync(stream.fileno())
    writing.rename(folder / f"{number:05d}.npz")


def _check_unchanged(part: SourcePart, stamps: list[tuple[int, int]]) -> None:
    for path, before, now in zip(part.files, stamps, part.stamps(), strict=True):
        if before != now:
            raise DataError(
                f"{path}: changed while it was read; start again once nothing writes to it"
            )


def _finish(folder: Path, part: SourcePart) -> None:
    indexes = sorted(folder.glob("*.npz"))

    def entries(name: str) -> list[npt.NDArray[Any]]:
        return [_read_index(index, name) for index in indexes]

    digest = hashlib.sha256("".join(map(str, entries("sha256"))).encode())
    lengths = entries("lengths")
    info = PartInfo(
        documents=sum(map(len, lengths)),
        tokens=sum(int(each.sum(dtype=np.int64)) for each in lengths),
        sha256=digest.hexdigest(),
        dtype=str(entries("dtype")[0]),
        dropped_rows=sum(map(int, entries("dropped_rows"))),
        named_rows=[str(row) for rows in entries("named_rows") for row in rows][:NAMED_ROWS],
        identity=part.identity,
    )
    writing = folder / "part.json.writing"
    writing.write_text(json.dumps(asdict(info), indent=1), encoding="utf-8")
    writing.rename(folder / "part.json")
