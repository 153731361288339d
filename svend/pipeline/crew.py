"""The processes of a run at work: the first decides, and has all of them do the same thing.

Decisions hang on clocks, signals and gates, on which processes would not agree by themselves. So
only the first runs the pipeline; the others wait for what it calls, and do their part of it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import psutil
import torch

from svend.errors import RankLost, UserError, one_line
from svend.training.parallel import Ranks, give_up, has_given_up, is_about_a_connection

P = ParamSpec("P")
M = TypeVar("M")
T = TypeVar("T")
# For the death of another process to show, once it has broken a connection.
LOST_SECONDS = 5.0
READY = "ready"
UNKNOWN = "a process of the run does not answer"


@dataclass(frozen=True)
class Dismissal:
    """The end of a run, and how it ended."""

    outcome: Any


@dataclass(frozen=True)
class Farewell:
    """The end of all runs of a command."""


class Crew:
    """All processes of a run; of one that is alone, just it."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._dismissed = False
        if ranks.store is not None:
            ranks.store.set(f"process/{ranks.rank}", f"{os.getpid()} {socket.gethostname()}")

    @property
    def size(self) -> int:
        return self.ranks.size

    def call(
        self, operation: Callable[Concatenate[M, P], T], member: M, *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Have every process run a function of a module; return what this one, the first, got.

        member: what it works on here; each process has its own. Raises RankLost, with its number,
        where a process has died.
        """
        self.tell((operation, args, kwargs))
        with self.together():
            return operation(member, *args, **kwargs)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Name the process that has died, where something that all do ends because of it.

        However it ends before its end, the others may be waiting in the middle of it.
        """
        try:
            yield
        except BaseException as error:
            if self.size > 1:
                give_up()
            if self.size == 1 or not (isinstance(error, RankLost) or is_about_a_connection(error)):
                raise
            told = str(error) if isinstance(error, RankLost) else f"{UNKNOWN} ({_short(error)})"
            raise RankLost(self._find_lost() or told) from error

    def tell(self, order: Any) -> None:
        """Send the others an order; raises RankLost where one has died."""
        if self.size > 1:
            with self.together():
                _broadcast(order, self.ranks)

    def hear(self) -> Any:
        """Wait for an order of the first process."""
        try:
            return _broadcast(None, self.ranks)
        except RuntimeError as error:
            give_up()
            raise RankLost(f"rank 0 does not answer ({_short(error)})") from error

    def answer(self, question: str, reason: str | None) -> None:
        """Tell the first process that this one is ready, or why it is not."""
        assert self.ranks.store is not None
        self.ranks.store.set(f"{question}/{self.ranks.rank}", reason or READY)

    def hear_answers(self, question: str) -> None:
        """Wait, as long as it takes, until every other process is ready.

        Raises UserError where one says why it is not, RankLost where one has died.
        """
        store = self.ranks.store
        if store is None:
            return
        for rank in range(1, self.size):
            while not store.check([f"{question}/{rank}"]):
                if lost := self._look_for_lost():
                    give_up()
                    raise RankLost(lost)
                time.sleep(0.1)
            reason = store.get(f"{question}/{rank}").decode()
            if reason != READY:
                raise UserError(f"rank {rank}: {reason}")

    def follow(self, member: Any) -> Any:
        """Do what the first process calls until it ends the run; return how it ended."""
        while True:
            order = self.hear()
            if isinstance(order, Dismissal):
                return order.outcome
            operation, args, kwargs = order
            operation(member, *args, **kwargs)

    def dismiss(self, outcome: Any) -> None:
        """Tell the others how the run ended, as far as they can still hear it."""
        if self.size > 1 and not (self._dismissed or has_given_up()):
            self._dismissed = True
            try:
                self.tell(Dismissal(outcome))
            except RankLost:
                return  # it is the reason why the run ends

    def leave_note(self, reason: str) -> None:
        """Say why this process ends, for the first to find."""
        if self.ranks.store is not None:
            self.ranks.store.set(f"reason/{self.ranks.rank}", reason)

    def _find_lost(self) -> str | None:
        """Wait a little for the death of a process to show; see `_look_for_lost`."""
        deadline = time.monotonic() + LOST_SECONDS
        while (lost := self._look_for_lost()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return lost

    def _look_for_lost(self) -> str | None:
        """Say which process has ended, and why if it said so; None if all are there."""
        store, here = self.ranks.store, socket.gethostname()
        for rank in range(1, self.size):
            if store is None or not store.check([f"process/{rank}"]):
                continue
            process, _, host = store.get(f"process/{rank}").decode().partition(" ")
            who = f"rank {rank} (process {process} on {host})"
            if store.check([f"reason/{rank}"]):
                return f"{who} ended: {store.get(f'reason/{rank}').decode()}"
            if host == here and (trouble := _trouble_of(int(process))):
                return f"{who} {trouble}"
        return None


def stay_for_orders() -> None:
    """Leave it to the first process to decide what a signal means."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _trouble_of(process: int) -> str | None:
    """Say what keeps a process of this machine from answering, None if nothing does."""
    try:
        status = psutil.Process(process).status()
    except psutil.NoSuchProcess:
        return "died"
    if status == psutil.STATUS_STOPPED:
        return "is stopped, and did not answer in time"
    return "died" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else None


def _short(error: BaseException) -> str:
    return one_line(error)[:160]


def _broadcast(order: Any, ranks: Ranks) -> Any:
    """Send an order from the first process to the others; return it."""
    import torch.distributed as dist

    content = pickle.dumps(order)
    length = torch.tensor(len(content))
    dist.broadcast(length, 0, group=ranks.orders)
    if not ranks.place.leads:
        content = bytes(int(length))
    sent = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    dist.broadcast(sent, 0, group=ranks.orders)
    # From another process of this run, which the environment named.
    return order if ranks.place.leads else pickle.loads(sent.numpy().tobytes())  # noqa: S301
