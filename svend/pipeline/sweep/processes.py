"""The worker processes of one machine, each with a log of its own, replaced when they die."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from svend import cuda
from svend.errors import UserError

# Deaths of workers after which something other than bad luck is at work.
MAX_DEATHS = 10
GRACE_SECONDS = 60.0


class WorkerProcesses:
    """The worker processes of this machine, each with a log of its own."""

    def __init__(self, command: Sequence[str], count: int, folder: Path) -> None:
        self._command = command
        self._count = count
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._logs: list[IO[bytes]] = []
        self._deaths = 0

    def __enter__(self) -> WorkerProcesses:
        for number in range(self._count):
            self._start(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the workers, which see that the sweep is over; interrupt them if it failed."""
        if kind is not None:
            for process in self._processes.values():
                process.terminate()
        for process in self._processes.values():
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for log in self._logs:
            log.close()

    def replace_dead(self) -> bool:
        """Start a worker for each that has died; return whether one had.

        Raises UserError with a worker's last line if it gave up, or if too many died.
        """
        dead = [n for n, process in self._processes.items() if process.poll() is not None]
        for number in dead:
            code = self._processes[number].returncode
            self._deaths += 1
            if code > 0 or self._deaths > MAX_DEATHS:
                raise UserError(f"worker {number}: {self._last_line(number)}")
            self._start(number)
        return bool(dead)

    def _start(self, number: int) -> None:
        threads = max(1, (os.cpu_count() or 1) // self._count)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if (count := cuda.device_count()) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(number % count)
        log = self._log(number).open("ab")
        self._logs.append(log)
        self._processes[number] = subprocess.Popen(
            [*self._command, "--number", str(number), "--parent-pid", str(os.getpid())],
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
        )

    def _log(self, number: int) -> Path:
        return self._folder / f"worker-{number}.log"

    def _last_line(self, number: int) -> str:
        lines = self._log(number).read_text(encoding="utf-8", errors="replace").split("\n")
        told = [line for line in lines if line.strip()]
        return (told[-1].removeprefix("error: ") if told else "died") + f" ({self._log(number)})"
