"""The sources by name: what kind each is, where it comes from, how a record becomes a document."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svend.data import embedded
from svend.data.documents import Document, Kind
from svend.data.library import library_documents, library_name
from svend.data.records import (
    CHUNK_ROWS,
    Chunk,
    check_suffix,
    file_digest,
    find_split,
    hub_commit,
    read_chunks,
    stream_hub,
)
from svend.data.schemas import find_schema, schema_digest
from svend.data.tool_dialogues import tool_use_documents
from svend.errors import ConfigError, DataError, reason_of
from svend.pipeline.config import DataConfig, OwnSource

SCHEMAS = "svend.data.schemas"
# What the held-out part beside train.* may be called, the first that is there.
HELDOUT_NAMES = ("test", "validation", "valid", "val", "dev")
# A commit of a repository on the hub: what a revision of this form names, no one can change.
COMMIT_LENGTH = 40


def gym_version() -> str:
    """Return the library that makes the embedded problems, and its version."""
    return f"reasoning-gym {importlib.metadata.version('reasoning-gym')}"


@dataclass(frozen=True)
class GeneratedSource:
    """A source that makes its documents, `generate(count, seed)`, with what `made_by` names."""

    name: str
    kind: Kind
    generate: Callable[[int, int], Iterator[Document]]
    made_by: Callable[[], str] = gym_version


@dataclass(frozen=True)
class RecordSource:
    """A data set on the hub, or a local copy of it in the same schema.

    `to_document` names the function that makes a document of a record: a process of its own
    imports it by that name.
    """

    name: str
    kind: Kind
    repository: str | None
    to_document: str
    subset: str | None = None
    revision: str = "main"
    heldout_split: str | None = None
    path: str | None = None


Source = GeneratedSource | RecordSource


@dataclass(frozen=True)
class SourcePart:
    """One part of a source, found but not yet read.

    `identity` says what `read` yields, so that two of the same identity are the same. Chunks hold
    rows for `to_document`, or documents where that is None. `stamps` are sizes and times of the
    files, by which a change during reading shows.
    """

    source: str
    name: str
    identity: dict[str, Any]
    read: Callable[[], Iterator[Chunk]]
    to_document: str | None
    files: tuple[Path, ...] = ()

    def stamps(self) -> list[tuple[int, int]]:
        return [_stamp(path) for path in self.files]


@dataclass(frozen=True)
class LocatedSource:
    """A source of a run: its train part and, if it has one of its own, its held-out part."""

    source: Source
    place: str
    train: SourcePart
    heldout: SourcePart | None


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        GeneratedSource("gym_reasoning", Kind.REASONING, embedded.reasoning_documents),
        GeneratedSource("gym_tool_use", Kind.TOOL_USE, tool_use_documents),
        GeneratedSource("gym_general", Kind.GENERAL, embedded.general_documents),
        GeneratedSource("library", Kind.GENERAL, library_documents, library_name),
        RecordSource("gsm8k", Kind.REASONING, "openai/gsm8k", f"{SCHEMAS}:gsm8k_document",
                     subset="main", heldout_split="test"),
        RecordSource("openmath", Kind.REASONING, "nvidia/OpenMathInstruct-2",
                     f"{SCHEMAS}:openmath_document"),
        RecordSource("slimorca", Kind.GENERAL, "Open-Orca/SlimOrca",
                     f"{SCHEMAS}:chat_document"),
        RecordSource("xlam", Kind.TOOL_USE, "Salesforce/xlam-function-calling-60k",
                     f"{SCHEMAS}:xlam_document"),
        RecordSource("toolace", Kind.TOOL_USE, "Team-ACE/ToolACE", f"{SCHEMAS}:toolace_document"),
        RecordSource("chat", Kind.GENERAL, None, f"{SCHEMAS}:chat_document"),
        RecordSource("prompt", Kind.GENERAL, None, f"{SCHEMAS}:prompt_document"),
        RecordSource("text", Kind.GENERAL, None, f"{SCHEMAS}:text_document"),
    )
}
# `gym:NAME` is the data set NAME of reasoning-gym.
GYM_PREFIX = "gym:"


def find_source(name: str, data: DataConfig) -> Source:
    """Return a source by its name. Raises ConfigError for a name that nothing has."""
    for own in data.own_sources:
        if own.name == name:
            return _own_source(own)
    if name.startswith(GYM_PREFIX):
        gym_name = name.removeprefix(GYM_PREFIX)
        embedded.check_problem_set(gym_name)
        return GeneratedSource(
            name, Kind.REASONING, lambda count, seed: embedded.problems(gym_name, count, seed)
        )
    if name not in SOURCES:
        known = ", ".join((*(own.name for own in data.own_sources), *SOURCES, f"{GYM_PREFIX}NAME"))
        raise ConfigError(f"training.data.sources: unknown source '{name}'; known: {known}")
    return SOURCES[name]


def _own_source(own: OwnSource) -> RecordSource:
    kinds = [kind.value for kind in Kind]
    if own.kind not in kinds:
        raise ConfigError(
            f"training.data.own_sources: {own.name}: kind = {own.kind}: must be one of "
            f"{', '.join(kinds)}"
        )
    find_schema(own.to_document)
    return RecordSource(own.name, Kind(own.kind), own.repository, own.to_document, own.subset,
                        own.revision, own.heldout_split, own.path)


def locate_sources(data: DataConfig, seed: int) -> list[LocatedSource]:
    """Find every source of a recipe, and check that the mix can be made of them.

    Raises ConfigError for an unknown source or a ratio without a source, DataError for a path
    that does not exist.
    """
    if len(set(data.sources)) < len(data.sources):
        raise ConfigError(f"training.data.sources = {data.sources}: must name each source once")
    sources = [find_source(name, data) for name in data.sources]
    from_records = [source for source in sources if isinstance(source, RecordSource)]
    if data.path is not None and not from_records:
        raise ConfigError(
            f"data.path = {data.path}: the sources {', '.join(data.sources)} are made on the spot "
            "and read no file; choose another recipe, such as data=gsm8k"
        )
    if data.heldout_path is not None and len(from_records) != 1:
        raise ConfigError(
            f"data.heldout_path = {data.heldout_path}: is for one source that is read from files; "
            f"the recipe has {len(from_records)}"
        )
    mix_of(data)
    return [_locate(source, data, seed) for source in sources]


def mix_of(data: DataConfig) -> dict[str, float]:
    """Return the shares of tokens by kind.

    The default ratios belong to the default sources: for others, the kinds that none of them has
    are left out and the rest keep their proportions. Any other ratio without a source raises
    ConfigError.
    """
    kinds = {find_source(name, data).kind.value for name in data.sources}
    known_kinds = [kind.value for kind in Kind]
    for kind, ratio in data.mix_ratios.items():
        if kind not in known_kinds:
            raise ConfigError(
                f"training.data.mix_ratios.{kind}: unknown kind; known: {', '.join(known_kinds)}"
            )
        if ratio > 0 and kind not in kinds and data.mix_ratios != DataConfig().mix_ratios:
            raise ConfigError(
                f"training.data.mix_ratios.{kind} = {ratio}: none of the sources "
                f"({', '.join(data.sources)}) is of this kind; add one, or set the ratio to 0"
            )
    total = sum(data.mix_ratios.get(kind, 0.0) for kind in kinds)
    if total == 0:
        raise ConfigError(
            f"training.data.mix_ratios = {data.mix_ratios}: the sources ({', '.join(data.sources)})"
            f" are of kind {', '.join(sorted(kinds))}; give that a ratio above 0"
        )
    return {
        kind: ratio / total for kind, ratio in data.mix_ratios.items() if kind in kinds and ratio
    }


def _locate(source: Source, data: DataConfig, seed: int) -> LocatedSource:
    if isinstance(source, GeneratedSource):
        return _locate_generator(source, data, seed)
    path = source.path or data.path
    if path is None:
        return _locate_on_hub(source, data)
    train, heldout = _local_files(source, path, data)
    return LocatedSource(
        source,
        ", ".join(str(file) for file in train),
        _files_part(source, "train", train, data),
        _files_part(source, "heldout", heldout, data) if heldout else None,
    )


def _locate_generator(source: GeneratedSource, data: DataConfig, seed: int) -> LocatedSource:
    assert data.num_samples is not None  # set by PipelineConfig.resolve
    count = data.num_samples
    place = source.made_by()
    identity = {"source": source.name, "generator": place, "count": count, "seed": seed}

    def read() -> Iterator[Chunk]:
        documents, number = source.generate(count, seed), 1
        while taken := [d for _, d in zip(range(CHUNK_ROWS), documents, strict=False)]:
            yield Chunk(source.name, range(number, number + len(taken)), taken)
            number += len(taken)

    part = SourcePart(source.name, source.name, identity, read, None)
    return LocatedSource(source, place, part, None)


def _files_part(
    source: RecordSource, name: str, files: list[Path], data: DataConfig
) -> SourcePart:
    for path in files:
        check_suffix(path)
    digests = [_known_digest(path, Path(data.cache_dir).expanduser()) for path in files]
    identity = {"source": source.name, "files": digests,
                "schema": schema_digest(source.to_document)}

    def read() -> Iterator[Chunk]:
        for path in files:
            yield from read_chunks(path)

    return SourcePart(
        source.name, f"{source.name} {name}", identity, read, source.to_document, tuple(files)
    )


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason_of(error)})") from None
    return status.st_size, status.st_mtime_ns


def _known_digest(path: Path, cache: Path) -> str:
    """Return a file's hash, computed once for as long as its size and time stay the same."""
    note = cache / "digests.json"
    key = f"{path.resolve()} {_stamp(path)}"
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = file_digest(path)
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            writing = note.with_name(f"digests-{os.getpid()}.writing")
            writing.write_text(json.dumps(known), encoding="utf-8")
            writing.replace(note)
        except OSError as error:
            raise DataError(
                f"data.cache_dir {cache.absolute()}: cannot be written ({reason_of(error)}); "
                "free space, or choose another"
            ) from error
    digest: str = known[key]
    return digest


