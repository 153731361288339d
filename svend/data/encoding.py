"""From chunks of rows to token ids, in processes of their own.

What is imported here, each of those processes imports: neither torch nor mlflow.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from svend.data.documents import Document
from svend.data.hygiene import (
    Hashes,
    Signatures,
    minhash_signatures,
    occurs_in,
    word_sequences,
)
from svend.data.records import Chunk, RowError, parse_row
from svend.data.schemas import ToDocument, find_schema, schema_digest
from svend.errors import DataError, reason_of

if TYPE_CHECKING:
    from svend.data.tokenizer import DocumentTokenizer

# Chunks that are under way for each process: enough that none waits, few enough for memory.
AHEAD = 2


@dataclass(frozen=True)
class EncodingSpec:
    """What is done to the rows of a part.

    `tokenizer` is a tokenizer.json. `leaks` is a file of the sorted hashes of `leak_words` words
    in a row that evaluation sets hold, or None.
    """

    source: str
    to_document: str | None
    tokenizer: str
    drop_broken: bool
    leak_words: int
    leaks: str | None
    near_duplicates: bool


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents as token ids, one after the other, and what is known of each."""

    tokens: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.uint32]
    text_bytes: npt.NDArray[np.uint32]
    questions: Hashes
    digests: Hashes
    leaked: npt.NDArray[np.bool_]
    signatures: Signatures | None
    dropped: list[str] = field(default_factory=list)  # place and reason of rows left out


def encode_chunks(
    chunks: Iterable[Chunk], spec: EncodingSpec, processes: int
) -> Iterator[EncodedDocuments]:
    """Yield what each chunk holds, in order. One process means this one."""
    if processes == 1:
        for chunk in chunks:
            yield encode_chunk(spec, chunk)
        return
    from loky import get_reusable_executor
    from loky.process_executor import TerminatedWorkerError

    executor = get_reusable_executor(
        max_workers=processes, timeout=60, env={"TOKENIZERS_PARALLELISM": "false"}
    )
    waiting: deque[Future[EncodedDocuments]] = deque()
    try:
        for chunk in chunks:
            waiting.append(executor.submit(encode_chunk, spec, chunk))
            if len(waiting) > AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except TerminatedWorkerError as error:
        raise DataError(
            f"source '{spec.source}': a process that tokenised was killed, most often for want of "
            "memory; lower data.processes"
        ) from error
    finally:
        for future in waiting:
            future.cancel()


def default_processes(processes: int | None) -> int:
    """Return how many processes tokenise: as configured, else one for each core."""
    if processes is None and hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return processes or os.cpu_count() or 1


@contextlib.contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Spare Python a search for cycles among millions of new lists that have none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_garbage_collection_paused()
def encode_chunk(spec: EncodingSpec, chunk: Chunk) -> EncodedDocuments:
    """Return the documents of a chunk, tokenised. Raises DataError for a row that is broken."""
    dropped: list[str] = []
    documents = list(documents_in(chunk, spec.source, spec.to_document, dropped))
    if dropped and not spec.drop_broken:
        raise DataError(f"{dropped[0]}")
    tokenizer = _tokenizer(spec.tokenizer)
    tokens, lengths = tokenizer.encode_flat(documents)
    leaks = _leaks(spec.leaks)
    return EncodedDocuments(
        tokens=tokens,
        lengths=lengths,
        text_bytes=np.array([document.text_bytes for document in documents], dtype=np.uint32),
        questions=np.array([document.question_digest for document in documents], dtype=np.uint64),
        digests=np.array([document.digest for document in documents], dtype=np.uint64),
        leaked=np.array(
            [leaks is not None and occurs_in(word_sequences(document, spec.leak_words), leaks)
             for document in documents], dtype=np.bool_,
        ),
        signatures=minhash_signatures(documents) if spec.near_duplicates else None,
        dropped=dropped,
    )


def documents_in(
    chunk: Chunk, source: str, to_document: str | None, dropped: list[str]
) -> Iterator[Document]:
    """Yield the documents of a chunk; name those that cannot be one in `dropped`."""
    schema = None if to_document is None else _schema(to_document, schema_digest(to_document))
    for index, row in enumerate(chunk.rows):
        if schema is None:
            yield row
            continue
        try:
            record = parse_row(row)
            try:
                document = schema(record)
            except KeyError as error:
                raise RowError(
                    f"no key {error} for source '{source}'; found {', '.join(record)}"
                ) from None
            except (TypeError, AttributeError, ValueError) as error:
                raise RowError(f"not in the schema of '{source}' ({error})") from None
            _check(document, source)
        except RowError as error:
            dropped.append(f"{chunk.place(index)}: {error}")
            continue
        yield document


def _check(document: Document, source: str) -> None:
    """Raise RowError for a document that nothing can be learnt from."""
    if not isinstance(document, Document):
        raise RowError(
            f"the schema of '{source}' returned {type(document).__name__}, not a Document"
        )
    if not document.messages:
        raise RowError(f"no messages for source '{source}'; remove the record")
    for message in document.messages:
        role, content = message.role.value, message.content
        if not isinstance(content, str):
            raise RowError(f"{role} is {type(content).__name__}, not text")
        if message is document.messages[-1] and not content.strip():
            raise RowError(f"the {role} is empty; remove the record")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"{role} is not Unicode text ({error.reason} at character {error.start + 1}); "
                "mend the record"
            ) from None


@functools.lru_cache
def _schema(reference: str, digest: str) -> ToDocument:  # noqa: ARG001 - of another, found anew
    return find_schema(reference)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> DocumentTokenizer:
    from svend.data.tokenizer import load_tokenizer

    return load_tokenizer(path, vocab_size=2**32)


@functools.lru_cache(maxsize=1)
def _leaks(path: str | None) -> Hashes | None:
    if path is None:
        return None
    try:
        hashes: Hashes = np.load(path, allow_pickle=False)
        if hashes.dtype != np.uint64 or hashes.ndim != 1:
            raise ValueError(f"an array of {hashes.dtype}")
    except Exception as error:  # noqa: BLE001 - a damaged file fails in whatever it becomes
        raise DataError(
            f"{path}: damaged ({reason_of(error)}); remove it, and it is made again"
        ) from None
    return hashes
