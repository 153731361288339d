"""The blocks of a page, and its commands carried out as by a reader who pastes them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import Workplace
from tests.in_process import run_here

SVEND = "python -m svend "
HEADING = re.compile(r"(##) (.+)|### (.+)|\*\*([^*]+)\*\*$")
HEREDOC = re.compile(r"<<'(\w+)'")


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page: its language, its section and nearest heading, and its lines."""

    language: str
    section: str
    heading: str
    source: str


def read_fences(path: Path) -> list[Fence]:
    """Return the fenced blocks of a page."""
    fences: list[Fence] = []
    section, heading, language = "", "", None
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if language is not None:
                fences.append(Fence(language, section, heading, "\n".join(lines) + "\n"))
            language, lines = (line[3:] if language is None else None), []
        elif language is not None:
            lines.append(line)
        elif found := HEADING.match(line):
            heading = found[2] or found[3] or found[4]
            section = heading if found[1] else section
    return fences


def commands_of(script: str) -> Iterator[str]:
    """Yield the commands of a script of the shell, each with the lines that it is given."""
    lines = iter(script.splitlines())
    for line in lines:
        command = [line]
        found = HEREDOC.search(line)
        while found and command[-1] != found[1]:
            command.append(next(lines))
        yield "\n".join(command)


def told_commands(console: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a console, and what it is shown to say."""
    for part in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]:
        command, *said = part.splitlines()
        yield command, said


def is_as_shown(told: str, shown: str) -> bool:
    """Whether a line is what a page shows of it, where `...` stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, shown.split("..."))), told) is not None


def carry_out(command: str, workplace: Workplace) -> subprocess.CompletedProcess[str]:
    """Carry out one command in the workplace's folder: Svend's in this process, others in bash."""
    if command.startswith(SVEND):
        return run_here(workplace, [sys.executable, "-m", "svend",
                                    *shlex.split(command.removeprefix(SVEND))])
    return workplace.run(["bash", "-c", command])
