"""Calls with a limit on their time and memory, in a process of their own.

For functions that are trusted but whose arguments are not: a model's text may make a library
compute without end. The process is no sandbox for code that a model wrote.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Self

from svend.errors import ResourceError

DEFAULT_MEMORY_BYTES = 1 << 29
# For starting the process and importing what it needs, on a slow disk too; no call counts this.
START_SECONDS = 120.0
# How long after its limit a process that lost its parent in the middle of a call ends itself.
ORPHAN_GRACE_SECONDS = 1.0
# As multiprocessing's spawn does, but without importing the caller's main module.
BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from svend.isolation import serve; serve(int(sys.argv[2]))"
)
MESSAGE_CHARACTERS = 1000
# A pool's threads would reserve address space, which counts against the limit on memory.
SINGLE_THREADED = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}

# {"result": ...}, or {"error": the exception's class, "message": its text}.
_Reply = dict[str, Any]


class IsolatedCallError(RuntimeError):
    """A call in a process of its own that did not return."""


class TimeLimitExceeded(IsolatedCallError):
    """The call took longer than its limit; its process was killed."""


class MemoryLimitExceeded(IsolatedCallError):
    """The call wanted more memory than its process may have."""


class WorkerDied(IsolatedCallError):
    """The call's process ended before the call did."""


