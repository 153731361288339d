"""What a command is: its words for people, its options, and the function that it calls."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NoReturn

from svend.errors import ConfigError
from svend.pipeline.groups import GROUPS, group_members

KEYS_NOTE = """\
any value of the configuration can be set by its dotted key, such as
  --training.learning_rate 1e-4   --training.max_steps 500   --data.path ../gsm8k

`data.` is short for `training.data.`; conf/config.yaml lists the keys.
"""
GROUP_HELP = {
    "scale": "rung of the ladder",
    "data": "data recipe",
    "gates": "gate set",
    "preset": "size of the run; the scale's own where left out",
}


class Takes(Enum):
    """What a command takes of the configuration, beside its own options."""

    NOTHING = "nothing"
    KEYS = "dotted keys"
    GROUPS = "groups and dotted keys"


@dataclass
class Call:
    """A command as it was asked for.

    groups: the members of `conf/` that were chosen. overrides: dotted keys with their texts.
    arguments: the words behind the command's name. answer: what --json prints, set by the command.
    ends_joined_run: whether a refusal ends the run that `mlflow run` made.
    """

    options: argparse.Namespace
    groups: dict[str, str]
    overrides: list[tuple[str, str]]
    arguments: list[str]
    answer: Any = None
    ends_joined_run: bool = True

    def words(self, *without: str) -> str:
        """Return what was given, but for --json and these switches, as it can be pasted."""
        kept, left = [], list(self.arguments)
        while left:
            word = left.pop(0)
            if word.partition("=")[0] not in ("--json", *without):
                kept.append(word)
            elif word in without and left and left[0] in ("true", "false"):
                left.pop(0)
        return shlex.join(kept)


def _no_options(parser: argparse.ArgumentParser) -> None:
    """Add no options."""


def _any_options(options: argparse.Namespace) -> None:
    """Take any options."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command, declared once.

    summary: one line, for the list of all. description: what it does. makes: what is there
    afterwards. notes: what else its help says, before the examples. examples: command lines that
    run as they are. answer: what --json prints, where there is such an option. sections: whose keys
    it takes beside the configuration's, by prefix. kinds: the commands below it. check: raises
    ConfigError for options that do not go together, also where a kind is called. run: returns the
    exit code, or raises UserError.
    """

    name: str
    summary: str
    description: str
    makes: str
    examples: tuple[str, ...]
    run: Callable[[Call], int]
    add_options: Callable[[argparse.ArgumentParser], None] = _no_options
    takes: Takes = Takes.NOTHING
    notes: str = ""
    answer: str | None = None
    sections: Mapping[str, type] = field(default_factory=dict)
    kinds: tuple[Command, ...] = ()
    check: Callable[[argparse.Namespace], None] = _any_options

    def add_to(self, commands: argparse._SubParsersAction[Any]) -> None:
        """Add the command's parser to those of its siblings."""
        examples = "\n".join(f"  {line}" for line in self.examples)
        notes = [self.notes.strip(), KEYS_NOTE.strip() if self.takes is Takes.GROUPS else "",
                 f"makes: {self.makes}", f"examples:\n{examples}"]
        parser = commands.add_parser(
            self.name, help=self.summary, description=self.description,
            epilog="\n\n".join(filter(None, notes)), allow_abbrev=False,
            formatter_class=HelpFormatter,
        )
        parser.set_defaults(command=self)
        self.add_options(parser)
        if self.takes is Takes.GROUPS:
            for group, text in GROUP_HELP.items():
                # The members are checked with the rest of the configuration, which names them.
                complete(parser.add_argument(
                    f"--{group}", metavar="NAME", help=f"{text}: {', '.join(group_members(group))}"
                ), group_members(group))
        if self.answer is not None:
            parser.add_argument("--json", action="store_true",
                                help=f"print one JSON document, and nothing else: {self.answer}")
        if self.kinds:
            kinds = parser.add_subparsers(dest="kind", metavar="KIND", title="kinds")
            for kind in self.kinds:
                kind.add_to(kinds)


