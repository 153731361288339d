"""The command line: parse, load the configuration, call one function below."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from svend import __version__
from svend.errors import ConfigError, UserError
from svend.pipeline.config import group_members, print_scale_comparison

OVERRIDE_HELP = """\
any value of the configuration can be set by its dotted key, such as
  --training.learning_rate 1e-4   --training.max_steps 500   --data.path ../gsm8k
(data. is short for training.data.); conf/config.yaml lists the keys.

examples:
  python -m svend train
  python -m svend train --scale small --training.learning_rate 1e-4
  python -m svend train --data gsm8k --data.path ../gsm8k
  python -m svend train --resume
"""
EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        known, rest = _parser().parse_known_args(arguments)
        if known.command == "scales":
            if rest:
                raise ConfigError(f"scales takes no option {rest[0]}")
            print_scale_comparison()
            return 0
        return _train(known, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other mistake is said."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="svend", description="Train decoder-only reasoning models, gated at every rung."
    )
    parser.add_argument("--version", action="version", version=f"svend {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    train = commands.add_parser(
        "train",
        help="train one scale as a tracked run",
        description="Train one scale as a tracked run: plan, train, gate, save, register.",
        epilog=OVERRIDE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for group, text in (
        ("scale", "rung of the ladder"),
        ("data", "data recipe"),
        ("gates", "gate set"),
        ("profile", "size of the run; the scale's own where left out"),
    ):
        # The members are checked with the rest of the configuration, which names them.
        train.add_argument(f"--{group}", metavar="NAME",
                           help=f"{text}: {', '.join(group_members(group))}")
    train.add_argument(
        "--resume", nargs="?", const="true", default="false", metavar="true|false",
        help="go on with the newest unfinished run of this experiment and scale",
    )
    commands.add_parser("scales", help="print the seven scales",
                        description="Print the seven scales, each figure from its config.")
    return parser


def _train(known: argparse.Namespace, rest: Sequence[str]) -> int:
    try:
        # omegaconf takes a while: only where a configuration is loaded.
        from svend.pipeline.loading import load_config

        groups = {name: getattr(known, name) for name in ("scale", "data", "gates", "profile")
                  if getattr(known, name)}
        if known.resume not in ("true", "false"):
            raise ConfigError(f"resume = {known.resume}: must be true or false")
        config = load_config(groups, _overrides(rest))
    except UserError as error:
        if "MLFLOW_RUN_ID" in os.environ:
            from svend.tracking.run import fail_joined_run

            fail_joined_run(str(error))
        raise
    print("starting: loading torch and mlflow", flush=True)
    from svend.pipeline.runner import PipelineRunner

    result = PipelineRunner(config).run(resume=known.resume == "true")
    if result.success:
        return 0
    print(f"error: {result.reason}", file=sys.stderr)
    return EXIT_INTERRUPTED if result.interrupted else EXIT_USER_ERROR


def _overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
    """Return `--key value` and `--key=value` as pairs."""
    pairs = []
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"'{word}' is not an option: expected a form such as --key value")
        key, equals, value = word[2:].partition("=")
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        if not value:
            raise ConfigError(f"--{key} has no value: expected a form such as --{key} VALUE")
        pairs.append((key, value))
    return pairs
