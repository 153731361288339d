"""`svend ladder`: its options, and what is called. Imports nothing heavy before it has to."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from svend.errors import ConfigError
from svend.pipeline.groups import group_members
from svend.pipeline.ladder.options import Ladder, load_ladder

HELP = """\
any key of the ladder, and any of the configuration for all rungs, can be set:
  --ladder.tokens_per_parameter 10   --ladder.stress.steps 200   --training.batch_size 16
  --ladder.rungs '{small: {training.learning_rate: 2e-3}}'

examples:
  python -m svend ladder --start tiny --end large --dry-run
  python -m svend ladder --ladder miniature
  python -m svend ladder status --ladder miniature
  python -m svend ladder --start tiny --end large --retry
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are not the configuration's."""
    parser.add_argument("--ladder", default="default", metavar="NAME",
                        help=f"settings: {', '.join(group_members('ladder'))}")
    parser.add_argument("--start", metavar="SCALE", help="short for --ladder.start")
    parser.add_argument("--end", metavar="SCALE", help="short for --ladder.end")
    parser.add_argument("--name", metavar="NAME", help="of the ladder; default: that of --ladder")
    parser.add_argument("--dry-run", nargs="?", const="true", default="false",
                        metavar="true|false", help="print the whole plan, and stop")
    parser.add_argument("--retry", nargs="?", const="true", default="false",
                        metavar="true|false",
                        help="train the rung that failed again, in a run of its own")
    parser.add_argument("--override", metavar="REASON",
                        help="go on above the rung that failed; the reason is put on record")


def load(
    known: argparse.Namespace, groups: Mapping[str, str], overrides: Sequence[tuple[str, str]]
) -> Ladder:
    """Return the ladder that a command line asks for. Raises ConfigError for what does not fit."""
    for name in ("dry_run", "retry"):
        if getattr(known, name) not in ("true", "false"):
            raise ConfigError(f"{name} = {getattr(known, name)}: must be true or false")
    short = [(f"ladder.{name}", getattr(known, name)) for name in ("start", "end")
             if getattr(known, name)]
    return load_ladder(known.ladder, groups, [*overrides, *short])


def run(
    known: argparse.Namespace, groups: Mapping[str, str], overrides: Sequence[tuple[str, str]],
    *, status: bool,
) -> str | None:
    """Climb a ladder, print its plan, or say where it stands; return why it stopped, if it did.

    Raises UserError for what the user can mend, Interrupted after a signal.
    """
    if known.override is not None and not known.override.strip():
        raise ConfigError("override: give the reason, which is put on record")
    ladder = load(known, groups, overrides)
    name = known.name or known.ladder
    print("starting: loading torch and mlflow", flush=True)
    from svend.pipeline.ladder.climb import LadderClimb, Means, Wish
    from svend.pipeline.ladder.standing import ladder_folder

    folder = ladder_folder(ladder.rungs[ladder.config.start].checkpoint_dir, name)
    if status:
        _show_status(folder)
        return None
    if known.dry_run == "true":
        _show_dry_run(ladder, name, folder)
        return None
    from svend.pipeline.runner import say_farewell

    climb = LadderClimb(ladder, name, folder, Means(owns_process=True))
    try:
        results = climb.go(Wish(known.retry == "true", known.override))
    finally:
        say_farewell(ladder.rungs[ladder.config.start])
    last = results[-1] if results else None
    if last is None or last.success:
        return None
    return f"rung {last.scale.value}: {last.reason}"


def _show_status(folder: Path) -> None:
    from svend.pipeline.ladder.display import show_standing
    from svend.pipeline.ladder.standing import Standing
    from svend.pipeline.report import make_console

    show_standing(make_console(), Standing.open(folder))


def _show_dry_run(ladder: Ladder, name: str, folder: Path) -> None:
    from svend.pipeline.ladder.below import find_below
    from svend.pipeline.ladder.display import plan_rungs, show_plan
    from svend.pipeline.ladder.standing import LADDER_FILE, Standing
    from svend.pipeline.report import make_console

    history = [] if ladder.below is None else find_below(
        ladder.below, ladder.rungs[ladder.config.start])
    if (folder / LADDER_FILE).exists():
        history += Standing.open(folder).climbed()
    show_plan(make_console(), ladder, name, plan_rungs(ladder, history))
