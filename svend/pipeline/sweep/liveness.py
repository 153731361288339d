"""Which processes of a sweep live: known at once on this machine, by heartbeats from others."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

# What a trial carries of the process that runs it.
WORKER, BEAT = "worker", "beat_seconds"
BEATS_IN_SILENCE = 6
# Observations that it takes at least to find a process silent.
LOOKS_IN_SILENCE = 3


@cache
def machine_name() -> str:
    """Name this machine as processes see it: those of another container are not seen."""
    with contextlib.suppress(OSError):  # Linux's own
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        seen = f"{boot}{Path('/proc/self/ns/pid').readlink()}"
        return f"{socket.gethostname()}/{hashlib.sha256(seen.encode()).hexdigest()[:12]}"
    return socket.gethostname()


def process_name() -> str:
    """Name this process so that no later one is taken for it."""
    return f"{machine_name()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def describe_process(name: str) -> str:
    """Say a process's name as a person does."""
    machine, pid, _ = _parts(name)
    return f"{machine.partition('/')[0]}, process {pid}" if name else "another process"


class Watch:
    """Decides from what is on record whether the processes that run trials live.

    A process of another machine is dead when its heartbeat has not changed for `silence_seconds`
    of this process's watching. Clocks are not compared, for those of two machines may differ, and
    time in which nobody looked, such as an outage of the storage, hardly counts.
    """

    def __init__(self, silence_seconds: float) -> None:
        self._silence_seconds = silence_seconds
        # By trial and process: the last heartbeat, for how long it has been so, the last look.
        self._seen: dict[tuple[int, str], tuple[float, float, float]] = {}

    def lives(self, trial: FrozenTrial) -> bool | None:
        """Return whether the trial's process lives; None while that cannot be told yet."""
        name = str(trial.user_attrs.get(WORKER, ""))
        machine, pid, created = _parts(name)
        if machine == machine_name():
            try:
                return f"{psutil.Process(pid).create_time():.2f}" == created
            except psutil.NoSuchProcess:
                return False
        beat = float(trial.user_attrs.get(BEAT, 0.0))
        now, key = time.monotonic(), (trial.number, name)
        if key not in self._seen:
            self._seen[key] = (beat, 0.0, now)
            return None
        before, silent_seconds, looked = self._seen[key]
        if beat != before:
            self._seen[key] = (beat, 0.0, now)
            return True
        silent_seconds += min(now - looked, self._silence_seconds / LOOKS_IN_SILENCE)
        self._seen[key] = (beat, silent_seconds, now)
        return False if silent_seconds >= self._silence_seconds else None


class Heartbeat:
    """While entered, says now and then that this process lives.

    `lost` is set when that is said in vain: this process was taken for dead, and its trial given
    to another.
    """

    def __init__(self, beat: Callable[[], None], silence_seconds: float) -> None:
        self.lost = threading.Event()
        self._beat = beat
        self._pause_seconds = silence_seconds / BEATS_IN_SILENCE
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self._pause_seconds):
            try:
                self._beat()
            except UpdateFinishedTrialError:
                self.lost.set()
                return
            except (StorageInternalError, SQLAlchemyError, OSError):
                continue  # the storage is away: whoever works with it says so


def _parts(name: str) -> tuple[str, int, str]:
    machine, _, rest = name.partition(":")
    pid, _, created = rest.partition(":")
    return machine, int(pid or 0), created
