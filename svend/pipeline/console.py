"""The terminal, or the pipe, that a person reads."""

from __future__ import annotations

from rich.console import Console

# Of a pipe; a terminal says its own.
PIPE_WIDTH = 110


def make_console(pipe_width: int = PIPE_WIDTH) -> Console:
    """Return the console; a pipe gets plain text wide enough for the tables."""
    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, width=pipe_width)


def say(console: Console, line: str) -> None:
    """Print a line as it is, from whichever thread."""
    console.print(line, markup=False, soft_wrap=True)
