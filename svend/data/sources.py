"""The sources by name: what kind each is, where it comes from, how a record becomes a document."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svend.data import embedded
from svend.data.documents import Document, Kind, Role, conversation
from svend.data.records import Record, file_digest, find_split, read_records, stream_hub
from svend.errors import ConfigError, DataError
from svend.pipeline.config import DataConfig


@dataclass(frozen=True)
class GeneratedSource:
    """A source that makes its documents: `generate(count, seed)`."""

    name: str
    kind: Kind
    generate: Callable[[int, int], Iterator[Document]]


@dataclass(frozen=True)
class RecordSource:
    """A data set on the hub, or a local copy of it in the same schema."""

    name: str
    kind: Kind
    repository: str
    subset: str | None
    revision: str
    heldout_split: str | None
    to_document: Callable[[Record], Document]


Source = GeneratedSource | RecordSource


@dataclass(frozen=True)
class SourceParts:
    """One source of a run, found but not yet read: its train part and, if it has one, held-out."""

    source: Source
    place: str
    identity: dict[str, Any]
    train: Callable[[], Iterator[Document]]
    heldout: Callable[[], Iterator[Document]] | None


def gsm8k_document(record: Record) -> Document:
    """openai/gsm8k: question; answer with <<calculator>> marks and `#### result`."""
    return conversation((Role.USER, record["question"]), (Role.ASSISTANT, record["answer"]))


def openmath_document(record: Record) -> Document:
    """nvidia/OpenMathInstruct-2: problem, generated_solution, expected_answer."""
    solution, expected = record["generated_solution"], record["expected_answer"]
    if not isinstance(solution, str) or not isinstance(expected, str):
        raise ValueError("generated_solution and expected_answer must be text")
    answer = f"{solution}\n#### {expected}"
    return conversation((Role.USER, record["problem"]), (Role.ASSISTANT, answer))


def slimorca_document(record: Record) -> Document:
    """Open-Orca/SlimOrca: conversations, a list of from (system, human, gpt) and value."""
    roles = {"system": Role.SYSTEM, "human": Role.USER, "gpt": Role.ASSISTANT}
    for turn in record["conversations"]:
        if turn["from"] not in roles:
            raise ValueError(f"unknown speaker '{turn['from']}'; known: {', '.join(roles)}")
    return conversation(
        *((roles[turn["from"]], turn["value"]) for turn in record["conversations"])
    )


def text_document(record: Record) -> Document:
    """Running text under the key `text`."""
    return conversation((Role.TEXT, record["text"]))


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        GeneratedSource("gym_reasoning", Kind.REASONING, embedded.reasoning_documents),
        GeneratedSource("gym_tool_use", Kind.TOOL_USE, embedded.tool_use_documents),
        GeneratedSource("gym_general", Kind.GENERAL, embedded.general_documents),
        RecordSource(
            "gsm8k", Kind.REASONING, "openai/gsm8k", "main", "main", "test", gsm8k_document
        ),
        RecordSource(
            "openmath", Kind.REASONING, "nvidia/OpenMathInstruct-2", None, "main", None,
            openmath_document,
        ),
        RecordSource(
            "slimorca", Kind.GENERAL, "Open-Orca/SlimOrca", None, "main", None, slimorca_document
        ),
        RecordSource("text", Kind.GENERAL, "text", None, "main", None, text_document),
    )
}


def locate_sources(data: DataConfig, seed: int) -> list[SourceParts]:
    """Find every source of a recipe, and check that the mix can be made of them.

    Raises ConfigError for an unknown source or a ratio without a source, DataError for a path
    that does not exist.
    """
    unknown = [name for name in data.sources if name not in SOURCES]
    if unknown:
        raise ConfigError(
            f"training.data.sources: unknown source '{unknown[0]}'; known: {', '.join(SOURCES)}"
        )
    from_records = [name for name in data.sources if isinstance(SOURCES[name], RecordSource)]
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
    return [_locate(SOURCES[name], data, seed) for name in data.sources]


def mix_of(data: DataConfig) -> dict[str, float]:
    """Return the shares of tokens by kind.

    The default ratios belong to the default sources: for others, the kinds that none of them has
    are left out and the rest keep their proportions. Any other ratio without a source raises
    ConfigError.
    """
    kinds = {SOURCES[name].kind.value for name in data.sources}
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


def _locate(source: Source, data: DataConfig, seed: int) -> SourceParts:
    assert data.num_samples is not None  # set by PipelineConfig.resolve
    count = data.num_samples
    if isinstance(source, GeneratedSource):
        generate = source.generate
        identity = {
            "source": source.name,
            "generator": f"reasoning-gym {importlib.metadata.version('reasoning-gym')}",
            "count": count,
            "seed": seed,
        }
        place = identity["generator"]
        return SourceParts(source, str(place), identity, lambda: generate(count, seed), None)
    if data.path is None:
        return _locate_on_hub(source, count)
    train_path, heldout_path = _local_files(source, data)
    identity = {"source": source.name, "train": file_digest(train_path)}
    if heldout_path is not None:
        identity["heldout"] = file_digest(heldout_path)
    return SourceParts(
        source,
        str(train_path),
        identity,
        lambda: _documents(source, read_records(train_path)),
        None if heldout_path is None else lambda: _documents(source, read_records(heldout_path)),
    )


def _locate_on_hub(source: RecordSource, count: int) -> SourceParts:
    if source.name == "text":
        raise ConfigError("source 'text' has no place on the hub: set data.path to a .txt file")

    def part(split: str) -> Callable[[], Iterator[Document]]:
        return lambda: _documents(
            source,
            stream_hub(source.repository, source.subset, split, source.revision, count),
        )

    identity = {"source": source.name, "repository": source.repository,
                "revision": source.revision, "count": count}
    heldout = part(source.heldout_split) if source.heldout_split else None
    return SourceParts(source, source.repository, identity, part("train"), heldout)


def _local_files(source: RecordSource, data: DataConfig) -> tuple[Path, Path | None]:
    """The train and held-out file of a source under `data.path`."""
    assert data.path is not None
    path = Path(data.path).expanduser()
    if not path.exists():
        raise DataError(f"data.path {path.absolute()}: no such file or folder")
    train: Path | None
    if path.is_file():
        if len(data.sources) > 1:
            raise ConfigError(
                f"data.path {path} is one file for {len(data.sources)} sources; give a folder "
                f"that holds {' and '.join(f'{name}.jsonl' for name in data.sources)}"
            )
        train, folder = path, path.parent
    else:
        folder = path / source.name if (path / source.name).is_dir() else path
        names = (source.name, "train") if len(data.sources) > 1 else ("train", source.name)
        train = find_split(folder, *names)
        if train is None:
            raise DataError(
                f"data.path {path.absolute()}: no file for source '{source.name}'; "
                f"expected {folder / 'train.jsonl'} or {folder / (source.name + '.jsonl')}"
            )
    if data.heldout_path is not None:
        heldout = Path(data.heldout_path).expanduser()
        if not heldout.is_file():
            raise DataError(f"data.heldout_path {heldout.absolute()}: no such file")
        return train, heldout
    beside = find_split(folder, "test", "validation") if train.stem == "train" else None
    return train, beside


def _documents(source: RecordSource, records: Iterator[tuple[str, Record]]) -> Iterator[Document]:
    for place, record in records:
        try:
            document = source.to_document(record)
        except KeyError as error:
            raise DataError(
                f"{place}: no key {error} for source '{source.name}'; found {', '.join(record)}"
            ) from None
        except (TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{place}: not in the schema of '{source.name}' ({error})") from None
        if not document.messages:
            raise DataError(f"{place}: no messages for source '{source.name}'; remove the record")
        for message in document.messages:
            if not isinstance(message.content, str):
                raise DataError(
                    f"{place}: {message.role.value} is {type(message.content).__name__}, not text"
                )
            if not message.content.strip() and message is document.messages[-1]:
                raise DataError(f"{place}: the {message.role.value} is empty; remove the record")
            try:
                message.content.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{place}: {message.role.value} is not Unicode text ({error.reason} at "
                    f"character {error.start + 1}); mend the record"
                ) from None
        yield document
