"""`svend chaos`: runs that are killed, and what became of them."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from svend.command import Call, Command, Takes, tell, tell_loading
from svend.errors import UserError


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=20, metavar="N",
                        help="runs that are killed (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, metavar="PATH",
                        help="where to work, and keep what differed (default: a temporary one)")


def _run(call: Call) -> int:
    """Kill and compare, a line for each run. Raises UserError if one ended otherwise."""
    known = call.options
    if known.kills < 1:
        raise UserError(f"--kills {known.kills}: must be at least 1")
    tell_loading("torch and mlflow")
    from svend.bench.chaos import Chaos, Moment

    folder = known.folder or Path(tempfile.mkdtemp(prefix="svend-chaos-"))
    chaos = Chaos(folder.absolute(), call.overrides, known.seed)
    tell(f"in {folder}: a run that is never killed, then {known.kills} that are")
    tell("training the run that is never killed, twice: the first fills the caches")
    reference = chaos.train_reference()
    tell(f"its end state is {reference.sha256[:16]}, of {len(reference.parts)} parts")
    same = 0
    for number in range(known.kills):
        told = chaos.train_killed(number, reference)
        same += not told.differences
        moments = ", then ".join(
            f"{moment.value if moment is Moment.ANY else 'while ' + moment.value} "
            f"({seconds:.1f} s, newest checkpoint {step})"
            for moment, seconds, step in zip(told.moments, told.seconds, told.resumed_from,
                                             strict=True)
        )
        end = "the same end" if not told.differences else (
            f"ANOTHER END: {', '.join(told.differences[:5])}"
        )
        tell(f"{number + 1}/{known.kills} killed {moments}: {end}")
    tell(f"{same} of {known.kills} ended as the run that was never killed")
    if same < known.kills:
        raise UserError(f"{known.kills - same} of {known.kills} ended otherwise; they are kept "
                        f"in {folder}")
    return 0


CHAOS = Command(
    name="chaos",
    summary="kill runs and see whether they end the same",
    description="Train a small run once, and then again and again: killed by SIGKILL at a random "
    "moment, while saving, while evaluating, while registering, and resumed. Weights, optimizer, "
    "schedule, random state, place in the data, every logged point, verdicts, registered versions "
    "and aliases must be those of the run that was never killed.",
    makes="a line per kill; a folder with what differed, or the one of --folder",
    notes="any value of the configuration can be set by its dotted key.",
    examples=(
        "svend chaos --kills 4 --training.compile off --training.max_steps 40",
        "svend chaos",
    ),
    takes=Takes.KEYS,
    add_options=_add_options,
    run=_run,
)
