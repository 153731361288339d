"""A recipe's documents, tokenised once into memory-mapped arrays that carry a fingerprint."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from svend.data.documents import Document, Kind
from svend.data.sources import SourceParts, locate_sources
from svend.data.tokenizer import (
    TEMPLATE_VERSION,
    DocumentTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from svend.errors import DataError
from svend.pipeline.config import DataConfig

KINDS = tuple(Kind)
ENCODE_BATCH = 1000
TRAIN, HELDOUT = "train", "heldout"

Progress = Callable[[str], None]
Divided = tuple[list[Document], list[Document]]  # train, held out


@dataclass(frozen=True)
class TokenArray:
    """One part of a corpus: all tokens in a row, and where each document lies and what it is."""

    name: str
    tokens: npt.NDArray[np.uint16]
    offsets: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class SourceCount:
    """What a source gave to the corpus, in documents and tokens."""

    source: str
    kind: str
    train_documents: int
    train_tokens: int
    heldout_documents: int
    heldout_tokens: int
    leaked_documents: int
    identity: dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    """The tokenised data of a run."""

    train: TokenArray
    heldout: TokenArray
    tokenizer: DocumentTokenizer
    fingerprint: str
    counts: list[SourceCount]


def build_corpus(data: DataConfig, vocab_size: int, seed: int, progress: Progress) -> Corpus:
    """Return the tokenised corpus of a recipe, from the cache where it has been made before.

    No question of the held-out part occurs in the train part: a source with a held-out split of
    its own loses the train documents that repeat it (counted as leaked); another is divided by a
    hash of the question. Raises DataError or ConfigError for what cannot be read.
    """
    parts = locate_sources(data, seed)
    cache = Path(data.cache_dir).expanduser() / _cache_key(data, parts, vocab_size)
    if not (cache / "corpus.json").is_file():
        try:
            _make_entry(cache, data, parts, vocab_size, progress)
        except OSError as error:
            raise DataError(
                f"data.cache_dir {cache.parent.absolute()}: cannot be written ({error.strerror}); "
                "free space, or choose another"
            ) from error
    return _read_corpus(cache)


def _make_entry(
    cache: Path, data: DataConfig, parts: list[SourceParts], vocab_size: int, progress: Progress
) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(cache.parent)
    building = Path(tempfile.mkdtemp(prefix=f"building-{os.getpid()}-", dir=cache.parent))
    try:
        _write_corpus(building, data, parts, vocab_size, progress)
        _move_into_place(building, cache)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _cache_key(data: DataConfig, parts: list[SourceParts], vocab_size: int) -> str:
    tokenizer = data.tokenizer
    if Path(tokenizer).is_file():
        tokenizer = hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
    identity = {
        "template": TEMPLATE_VERSION,
        "sources": [part.identity for part in parts],
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "heldout_fraction": data.heldout_fraction,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes were building."""
    for building in folder.glob("building-*-*"):
        if not psutil.pid_exists(int(building.name.split("-")[1])):
            shutil.rmtree(building, ignore_errors=True)


def _move_into_place(building: Path, cache: Path) -> None:
    if cache.exists() and not (cache / "corpus.json").is_file():
        shutil.rmtree(cache)
    try:
        building.rename(cache)
    except OSError:
        # Another process made the same entry first; the key says that it holds the same.
        if not (cache / "corpus.json").is_file():
            raise


def _write_corpus(
    folder: Path, data: DataConfig, parts: list[SourceParts], vocab_size: int, progress: Progress
) -> None:
    divided = []
    for part in parts:
        progress(f"reading {part.source.name}")
        divided.append(_divide(part, data.heldout_fraction))
    divided, leaked = _drop_leaks(divided)
    train_documents = [document for train, _ in divided for document in train]
    if data.tokenizer == "train":
        progress(f"training a tokenizer on {len(train_documents):,} documents")
        tokenizer = train_tokenizer(train_documents, vocab_size)
    else:
        tokenizer = load_tokenizer(data.tokenizer, vocab_size)
    digest = hashlib.sha256(tokenizer.sha256.encode())
    for name, side in ((TRAIN, 0), (HELDOUT, 1)):
        if not any(part[side] for part in divided):
            raise DataError(
                f"the {name} part is empty: {sum(len(t) + len(h) for t, h in divided)} documents "
                f"in {', '.join(part.place for part in parts)} are too few; give more data, "
                "or a held-out file with data.heldout_path"
            )
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(contextlib.closing(_PartWriter(folder, name)))
            for name in (TRAIN, HELDOUT)
        }
        counts = _tokenize(writers, tokenizer, parts, divided, leaked, progress)
        for writer in writers.values():
            digest.update(writer.finish())
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    meta = {
        "fingerprint": digest.hexdigest(),
        "tokenizer_origin": tokenizer.origin,
        "counts": [dataclasses.asdict(count) for count in counts],
    }
    (folder / "corpus.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _tokenize(
    writers: dict[str, _PartWriter],
    tokenizer: DocumentTokenizer,
    parts: list[SourceParts],
    divided: list[Divided],
    leaked: list[int],
    progress: Progress,
) -> list[SourceCount]:
    counts = []
    for part, (train, heldout), leaks in zip(parts, divided, leaked, strict=True):
        progress(f"tokenising {part.source.name}: {len(train) + len(heldout):,} documents")
        tokens = {
            name: writers[name].write(tokenizer, documents, KINDS.index(part.source.kind))
            for name, documents in ((TRAIN, train), (HELDOUT, heldout))
        }
        counts.append(SourceCount(
            part.source.name, part.source.kind.value, len(train), tokens[TRAIN], len(heldout),
            tokens[HELDOUT], leaks, part.identity,
        ))
    return counts


