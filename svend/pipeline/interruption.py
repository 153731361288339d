"""SIGINT and SIGTERM as a request to stop at the end of the step; a second one stops at once.

So does the end of the grace time: schedulers send SIGTERM, and SIGKILL after a while.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from svend.errors import Interrupted

EXIT_INTERRUPTED = 130
# `mlflow run` passes Ctrl-C on as SIGTERM, right after the terminal's own SIGINT.
SAME_REQUEST_SECONDS = 1.0


# Of the grace time, what is kept for telling the tracking store how the run ended.
CLOSING_FRACTION, LONGEST_CLOSING_SECONDS = 0.2, 5.0


class StopSignals:
    """While entered, turns the first signal into `requested`, where the caller can finish a step.

    Outside `with signals.deferred()` blocks, at a second signal, and near the end of the grace
    time, Interrupted is raised from the handler, and `at_once` says whether the caller is to leave
    everything as it is. In a thread other than the main one, where Python allows no handlers, it
    does nothing.

    grace_seconds: from the first signal to the end of the process. exits: whether to end the
    process at the end of the grace time, whatever it is doing then.
    """

    def __init__(self, grace_seconds: float = math.inf, *, exits: bool = False) -> None:
        self.requested: signal.Signals | None = None
        self.at_once = False
        self._grace_seconds = grace_seconds
        self._exits = exits
        self._requested_seconds = 0.0
        self._deferred = False
        self._closing = self._out_of_time = False
        self._ended = threading.Event()
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
        self._ended.set()
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @property
    def remaining_seconds(self) -> float:
        """What is left of the grace time; without limit where no signal has come."""
        if self.requested is None:
            return math.inf
        return max(0.0, self._requested_seconds + self._grace_seconds - time.monotonic())

    def closing(self) -> None:
        """From here on raise nothing: the run is being brought to its end."""
        self._closing = True

    def deferred(self) -> _Deferred:
        """Return a context in which the first signal waits for `requested` to be read."""
        return _Deferred(self)

    def raise_if_requested(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.requested is not None:
            raise Interrupted(f"interrupted by {self.requested.name}")

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        now, name = time.monotonic(), signal.Signals(number).name
        if self.requested is None:
            self.requested, self._requested_seconds = signal.Signals(number), now
            if self._grace_seconds < math.inf:
                threading.Thread(target=self._watch, name="grace time", daemon=True).start()
            if not self._deferred and not self._closing:
                raise Interrupted(f"interrupted by {name}")
        elif self._out_of_time:
            self._stop_at_once(f"interrupted by {name}, the grace time is over")
        elif now - self._requested_seconds >= SAME_REQUEST_SECONDS:
            self._stop_at_once(f"interrupted by {name}, a second time")

    def _stop_at_once(self, reason: str) -> None:
        first, self.at_once = not self.at_once, True
        if first and not self._closing:
            raise Interrupted(f"{reason}: ended at once; resume=true goes on from what is saved")

    def _watch(self) -> None:
        """Near the end of the grace time interrupt the main thread; at its end, the process."""
        closing_seconds = min(LONGEST_CLOSING_SECONDS, CLOSING_FRACTION * self._grace_seconds)
        if self._ended.wait(self._grace_seconds - closing_seconds):
            return
        assert self.requested is not None
        self._out_of_time = True
        signal.pthread_kill(threading.main_thread().ident or 0, self.requested)
        if self._ended.wait(closing_seconds) or not self._exits:
            return
        # The main thread is deep in a call that heeds no signal. What is saved is whole.
        print(f"error: ended after the grace time of {self._grace_seconds:g} s; resume=true goes "
              "on from what is saved", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)


class _Deferred:
    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals

    def __enter__(self) -> None:
        self._signals._deferred = True

    def __exit__(self, *_: object) -> None:
        self._signals._deferred = False
