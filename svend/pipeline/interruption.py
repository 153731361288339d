"""SIGINT and SIGTERM as a request to stop at the end of the step; a second one stops at once.

So does the end of the grace time: schedulers send SIGTERM, and SIGKILL after a while.
"""

from __future__ import annotations

import math
import os
import select
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


LONGEST_WAIT_SECONDS = 3600.0  # at a time: `select` knows no infinity
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
        self._former: dict[signal.Signals, Any] = {}
        self._wakeup, self._former_wakeup = (-1, -1), -1

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            # Python's handlers run in the main thread, once it is back from whatever call it is in.
            # The byte that a signal writes here is there at once.
            self._wakeup = os.pipe()
            os.set_blocking(self._wakeup[1], False)
            self._former_wakeup = signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
            _entered.append(self)
            threading.Thread(target=self._watch, name="grace time", daemon=True).start()
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._former:
            _entered.remove(self)
            signal.set_wakeup_fd(self._former_wakeup)
            os.close(self._wakeup[1])  # ends the thread

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
        reading = self._wakeup[0]
        try:
            number = None
            while number not in (signal.SIGINT, signal.SIGTERM):
                if not (told := os.read(reading, 1)):
                    return
                number = told[0]
            closing_seconds = min(LONGEST_CLOSING_SECONDS, CLOSING_FRACTION * self._grace_seconds)
            if _ends_within(reading, self._grace_seconds - closing_seconds):
                return
            self._out_of_time = True
            signal.pthread_kill(threading.main_thread().ident or 0, number)
            if _ends_within(reading, closing_seconds) or not self._exits:
                return
        finally:
            os.close(reading)
        # The main thread is deep in a call that heeds no signal. What is saved is whole.
        print(f"error: ended after the grace time of {self._grace_seconds:g} s; resume=true goes "
              "on from what is saved", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)


_entered: list[StopSignals] = []


def _leave_the_pipe() -> None:
    """In a forked child, whose signals are not for its parent's pipe."""
    if _entered:
        signal.set_wakeup_fd(-1)
        _entered.clear()


os.register_at_fork(after_in_child=_leave_the_pipe)


def _ends_within(pipe: int, seconds: float) -> bool:
    """Wait so long for the other end of a pipe to be closed; return whether it was."""
    deadline = time.monotonic() + seconds
    while (left_seconds := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([pipe], [], [], min(left_seconds, LONGEST_WAIT_SECONDS))
        if ready and not os.read(pipe, 1):
            return True
    return False


class _Deferred:
    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals

    def __enter__(self) -> None:
        self._signals._deferred = True

    def __exit__(self, *_: object) -> None:
        self._signals._deferred = False
