"""Where a study is kept: a journal file, or a database whose restart is waited for."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.exceptions import OptunaError, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import (
    ArgumentError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from svend.errors import ConfigError, UserError, one_line

# A database that restarts is waited for.
OUTAGE_SECONDS = 120.0
RETRY_SECONDS = 1.0
AWAY = (OperationalError, InterfaceError, PendingRollbackError)
DRIVERS = {"postgresql": "postgresql+psycopg"}

# A lost connection is waited for, and told in one line if it does not come back.
logging.getLogger("optuna.storages._rdb.storage").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Place:
    """Where a study is kept: its name, its storage, and the folder of its trials and logs."""

    study: str
    storage: str
    folder: Path

    @property
    def shown(self) -> str:
        """The storage as it may be printed: without a password."""
        try:
            return sqlalchemy.make_url(self.storage).render_as_string()
        except ArgumentError:
            return self.storage  # a file

    def open(self) -> BaseStorage:
        """Return the storage. Raises UserError, in one line, if it cannot be used."""
        if self.storage.startswith("sqlite"):
            raise ConfigError(
                f"storage = {self.shown}: workers of SQLite run the same trial twice; leave it "
                "out for a journal file, or give postgresql://... or mysql://..."
            )
        try:
            if "://" in self.storage:
                return _open_database(self.storage)
            Path(self.storage).parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(self.storage))
        except ImportError as error:
            install = "pip install 'svend[postgres]'" if "psycopg" in str(error.__cause__) else (
                f"install it ({error.__cause__ or error})"
            )
            raise UserError(f"storage {self.shown}: its driver is missing; {install}") from None
        except (OSError, SQLAlchemyError, OptunaError) as error:
            raise UserError(f"storage {self.shown}: {one_line(error)[:300]}") from None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, a storage that goes away is told in one line."""
        try:
            yield
        except (StorageInternalError, SQLAlchemyError) as error:
            raise UserError(
                f"storage {self.shown}: {one_line(error.__cause__ or error)[:300]}; what was done "
                "is kept, and the same command goes on once the storage is back"
            ) from None


def _open_database(address: str) -> RDBStorage:
    """Return a database as the storage, whose restart is waited for."""
    url = sqlalchemy.make_url(address)
    url = url.set(drivername=DRIVERS.get(url.drivername, url.drivername))
    storage = RDBStorage(url.render_as_string(hide_password=False), {"pool_pre_ping": True})
    for name in (*BaseStorage.__abstractmethods__, "_get_trials", "_create_new_trial"):
        setattr(storage, name, _patient(getattr(storage, name)))
    return storage


def _patient(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call of the storage that is made again while the database is away.

    Whether a call that was cut off has had its effect is not known. All may be made twice: those
    that set something set the same, who closes a trial twice is told that it is closed, and a trial
    that was taken unknown to its worker is silent, and so recovered.
    """

    @functools.wraps(call)
    def call_again(*arguments: Any, **options: Any) -> Any:
        deadline_seconds = time.monotonic() + OUTAGE_SECONDS
        while True:
            try:
                return call(*arguments, **options)
            except (StorageInternalError, SQLAlchemyError) as error:
                away = isinstance(error.__cause__ or error, AWAY)
                if not away or time.monotonic() > deadline_seconds:
                    raise
                time.sleep(RETRY_SECONDS)

    return call_again
