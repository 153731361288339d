"""The study: trials are claimed once, counted exactly, and never lost with their worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from optuna.trial import TrialState

from svend.errors import ConfigError, UserError
from svend.pipeline.sweep.options import load_sweep
from svend.pipeline.sweep.study import (
    ORIGIN,
    RUN,
    Place,
    SweepStudy,
    origin_of,
    suggest,
)
from tests.conftest import ROOT

SWEEP = load_sweep("minute", {"scale": "tiny"}, [])

# A worker that trains nothing: it takes trials until there are no more, and is slow where told.
WORKER = """
import sys, time
from pathlib import Path
from svend.pipeline.sweep.options import load_sweep
from svend.pipeline.sweep.storage import Place
from svend.pipeline.sweep.study import SweepStudy, origin_of, suggest
number, wanted, seconds = map(float, sys.argv[2:])
sweep = load_sweep("minute", {"scale": "tiny"}, [])
study = SweepStudy.join(Place("s", sys.argv[1], Path(".")), sweep, int(number))
while len([t for t in study.trials if t.state.is_finished()]) < wanted:
    trial = study.claim(int(wanted))
    if trial is None:
        time.sleep(0.05)
        continue
    values = suggest(trial, sweep.space)
    print("took", origin_of(trial), flush=True)
    time.sleep(seconds)
    study.study.tell(trial, float(values["training.learning_rate"]))
    print("told", origin_of(trial), flush=True)
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place("s", str(tmp_path / "s.journal"), tmp_path)


def start(place: Place, number: int, wanted: int, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, place.storage, str(number), str(wanted), str(seconds)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )


def test_racing_workers_run_each_trial_once_and_no_more_than_wanted(place: Place) -> None:
    study = SweepStudy.create(place, SWEEP)
    outputs = [w.communicate(timeout=120)[0] for w in [start(place, n, 12, 0.02) for n in range(3)]]
    told = Counter(line for out in outputs for line in out.splitlines() if line.startswith("told"))
    assert set(told.values()) == {1}, outputs
    assert len(told) == 12
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 12
    rates = [t.params["training.learning_rate"] for t in study.trials]
    assert len(set(rates)) == 12  # workers draw other samples


def test_a_trial_of_a_killed_worker_is_put_in_line_once_and_ends(place: Place) -> None:
    study = SweepStudy.create(place, SWEEP)
    with start(place, 0, 3, 60.0) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "took 0\n"
        assert study.recover() == []  # its worker lives
        (running,) = study.trials
        worker.send_signal(signal.SIGKILL)
    assert study.recover() == ["trial-0"]
    assert study.recover() == []  # in line already
    assert [t.state for t in study.trials] == [TrialState.WAITING]
    again = study.claim(3)
    assert again is not None
    assert again.user_attrs[ORIGIN] == 0
    assert suggest(again, SWEEP.space) == running.params
    study.study.tell(again, 1.0)
    assert [(origin_of(t), t.value) for t in study.trials] == [(0, 1.0)]


def test_a_parent_killed_between_closing_a_trial_and_lining_it_up_forgets_none(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = SweepStudy.create(place, SWEEP)
    trial = study.claim(2)
    assert trial is not None
    values = suggest(trial, SWEEP.space)
    trial.set_user_attr(RUN, "the run")

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    for method in ("tell", "enqueue_trial"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(study.study, method, die)
            study.release(trial)
            study.recover()
    assert study.recover() == ["trial-0"]
    assert [t.state for t in study.trials] == [TrialState.WAITING]
    again = study.claim(2)
    assert again is not None
    assert again.user_attrs[RUN] == "the run"
    assert suggest(again, SWEEP.space) == values


def test_a_successor_does_not_draw_what_its_predecessor_drew(place: Place) -> None:
    SweepStudy.create(place, SWEEP)
    drawn = []
    for _ in range(2):
        study = SweepStudy.join(place, SWEEP, 0)
        trial = study.claim(5)
        assert trial is not None
        drawn.append(suggest(trial, SWEEP.space))
        study.study.tell(trial, 1.0)
    assert drawn[0] != drawn[1]


def test_a_changed_space_is_refused_by_name(place: Place) -> None:
    SweepStudy.create(place, SWEEP)
    other = load_sweep("minute", {"scale": "tiny"}, [], "{training.weight_decay: [0, 1]}")
    for begin in (lambda: SweepStudy.create(place, other),
                  lambda: SweepStudy.join(place, other, 0)):
        with pytest.raises(UserError, match=r"space.training.weight_decay was .*, now 0, 1"):
            begin()


def test_another_study_of_that_name_is_left_alone(place: Place) -> None:
    import optuna

    optuna.create_study(storage=place.open(), study_name="s").enqueue_trial({"x": 1})
    with pytest.raises(UserError, match="has one of that name that is no sweep of Svend"):
        SweepStudy.create(place, SWEEP)


def test_storages_that_lose_trials_or_cannot_be_reached_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run the same trial twice"):
        Place("s", f"sqlite:///{tmp_path}/s.db", tmp_path).open()
    with pytest.raises(UserError, match="storage postgresql"):
        Place("s", "postgresql://nobody@127.0.0.1:1/none", tmp_path).open()
    with pytest.raises(UserError) as caught:
        Place("s", "postgresql://nobody:secret@127.0.0.1:1/none", tmp_path).open()
    assert "secret" not in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="storage"):
        Place("s", str(tmp_path / "file" / "s.journal"), tmp_path).open()
    with pytest.raises(UserError, match="begin it with svend sweep without --join"):
        SweepStudy.join(Place("s", str(tmp_path / "new.journal"), tmp_path), SWEEP, 0)


def test_a_missing_driver_is_named_with_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"its driver is missing; pip install 'svend.postgres.'"):
        Place("s", "postgresql://nobody@127.0.0.1:1/none", tmp_path).open()
    with pytest.raises(UserError, match=r"its driver is missing; install it .*MySQLdb"):
        Place("s", "mysql://nobody@127.0.0.1:1/none", tmp_path).open()


def test_a_worker_that_was_taken_for_dead_changes_nothing_more(place: Place) -> None:
    study = SweepStudy.create(place, SWEEP)
    trial = study.claim(1)
    assert trial is not None
    assert study.holds(trial)
    study.release(trial)  # what the parent does
    assert not study.holds(trial)
    study.tell(trial, 0.5)
    assert study.claim(1) is None  # nor is there room for one more meanwhile
    assert study.recover() == ["trial-0"]
    again = study.claim(1)
    assert again is not None
    study.tell(again, 1.0)
    assert [t.value for t in study.trials] == [1.0]


def test_a_silent_worker_of_another_machine_is_dead_after_a_while(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = SweepStudy.create(place, SWEEP)
    trial = study.claim(1)
    assert trial is not None
    trial.set_user_attr("worker", "elsewhere:1:0.00")
    clock = [0.0]
    monkeypatch.setattr("svend.pipeline.sweep.liveness.time.monotonic", lambda: clock[0])

    def recovered_after(seconds: float) -> list[str]:
        clock[0] += seconds
        return study.recover()

    # Its clock may be wrong: that it says something new is what counts.
    for beat in (time.time() - 10_000, time.time() + 10_000):
        trial.set_user_attr("beat_seconds", beat)
        assert [recovered_after(50) for _ in range(3)] == [[], [], []]
    # Nor is it dead because nobody looked.
    assert recovered_after(10_000) == []
    assert recovered_after(60) == ["trial-0"]
