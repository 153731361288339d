"""`svend promote`, `history`, `audit` and `lineage`: their options, and what they print."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from svend.errors import ConfigError
from svend.pipeline.config import load_config

LEVEL_NAMES = ("quick", "standard", "full", "production")
NEXT, NEWEST = "next", "newest"
PROMOTE_HELP = """\
what decides are today's gates (conf/gates, --gates NAME), on what is measured on that very version;
what is on record for its weights on the same data is not measured again. Evaluation settings are
those that the version was trained with; any can be overridden, such as
  --evaluation.paths '{gsm8k: ../gsm8k}'   --evaluation.problems 1000   --data.path ../data

examples:
  python -m svend promote --model svend-tiny-50m --to full
  python -m svend promote --model svend-tiny-50m --version 3 --to production
  python -m svend promote --model svend-tiny-50m --version 3 --to production --override "hotfix 12"
  python -m svend promote --model svend-tiny-50m --rollback production --reason "refuses too much"
"""
HISTORY_HELP = """\
example:
  python -m svend history svend-tiny-50m
"""
AUDIT_HELP = """\
every alias must be backed by a passing verdict on the weights that it points at, every record must
be whole, every file what was registered. The exit code is 1 where something is found.

examples:
  python -m svend audit
  python -m svend audit --model svend-tiny-50m --repair
"""
LINEAGE_HELP = """\
example:
  python -m svend lineage models:/svend-tiny-50m@full
"""


def add_promote_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `svend promote`."""
    parser.add_argument("--model", required=True, metavar="NAME", help="a registered model")
    parser.add_argument("--version", default=NEWEST, metavar="N",
                        help="left out: the newest that has the level below")
    parser.add_argument("--to", default=NEXT, metavar="LEVEL",
                        help=f"{', '.join(LEVEL_NAMES)}; left out: the one above the version's own")
    parser.add_argument("--gates", metavar="NAME", help="gate set, of conf/gates")
    parser.add_argument("--override", metavar="REASON",
                        help="move the alias without a verdict; shows as overridden everywhere")
    parser.add_argument("--rollback", metavar="LEVEL", help="give a level back to its last holder")
    parser.add_argument("--reason", metavar="TEXT", help="of a rollback, for the record")


def add_history_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `svend history`."""
    parser.add_argument("model", metavar="NAME", help="a registered model")
    parser.add_argument("--json", action="store_true", help="for programs")


def add_audit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `svend audit`."""
    parser.add_argument("--model", metavar="NAME", help="left out: the whole registry")
    parser.add_argument("--gates", metavar="NAME", help="gate set that levels must hold by")
    parser.add_argument("--repair", action="store_true",
                        help="put aliases back to where the record has them, then look")
    parser.add_argument("--json", action="store_true", help="for programs")


def add_lineage_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `svend lineage`."""
    parser.add_argument("uri", metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS")
    parser.add_argument("--json", action="store_true", help="for programs")


def run_promote(known: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> None:
    """Promote, override or roll back, and print what was moved."""
    wanted = None if known.version == NEWEST else str(known.version)
    for option, level in (("to", known.to), ("rollback", known.rollback)):
        if level not in (*LEVEL_NAMES, NEXT, None):
            raise ConfigError(f"{option} = {level}: must be one of {', '.join(LEVEL_NAMES)}")
    if known.rollback is not None and (
        known.override is not None or known.to != NEXT or wanted is not None
    ):
        raise ConfigError("rollback: takes a level and no version, to or override beside it")
    if known.override is not None and known.to == NEXT:
        raise ConfigError("override: needs to, the level whose alias is to move")
    if wanted is not None and not wanted.isdecimal():
        raise ConfigError(f"version = {wanted}: must be a number, or left out")
    of_gates = [pair for pair in overrides if pair[0].startswith("gates.")]
    gates = load_config({"gates": known.gates} if known.gates else {}, of_gates).gates
    print("starting: loading torch and mlflow", flush=True)
    from svend.pipeline.promotion import actions

    if known.rollback is not None:
        actions.roll_back(known.model, known.rollback, known.reason)
    elif known.override is not None:
        actions.override(known.model, wanted, known.to, known.override)
    else:
        actions.promote(known.model, wanted, None if known.to == NEXT else known.to, gates,
                        [pair for pair in overrides if pair not in of_gates])


def run_history(known: argparse.Namespace) -> None:
    """Print every move of a model."""
    from svend.pipeline.promotion import actions

    actions.show_history(known.model, as_json=known.json)


def run_audit(known: argparse.Namespace) -> int:
    """Check one model or all; return 1 where something was found, else 0."""
    gates = load_config({"gates": known.gates} if known.gates else {}).gates
    from svend.pipeline.promotion import actions

    return actions.audit(known.model, gates, repair=known.repair, as_json=known.json)


def run_lineage(known: argparse.Namespace) -> None:
    """Print what made a version."""
    from svend.pipeline.promotion import actions

    actions.show_lineage(known.uri, as_json=known.json)
