"""From where a benchmark's problems are to its records, each with its place, and a choice of them.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from svend.data.records import (
    Chunk,
    HubError,
    Record,
    RowError,
    find_split,
    hub_commit,
    parse_row,
    read_chunks,
    stream_hub,
)
from svend.errors import DataError
from svend.evaluation.benchmark import Problem, ProblemSource


@dataclass(frozen=True)
class DatasetPlace:
    """Where a benchmark's data set is found.

    name: of the benchmark, and of its folder within one that holds several. stems: the names, less
    the suffix, that its file may have in a folder. repository, subset, split: its place on the hub.
    asked_as: the name under which a run asks for it, where that is another.
    """

    name: str
    stems: tuple[str, ...]
    repository: str
    subset: str | None = None
    split: str = "test"
    asked_as: str | None = None

    @property
    def way_out(self) -> str:
        """What a user can do where the data set cannot be read."""
        return f"give a local copy with evaluation.paths='{{{self.asked_as or self.name}: PATH}}'"


@dataclass(frozen=True, slots=True)
class PlacedRecord:
    """A record, and where it stands: `file:line`."""

    place: str
    values: Record

    def column(self, name: str) -> Any:
        """Return what the record has under a name. Raises DataError if it has no such column."""
        if name not in self.values:
            found = ", ".join(map(str, self.values)) or "none"
            raise self.error(f"column '{name}' is missing; it has {found}")
        return self.values[name]

    def text(self, name: str) -> str:
        """Return a column's text. Raises DataError if it is missing, no text, or blank."""
        value = self.column(name)
        if not isinstance(value, str):
            raise self.error(f"'{name}' must be text, found {type(value).__name__}")
        if not value.strip():
            raise self.error(f"'{name}' is empty; fill it in or remove the record")
        return value

    def error(self, reason: str) -> DataError:
        """Return the error that this record cannot be used, for the caller to raise."""
        return DataError(f"{self.place}: {reason}")


def read_records(source: ProblemSource, dataset: DatasetPlace) -> list[PlacedRecord]:
    """Return every record of a benchmark, from a local file or folder, or from the hub.

    Raises DataError, in one line with file and line, for a path without the data, a line that is
    no record, or no record at all.
    """
    if source.path is None:
        place, chunks = dataset.repository, _hub_chunks(dataset)
    else:
        files = find_files(source.path, dataset)
        place = ", ".join(str(file) for file in files)
        chunks = itertools.chain.from_iterable(map(read_chunks, files))
    records = [_record(chunk, index) for chunk in chunks for index in range(len(chunk.rows))]
    if not records:
        raise DataError(f"{place}: no records; {dataset.name} needs at least one")
    return records


def find_files(path: Path, dataset: DatasetPlace) -> list[Path]:
    """Return the files of a benchmark at a path: itself, or those in a folder.

    Raises DataError if there are none.
    """
    path = path.expanduser()
    if path.is_file():
        return [path]
    folder = benchmark_folder(path, dataset)
    files = find_split(folder, *dataset.stems)
    if not files:
        expected = " or ".join(f"{stem}.jsonl" for stem in dataset.stems)
        raise DataError(
            f"{folder.absolute()}: no file for {dataset.name}; expected {expected} (or .jsonl.gz, "
            f".parquet, .csv); {dataset.way_out}"
        )
    return files


def benchmark_folder(path: Path, dataset: DatasetPlace) -> Path:
    """Return the folder of a benchmark: the one under its name in `path`, else `path` itself.

    Raises DataError if `path` is no folder.
    """
    path = path.expanduser()
    if not path.is_dir():
        fault = "not a folder" if path.exists() else "no such file or folder"
        raise DataError(f"{path.absolute()}: {fault}; {dataset.way_out}")
    own = path / dataset.name
    return own if own.is_dir() else path


def choose(
    problems: Sequence[Problem], source: ProblemSource, balanced: bool = False
) -> list[Problem]:
    """Return `source.limit` problems in a random order that depends on `source.seed` alone.

    A smaller limit gives the beginning of what a larger one gives, whatever order the file has.
    balanced: take from each group by turns, for a metric that is a mean over the groups.
    """
    shuffled = sorted(
        problems, key=lambda p: xxhash.xxh3_64_intdigest(f"{source.seed}\0{p.problem_id}".encode())
    )
    if balanced:
        taken: dict[str, int] = defaultdict(int)
        turns = []
        for problem in shuffled:
            turns.append(taken[problem.group])
            taken[problem.group] += 1
        order = sorted(range(len(shuffled)), key=turns.__getitem__)
        shuffled = [shuffled[index] for index in order]
    return shuffled[:source.limit]


def local_copy_wanted(error: Exception, dataset: DatasetPlace) -> DataError:
    """Return the hub's error in one line, with what a benchmark's user can do about it."""
    if not isinstance(error, DataError):
        error = HubError(dataset.repository, error)
    fault = error.fault if isinstance(error, HubError) else error
    return DataError(f"{fault}; {dataset.way_out}")


def _hub_chunks(dataset: DatasetPlace) -> Iterator[Chunk]:
    try:
        commit = hub_commit(dataset.repository, "main")
        yield from stream_hub(
            dataset.repository, dataset.subset, dataset.split, commit, sys.maxsize
        )
    except DataError as error:
        raise local_copy_wanted(error, dataset) from error


def _record(chunk: Chunk, index: int) -> PlacedRecord:
    place = chunk.place(index)
    try:
        return PlacedRecord(place, parse_row(chunk.rows[index]))
    except RowError as error:
        raise DataError(f"{place}: {error}") from None
