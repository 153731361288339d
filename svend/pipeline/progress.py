"""A progress bar where there is a terminal, and a plain line now and then where there is none."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

PLAIN_LINE_SECONDS = 10.0


class TerminalBar:
    """A bar that is shown on a terminal only, while entered; elsewhere its heirs print lines.

    A terminal that cannot draw over what it has drawn (TERM=dumb) gets lines too.
    """

    def __init__(self, console: Console, *columns: ProgressColumn, transient: bool = True) -> None:
        self._console = console
        self._bar = Progress(*columns, console=console, transient=transient)
        self._line_shown_seconds = time.monotonic()
        self._draws = console.is_terminal and not console.is_dumb_terminal

    def __enter__(self) -> Self:
        if self._draws:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._draws:
            self._bar.stop()

    def show_line(self, line: str, *, at_once: bool = False) -> None:
        """Print a line where no bar is drawn: every few seconds, or at once."""
        now = time.monotonic()
        due = at_once or now - self._line_shown_seconds > PLAIN_LINE_SECONDS
        if due and not self._draws:
            self._console.print(line, markup=False, soft_wrap=True)
            self._line_shown_seconds = now


class CountProgress(TerminalBar):
    """A bar for each of several things of which there is a known number."""

    def __init__(self, console: Console, unit: str) -> None:
        super().__init__(
            console, TextColumn("{task.description}"), BarColumn(bar_width=24),
            MofNCompleteColumn(), TimeRemainingColumn(),
        )
        self._unit = unit
        self._tasks: dict[str, TaskID] = {}

    def advance(self, name: str, done: int, total: int) -> None:
        """Show how many are done of one thing."""
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total)
        self._bar.update(self._tasks[name], completed=done, total=total)
        if done == total:
            self.show_line(f"{name}: {done:,} {self._unit}", at_once=True)
        else:
            self.show_line(f"{name}: {done:,} of {total:,} {self._unit}")
