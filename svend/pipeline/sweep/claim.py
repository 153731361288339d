"""Who is a sweep's parent: one process at a time, on whatever machine, by the storage itself.

A study's attributes are written by whoever comes last, but the numbers of its trials are given out
once and in order. So each process that wants to be the parent takes a ticket, a running trial of a
study of its own, and the parent is the lowest ticket whose process lives: of two that come at
once the second sees the first. A ticket that is closed stays closed: a process that was taken for
dead, and was not, learns it at its next heartbeat, and by `confirm` before it does what only the
parent may.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import TracebackType

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from svend.errors import UserError
from svend.pipeline.sweep.liveness import (
    BEAT,
    BEATS_IN_SILENCE,
    WORKER,
    Heartbeat,
    Watch,
    describe_process,
    process_name,
)
from svend.pipeline.sweep.storage import Place

PARENTS_SUFFIX = ".parents"
SINCE = "since"
CLOSED_BY = "closed_by."  # and the number of a ticket
LONGEST_PAUSE_SECONDS = 1.0


class TakenOver(UserError):
    """Another process has become the sweep's parent."""


class ParentClaim:
    """While entered, this process is the sweep's parent.

    Entering raises UserError, which names the other, if another is; `report` is told where that
    takes watching whether another lives.
    """

    def __init__(
        self, place: Place, silence_seconds: float, report: Callable[[str], None]
    ) -> None:
        self._place = place
        self._silence_seconds = silence_seconds
        self._report = report

    def __enter__(self) -> ParentClaim:
        self._study = optuna.create_study(
            storage=self._place.open(), study_name=self._place.study + PARENTS_SUFFIX,
            load_if_exists=True,
        )
        self._ticket = self._study.ask()
        self._ticket.set_user_attr(SINCE, time.strftime("%Y-%m-%d %H:%M:%S %Z"))
        self._beat()
        self._ticket.set_user_attr(WORKER, process_name())
        self._heartbeat = Heartbeat(self._beat, self._silence_seconds)
        with contextlib.ExitStack() as undo:
            undo.callback(self._close, self._ticket.number)
            undo.enter_context(self._heartbeat)
            self._wait_for_lower_tickets()
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._heartbeat.__exit__()
        self._close(self._ticket.number)

    @property
    def lost(self) -> bool:
        """Whether it is known that another process has taken over."""
        return self._heartbeat.lost.is_set()

    def confirm(self) -> None:
        """Ask the storage; raise TakenOver if another process is the parent now."""
        if not self.lost:
            with contextlib.suppress(UpdateFinishedTrialError):
                self._beat()
                return
        by = self._study.user_attrs.get(f"{CLOSED_BY}{self._ticket.number}", "")
        raise TakenOver(
            f"study {self._place.study}: taken over by {describe_process(by)}, for this process "
            f"was not heard of for {self._silence_seconds:g} s; add workers to it with --join"
        )

    def _wait_for_lower_tickets(self) -> None:
        """Close the tickets of the dead; raise UserError if a lower one's process lives."""
        watch, told = Watch(self._silence_seconds), False
        pause_seconds = min(LONGEST_PAUSE_SECONDS, self._silence_seconds / BEATS_IN_SILENCE)
        while lower := [t for t in self._study.get_trials(deepcopy=False)
                        if t.state is TrialState.RUNNING and t.number < self._ticket.number]:
            for ticket in lower:
                alive = watch.lives(ticket)
                if alive or (alive is None and self._heard_lately(ticket)):
                    raise UserError(
                        f"study {self._place.study}: is being run by {_owner(ticket)}; wait for "
                        "it, stop it, or add workers to it with --join"
                    )
                if alive is False:
                    self._close(ticket.number)
                elif not told:
                    self._report(
                        f"study {self._place.study}: was being run by {_owner(ticket)}; listening "
                        f"for {self._silence_seconds:g} s whether it still is"
                    )
                    told = True
            time.sleep(pause_seconds)

    def _heard_lately(self, ticket: FrozenTrial) -> bool:
        """Compare the clocks: enough to refuse at once, not to take over."""
        ago_seconds = abs(time.time() - float(ticket.user_attrs.get(BEAT, 0.0)))
        return ago_seconds < 2 * self._silence_seconds / BEATS_IN_SILENCE

    def _beat(self) -> None:
        self._ticket.set_user_attr(BEAT, time.time())

    def _close(self, number: int) -> None:
        if number != self._ticket.number:
            self._study.set_user_attr(f"{CLOSED_BY}{number}", process_name())
        with contextlib.suppress(UpdateFinishedTrialError):  # another was faster
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _owner(ticket: FrozenTrial) -> str:
    name = describe_process(ticket.user_attrs.get(WORKER, ""))
    return f"{name} (since {ticket.user_attrs.get(SINCE, 'just now')})"
