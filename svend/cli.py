"""The command line: parse, call one command, turn mistakes into one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

from svend import __version__, completion_command
from svend.answers import to_json
from svend.bench import chaos_command, coordcheck_command
from svend.bench import command as bench_command
from svend.command import Call, Command, CommandParser, HelpFormatter, Takes, call_of
from svend.errors import ConfigError, Interrupted, UserError, one_line
from svend.pipeline import (
    evaluate_command,
    exchange_command,
    plan_command,
    scales_command,
    sync_command,
    train_command,
    validate_command,
)
from svend.pipeline.compare import command as compare_command
from svend.pipeline.interruption import EXIT_INTERRUPTED
from svend.pipeline.ladder import command as ladder_command
from svend.pipeline.ladder import predict_command
from svend.pipeline.promotion import command as promotion_command
from svend.pipeline.sweep import command as sweep_command
from svend.serving import command as serve_command

# In the order of use.
TOPICS: tuple[tuple[str, tuple[Command, ...]], ...] = (
    ("before a run", (
        scales_command.SCALES, plan_command.PLAN, validate_command.VALIDATE,
    )),
    ("training", (
        train_command.TRAIN, sweep_command.SWEEP, ladder_command.LADDER, sync_command.SYNC,
    )),
    ("judging what was trained", (
        evaluate_command.EVALUATE, compare_command.COMPARE, predict_command.PREDICT,
    )),
    ("the registry", (
        promotion_command.PROMOTE, promotion_command.HISTORY, promotion_command.AUDIT,
        promotion_command.LINEAGE,
    )),
    ("using a version", (
        serve_command.SERVE, exchange_command.EXPORT, exchange_command.IMPORT,
    )),
    ("trying Svend itself", (
        bench_command.BENCH, coordcheck_command.COORDCHECK, chaos_command.CHAOS,
        completion_command.COMPLETION,
    )),
)
COMMANDS = tuple(command for _, commands in TOPICS for command in commands)
EXAMPLES = """\
examples:
  svend train                                  the 52M-parameter TINY, on this machine
  svend plan --scale flagship --gpu a100-80gb  memory, time and cost elsewhere
  svend promote --model svend-tiny-50m         one level up, by its gates

svend COMMAND --help has examples of each; `python -m svend` is the same as `svend`. README.md and
docs/ have the rest, docs/commands.md a table of all commands. Completion by the shell:
  eval "$(svend completion bash)"
"""
EXIT_USER_ERROR = 1
EXIT_NO_READER = 141  # as a shell tells of a process that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "_ARGCOMPLETE" in os.environ:
        completion_command.offer(make_parser())
    try:
        code = _code_of(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read along has gone, as head does: Python's own flush is to find nobody missing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_NO_READER
    except SystemExit as ended:  # argparse, after --help: a notebook is not to end by it
        code = ended.code if isinstance(ended.code, int) else EXIT_USER_ERROR
    parallel = sys.modules.get("svend.training.parallel")
    if parallel is not None and parallel.has_given_up():
        # Not waiting for processes that wait for this one, or for a save whose parts do not come.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def make_parser() -> CommandParser:
    """Return the parser of all commands."""
    parser = CommandParser(
        prog="svend", usage="svend [-h] [--version] COMMAND ...", description=_overview(),
        epilog=EXAMPLES.strip(), formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"svend {__version__}")
    commands = parser.add_subparsers(
        dest="top", required=True, metavar="COMMAND", help=argparse.SUPPRESS, prog="svend",
    )
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def _overview() -> str:
    """Return all commands with a line for each, by topic."""
    width = shutil.get_terminal_size().columns - 2
    longest = max(len(command.name) for command in COMMANDS)
    lines = ["Train decoder-only reasoning models, gated at every rung."]
    for topic, commands in TOPICS:
        lines += ["", f"{topic}:"]
        for command in commands:
            lines += textwrap.wrap(
                command.summary, width, initial_indent=f"  {command.name:<{longest}}  ",
                subsequent_indent=" " * (longest + 4),
            )
    return "\n".join(lines)


def parse(words: Sequence[str]) -> Call:
    """Return what a command line asks for. Raises ConfigError for what no command takes."""
    parsed, rest = make_parser().parse_known_args(words)
    command: Command = parsed.command
    if rest and command.takes is Takes.NOTHING:
        name = command.name if parsed.top == command.name else f"{parsed.top} {command.name}"
        raise ConfigError(f"{name} takes no option {rest[0]}; see svend {name} --help")
    if rest:
        raise ConfigError(
            f"'{rest[0]}' is not an option: expected a form such as --key value"
        )
    next(top for top in COMMANDS if top.name == parsed.top).check(parsed)
    return call_of(parsed, words[words.index(parsed.top) + 1:])


def _code_of(words: Sequence[str]) -> int:
    call: Call | None = None
    try:
        call = parse(words)
        return _run(call)
    except UserError as error:
        if (call is None or call.ends_joined_run) and "MLFLOW_RUN_ID" in os.environ:
            _end_joined_run(error)
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Interrupted as interruption:
        print(f"error: {one_line(interruption)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        # Not imported where nothing has talked to a store: that takes a second.
        told = sys.modules.get("svend.tracking.store_errors")
        line = None if told is None else told.as_user_error(error)
        if line is None:
            raise
        print(f"error: {one_line(line)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(call: Call) -> int:
    """Run a command; with --json its answer alone goes to standard output."""
    command: Command = call.options.command
    if not getattr(call.options, "json", False) or command.answer is None:
        return command.run(call)
    with contextlib.redirect_stdout(sys.stderr):
        code = command.run(call)
    if call.answer is not None:
        print(to_json(call.answer), flush=True)
    return code


def _end_joined_run(error: UserError) -> None:
    """Have the run that `mlflow run` made say why it failed."""
    from svend.tracking.runs import end_joined_run

    end_joined_run("FAILED", str(error))
