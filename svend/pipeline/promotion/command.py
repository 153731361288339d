"""`svend promote`, `history`, `audit` and `lineage`: what moves versions, and what tells of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from svend.command import Call, Command, Takes, complete, tell_loading
from svend.errors import ConfigError
from svend.pipeline.config import GatesConfig, group_members, load_config

LEVEL_NAMES = ("quick", "standard", "full", "production")
NEXT, NEWEST = "next", "newest"

def _add_promote_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help="a registered model")
    parser.add_argument("--version", default=NEWEST, metavar="N",
                        help="left out: the newest that has the level below")
    complete(parser.add_argument(
        "--to", default=NEXT, metavar="LEVEL",
        help=f"{', '.join(LEVEL_NAMES)}; left out: the one above the version's own",
    ), LEVEL_NAMES)
    _add_gates(parser, "gate set that decides")
    parser.add_argument("--override", metavar="REASON",
                        help="move the alias without a verdict; shows as overridden everywhere")
    complete(parser.add_argument(
        "--rollback", metavar="LEVEL", help="give a level back to its last holder"
    ), LEVEL_NAMES)
    parser.add_argument("--reason", metavar="TEXT", help="of a rollback, for the record")


def _add_history_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="NAME", help="a registered model")


def _add_audit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="left out: the whole registry")
    _add_gates(parser, "gate set that levels must hold by")
    parser.add_argument("--repair", action="store_true",
                        help="put aliases back to where the record has them, then look")


def _add_lineage_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uri", metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS")


def _add_gates(parser: argparse.ArgumentParser, text: str) -> None:
    members = group_members("gates")
    complete(parser.add_argument("--gates", metavar="NAME", help=f"{text}: {', '.join(members)}"),
             members)


def _run_promote(call: Call) -> int:
    known, overrides = call.options, call.overrides
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
    gates = _gates(known, of_gates)
    tell_loading("torch and mlflow")
    from svend.pipeline.promotion import actions

    if known.rollback is not None:
        moved = actions.roll_back(known.model, known.rollback, known.reason)
    elif known.override is not None:
        moved = actions.override(known.model, wanted, known.to, known.override)
    else:
        moved = actions.promote(known.model, wanted, None if known.to == NEXT else known.to, gates,
                                [pair for pair in overrides if pair not in of_gates])
    call.answer = {"model": known.model, "moved": moved}
    return 0


def _run_history(call: Call) -> int:
    tell_loading("torch and mlflow")
    from svend.pipeline.promotion import actions

    call.answer = actions.show_history(call.options.model)
    return 0


def _run_audit(call: Call) -> int:
    known = call.options
    gates = _gates(known)
    tell_loading("torch and mlflow")
    from svend.pipeline.promotion import actions

    call.answer = actions.audit(known.model, gates, repair=known.repair)
    return min(1, len(call.answer))


def _run_lineage(call: Call) -> int:
    tell_loading("torch and mlflow")
    from svend.pipeline.promotion import actions

    call.answer = actions.show_lineage(call.options.uri)
    return 0


def _gates(known: argparse.Namespace, overrides: Sequence[tuple[str, str]] = ()) -> GatesConfig:
    return load_config({"gates": known.gates} if known.gates else {}, overrides).gates


PROMOTE = Command(
    name="promote",
    summary="move a version up the levels, with evidence",
    description="Have a version of the registry climb, level by level, each decided by its gates "
    "on that very version and put on record. Where one fails nothing moves, and the exit code is "
    "1.",
    makes="a run with the verdicts, entries in the model's record, aliases that move",
    notes="""\
what decides are today's gates, on what is measured on that very version; what is on record for its
weights on the same data is not measured again. Evaluation settings are those that the version was
trained with; any can be overridden, such as
  --evaluation.paths '{gsm8k: ../gsm8k}'   --evaluation.problems 1000   --data.path ../data
""",
    examples=(
        "svend promote --model svend-tiny-50m",
        "svend promote --model svend-tiny-50m --version 3 --to production",
        "svend promote --model svend-tiny-50m --version 3 --to production --override 'hotfix 12'",
        "svend promote --model svend-tiny-50m --rollback full --reason 'refuses too much'",
    ),
    answer="model, and moved: each move with its level, version, verdict and entry",
    takes=Takes.KEYS,
    add_options=_add_promote_options,
    run=_run_promote,
)
HISTORY = Command(
    name="history",
    summary="every move of a registered model",
    description="Print every move of a registered model: when, by whom, from, to, by what verdict, "
    "why; and which version holds which level.",
    makes="nothing",
    examples=("svend history svend-tiny-50m", "svend history svend-tiny-50m --json"),
    answer="a list of moves, each with number, kind, version, level, by, at, decided",
    add_options=_add_history_options,
    run=_run_history,
)
AUDIT = Command(
    name="audit",
    summary="check that every alias is backed by a verdict",
    description="Walk the registry: every alias must be backed by a passing verdict on the weights "
    "that it points at, every record must be whole, every file what was registered. The exit code "
    "is 1 where something is found.",
    makes="nothing; with --repair, aliases where the record has them",
    examples=("svend audit", "svend audit --model svend-tiny-50m --repair", "svend audit --json"),
    answer="a list of findings with model, kind, detail, version, level; [] where all is well",
    add_options=_add_audit_options,
    run=_run_audit,
)
LINEAGE = Command(
    name="lineage",
    summary="from a version to everything that made it",
    description="Print what made a version: run, config, commit, data, tokenizer, parents, "
    "verdicts.",
    makes="nothing",
    examples=("svend lineage models:/svend-tiny-50m@standard",),
    answer="model, version, and a key for each line; a list where there are several of one",
    add_options=_add_lineage_options,
    run=_run_lineage,
)
