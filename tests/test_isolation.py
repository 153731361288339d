"""Calls in a process of their own: their limits hold, and no call spoils the next."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from svend.errors import Interrupted, ResourceError
from svend.isolation import (
    CallFailed,
    IsolatedCaller,
    MemoryLimitExceeded,
    TimeLimitExceeded,
    WorkerDied,
)
from tests.conftest import ROOT

LIMIT_SECONDS = 10.0
ENDLESS = ("operator:pow", [9, 9**9])  # in C, so that no thread or handler of Python's runs


def load_slowly() -> None:
    time.sleep(0.5)


@pytest.fixture
def caller() -> Iterator[IsolatedCaller]:
    with IsolatedCaller() as caller:
        yield caller


def _process_id(caller: IsolatedCaller) -> int:
    process_id: int = caller.call("os:getpid", [], LIMIT_SECONDS)
    return process_id


def _wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def _is_gone(process_id: int) -> bool:
    try:
        return psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_call_returns_what_the_function_returns(caller: IsolatedCaller) -> None:
    assert caller.call("math:hypot", [3, 4], LIMIT_SECONDS) == 5
    assert caller.call("builtins:dict", {"name": "Ä\n", "of": [1, None]}, LIMIT_SECONDS) == {
        "name": "Ä\n", "of": [1, None],
    }
    large = "x" * 300_000  # more than a pipe holds
    assert caller.call("builtins:str", [large], LIMIT_SECONDS) == large


def test_one_process_serves_all_calls_and_is_not_this_one(caller: IsolatedCaller) -> None:
    first = _process_id(caller)
    assert first != os.getpid()
    assert _process_id(caller) == first


def test_a_call_over_its_time_limit_is_killed_and_the_next_works(caller: IsolatedCaller) -> None:
    before = _process_id(caller)
    start = time.monotonic()
    with pytest.raises(TimeLimitExceeded, match=r"longer than 0\.3 s"):
        caller.call(*ENDLESS, 0.3)
    assert time.monotonic() - start < 3
    assert _is_gone(before)
    assert caller.call("math:sqrt", [9], LIMIT_SECONDS) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is kept on Linux only")
def test_a_call_over_its_memory_limit_fails_and_the_next_works() -> None:
    with IsolatedCaller(memory_bytes=1 << 28) as caller:
        with pytest.raises(MemoryLimitExceeded):
            caller.call("_operator:mul", ["x", 1 << 29], LIMIT_SECONDS)
        assert caller.call("_operator:mul", ["x", 2], LIMIT_SECONDS) == "xx"


@pytest.mark.parametrize(("function", "arguments", "status"), [
    ("os:_exit", [3], "exit status 3"),
    ("os:abort", [], "SIGABRT"),
    ("sys:exit", [0], "exit status 0"),
    ("signal:raise_signal", [9], "SIGKILL"),
])
def test_a_process_that_dies_is_an_error_of_its_call_alone(
    caller: IsolatedCaller, function: str, arguments: list[int], status: str
) -> None:
    with pytest.raises(WorkerDied, match=status):
        caller.call(function, arguments, LIMIT_SECONDS)
    assert caller.call("math:sqrt", [9], LIMIT_SECONDS) == 3


def test_a_process_killed_between_calls_is_replaced(caller: IsolatedCaller) -> None:
    killed = _process_id(caller)
    os.kill(killed, signal.SIGKILL)
    assert _wait_until(lambda: _is_gone(killed))
    assert caller.call("math:sqrt", [9], LIMIT_SECONDS) == 3


def test_an_exception_keeps_its_name_and_text_and_the_process(caller: IsolatedCaller) -> None:
    before = _process_id(caller)
    with pytest.raises(CallFailed, match="invalid literal") as caught:
        caller.call("builtins:int", ["seven"], LIMIT_SECONDS)
    assert caught.value.kind == "ValueError"
    assert _process_id(caller) == before


@pytest.mark.parametrize("function", ["math:no_such_function", "no_such_module:function"])
def test_a_function_that_is_not_there_is_named(caller: IsolatedCaller, function: str) -> None:
    with pytest.raises(CallFailed, match="no_such"):
        caller.call(function, [], LIMIT_SECONDS)


def test_what_a_function_prints_or_reads_does_not_reach_the_pipes(caller: IsolatedCaller) -> None:
    assert caller.call("builtins:print", ['{"result": 1}'], LIMIT_SECONDS) is None
    with pytest.raises(CallFailed, match="EOF"):
        caller.call("builtins:input", [], LIMIT_SECONDS)
    assert caller.call("math:sqrt", [9], LIMIT_SECONDS) == 3


def test_loading_does_not_count_against_a_calls_limit() -> None:
    with IsolatedCaller(prepare=(f"{__name__}:load_slowly",)) as caller:
        assert caller.call("math:sqrt", [9], 0.4) == 3


def test_threads_share_a_process_which_outlives_the_thread_that_started_it(
    caller: IsolatedCaller,
) -> None:
    with ThreadPoolExecutor(1) as starter:
        started = starter.submit(_process_id, caller).result()
    with ThreadPoolExecutor(8) as pool:
        squares = pool.map(lambda n: caller.call("operator:mul", [n, n], LIMIT_SECONDS), range(200))
        assert list(squares) == [n * n for n in range(200)]
    assert _process_id(caller) == started


def test_an_interrupted_calls_reply_is_not_taken_for_the_next_ones(caller: IsolatedCaller) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    _process_id(caller)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupted):
            caller.call("time:sleep", [0.5], LIMIT_SECONDS)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert caller.call("math:sqrt", [9], LIMIT_SECONDS) == 3


def test_a_fork_gets_a_process_of_its_own(caller: IsolatedCaller) -> None:
    ours = _process_id(caller)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    fork = context.Process(target=lambda: sender.send(_process_id(caller)))
    fork.start()
    assert receiver.poll(LIMIT_SECONDS)
    theirs = receiver.recv()
    fork.join(LIMIT_SECONDS)
    assert theirs != ours
    assert _process_id(caller) == ours


def test_a_fork_that_closes_its_caller_leaves_ours_alone(caller: IsolatedCaller) -> None:
    ours = _process_id(caller)
    fork = multiprocessing.get_context("fork").Process(target=caller.close)
    fork.start()
    fork.join(LIMIT_SECONDS)
    assert fork.exitcode == 0
    assert _process_id(caller) == ours


def test_closing_ends_the_process_and_what_it_started(tmp_path: Path) -> None:
    written = tmp_path / "process_id"
    with IsolatedCaller() as caller:
        process_id = _process_id(caller)
        caller.call("os:system", [f"sleep 300 & echo $! > {written}"], LIMIT_SECONDS)
    grandchild = int(written.read_text())
    assert _wait_until(lambda: _is_gone(process_id) and _is_gone(grandchild))


def test_a_caller_that_is_collected_ends_its_process() -> None:
    caller = IsolatedCaller()
    process_id = _process_id(caller)
    del caller
    assert _wait_until(lambda: _is_gone(process_id))


@pytest.mark.parametrize("call", ["", "caller.call('operator:pow', [9, 9**9], 1)"])
def test_no_process_outlives_a_killed_parent(tmp_path: Path, call: str) -> None:
    script = tmp_path / "parent.py"
    # Nothing guards the script against being imported by its child.
    script.write_text(
        "import time\n"
        "from svend.isolation import IsolatedCaller\n"
        "caller = IsolatedCaller()\n"
        "print(caller.call('os:getpid', [], 10), flush=True)\n"
        f"{call}\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert not _is_gone(child)
    time.sleep(0.2)
    parent.kill()
    assert parent.stdout.read() == ""
    parent.stdout.close()
    parent.wait()
    assert _wait_until(lambda: _is_gone(child))


def test_a_process_that_does_not_start_is_the_machines_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with IsolatedCaller() as caller, pytest.raises(ResourceError, match="did not start"):
        caller.call("math:sqrt", [9], LIMIT_SECONDS)
