"""`svend train`: one scale, as a tracked run."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from svend.command import Call, Command, Takes, complete, tell_loading, tell_next
from svend.errors import ConfigError, one_line
from svend.pipeline.config import load_config
from svend.pipeline.interruption import EXIT_INTERRUPTED
from svend.pipeline.sharing import add_nproc, share

if TYPE_CHECKING:
    from svend.pipeline.outcome import PipelineResult

RESUME = ("true", "false", "force")


def _add_options(parser: argparse.ArgumentParser) -> None:
    complete(parser.add_argument(
        "--resume", nargs="?", const="true", default="false", metavar="true|false|force",
        help="go on with the newest unfinished run of this experiment and scale; force: also where "
             "it would be another run, on record",
    ), RESUME)
    add_nproc(parser)
    complete(parser.add_argument(
        "--profile", nargs="?", const="true", metavar="true|false",
        help="trace three steps, and list the ten most expensive parts",
    ), ("true", "false"))


def _run(call: Call) -> int:
    options, overrides = call.options, call.overrides
    if options.resume not in RESUME:
        raise ConfigError(f"resume = {options.resume}: must be true, false or force")
    if options.profile is not None:
        overrides = [*overrides, ("training.profile", options.profile)]
    code = share(call, lambda: load_config(call.groups, overrides), once=True)
    if code is not None:
        return code
    load_config(call.groups, overrides)  # what does not fit is said at once
    tell_loading("torch and mlflow")
    from svend.pipeline.run_config import compose_run
    from svend.pipeline.runner import ScaleRunner

    runner = ScaleRunner(compose_run(call.groups, overrides), owns_process=True)
    result = runner.run(resume=options.resume != "false", force=options.resume == "force")
    call.answer = _answer_of(result)
    if result.success:
        _tell_next(result)
        return 0
    if result.interrupted and not result.interrupted_at_once:
        again = [] if options.resume != "false" else ["--resume"]
        tell_next("train", call.words(), *again)
    print(f"error: {one_line(result.reason)}", file=sys.stderr, flush=True)
    if result.interrupted_at_once:
        sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)  # not waiting for a save that is under way
    return EXIT_INTERRUPTED if result.interrupted else 1


def _tell_next(result: PipelineResult) -> None:
    registered = result.registered
    if registered is None:
        tell_next(f"compare {result.run_id}")
    elif "full" in registered.aliases:
        tell_next(f"promote --model {registered.name} --version {registered.version} "
                  "--to production")
    else:
        tell_next(f"serve models:/{registered.name}/{registered.version}")


def _answer_of(result: PipelineResult) -> dict[str, Any]:
    registered = result.registered
    return {
        "success": result.success, "reason": result.reason, "interrupted": result.interrupted,
        "scale": result.scale, "run_id": result.run_id, "steps": result.steps,
        "final_loss_nats": result.final_loss,
        "training_time_seconds": result.training_time_seconds,
        "checkpoint_dir": result.checkpoint_dir,
        "registered": None if registered is None else {
            "model": registered.name, "version": registered.version,
            "aliases": registered.aliases,
        },
    }


TRAIN = Command(
    name="train",
    summary="train one scale as a tracked run",
    description="Train one scale as a tracked run: plan, train, gate, save, register. What it will "
    "do is printed before the first step, and what does not fit is refused.",
    makes="a run in the tracking store, a folder of checkpoints, a registered version",
    examples=(
        "svend train",
        "svend train --scale small --training.learning_rate 1e-4",
        "svend train --data gsm8k --data.path ../gsm8k",
        "svend train --preset quick_test --training.max_steps 40 --json",
        "svend train --resume",
    ),
    answer="success, run_id, steps, final_loss_nats, checkpoint_dir, registered",
    takes=Takes.GROUPS,
    add_options=_add_options,
    run=_run,
)
