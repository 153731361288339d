"""The terminal, or the pipe, that a person reads."""

from __future__ import annotations

from rich.console import Console

# Of a pipe; a terminal says its own.
PIPE_WIDTH = 110


def make_console(pipe_width: int = PIPE_WIDTH) -> Console:
    """Return the console; a pipe or a notebook gets plain text wide enough for the tables."""
    console = Console(highlight=False, soft_wrap=False)
    if console.is_terminal:
        return console
    # A notebook is a pipe too: drawn as HTML, each print would be a paragraph of its own, and its
    # kernel asks by FORCE_COLOR for what moves a cursor.
    return Console(highlight=False, width=pipe_width, force_jupyter=False,
                   force_terminal=False if console.is_jupyter else None)


def say(console: Console, line: str) -> None:
    """Print a line as it is, from whichever thread."""
    console.print(line, markup=False, soft_wrap=True)
