"""What many tests begin with, made once for all the processes that they are spread over."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import sqlite3
from pathlib import Path

from mlflow import MlflowClient

_FOLDER = "SVEND_TESTS_PREPARED"


def keep_in(folder: Path) -> None:
    """Name the folder, for this process and those that it starts."""
    os.environ[_FOLDER] = str(folder)


def prepared_folder() -> Path:
    """Return the folder; conftest.py has it named before the first test."""
    folder = Path(os.environ[_FOLDER])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def data_cache() -> Path:
    """Return a cache for `data.cache_dir`, which tests fill for one another."""
    return prepared_folder() / "cache"


def lay_empty_store(database: Path) -> None:
    """Make an empty store of MLflow's, which it takes seconds to make, by copying one.

    A store that is there stays as it is, and where no file can be, none is made.
    """
    if database.parent.is_dir() and not database.exists():
        shutil.copyfile(_empty_store(), database)


@functools.cache
def _empty_store() -> Path:
    made = prepared_folder() / "empty.db"
    with (prepared_folder() / "empty.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_file():
            _make_store(made.with_suffix(".making"))
            made.with_suffix(".making").rename(made)
    return made


def _make_store(database: Path) -> None:
    database.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{database}").search_experiments()
    # The experiment that every store has names a folder for artifacts. MLflow makes it again,
    # with the right one, in a store that has none.
    with sqlite3.connect(database) as connection:
        connection.execute("delete from experiments")
    connection.close()
