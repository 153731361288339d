"""SIGINT and SIGTERM as a request to stop at the end of the step; a second one stops at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from svend.errors import Interrupted

# `mlflow run` passes Ctrl-C on as SIGTERM, right after the terminal's own SIGINT.
SAME_REQUEST_SECONDS = 1.0


class StopSignals:
    """While entered, turns the first signal into `requested`, where the caller can finish a step.

    Outside `with signals.deferred()` blocks, and at a second signal, Interrupted is raised from
    the handler. In a thread other than the main one, where Python allows no handlers, it does
    nothing.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._requested_seconds = 0.0
        self._deferred = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def deferred(self) -> _Deferred:
        """Return a context in which the first signal waits for `requested` to be read."""
        return _Deferred(self)

    def raise_if_requested(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.requested is not None:
            raise Interrupted(f"interrupted by {self.requested.name}")

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        now = time.monotonic()
        first = self.requested is None
        if not first and now - self._requested_seconds < SAME_REQUEST_SECONDS:
            return
        self.requested, self._requested_seconds = signal.Signals(number), now
        if not first or not self._deferred:
            raise Interrupted(f"interrupted by {signal.Signals(number).name}")


class _Deferred:
    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals

    def __enter__(self) -> None:
        self._signals._deferred = True

    def __exit__(self, *_: object) -> None:
        self._signals._deferred = False
