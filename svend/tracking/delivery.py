"""What a run tells its tracking store, as entries that can be written down and told again.

Telling an entry twice leaves the store as telling it once does: a point carries the time at which
it was logged, and MLflow's database keeps one of equal points; a parameter and a tag have one
value, an artifact has one content.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    BAD_REQUEST,
    INVALID_PARAMETER_VALUE,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)

# MLflow's limits on one request.
BATCH_ITEMS = 1000
LOGGED_ARTIFACTS_TAG = "mlflow.loggedArtifacts"  # where MLflow's evaluation view looks for tables


class EntryKind(Enum):
    METRICS = "metrics"
    PARAMS = "params"
    TAGS = "tags"
    TAG_DROPPED = "tag_dropped"
    ARTIFACT = "artifact"
    TABLE = "table"
    STATUS = "status"


BATCHED = (EntryKind.METRICS, EntryKind.PARAMS, EntryKind.TAGS)
BATCH_LIMITS = {EntryKind.PARAMS: 100, EntryKind.TAGS: 100}


@dataclass(frozen=True)
class Entry:
    """One thing that a run tells; `content` is plain JSON, in the form of its kind."""

    kind: EntryKind
    content: dict[str, Any]

    @classmethod
    def metrics(cls, values: Mapping[str, float], step: int) -> Entry:
        return cls(EntryKind.METRICS, {
            "step": step, "milliseconds": milliseconds(),
            "values": {key: float(value) for key, value in values.items()},
        })

    @classmethod
    def params(cls, values: Mapping[str, str]) -> Entry:
        return cls(EntryKind.PARAMS, dict(values))

    @classmethod
    def tags(cls, values: Mapping[str, str]) -> Entry:
        return cls(EntryKind.TAGS, dict(values))

    @classmethod
    def tag_dropped(cls, key: str) -> Entry:
        return cls(EntryKind.TAG_DROPPED, {"key": key})

    @classmethod
    def file(cls, place: Path, artifact: str, *, is_table: bool) -> Entry:
        """A file that is to be the run's artifact; both names end alike."""
        kind = EntryKind.TABLE if is_table else EntryKind.ARTIFACT
        return cls(kind, {"file": str(place), "artifact": artifact})

    @classmethod
    def status(cls, status: str) -> Entry:
        return cls(EntryKind.STATUS, {"status": status, "milliseconds": milliseconds()})

    @classmethod
    def parse(cls, line: str | bytes) -> Entry:
        told = json.loads(line)
        return cls(EntryKind(told["kind"]), told["content"])

    @property
    def file_place(self) -> str | None:
        """Where the file lies that the entry is about, if it is about one."""
        has_file = self.kind in (EntryKind.ARTIFACT, EntryKind.TABLE)
        return str(self.content["file"]) if has_file else None

    @property
    def items(self) -> int:
        """How many points, parameters or tags it holds."""
        return len(self.content["values"] if self.kind is EntryKind.METRICS else self.content)

    def to_line(self) -> str:
        return json.dumps({"kind": self.kind.value, "content": self.content}) + "\n"


def milliseconds() -> int:
    """Return the time as MLflow counts it."""
    return time.time_ns() // 1_000_000


def is_refusal(error: Exception) -> bool:
    """Whether the store will never take what it was told, however often."""
    return isinstance(error, MlflowException) and error.error_code in (
        ErrorCode.Name(INVALID_PARAMETER_VALUE), ErrorCode.Name(BAD_REQUEST),
    )


def is_missing(error: MlflowException) -> bool:
    """Whether the store answered that it has no such thing."""
    return bool(error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST))


def deliver(client: MlflowClient, run_id: str, entries: Sequence[Entry], folder: Path) -> None:
    """Tell the store entries in their order, in as few requests as it allows.

    folder: what the places of files are relative to.
    """
    for group in _grouped(entries):
        if group[0].kind in BATCHED:
            _deliver_batch(client, run_id, group)
        else:
            _deliver_one(client, run_id, group[0], folder)


def _grouped(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Yield neighbours that one request can hold together, others alone."""
    group: list[Entry] = []
    counts: Counter[EntryKind] = Counter()
    for entry in entries:
        counts[entry.kind] += entry.items
        full = counts.total() > BATCH_ITEMS or any(
            counts[kind] > limit for kind, limit in BATCH_LIMITS.items()
        )
        if group and (full or entry.kind not in BATCHED):
            yield group
            group, counts = [], Counter({entry.kind: entry.items})
        if entry.kind in BATCHED:
            group.append(entry)
        else:
            yield [entry]
            counts.clear()
    if group:
        yield group


def _deliver_batch(client: MlflowClient, run_id: str, group: Sequence[Entry]) -> None:
    metrics, params, tags = [], [], []
    for entry in group:
        content = entry.content
        if entry.kind is EntryKind.METRICS:
            metrics += [Metric(key, value, content["milliseconds"], content["step"])
                        for key, value in content["values"].items()]
        elif entry.kind is EntryKind.PARAMS:
            params += [Param(key, value) for key, value in content.items()]
        else:
            tags += [RunTag(key, value) for key, value in content.items()]
    client.log_batch(run_id, metrics=metrics, params=params, tags=tags)


def _deliver_one(client: MlflowClient, run_id: str, entry: Entry, folder: Path) -> None:
    content = entry.content
    if entry.kind is EntryKind.STATUS:
        if content["status"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, content["status"], content["milliseconds"])
    elif entry.kind is EntryKind.TAG_DROPPED:
        try:
            client.delete_tag(run_id, content["key"])
        except MlflowException as error:
            if not is_missing(error):
                raise
    else:
        artifact = PurePosixPath(content["artifact"])
        below = None if artifact.parent == PurePosixPath() else str(artifact.parent)
        client.log_artifact(run_id, str(folder / content["file"]), below)
        if entry.kind is EntryKind.TABLE:
            _list_table(client, run_id, str(artifact))


def _list_table(client: MlflowClient, run_id: str, artifact: str) -> None:
    """Name a table where MLflow's evaluation view looks for them, as its `log_table` does."""
    listed = json.loads(client.get_run(run_id).data.tags.get(LOGGED_ARTIFACTS_TAG, "[]"))
    table = {"path": artifact, "type": "table"}
    if table not in listed:
        client.set_tag(run_id, LOGGED_ARTIFACTS_TAG, json.dumps([*listed, table]))
