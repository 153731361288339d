"""A throw-away PostgreSQL for the tests of what several machines share."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import pytest

from tests.servers import free_port

USER = "svend"
START_SECONDS = 60
STOP_SECONDS = 30
# Where Debian and Red Hat put what they keep off the PATH.
INSTALLATIONS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin")


def find_binaries() -> Path | None:
    """Return the folder of the newest PostgreSQL on this machine, None where there is none."""
    on_path = shutil.which("initdb")
    if on_path is not None and shutil.which("postgres") is not None:
        return Path(on_path).resolve().parent
    found = [folder for pattern in INSTALLATIONS for folder in Path("/").glob(pattern[1:])]
    found = [folder for folder in found if (folder / "postgres").exists()]
    return max(found, key=lambda folder: _version(folder.parent.name), default=None)


def _version(name: str) -> float:
    return float(name.removeprefix("pgsql-"))


requires_postgres = pytest.mark.skipif(
    find_binaries() is None, reason="no PostgreSQL on this machine (initdb and postgres)"
)


class PostgresServer:
    """A PostgreSQL with a data folder of its own, on a free port of this machine.

    It listens for whoever can reach 127.0.0.1, and for a network if one is named, asks no password,
    and is gone, data and all, when its `with` ends. PostgreSQL refuses root: for root it runs as
    `postgres`, or as `nobody`.
    """

    def __init__(self, network: str | None = None) -> None:
        self._network = network
        binaries = find_binaries()
        if binaries is None:
            pytest.skip("no PostgreSQL on this machine (initdb and postgres)")
        self._binaries = binaries
        # Not pytest's tmp_path: its parents are closed to other users, and PostgreSQL may be one.
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._account = _other_account() if os.geteuid() == 0 else None
        if self._account is not None:
            os.chown(self._folder, self._account.pw_uid, self._account.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    def __enter__(self) -> Self:
        try:
            self._call(
                "initdb", "--pgdata", str(self._data), "--username", USER, "--auth", "trust",
                "--encoding", "UTF8", "--locale", "C", "--no-sync", "--no-instructions",
            )
            if self._network is not None:
                with (self._data / "pg_hba.conf").open("a") as admitted:
                    admitted.write(f"host all all {self._network} trust\n")
            self.start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def url(self, database: str, driver: str = "postgresql+psycopg") -> str:
        """Return SQLAlchemy's address of a database, which is made where it is missing."""
        asked = f"SELECT 1 FROM pg_database WHERE datname = '{database}'"
        if not self.query(asked):
            self.query(f'CREATE DATABASE "{database}"')
        return f"{driver}://{USER}@127.0.0.1:{self.port}/{database}"

    def query(self, statement: str, database: str = "postgres") -> list[str]:
        """Return the rows of a statement, columns parted by `|`."""
        answer = self._call(
            "psql", "--host", "127.0.0.1", "--port", str(self.port), "--username", USER,
            "--no-psqlrc", "--quiet", "--tuples-only", "--no-align",
            "--set", "ON_ERROR_STOP=1", "--dbname", database, "--command", statement,
        )
        return answer.splitlines()

    def start(self) -> None:
        """Start the server, and return when it takes connections."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._binaries / "postgres", "-D", self._data, "-k", self._folder,
                    "-p", str(self.port), "-c",
                    f"listen_addresses={'127.0.0.1' if self._network is None else '*'}",
                    # Nothing here need outlive the machine.
                    "-c", "fsync=off", "-c", "full_page_writes=off",
                ],
                stdout=log, stderr=log, start_new_session=True, **self._identity(),
            )
        deadline_seconds = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_seconds:
                log_text = (self._folder / "log").read_text(errors="replace")
                raise RuntimeError(f"PostgreSQL does not start:\n{log_text}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End the server and every connection; `start` goes on with the same data."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGINT)  # PostgreSQL's "fast" shutdown
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _answers(self) -> bool:
        ready = subprocess.run(
            [self._binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-q"],
            check=False, **self._identity(),
        )
        return ready.returncode == 0

    def _remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _call(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [self._binaries / program, *arguments], check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **self._identity(),
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed:\n{done.stdout}")
        return done.stdout

    def _identity(self) -> Mapping[str, Any]:
        """Return who runs PostgreSQL's programs, and where: they refuse a folder closed to them."""
        if self._account is None:
            return {"cwd": self._folder}
        return {
            "cwd": self._folder, "user": self._account.pw_uid, "group": self._account.pw_gid,
            "extra_groups": [],
        }


def _other_account() -> pwd.struct_passwd:
    known = {account.pw_name: account for account in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in known:
            return known[name]
    raise RuntimeError("PostgreSQL refuses root, and there is no user postgres or nobody here")
