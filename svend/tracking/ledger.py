"""What happened to a registered model, in an order that all writers agree on.

MLflow's aliases and tags are last write wins. A run's parameters are not: the store accepts a key
once, and refuses another value for it, by a constraint of its database. So the ledger is a run of
its own whose parameter `entry.000017` is the seventeenth entry. Of two processes that write it at
once one succeeds, and the other is told. Each entry holds the hash of the one before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    TEMPORARILY_UNAVAILABLE,
    ErrorCode,
)

from svend.errors import TrackingError
from svend.tracking.runs import remove_run
from svend.tracking.store_errors import told_by_the_store

T = TypeVar("T")
EXPERIMENT = "svend-registry"
LEDGER_TAG = "svend.ledger_run_id"  # of the registered model, set as it is made
MODEL_TAG = "svend.ledger_of"  # of the ledger's run
# MLflow's own limit is 6000, and what is longer it may cut.
TEXT_CHARACTERS = 5000
# An SQLite file that others write is tried again for about a minute.
ATTEMPTS, LONGEST_PAUSE_SECONDS = 40, 3.0
NO_ENTRY = "0" * 64


@dataclass(frozen=True)
class Entry:
    """An entry as it stands in the ledger; `content` is None where it cannot be read."""

    number: int
    text: str
    content: dict[str, Any] | None
    done: bool

    @property
    def sha256(self) -> str:
        return text_digest(self.text)


@dataclass(frozen=True)
class Record:
    """Everything in a ledger: its entries in their order, and texts by their hash."""

    entries: list[Entry]
    texts: Mapping[str, str]

    @property
    def head(self) -> str:
        """The hash that the next entry holds."""
        return self.entries[-1].sha256 if self.entries else NO_ENTRY

    @property
    def next_number(self) -> int:
        return self.entries[-1].number + 1 if self.entries else 1


class Ledger:
    """The append-only record of one registered model."""

    def __init__(self, model: str, run_id: str) -> None:
        self.model = model
        self.run_id = run_id
        self._client = MlflowClient()

    @classmethod
    def find(cls, model: str) -> Ledger | None:
        """Return the ledger of a registered model; None if it has none.

        Raises TrackingError if there is no such model.
        """
        client = MlflowClient()
        with told_by_the_store(f"model {model}"):
            try:
                found = retried(lambda: client.get_registered_model(model))
            except MlflowException as error:
                if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                    raise
                names = ", ".join(registered_models()) or "none"
                raise TrackingError(
                    f"model {model}: is not in the registry {mlflow.get_tracking_uri()}; "
                    f"there are the models: {names}"
                ) from None
        run_id = found.tags.get(LEDGER_TAG)
        return None if run_id is None else cls(model, str(run_id))

    @classmethod
    def open(cls, model: str, description: str) -> Ledger:
        """Return the ledger of a model, making both where there is no such model.

        The name of a registered model is unique, and its tags are written with it: of two
        processes that make it at once, both end with the same ledger.
        """
        client = MlflowClient()
        with told_by_the_store(f"model {model}"):
            if not _exists(client, model):
                experiment_id = _registry_experiment(client)
                run = retried(lambda: client.create_run(
                    experiment_id, run_name=f"ledger of {model}",
                    tags={MODEL_TAG: model, "mlflow.note.content": (
                        f"Every move of **{model}** in the registry, in its order, as parameters. "
                        f"`svend history {model}` prints it, `svend audit` checks it."
                    )},
                ))
                run_id = str(run.info.run_id)
                retried(lambda: client.set_terminated(run_id))
                try:
                    retried(lambda: client.create_registered_model(
                        model, tags={LEDGER_TAG: run_id}, description=description
                    ))
                except MlflowException as error:
                    if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                        raise
                    retried(lambda: remove_run(client, run_id))
        ledger = cls.find(model)
        if ledger is None:
            raise TrackingError(
                f"model {model}: was made by something else than Svend, and has no record of its "
                "moves; give model.name another name, or rename that model"
            )
        return ledger

    def read(self) -> Record:
        """Return everything in the ledger. Raises TrackingError if its run is gone."""
        with told_by_the_store(f"ledger of {self.model}"):
            params = retried(lambda: self._client.get_run(self.run_id)).data.params
        entries, parts = [], {}
        for key, value in params.items():
            if found := re.fullmatch(r"entry\.(\d+)", key):
                number = int(found[1])
                entries.append(Entry(number, value, _parsed(value), f"done.{number:06}" in params))
            elif found := re.fullmatch(r"text\.([0-9a-f]{64})\.(\d+)", key):
                parts[found[1], int(found[2])] = value
        texts: dict[str, str] = {}
        for (digest, _), part in sorted(parts.items()):
            texts[digest] = texts.get(digest, "") + part
        return Record(sorted(entries, key=lambda entry: entry.number), texts)

    def append(self, content: Mapping[str, Any], after: Record) -> bool:
        """Write the entry that comes after what was read; return whether it was the first there.

        False means that another process has written since. An entry that did arrive, although the
        connection broke before the store said so, is recognised.
        """
        text = json.dumps({**content, "previous": after.head}, sort_keys=True)
        if len(text) > TEXT_CHARACTERS:
            raise TrackingError(
                f"ledger of {self.model}: an entry of {len(text)} characters is too long "
                f"({TEXT_CHARACTERS} at most); shorten the reason"
            )
        with told_by_the_store(f"ledger of {self.model}"):
            return self._write(f"entry.{after.next_number:06}", text)

    def keep(self, text: str) -> str:
        """Keep a text under its hash, which is returned."""
        digest = text_digest(text)
        with told_by_the_store(f"ledger of {self.model}"):
            for start in range(0, max(1, len(text)), TEXT_CHARACTERS):
                part = text[start : start + TEXT_CHARACTERS]
                self._write(f"text.{digest}.{start // TEXT_CHARACTERS:03}", part)
        return digest

    def mark_done(self, number: int) -> None:
        """Note that what follows from an entry has been carried out."""
        with told_by_the_store(f"ledger of {self.model}"):
            self._write(f"done.{number:06}", "done")

    def _write(self, key: str, value: str) -> bool:
        """Write a parameter; return False if the key has another value."""
        try:
            retried(lambda: self._client.log_param(self.run_id, key, value))
        except MlflowException as error:
            if "Changing param values is not allowed" not in str(error):
                raise
            return False
        return True


def retried(call: Callable[[], T]) -> T:
    """Return what a call to the store gives, waiting while the store is busy with others."""
    # MLflow prints the whole trace of each refusal, before it raises it.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    pause_seconds = 0.05
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except MlflowException as error:
            busy = error.error_code == ErrorCode.Name(TEMPORARILY_UNAVAILABLE)
            if not busy or attempt == ATTEMPTS - 1:
                raise
        time.sleep(pause_seconds * random.uniform(0.5, 1.5))
        pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
    raise AssertionError("unreachable")


def registered_models() -> list[str]:
    """Return the names of all registered models."""
    client = MlflowClient()
    names: list[str] = []
    token = None
    while True:
        page = client.search_registered_models(max_results=100, page_token=token)
        names += [str(model.name) for model in page]
        token = page.token
        if not token:
            return sorted(names)


def text_digest(text: str) -> str:
    """Return the hash that a text is kept and referred to by."""
    return hashlib.sha256(text.encode()).hexdigest()


def _registry_experiment(client: MlflowClient) -> str:
    """Return the experiment of all ledgers, which is made where it is not there."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        try:
            return str(retried(lambda: client.create_experiment(EXPERIMENT)))
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None  # it exists already, said the store
    return str(experiment.experiment_id)


def _exists(client: MlflowClient, model: str) -> bool:
    try:
        client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return False
    return True


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None
