"""`svend completion`: what a shell is told so that it completes commands, options and keys."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from svend.command import Call, Command, Takes, complete

SHELLS = ("bash", "zsh", "fish")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def _run(call: Call) -> int:
    from argcomplete import shellcode  # type: ignore[attr-defined]

    shell = call.options.shell
    print(shellcode(["svend"], shell=shell))
    return 0


COMPLETION = Command(
    name="completion",
    summary="have the shell complete commands, options and keys",
    description="Print what a shell must read to complete svend's commands, options, names and the "
    "dotted keys of the configuration, with the values that a key can have.",
    makes="lines for the shell on standard output",
    notes="""\
to have it in every shell, add the line to ~/.bashrc or ~/.zshrc; for fish:
  svend completion fish > ~/.config/fish/completions/svend.fish

In zsh, `autoload -U compinit && compinit` must come first.
""",
    examples=('eval "$(svend completion bash)"', 'eval "$(svend completion zsh)"'),
    add_options=_add_options,
    run=_run,
)


def offer(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks, and end the process."""
    import argcomplete

    declare_keys(parser)
    argcomplete.autocomplete(parser)


def declare_keys(parser: argparse.ArgumentParser) -> None:
    """Declare the configuration's keys as options, where a command takes them: for completion only.
    """
    for below in _parsers_below(parser):
        command: Command = below.get_default("command")
        if command.takes is not Takes.NOTHING:
            _add_keys(below, command)


def _parsers_below(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield below
                yield from _parsers_below(below)


def _add_keys(parser: argparse.ArgumentParser, command: Command) -> None:
    """Declare the keys that a command takes as options of its own, for the completion alone."""
    from svend.pipeline.config import PipelineConfig

    known = dict(_keys_of(PipelineConfig))
    for prefix, section in command.sections.items():
        known |= {f"{prefix}.{key}": values for key, values in _keys_of(section)}
    for key, values in known.items():
        short = [key.removeprefix("training.")] if key.startswith("training.data.") else []
        for name in (key, *short):
            if f"--{name}" in parser._option_string_actions:
                continue  # the command's own, such as --preset
            action = parser.add_argument(f"--{name}", help=key)
            if values:
                complete(action, values)


def _keys_of(schema: type) -> Iterator[tuple[str, list[str]]]:
    """Yield the dotted keys of a section with the values that each can have, if they are few."""
    for name, hint in typing.get_type_hints(schema).items():
        kinds = [kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type)]
        section = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if section is not None and typing.get_origin(hint) not in (list, dict):
            for key, values in _keys_of(section):
                yield f"{name}.{key}", values
            continue
        yield name, next(filter(None, map(_values_of, kinds)), [])


def _values_of(kind: type[Any]) -> list[str]:
    if issubclass(kind, Enum):
        return [str(member.value) for member in kind]
    return ["true", "false"] if kind is bool else []