def _locate_on_hub(source: RecordSource, data: DataConfig) -> LocatedSource:
    if source.repository is None:
        raise ConfigError(
            f"source '{source.name}' has no place on the hub: set data.path to a file or folder"
        )
    assert data.num_samples is not None  # set by PipelineConfig.resolve
    repository, count = source.repository, data.num_samples
    revision = data.revisions.get(source.name, source.revision)
    pinned = len(revision) == COMMIT_LENGTH and all(c in "0123456789abcdef" for c in revision)
    commit = revision if pinned else hub_commit(repository, revision)

    def part(split: str) -> SourcePart:
        identity = {"source": source.name, "repository": repository, "subset": source.subset,
                    "revision": commit, "split": split, "count": count,
                    "schema": schema_digest(source.to_document)}
        return SourcePart(
            source.name, f"{source.name} {split}", identity,
            lambda: stream_hub(repository, source.subset, split, commit, count),
            source.to_document,
        )

    heldout = part(source.heldout_split) if source.heldout_split else None
    return LocatedSource(source, f"{repository}@{commit[:12]}", part("train"), heldout)


def _local_files(
    source: RecordSource, place: str, data: DataConfig
) -> tuple[list[Path], list[Path]]:
    """The train and held-out files of a source under a path."""
    path = Path(place).expanduser()
    try:
        found = path.exists()
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise DataError(f"data.path {place[:200]}: cannot be read ({reason_of(error)})") from None
    if not found:
        raise DataError(f"data.path {path.absolute()}: no such file or folder")
    shared = len(data.sources) > 1 and source.path is None
    if path.is_file():
        if shared:
            raise ConfigError(
                f"data.path {path} is one file for {len(data.sources)} sources; give a folder "
                f"that holds {' and '.join(f'{name}.jsonl' for name in data.sources)}"
            )
        train, folder = [path], path.parent
    else:
        folder = path / source.name if (path / source.name).is_dir() else path
        names = (source.name, "train") if shared else ("train", source.name)
        train = find_split(folder, *names)
        if not train:
            there = sorted(file.name for file in folder.iterdir() if file.is_file())
            raise DataError(
                f"data.path {path.absolute()}: no file for source '{source.name}'; "
                f"expected {folder / 'train.jsonl'} or {folder / (source.name + '.jsonl')}, or "
                f"several numbered as train-00000.jsonl; found {', '.join(there[:5]) or 'none'}"
                f"{' and more' if len(there) > 5 else ''}"
            )
    if data.heldout_path is not None:
        heldout = Path(data.heldout_path).expanduser()
        if not heldout.is_file():
            raise DataError(f"data.heldout_path {heldout.absolute()}: no such file")
        return train, [heldout]
    is_split = train[0].name.startswith(("train.", "train-"))
    return train, find_split(folder, *HELDOUT_NAMES) if is_split else []
