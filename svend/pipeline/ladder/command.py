"""`svend ladder`: climb, or print the plan or the standing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from svend.command import (
    Call,
    Command,
    Takes,
    add_switch,
    complete,
    is_on,
    tell,
    tell_loading,
    tell_next,
)
from svend.errors import ConfigError, one_line
from svend.pipeline.config import PipelineConfig
from svend.pipeline.groups import group_members
from svend.pipeline.ladder.options import Ladder, LadderConfig, load_ladder
from svend.pipeline.sharing import add_nproc, share

CLIMB, STATUS = "climb", "status"


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=(CLIMB, STATUS), default=CLIMB,
                        metavar="climb|status",
                        help="status: print where the ladder stands, and stop (default: climb)")
    complete(parser.add_argument(
        "--ladder", default="default", metavar="NAME",
        help=f"settings: {', '.join(group_members('ladder'))} (default: default)",
    ), group_members("ladder"))
    for end in ("start", "end"):
        complete(parser.add_argument(
            f"--{end}", metavar="SCALE", help=f"short for --ladder.{end}"
        ), group_members("scale"))
    parser.add_argument("--name", metavar="NAME", help="of the ladder (default: that of --ladder)")
    add_switch(parser, "--dry-run", "print the whole plan, and stop")
    add_switch(parser, "--retry", "train the rung that failed again, in a run of its own")
    parser.add_argument("--override", metavar="REASON",
                        help="go on above the rung that failed; the reason is put on record")
    add_nproc(parser)


def _run(call: Call) -> int:
    options = call.options
    if options.override is not None and not options.override.strip():
        raise ConfigError("override: give the reason, which is put on record")
    looks = options.action == STATUS or is_on(options, "dry_run")
    if not looks:
        code = share(call, lambda: _first_rung(_load(call)), once=False)
        if code is not None:
            return code
    ladder = _load(call)
    name = options.name or options.ladder
    tell_loading("torch and mlflow")
    from svend.pipeline.ladder.standing import ladder_folder

    folder = ladder_folder(_first_rung(ladder).checkpoint_dir, name)
    if options.action == STATUS:
        call.answer = _show_status(folder)
        return 0
    if looks:
        call.answer = _show_dry_run(ladder, name, folder)
        tell_next("ladder", call.words("--dry-run"))
        return 0
    return _climb(call, ladder, name, folder)


def _load(call: Call) -> Ladder:
    """Return the ladder that is asked for. Raises ConfigError for what does not fit."""
    is_on(call.options, "retry")
    short = [(f"ladder.{name}", getattr(call.options, name)) for name in ("start", "end")
             if getattr(call.options, name)]
    return load_ladder(call.options.ladder, call.groups, [*call.overrides, *short])


def _first_rung(ladder: Ladder) -> PipelineConfig:
    return ladder.rungs[ladder.config.start]


def _climb(call: Call, ladder: Ladder, name: str, folder: Path) -> int:
    from svend.pipeline.ladder.climb import LadderClimb, Means, Wish
    from svend.pipeline.ladder.standing import Standing
    from svend.pipeline.runner import say_farewell

    scales = [scale.value for scale in ladder.config.scales]
    tell(f"ladder {name}: {', '.join(scales)}, a run each; {folder.absolute()} says how far "
         "it is, --dry-run what it takes")
    climb = LadderClimb(ladder, name, folder, Means(owns_process=True))
    try:
        results = climb.go(Wish(is_on(call.options, "retry"), call.options.override))
    finally:
        say_farewell(_first_rung(ladder))
    standing = Standing.open(folder)
    call.answer = standing.record()
    last = results[-1] if results else None
    if last is None or last.success:
        tell_next(f"compare --ladder {standing.run_id}")
        return 0
    print(f"error: {one_line(f'rung {last.scale.value}: {last.reason}')}", file=sys.stderr)
    return 1


def _show_status(folder: Path) -> dict[str, Any]:
    from svend.pipeline.console import make_console
    from svend.pipeline.ladder.display import show_standing
    from svend.pipeline.ladder.standing import Standing

    standing = Standing.open(folder)
    show_standing(make_console(), standing)
    tell_next(f"compare --ladder {standing.run_id}")
    return standing.record()


def _show_dry_run(ladder: Ladder, name: str, folder: Path) -> dict[str, Any]:
    from svend.pipeline.console import make_console
    from svend.pipeline.ladder.below import find_below
    from svend.pipeline.ladder.display import plan_rungs, show_plan
    from svend.pipeline.ladder.standing import LADDER_FILE, Standing
    from svend.pipeline.progress import CountProgress

    history = [] if ladder.below is None else find_below(ladder.below, _first_rung(ladder))
    if (folder / LADDER_FILE).exists():
        history += Standing.open(folder).climbed()
    console = make_console()
    with CountProgress(console, "planned") as progress:
        plans = plan_rungs(ladder, history, lambda done, total: progress.advance(
            "rungs", done, total))
    show_plan(console, ladder, name, plans)
    return {"name": name, "rungs": [plan.record() for plan in plans]}


LADDER = Command(
    name="ladder",
    summary="climb from scale to scale, each predicted before it is trained",
    description="Climb from scale to scale: a run per rung below one run, its loss predicted "
    "before its first step, a verdict before the next begins. Stopped or killed, the same command "
    "goes on.",
    makes="a run per rung below one of its own, checkpoints, registered versions, ladder.json",
    notes="""\
any key of the ladder can be set too:
  --ladder.tokens_per_parameter 10   --ladder.stress.steps 200
  --ladder.rungs '{small: {training.learning_rate: 2e-3}}'
""",
    examples=(
        "svend ladder --ladder miniature --dry-run",
        "svend ladder --ladder miniature",
        "svend ladder status --ladder miniature --json",
        "svend ladder --start tiny --end large --dry-run",
        "svend ladder --start tiny --end large --retry",
    ),
    answer="name, run_id, attempts with loss, prediction and verdict; of --dry-run, rungs",
    takes=Takes.GROUPS,
    sections={"ladder": LadderConfig},
    add_options=_add_options,
    run=_run,
)
