"""The process in which the parts of the GPU report run, and what watches over it.

A kernel that fails may leave the device unusable for its process, crash it, or never end. So a part
that fails, or takes longer than there is time, costs its process, and the next part gets a new one.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from svend import cuda
from svend.bench.gpu_report import (
    Figure,
    Outcome,
    Part,
    Size,
    Verdict,
    full_size,
    miniature_size,
    run_part,
)

GRACE_SECONDS = 10.0


def run_parts(
    parts: Callable[[Size], list[Part]], *, rehearsal: bool, seconds: float,
    begin: Callable[[str], None] = lambda _: None,
) -> Iterator[Outcome]:
    """Run every part that there is time for, each when asked for, and yield its outcome.

    parts: a function of a module, for other processes call it too. After so many seconds no part
    runs any more. Whatever is written meanwhile is removed.
    """
    deadline = time.monotonic() + seconds
    size = miniature_size() if rehearsal else full_size()
    with contextlib.ExitStack() as resources:
        folder = resources.enter_context(
            tempfile.TemporaryDirectory(prefix="svend-gpu-report-", ignore_cleanup_errors=True)
        )
        worker = Worker(rehearsal, Path(folder), parts)
        resources.callback(worker.end, GRACE_SECONDS)
        for part in parts(size):
            left = deadline - time.monotonic()
            needed = part.about_seconds * size.pace
            if left < needed:
                yield Outcome(
                    part.name, Verdict.NOT_RUN,
                    f"it takes about {needed:.0f} s, and {max(0.0, left):.0f} s were left of "
                    f"{seconds:.0f}; raise --minutes", 0.0, [],
                )
                continue
            begin(part.name)
            yield worker.run(part.name, left)


class Worker:
    """A process that runs parts by name; started when one is wanted, and anew after one failed."""

    def __init__(
        self, rehearsal: bool, folder: Path, parts: Callable[[Size], list[Part]]
    ) -> None:
        self._arguments = (rehearsal, folder, parts)
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def run(self, part: str, seconds: float) -> Outcome:
        """Run a part for at most so long, and return its outcome."""
        started = time.perf_counter()
        figures: list[Figure] = []
        try:
            connection = self._connected()
            connection.send(part)
            while connection.poll(max(0.0, seconds - (time.perf_counter() - started))):
                told = connection.recv()
                if isinstance(told, Outcome):
                    if told.verdict is Verdict.FAILED:
                        self.end(GRACE_SECONDS)
                    return told
                figures.append(told)
            reason = f"not done after {seconds:.0f} s, when the report's time was over; raise "
            reason += "--minutes"
        except (EOFError, OSError):
            assert self._process is not None
            self._process.join(10)
            reason = f"its process died ({_how(self._process.exitcode)})"
        self.end(0.0)
        return Outcome(part, Verdict.FAILED, reason, time.perf_counter() - started, figures)

    def end(self, grace_seconds: float) -> None:
        """Have the process end, if there is one; kill it if it does not within so long."""
        if self._process is not None and self._connection is not None:
            self._connection.close()  # by which it knows
            self._process.join(grace_seconds)
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _connected(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, *self._arguments))
            self._process.start()
            theirs.close()
        return self._connection


def _serve(
    connection: Connection, rehearsal: bool, folder: Path, parts: Callable[[Size], list[Part]]
) -> None:
    """Run each part that is asked for by name, and tell each figure and the outcome."""
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ[variable] = str(folder / variable.lower())
    tempfile.tempdir = str(folder)
    device = torch.device("cpu" if rehearsal else "cuda")
    size = miniature_size() if rehearsal else full_size()
    by_name = {part.name: part for part in parts(size)}
    with contextlib.suppress(EOFError):  # whoever asks has ended
        while True:
            part = by_name[connection.recv()]
            outcome = run_part(part, device, size, connection.send)
            connection.send(outcome)
            if outcome.verdict is Verdict.FAILED:
                return  # the device may be past use
            _release(device)


def _release(device: torch.device) -> None:
    """Leave as little as can be of a part to the next."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        cuda.reset_peak(device)
        cuda.release_cached_memory()


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"signal {-exit_code}"
    return f"exit code {exit_code}"
