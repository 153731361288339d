"""Rows from local files or the hub, in chunks, each with the place that an error message can name.

Nothing here holds more than a chunk, whatever the size of the file, but for a JSON array, which is
read whole and may have LARGEST_ARRAY_BYTES.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from svend.errors import DataError, reason_of

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".txt")
CHUNK_BYTES = 1 << 18
CHUNK_ROWS = 1000
# What a compressed file of a few bytes must not fill the memory with.
LONGEST_LINE_BYTES = 1 << 26
LARGEST_ARRAY_BYTES = 1 << 30

Record = dict[str, Any]


class RowError(Exception):
    """A row that cannot be used; the message says why."""


class HubError(DataError):
    """The hub cannot be read; `fault` says so without what to do, which depends on who reads."""

    def __init__(self, place: str, error: Exception) -> None:
        self.fault = f"{place}: the hub cannot be read ({reason_of(error)})"
        super().__init__(f"{self.fault}; give a local copy with data.path=FOLDER_OR_FILE")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one file in its order: lines still to be parsed, or records."""

    file: str
    numbers: Sequence[int]
    rows: Sequence[Any]
    unit: str = ""

    def place(self, index: int) -> str:
        """Where a row stands: `file:line`, or what counts in this kind of file."""
        number = self.numbers[index]
        return f"{self.file}: {self.unit} {number}" if self.unit else f"{self.file}:{number}"


def parse_row(row: Any) -> Record:
    """Return the record of a row. Raises RowError for a line that is not a JSON object."""
    if not isinstance(row, bytes):
        record: Record = row
        return record
    try:
        parsed = json.loads(row)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        if row.strip() in (b"{", b"["):
            raise RowError(
                "not JSON on one line: the record goes on over several; write each on one"
            ) from None
        raise RowError(f"not JSON ({error}); mend or remove the line") from None
    if not isinstance(parsed, dict):
        raise RowError(
            f"expected a JSON object, found {type(parsed).__name__}; each line must be one record"
        )
    return parsed


def read_chunks(path: Path) -> Iterator[Chunk]:
    """Yield the rows of JSON Lines (also gzipped), Parquet, CSV or text.

    A text file is one record per paragraph, under the key `text`. Raises DataError that names the
    file for what cannot be read.
    """
    read = _reader(path)
    try:
        yield from read(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or damaged gzip ({error}); fetch it again") from None
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read ({reason_of(error)})") from None


def check_suffix(path: Path) -> None:
    """Raise DataError for a file of a kind that is not read."""
    _reader(path)


def find_split(folder: Path, *names: str) -> list[Path]:
    """Return the files in `folder`, or in its `data`, of the first of `names` that has any.

    A split is one file, or several in the hub's numbering, `train-00000-of-00004.parquet`.
    """
    for name in names:
        for place in (folder, folder / "data"):
            for suffix in SUFFIXES:
                if (place / f"{name}{suffix}").is_file():
                    return [place / f"{name}{suffix}"]
                numbered = sorted(place.glob(f"{name}-[0-9]*{suffix}"))
                if numbered:
                    return numbered
    return []


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason_of(error)})") from None


