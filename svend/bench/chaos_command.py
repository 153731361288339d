"""`svend chaos`: its options, and what it prints."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from svend.errors import UserError

HELP = """\
a small run is trained once, and then again and again: killed by SIGKILL at a random moment, while
saving, while evaluating, while registering, and resumed. Weights, optimizer, schedule, random
state, place in the data, every logged point, verdicts, registered versions and aliases must be
those of the run that was never killed. Any value of the configuration can be set by its dotted
key.

examples:
  python -m svend chaos
  python -m svend chaos --kills 4 --training.compile off --training.max_steps 40
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `svend chaos`."""
    parser.add_argument("--kills", type=int, default=20, metavar="N",
                        help="runs that are killed (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, metavar="PATH",
                        help="where to work, and keep what differed (default: a temporary one)")


def run(known: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> None:
    """Kill and compare, a line for each run. Raises UserError if one ended otherwise."""
    if known.kills < 1:
        raise UserError(f"--kills {known.kills}: must be at least 1")
    print("starting: loading torch and mlflow", flush=True)
    from svend.bench.chaos import Chaos, Moment

    folder = known.folder or Path(tempfile.mkdtemp(prefix="svend-chaos-"))
    chaos = Chaos(folder.absolute(), overrides, known.seed)
    print("training the run that is never killed, twice: the first fills the caches", flush=True)
    reference = chaos.train_reference()
    print(f"its end state is {reference.sha256[:16]}, of {len(reference.parts)} parts", flush=True)
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
        print(f"{number + 1}/{known.kills} killed {moments}: {end}", flush=True)
    print(f"{same} of {known.kills} ended as the run that was never killed")
    if same < known.kills:
        raise UserError(f"{known.kills - same} of {known.kills} ended otherwise; they are kept "
                        f"in {folder}")