class CallFailed(IsolatedCallError):
    """The function raised an exception: `kind` is its class's name, `message` its text."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind = kind
        self.message = message


class IsolatedCaller:
    """Calls functions in one process, which is reused, and replaced when a call destroyed it.

    memory_bytes: what calls may take beyond what the process holds once its functions are loaded
    (RLIMIT_AS; kept on Linux only). prepare: functions, as "module:name", that are called without
    arguments when a process starts, to load what later calls need at no cost to their limits.
    A function must leave the timer of SIGALRM alone, which ends the process of a lost parent.
    May be used from any thread, one call at a time. Ends its process when it is closed, collected,
    or its own process ends, however that comes about.
    """

    def __init__(
        self, memory_bytes: int = DEFAULT_MEMORY_BYTES, prepare: Sequence[str] = ()
    ) -> None:
        self.memory_bytes = memory_bytes
        self.prepare = tuple(prepare)
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._finalizer: Callable[[], object] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(
        self,
        function: str,
        arguments: Sequence[Any] | Mapping[str, Any],
        timeout_seconds: float,
    ) -> Any:
        """Return what the function "module:name" returns for positional or keyword arguments.

        Arguments and result are what JSON can hold. Importing the module counts for nothing.
        Raises TimeLimitExceeded, MemoryLimitExceeded, WorkerDied or CallFailed, after each of
        which the next call works; ResourceError where no process can be started.
        """
        with self._lock:
            try:
                worker = self._ready_worker(function)
                reply = worker.request(function, arguments, timeout_seconds)
            except BaseException:
                # Also for an interrupt: the reply still to come would be taken for the next one's.
                self._stop()
                raise
            return _result(reply)

    def close(self) -> None:
        """End the process; a later call starts another."""
        with self._lock:
            self._stop()

    def _ready_worker(self, function: str) -> _Worker:
        if self._worker is not None and self._worker.owner_pid != os.getpid():
            self._worker = None  # a fork must not speak on its parent's pipes
        if self._worker is not None and not self._worker.is_waiting():
            self._stop()  # something else killed it since the last call
        if self._worker is None:
            self._worker = _Worker(self.memory_bytes)
            self._finalizer = weakref.finalize(self, self._worker.stop)
            self._worker.wait_until_started()
            for name in self.prepare:
                self._worker.load(name, run=True)
        if function not in self._worker.loaded:
            self._worker.load(function, run=False)
        return self._worker

    def _stop(self) -> None:
        if self._worker is not None and self._finalizer is not None:
            self._finalizer()
        self._worker = None


class _Worker:
    """The parent's side of one process: a line of JSON for each request and each reply."""

    def __init__(self, memory_bytes: int) -> None:
        self.owner_pid = os.getpid()
        self.loaded: set[str] = set()
        self._received = bytearray()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", BOOTSTRAP, json.dumps(sys.path),
             str(memory_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            env={**os.environ, **SINGLE_THREADED}, start_new_session=True,
        )
        assert self._process.stdout is not None
        self._poller = select.poll()
        self._poller.register(self._process.stdout, select.POLLIN)

    def wait_until_started(self) -> None:
        try:
            self._reply(START_SECONDS)
        except IsolatedCallError as error:
            raise ResourceError(
                f"the process for calls with a time limit did not start ({error}); see its own "
                "message above, and whether memory and processes are left"
            ) from None

    def is_waiting(self) -> bool:
        """Whether the process is there, with nothing left to say."""
        return not self._poller.poll(0)

    def load(self, function: str, run: bool) -> None:
        """Import a function's module, and call the function without arguments if so told."""
        self._send({"load": function, "run": run, "seconds": START_SECONDS})
        _result(self._reply(START_SECONDS))
        self.loaded.add(function)

    def request(
        self, function: str, arguments: Sequence[Any] | Mapping[str, Any], seconds: float
    ) -> _Reply:
        """Return the reply to a call, after which the process is ready for the next."""
        self._send({"call": function, "arguments": arguments, "seconds": seconds})
        reply = self._reply(seconds)
        if reply.get("error") == MemoryError.__name__:
            raise MemoryLimitExceeded("the call wanted more memory than it may have")
        return reply

    def stop(self) -> None:
        """Kill the process and all that it started."""
        if self.owner_pid != os.getpid():
            return
        self._kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            _write(self._process.stdin.fileno(), json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            raise WorkerDied("the process ended between two calls") from None

    def _reply(self, seconds: float) -> _Reply:
        reply: _Reply = json.loads(self._read_line(time.monotonic() + seconds, seconds))
        return reply

    def _read_line(self, deadline: float, seconds: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not self._poller.poll(left * 1000):
                raise TimeLimitExceeded(f"the call took longer than {seconds:g} s")
            if not (read := os.read(descriptor, 1 << 16)):
                status = self._kill()
                how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
                raise WorkerDied(f"the process ended in the middle of the call ({how})")
            self._received += read
        line, _, self._received = self._received.partition(b"\n")
        return bytes(line)

    def _kill(self) -> int:
        """Kill the process group; return how the process ended, which may have been before."""
        if self._process.returncode is None:
            # Its id is still its own, for nobody has waited for it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


def _result(reply: _Reply) -> Any:
    if "error" in reply:
        raise CallFailed(reply["error"], reply["message"])
    return reply["result"]


def serve(memory_bytes: int) -> None:
    """Answer requests from standard input until it ends. Runs in the process of the calls."""
    requests, replies = _take_pipes()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    functions: dict[str, Callable[..., Any]] = {}
    with contextlib.suppress(BrokenPipeError):  # nobody is left to read
        _write(replies, b'{"result": null}\n')
        while line := requests.readline():
            request = json.loads(line)
            # The kernel ends an orphan in an endless loop, which would not see that the pipe ended.
            signal.setitimer(signal.ITIMER_REAL, request["seconds"] + ORPHAN_GRACE_SECONDS)
            reply = _answer(request, functions, memory_bytes)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _write(replies, reply.encode() + b"\n")


def _answer(
    request: dict[str, Any], functions: dict[str, Callable[..., Any]], memory_bytes: int
) -> str:
    try:
        if "load" in request:
            _limit_memory(None)
            function = functions[request["load"]] = _find(request["load"])
            result = function() if request["run"] else None
            _limit_memory(memory_bytes)
        else:
            function, arguments = functions[request["call"]], request["arguments"]
            named = isinstance(arguments, dict)
            result = function(**arguments) if named else function(*arguments)
        return json.dumps({"result": result})
    except MemoryError:
        return json.dumps({"error": MemoryError.__name__, "message": ""})
    except Exception as error:  # noqa: BLE001 - whatever it is, it becomes the caller's error
        message = str(error)[:MESSAGE_CHARACTERS]
        return json.dumps({"error": type(error).__name__, "message": message})


def _take_pipes() -> tuple[IO[bytes], int]:
    """Return where requests and replies go, out of reach of a function that reads or prints."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    return requests, replies


def _write(descriptor: int, message: bytes) -> None:
    remaining = memoryview(message)
    while remaining:
        remaining = remaining[os.write(descriptor, remaining):]


def _find(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _limit_memory(memory_bytes: int | None) -> None:
    """Allow so much beyond what the process has now; None for no limit."""
    if sys.platform != "linux":
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if memory_bytes is None:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        return
    with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123 - no file of ours
        pages = int(statm.read().split()[0])
    limit = pages * resource.getpagesize() + memory_bytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