def hub_commit(repository: str, revision: str) -> str:
    """Return the commit that a revision of a data set on the hub stands for now."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(repository, revision=revision).sha
    except Exception as error:
        raise HubError(repository, error) from error
    if commit is None:
        raise DataError(f"{repository}: the hub names no commit for revision '{revision}'")
    return commit


def stream_hub(
    repository: str, subset: str | None, split: str, revision: str, count: int
) -> Iterator[Chunk]:
    """Yield the first `count` rows of a data set on the hub."""
    from datasets import load_dataset  # imports pandas and pyarrow: only where it is used

    place = f"{repository} ({split})"
    try:
        rows = load_dataset(repository, subset, split=split, revision=revision, streaming=True)
        numbered = enumerate(itertools.islice(rows, count), start=1)
        yield from _in_chunks(place, ((number, dict(row)) for number, row in numbered))
    except Exception as error:
        raise HubError(place, error) from error


def _reader(path: Path) -> Callable[[Path], Iterator[Chunk]]:
    for suffixes, reader in (
        ((".jsonl", ".json", ".jsonl.gz", ".json.gz"), _json_lines),
        ((".parquet",), _parquet_rows),
        ((".csv",), _csv_rows),
        ((".txt",), _paragraphs),
    ):
        if path.name.endswith(suffixes):
            return reader
    raise DataError(f"{path}: unknown kind of file; use one of {', '.join(SUFFIXES)}")


def _json_lines(path: Path) -> Iterator[Chunk]:
    number = 1
    with _opened(path) as stream:
        while block := stream.read(CHUNK_BYTES + 1):
            if number == 1 and block.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                yield from _json_array(path, block + stream.read(LARGEST_ARRAY_BYTES))
                return
            if not block.endswith(b"\n"):
                block += stream.readline(LONGEST_LINE_BYTES)
            lines = io.BytesIO(block).readlines()
            if len(lines[-1]) > LONGEST_LINE_BYTES:
                raise DataError(
                    f"{path}:{number + len(lines) - 1}: a line of more than "
                    f"{LONGEST_LINE_BYTES >> 20} MiB; write one record on each line"
                )
            numbered = [(n, line) for n, line in enumerate(lines, number) if line.strip()]
            number += len(lines)
            if numbered:
                yield Chunk(str(path), [n for n, _ in numbered], [line for _, line in numbered])


def _json_array(path: Path, content: bytes) -> Iterator[Chunk]:
    if len(content) > LARGEST_ARRAY_BYTES:
        raise DataError(
            f"{path}: a JSON array of more than {LARGEST_ARRAY_BYTES >> 20} MiB; write one record "
            "on each line"
        )
    try:
        records = json.loads(content)
    except RecursionError:
        raise DataError(f"{path}: not JSON (nested too deep)") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    for record in records:
        if not isinstance(record, dict):
            raise DataError(f"{path}: expected a list of JSON objects")
    yield from _in_chunks(str(path), enumerate(records, start=1), "record")


def _opened(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _parquet_rows(path: Path) -> Iterator[Chunk]:
    import pyarrow.parquet as pq

    number = 1
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(CHUNK_ROWS):
                rows = batch.to_pylist()
                yield Chunk(str(path), range(number, number + len(rows)), rows, "row")
                number += len(rows)
    except Exception as error:  # noqa: BLE001 - damaged values fail in whatever they become
        raise DataError(f"{path}: cannot be read ({reason_of(error)})") from None


def _csv_rows(path: Path) -> Iterator[Chunk]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        table = csv.reader(stream, strict=True)

        def rows() -> Iterator[tuple[int, Record]]:
            header = next(table, None)
            if header is None:
                return
            first = table.line_num + 1
            for cells in table:
                if cells:
                    if len(cells) != len(header):
                        raise DataError(
                            f"{path}:{first}: {len(cells)} cells, and the header names "
                            f"{len(header)}; mend the line"
                        )
                    yield first, dict(zip(header, cells, strict=True))
                first = table.line_num + 1

        try:
            yield from _in_chunks(str(path), rows())
        except csv.Error as error:
            raise DataError(f"{path}:{table.line_num}: cannot be read ({error})") from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 after line {table.line_num} ({error.reason}); save it as UTF-8"
            ) from None


def _paragraphs(path: Path) -> Iterator[Chunk]:
    def paragraphs() -> Iterator[tuple[int, Record]]:
        number, size = 1, 0
        held: list[str] = []
        with path.open("rb") as stream:
            for line_number, line in enumerate(stream, start=1):
                try:
                    text = line.decode("utf-8-sig" if line_number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}:{line_number}: not UTF-8 at byte {error.start} of the line; save "
                        "it as UTF-8"
                    ) from None
                # A book without paragraphs is read in pieces: nothing here grows with the file.
                if held and (not text.strip() or size > CHUNK_BYTES):
                    yield number, {"text": "".join(held).strip()}
                    number, held, size = number + 1, [], 0
                if text.strip():
                    held.append(text)
                    size += len(text)
        if held:
            yield number, {"text": "".join(held).strip()}

    yield from _in_chunks(str(path), paragraphs(), "paragraph")


def _in_chunks(file: str, rows: Iterator[tuple[int, Record]], unit: str = "") -> Iterator[Chunk]:
    while taken := list(itertools.islice(rows, CHUNK_ROWS)):
        numbers, records = zip(*taken, strict=True)
        yield Chunk(file, numbers, records, unit)
