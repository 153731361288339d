"""Signals: the step is finished first, a second one and the end of the grace time do not wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

import pytest

from svend.errors import Interrupted
from svend.pipeline import interruption
from svend.pipeline.checkpoints import CheckpointManager, verify
from svend.pipeline.interruption import StopSignals
from tests.conftest import Workplace
from tests.test_run import losses, only_run


def _send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs the handler between two of its own instructions


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_waits_to_be_read_where_a_step_can_be_finished(
    number: signal.Signals,
) -> None:
    with StopSignals() as signals, signals.deferred():
        _send(number)
        assert signals.requested is number and not signals.at_once
        with pytest.raises(Interrupted, match=number.name):
            signals.raise_if_requested()


def test_elsewhere_it_is_raised_and_the_former_handlers_come_back() -> None:
    former = signal.getsignal(signal.SIGTERM)
    with StopSignals(), pytest.raises(Interrupted, match="SIGTERM"):
        _send()
    assert signal.getsignal(signal.SIGTERM) is former


def test_a_second_signal_is_raised_even_so_but_not_one_that_came_with_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interruption, "SAME_REQUEST_SECONDS", 0.3)
    with StopSignals() as signals, signals.deferred():
        _send(signal.SIGINT)
        _send()  # mlflow run passes Ctrl-C on as SIGTERM
        assert not signals.at_once
        time.sleep(0.4)
        with pytest.raises(Interrupted, match="a second time"):
            _send()
        assert signals.at_once
        _send()  # the end is on its way: nothing more is raised


def test_while_the_run_is_ended_nothing_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "SAME_REQUEST_SECONDS", 0.0)
    with StopSignals(5.0) as signals:
        signals.closing()
        _send()
        assert 4 < signals.remaining_seconds <= 5
        _send()
        assert signals.at_once


def test_near_the_end_of_the_grace_time_the_step_is_left_unfinished() -> None:
    with StopSignals(1.0) as signals, signals.deferred():
        started = time.monotonic()
        _send()
        with pytest.raises(Interrupted, match="grace time"):
            time.sleep(30)
        assert 0.5 < time.monotonic() - started < 5
        assert signals.at_once


DEAF = """
import hashlib, sys
from svend.pipeline.interruption import StopSignals
with StopSignals(1.0, exits=True) as signals, signals.deferred():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in which no handler runs
"""


def test_a_process_that_heeds_no_signal_ends_with_the_grace_time() -> None:
    with subprocess.Popen([sys.executable, "-c", DEAF], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(1.0)  # by now it is in that call
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == 130
        assert time.monotonic() - started < 10
        assert errors.startswith("error: ended after the grace time of 1 s; resume=true")


def test_a_signal_to_a_forked_child_is_not_taken_for_ones_own() -> None:
    with StopSignals(1.0) as signals, signals.deferred():
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
            time.sleep(30)
            os._exit(1)
        time.sleep(0.3)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        time.sleep(1.5)
        assert signals.requested is None and not signals.at_once


# A disk so slow that a save takes minutes.
SLOW_DISK = """
import sys, time
from svend.pipeline.checkpoints import manager as checkpoint_manager
write_state, slow_from = checkpoint_manager.write_state, int(sys.argv.pop(1))
def write_slowly(path, state):
    if int(path.parent.name.split("-")[1].removeprefix("step_")) >= slow_from:
        print("saving slowly", flush=True)
        time.sleep(600)
    return write_state(path, state)
checkpoint_manager.write_state = write_slowly
from svend.cli import main
sys.exit(main())
"""


def _by_a_second_signal(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)


def _by_the_grace_time(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(("interrupt", "grace_seconds"),
                         [(_by_a_second_signal, "300"), (_by_the_grace_time, "10")])
def test_an_end_in_the_middle_of_a_save_leaves_the_checkpoint_before_and_is_resumed(
    workplace: Workplace, interrupt: Callable[[subprocess.Popen[str]], None], grace_seconds: str
) -> None:
    command = workplace.train_command(grace_seconds=grace_seconds)
    slow = [command[0], "-c", textwrap.dedent(SLOW_DISK), "40", *command[3:]]
    process = workplace.start(slow)
    assert process.stdout is not None
    assert any("saving slowly" in line for line in process.stdout)
    started = time.monotonic()
    interrupt(process)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "resume=true" in output
    assert time.monotonic() - started < 15
    folder = workplace.checkpoints / "svend"
    (left,) = CheckpointManager(folder).list_checkpoints()
    verify(left)
    assert left.step == 20
    run = only_run(workplace, "svend")
    assert run.info.status == "KILLED" and "interrupted by SIGTERM" in run.data.tags["svend.reason"]
    done = workplace.run(workplace.train_command("--resume", grace_seconds=grace_seconds))
    assert done.returncode == 0, done.stdout
    run = only_run(workplace, "svend")
    assert run.info.status == "FINISHED"
    assert [step for step, _ in losses(workplace, run)] == list(range(1, 41))