def _divide(part: SourceParts, heldout_fraction: float) -> Divided:
    """Return the train and the held-out documents of a source."""
    documents = list(part.train())
    if not documents:
        raise DataError(f"source '{part.source.name}' ({part.place}): empty; give more data")
    if part.heldout is not None:
        train, heldout = documents, list(part.heldout())
    else:
        bound = int(heldout_fraction * 2**64)
        train, heldout = [], []
        for document in documents:
            held = int.from_bytes(document.question_digest[:8]) < bound
            (heldout if held else train).append(document)
    return train, heldout


def _drop_leaks(divided: list[Divided]) -> tuple[list[Divided], list[int]]:
    """Drop train documents whose question any source holds out; return how many of each."""
    held = {document.question_digest for _, heldout in divided for document in heldout}
    kept = [
        ([document for document in train if document.question_digest not in held], heldout)
        for train, heldout in divided
    ]
    leaked = [len(all_) - len(rest) for (all_, _), (rest, _) in zip(divided, kept, strict=True)]
    return kept, leaked


class _PartWriter:
    """Appends tokenised documents of one part to its files."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._stream = (folder / f"{name}.tokens").open("wb")
        self._digest = hashlib.sha256()
        self._lengths: list[int] = []
        self._kinds: list[int] = []

    def write(self, tokenizer: DocumentTokenizer, documents: list[Document], kind: int) -> int:
        """Append documents; return how many tokens they came to."""
        before = sum(self._lengths)
        for batch in _batches(documents, ENCODE_BATCH):
            encoded = tokenizer.encode(batch)
            flat = np.fromiter((i for ids in encoded for i in ids), dtype=np.uint16)
            self._stream.write(flat.tobytes())
            self._digest.update(flat.tobytes())
            self._lengths.extend(len(ids) for ids in encoded)
            self._kinds.extend(kind for _ in encoded)
        return sum(self._lengths) - before

    def close(self) -> None:
        self._stream.close()

    def finish(self) -> bytes:
        """Write the rest and flush; return a hash of what the files hold."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        offsets = np.cumsum([0, *self._lengths], dtype=np.int64)
        kinds = np.array(self._kinds, dtype=np.uint8)
        np.save(self._folder / f"{self._name}.offsets.npy", offsets)
        np.save(self._folder / f"{self._name}.kinds.npy", kinds)
        self._digest.update(offsets.tobytes())
        self._digest.update(kinds.tobytes())
        return self._digest.digest()


def _batches(documents: list[Document], size: int) -> Iterator[list[Document]]:
    for start in range(0, len(documents), size):
        yield documents[start : start + size]


def _read_corpus(cache: Path) -> Corpus:
    meta = json.loads((cache / "corpus.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(str(cache / "tokenizer.json"), vocab_size=65536)
    tokenizer.origin = meta["tokenizer_origin"]
    return Corpus(
        train=_read_part(cache, TRAIN),
        heldout=_read_part(cache, HELDOUT),
        tokenizer=tokenizer,
        fingerprint=meta["fingerprint"],
        counts=[SourceCount(**count) for count in meta["counts"]],
    )


def _read_part(cache: Path, name: str) -> TokenArray:
    return TokenArray(
        name=name,
        tokens=np.memmap(cache / f"{name}.tokens", dtype=np.uint16, mode="r"),
        offsets=np.load(cache / f"{name}.offsets.npy"),
        kinds=np.load(cache / f"{name}.kinds.npy"),
    )


def kind_tokens(part: TokenArray, documents: Iterable[int]) -> Counter[str]:
    """Return how many tokens of each kind these documents hold."""
    index = np.fromiter(documents, dtype=np.int64)
    counted: Counter[str] = Counter()
    for number, kind in enumerate(KINDS):
        of_kind = index[part.kinds[index] == number]
        if len(of_kind):
            counted[kind.value] = int(part.lengths[of_kind].sum())
    return counted
