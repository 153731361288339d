"""The tokenised data of a run: which documents it trains on, and which it holds out.

The cache holds, each named by what went into it and made once: tokenised parts of sources
(`tokenised.py`), tokenizers, and hashes of evaluation sets. Which documents a run takes of them is
decided anew each time (`selection.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from svend.data.chat import speaker_marks
from svend.data.documents import Document, Role, conversation
from svend.data.encoding import EncodingSpec, default_processes, documents_in
from svend.data.hygiene import word_sequences
from svend.data.packing import Ints
from svend.data.records import RowError, parse_row, read_chunks
from svend.data.selection import (
    PartPair,
    Selection,
    explain_empty,
    heldout_bound,
    select_documents,
)
from svend.data.sources import LocatedSource, SourcePart, locate_sources, mix_of
from svend.data.token_array import KINDS, TokenArray, Tokens
from svend.data.tokenised import Progress, TokenisedPart, locked, tokenise
from svend.data.tokenizer import DocumentTokenizer, load_tokenizer, train_tokenizer
from svend.errors import DataError, reason_of
from svend.pipeline.config import BrokenRows, DataConfig, Duplicates

TRAIN, HELDOUT = "train", "heldout"
# A tokenizer learns from so much text of the mix; more changes it little and takes hours.
TOKENIZER_TEXT_BYTES = 100_000_000


@dataclass(frozen=True)
class SourceCount:
    """What a source gave to the corpus, in documents and tokens, and what was left out."""

    source: str
    kind: str
    train_documents: int
    train_tokens: int
    heldout_documents: int
    heldout_tokens: int
    leaked_documents: int
    duplicate_documents: int
    dropped_rows: int
    named_rows: list[str]
    identity: dict[str, Any]


@dataclass(frozen=True)
class EvaluationSet:
    """Documents that the train part must not share text with; `identity` says which they are."""

    name: str
    identity: str
    documents: Sequence[Document]


@dataclass(frozen=True)
class Corpus:
    """The tokenised data of a run."""

    train: TokenArray
    heldout: TokenArray
    tokenizer: DocumentTokenizer
    fingerprint: str
    counts: list[SourceCount]


def build_corpus(
    data: DataConfig, vocab_size: int, seed: int, progress: Progress,
    evaluations: Sequence[EvaluationSet] = (),
) -> Corpus:
    """Return the tokenised corpus of a recipe, from the cache where it has been made before.

    No question of the held-out part occurs in the train part: a source with a held-out split of
    its own loses the train documents that repeat it, or that share `leak_words` words in a row
    with it, with `evaluations` or with another evaluation set (counted as leaked); another is
    divided by a hash of the question. Raises DataError or ConfigError for what cannot be read.
    """
    located = locate_sources(data, seed)
    cache = Path(data.cache_dir).expanduser()
    try:
        tokenizer = _prepare_tokenizer(cache, data, located, vocab_size, progress)
        parts = _tokenise_all(cache, data, located, evaluations, tokenizer, progress)
        chosen = select_documents(data, parts, progress)
    except OSError as error:
        raise DataError(
            f"data.cache_dir {cache.absolute()}: cannot be written ({reason_of(error)}); "
            "free space, or choose another"
        ) from error
    return _assemble(located, tokenizer, parts, chosen)


def _prepare_tokenizer(
    cache: Path, data: DataConfig, located: list[LocatedSource], vocab_size: int,
    progress: Progress,
) -> DocumentTokenizer:
    """Return the tokenizer; its file, which other processes read, is in the cache."""
    folder = cache / "tokenizers"
    folder.mkdir(parents=True, exist_ok=True)
    if data.tokenizer == "train":
        identity = [part.train.identity for part in located]
        key = _digest([identity, data.mix_ratios, vocab_size, data.heldout_fraction])
        path = folder / f"{key}.json"
        if not path.is_file():
            with locked(path.with_suffix(".lock"), "the tokenizer is being trained", progress):
                if not path.is_file():
                    progress("training a tokenizer")
                    trained = train_tokenizer(_tokenizer_sample(data, located), vocab_size)
                    _publish(path, trained.to_json())
        tokenizer = load_tokenizer(str(path), vocab_size)
        tokenizer.origin = "trained on this run's data"
        return tokenizer
    return load_tokenizer(data.tokenizer, vocab_size)


def _tokenizer_file(cache: Path, tokenizer: DocumentTokenizer) -> Path:
    """Return a file of the tokenizer in the cache, for the processes that tokenise."""
    path = cache / "tokenizers" / f"{tokenizer.sha256}.json"
    if not path.is_file():
        _publish(path, tokenizer.to_json())
    return path


def _tokenizer_sample(data: DataConfig, located: list[LocatedSource]) -> Iterator[Document]:
    """Yield documents of the train part, of each kind as much text as the mix has of it."""
    bound = heldout_bound(data)
    mix = mix_of(data)
    for source in located:
        kind = source.source.kind.value
        of_kind = sum(other.source.kind.value == kind for other in located)
        left = TOKENIZER_TEXT_BYTES * mix.get(kind, 0.0) / of_kind
        for document in _documents(source.train, data):
            if left <= 0:
                break
            if source.heldout is None and document.question_digest < bound:
                continue
            left -= document.text_bytes
            yield document


def _documents(part: SourcePart, data: DataConfig) -> Iterator[Document]:
    for chunk in part.read():
        dropped: list[str] = []
        yield from documents_in(chunk, part.source, part.to_document, dropped)
        if dropped and data.broken_rows is BrokenRows.FAIL:
            raise DataError(dropped[0])


def _tokenise_all(
    cache: Path, data: DataConfig, located: list[LocatedSource],
    evaluations: Sequence[EvaluationSet], tokenizer: DocumentTokenizer, progress: Progress,
) -> list[PartPair]:
    leaks = _evaluation_sequences(cache, data, located, evaluations, progress)
    processes = default_processes(data.processes)
    file = str(_tokenizer_file(cache, tokenizer))

    def tokenised(part: SourcePart, *, train: bool) -> TokenisedPart:
        spec = EncodingSpec(
            source=part.source,
            to_document=part.to_document,
            tokenizer=file,
            drop_broken=data.broken_rows is BrokenRows.DROP,
            leak_words=data.leak_words,
            leaks=str(leaks) if leaks and train else None,
            near_duplicates=data.duplicates is Duplicates.NEAR,
        )
        return tokenise(part, spec, tokenizer.sha256, cache / "parts", processes, progress)

    return [
        (tokenised(source.train, train=True),
         tokenised(source.heldout, train=False) if source.heldout else None)
        for source in located
    ]


def _evaluation_sequences(
    cache: Path, data: DataConfig, located: list[LocatedSource],
    evaluations: Sequence[EvaluationSet], progress: Progress,
) -> Path | None:
    """Return a file of the sorted hashes of word sequences in evaluation sets, if there are any."""
    own = [source.heldout for source in located if source.heldout is not None]
    files = [Path(name).expanduser() for name in data.evaluation_sets]
    for file in files:
        if not file.is_file():
            raise DataError(f"data.evaluation_sets {file.absolute()}: no such file")
    if data.leak_words == 0 or not (own or files or evaluations):
        return None
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    contents += [evaluation.identity for evaluation in evaluations]
    key = _digest([[part.identity for part in own], contents, data.leak_words])
    path = cache / "evaluation" / f"{key}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        progress("reading evaluation sets")
        documents = [document for part in own for document in _documents(part, data)]
        documents += [document for file in files for document in read_texts(file)]
        documents += [document for each in evaluations for document in each.documents]
        hashes = [word_sequences(document, data.leak_words) for document in documents]
        writing = path.with_suffix(f".{os.getpid()}.npy")
        np.save(writing, np.unique(np.concatenate(hashes)))
        writing.rename(path)
    return path


def read_texts(file: Path) -> Iterator[Document]:
    """Yield all text in the rows of a file, whatever its schema.

    Raises DataError that names the line for a row that cannot be read.
    """
    for chunk in read_chunks(file):
        for index, row in enumerate(chunk.rows):
            try:
                texts = list(_strings(parse_row(row)))
            except RowError as error:
                raise DataError(f"{chunk.place(index)}: {error}") from None
            if texts:
                yield conversation(*((Role.TEXT, text) for text in texts))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _assemble(
    located: list[LocatedSource], tokenizer: DocumentTokenizer, parts: list[PartPair],
    chosen: Selection,
) -> Corpus:
    marks = speaker_marks(tokenizer.control_ids)
    kinds = [KINDS.index(source.source.kind) for source in located]
    arrays = {}
    for name, held in ((TRAIN, [train for train, _ in parts]),
                       (HELDOUT, [own or train for train, own in parts])):
        numbers = chosen.train if name == TRAIN else chosen.heldout
        if not sum(map(len, numbers)):
            places = ", ".join(source.place for source in located)
            raise DataError(
                f"the {name} part is empty: {explain_empty(parts, chosen, places)}; give more "
                "data, another data.heldout_fraction, or a held-out file with data.heldout_path"
            )
        arrays[name] = _gather(name, held, numbers, kinds, marks)
    return Corpus(
        train=arrays[TRAIN],
        heldout=arrays[HELDOUT],
        tokenizer=tokenizer,
        fingerprint=_fingerprint(tokenizer, parts, chosen),
        counts=_count(located, parts, chosen),
    )


def _gather(
    name: str, parts: list[TokenisedPart], numbers: list[Ints], kinds: list[int],
    marks: npt.NDArray[np.int8],
) -> TokenArray:
    """Return the chosen documents of several tokenised parts as one part of a corpus."""
    arrays: list[npt.NDArray[np.unsignedinteger]] = []
    bases = []
    for part in parts:
        bases.append(sum(len(array) for array in arrays))
        arrays += [
            np.memmap(shard, dtype=part.info.dtype, mode="r")
            for shard in part.shards if shard.stat().st_size
        ]
    pairs = list(zip(parts, numbers, strict=True))
    counts = [len(n) for n in numbers]
    return TokenArray(
        name=name,
        tokens=Tokens(arrays),
        starts=np.concatenate([
            base + (np.cumsum(part.lengths, dtype=np.int64) - part.lengths)[n]
            for base, (part, n) in zip(bases, pairs, strict=True)
        ]),
        lengths=np.concatenate([part.lengths[n] for part, n in pairs]).astype(np.int64),
        kinds=np.repeat(np.array(kinds, dtype=np.uint8), counts),
        sources=np.repeat(np.arange(len(parts), dtype=np.uint8), counts),
        text_bytes=np.concatenate([part.text_bytes[n] for part, n in pairs]),
        marks=marks,
    )


def _fingerprint(
    tokenizer: DocumentTokenizer, parts: list[PartPair], chosen: Selection
) -> str:
    """Return a hash of the tokenizer, the tokens, and which documents are in which part."""
    digest = hashlib.sha256(tokenizer.sha256.encode())
    for (train, own), to_train, held in zip(parts, chosen.train, chosen.heldout, strict=True):
        digest.update(train.info.sha256.encode())
        digest.update(own.info.sha256.encode() if own else b"")
        digest.update(to_train.tobytes())
        digest.update(held.tobytes())
    return digest.hexdigest()


def _count(
    located: list[LocatedSource], parts: list[PartPair], chosen: Selection
) -> list[SourceCount]:
    return [
        SourceCount(
            source=source.source.name,
            kind=source.source.kind.value,
            train_documents=len(chosen.train[i]),
            train_tokens=int(train.lengths[chosen.train[i]].sum(dtype=np.int64)),
            heldout_documents=len(chosen.heldout[i]),
            heldout_tokens=int((own or train).lengths[chosen.heldout[i]].sum(dtype=np.int64)),
            leaked_documents=chosen.leaked[i],
            duplicate_documents=chosen.duplicates[i],
            dropped_rows=train.info.dropped_rows + (own.info.dropped_rows if own else 0),
            named_rows=train.info.named_rows + (own.info.named_rows if own else []),
            identity=source.train.identity,
        )
        for i, (source, (train, own)) in enumerate(zip(located, parts, strict=True))
    ]


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _publish(path: Path, text: str) -> None:
    writing = path.with_suffix(f".{os.getpid()}.writing")
    writing.write_text(text, encoding="utf-8")
    writing.rename(path)