class CommandParser(argparse.ArgumentParser):
    """Says what is wrong in one line, and keeps settings of the configuration apart.

    Those are the options that no command declares: argparse would take their values for arguments.
    """

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        command = self.get_default("command")
        overrides: list[tuple[str, str]] = []
        if isinstance(command, Command) and command.takes is not Takes.NOTHING:
            words, overrides = self._split(words)
        parsed, rest = super().parse_known_args(words, namespace)
        if not hasattr(parsed, "overrides"):
            parsed.overrides = overrides
        return parsed, rest

    def _split(self, words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
        """Return the words that are the command's own, and `--key value` and `--key=value`."""
        own, overrides, left = [], [], list(words)
        while left:
            word = left.pop(0)
            key, equals, value = word[2:].partition("=")
            if not word.startswith("--") or f"--{key}" in self._option_string_actions:
                own.append(word)
                continue
            self._check_not_misspelt(key)
            if not equals and left and not left[0].startswith("--"):
                value = left.pop(0)
            if not value:
                raise ConfigError(f"--{key} has no value: expected a form such as --{key} VALUE")
            overrides.append((key, value))
        return own, overrides

    def _check_not_misspelt(self, key: str) -> None:
        """Raise ConfigError for what is nearly an option, which no key without a dot is."""
        near = difflib.get_close_matches(f"--{key}", self._option_string_actions, n=1, cutoff=0.85)
        if near and "." not in key:
            raise ConfigError(f"--{key} is not an option: did you mean {near[0]}?")


class HelpFormatter(argparse.HelpFormatter):
    """Fills paragraphs to the width of the terminal; leaves indented lines as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            lines = paragraph.split("\n")
            plain = [line for line in lines if line[:2] not in ("  ", "")]
            kept = lines[len(plain):]
            if any(line[:2] not in ("  ", "") for line in kept):  # they begin with an indented one
                plain, kept = [], lines
            filled = [super()._fill_text(" ".join(plain), width, indent)] if plain else []
            paragraphs.append("\n".join([*filled, *kept]))
        return "\n\n".join(paragraphs)


def call_of(parsed: argparse.Namespace, arguments: Sequence[str]) -> Call:
    """Return what was asked for; `arguments` are the words behind the command's name."""
    command: Command = parsed.command
    groups = {}
    if command.takes is Takes.GROUPS:
        groups = {name: getattr(parsed, name) for name in GROUPS if getattr(parsed, name)}
    return Call(parsed, groups, list(parsed.overrides), list(arguments))


def complete(action: argparse.Action, names: Iterable[str], *, listed: bool = False) -> None:
    """Have a shell offer these names as an option's value; `listed`: as many as are wanted."""
    known = list(names)

    def offer(prefix: str, **_: Any) -> list[str]:
        done = prefix.rpartition(",")[0] if listed else ""
        return [f"{done}{',' if done else ''}{name}" for name in known]

    action.completer = offer  # type: ignore[attr-defined]


def add_switch(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """Add an option that is on where it is given alone, for `mlflow run` passes a value always."""
    complete(parser.add_argument(
        name, nargs="?", const="true", default="false", metavar="true|false", help=text
    ), ("true", "false"))


def is_on(options: argparse.Namespace, name: str) -> bool:
    """Return whether such an option is on; raises ConfigError for what is neither."""
    value = getattr(options, name)
    if value not in ("true", "false"):
        raise ConfigError(f"{name} = {value}: must be true or false")
    return bool(value == "true")


def tell(line: str) -> None:
    """Print a line of progress at once, also into a pipe."""
    print(line, flush=True)


def tell_loading(packages: str) -> None:
    """Say why nothing is seen for some seconds, before packages that are slow to import."""
    tell(f"starting: loading {packages}")


def tell_next(*words: str) -> None:
    """Print the next likely command, as the last line."""
    tell(f"next: {program()} {' '.join(filter(None, words))}")


def program() -> str:
    """Return what starts svend in the shell of the user, whether or not its environment is active.
    """
    in_environment = sys.prefix != sys.base_prefix
    active = os.environ.get("VIRTUAL_ENV")
    if shutil.which("svend") and (not in_environment or active == sys.prefix):
        return "svend"
    return f"{shlex.quote(sys.executable)} -m svend"

