"""One parent of a sweep at a time: the second is refused, the dead one is succeeded."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from svend.errors import UserError
from svend.pipeline.sweep.claim import PARENTS_SUFFIX, ParentClaim, TakenOver
from svend.pipeline.sweep.liveness import WORKER
from svend.pipeline.sweep.storage import Place
from tests.conftest import ROOT

SILENCE_SECONDS = 0.6
HOLDER = """
import sys, time
from pathlib import Path
from svend.pipeline.sweep.claim import ParentClaim
from svend.pipeline.sweep.storage import Place
with ParentClaim(Place("s", sys.argv[1], Path(".")), 60.0, print):
    print("holds", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place("s", str(tmp_path / "s.journal"), tmp_path)


def claim_of(place: Place, told: list[str] | None = None) -> ParentClaim:
    return ParentClaim(place, SILENCE_SECONDS, [].append if told is None else told.append)


def tickets(place: Place) -> list[TrialState]:
    study = optuna.load_study(study_name=place.study + PARENTS_SUFFIX, storage=place.open())
    return [trial.state for trial in study.get_trials()]


def move_elsewhere(claim: ParentClaim) -> None:
    """Have the claim's ticket name a process of another machine."""
    claim._ticket.set_user_attr(WORKER, "elsewhere/0:77:0.00")


def test_a_second_parent_is_refused_in_one_line_that_names_the_first(place: Place) -> None:
    with claim_of(place):
        me = re.escape(f"{socket.gethostname()}, process {os.getpid()}")
        with pytest.raises(UserError, match=rf"is being run by {me} \(since 20.*--join") as caught:
            claim_of(place).__enter__()
        assert "\n" not in str(caught.value)
    with claim_of(place):
        assert tickets(place) == [TrialState.FAIL, TrialState.FAIL, TrialState.RUNNING]


def test_a_parent_that_was_killed_is_succeeded_at_once_on_its_machine(place: Place) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, place.storage], text=True, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holds\n"
    with pytest.raises(UserError, match=f"process {holder.pid} "):
        claim_of(place).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with claim_of(place) as claim:
        claim.confirm()


def test_one_of_many_at_once_becomes_the_parent(place: Place) -> None:
    many = 6
    gate, entered, refused = threading.Barrier(many), [], []

    def begin() -> None:
        claim = claim_of(place)
        gate.wait()
        try:
            entered.append(claim.__enter__())
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(many)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) == 1, refused
    assert all("is being run by" in line for line in refused)
    entered[0].confirm()
    entered[0].__exit__(None, None, None)


def test_a_parent_elsewhere_is_left_alone_while_it_is_heard_and_succeeded_when_silent(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    with claim_of(place) as first:
        move_elsewhere(first)
        with pytest.raises(UserError, match="is being run by elsewhere, process 77"):
            claim_of(place).__enter__()
        # Clocks that differ make it listen, and it hears.
        monkeypatch.setattr(ParentClaim, "_heard_lately", lambda *_: False)
        with pytest.raises(UserError, match="is being run by"):
            claim_of(place, told).__enter__()
        first._heartbeat.__exit__()  # it is frozen
        with claim_of(place, told) as second:
            second.confirm()
            with pytest.raises(TakenOver, match=rf"taken over by .*process {os.getpid()}, for"):
                first.confirm()  # and awakes
            second.confirm()
    assert len(told) == 2
    assert "was being run by elsewhere, process 77" in told[1]
    assert set(tickets(place)) == {TrialState.FAIL}
