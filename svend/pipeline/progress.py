"""A progress bar where there is a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn


class TerminalBar:
    """A bar that is shown on a terminal only, while entered; elsewhere its heirs print lines."""

    def __init__(self, console: Console, *columns: ProgressColumn, transient: bool = True) -> None:
        self._console = console
        self._bar = Progress(*columns, console=console, transient=transient)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()
