"""Records from local files or the hub, each with the place that an error message can name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svend.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")

Record = dict[str, Any]


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", record) from JSON Lines, Parquet, CSV or text.

    A text file is one record per paragraph block, under the key `text`. Raises DataError that
    names file and line for what cannot be read.
    """
    if path.suffix in (".jsonl", ".json"):
        yield from _json_lines(path)
    elif path.suffix in (".parquet", ".csv"):
        yield from _table_rows(path)
    elif path.suffix == ".txt":
        yield from _paragraphs(path)
    else:
        raise DataError(f"{path}: unknown kind of file; use one of {', '.join(SUFFIXES)}")


def find_split(folder: Path, *names: str) -> Path | None:
    """Return the first file in `folder` called one of `names` with a suffix that can be read."""
    for name in names:
        for suffix in SUFFIXES:
            candidate = folder / f"{name}{suffix}"
            if candidate.is_file():
                return candidate
    return None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def stream_hub(
    repository: str, subset: str | None, split: str, revision: str, count: int
) -> Iterator[tuple[str, Record]]:
    """Yield ("repository:row", record) for the first `count` rows of a data set on the hub."""
    from datasets import load_dataset  # imports pandas and pyarrow: only where it is used

    place = f"{repository} ({split})"
    try:
        rows = load_dataset(repository, subset, split=split, revision=revision, streaming=True)
        for index, record in enumerate(rows):
            if index == count:
                return
            yield f"{place}:{index + 1}", dict(record)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(
            f"{place}: the hub cannot be read ({reason}); "
            "give a local copy with data.path=FOLDER_OR_FILE"
        ) from error


def _json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{place}: not UTF-8 at byte {error.start}; save the file as UTF-8"
                ) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not JSON ({error}); mend or remove the line") from None
            if not isinstance(record, dict):
                raise DataError(
                    f"{place}: expected a JSON object, found {type(record).__name__}; "
                    "each line must be one record"
                )
            yield place, record


def _table_rows(path: Path) -> Iterator[tuple[str, Record]]:
    import pandas as pd

    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else (
            pd.read_csv(path, dtype=str, keep_default_na=False)
        )
    except (ValueError, OSError) as error:
        # pyarrow's and pandas' own errors derive from these two.
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    first = 2 if path.suffix == ".csv" else 1  # a CSV's first line names the columns
    for number, record in enumerate(table.to_dict("records"), start=first):
        yield f"{path}:{number}", {str(key): value for key, value in record.items()}


def _paragraphs(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    for number, block in enumerate(text.split("\n\n"), start=1):
        if block.strip():
            yield f"{path}: paragraph {number}", {"text": block.strip()}
