"""`svend compare`: its options, and what is called. Imports nothing heavy before it has to."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from svend.command import Call, Command, tell_loading
from svend.errors import ConfigError

DEFAULT_FOLDER = "comparison"

def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN",
                        help="a run's id, or that of the parent of runs; also several, by commas")
    parser.add_argument("--ladder", nargs="+", action="extend", default=[], metavar="NAME_OR_RUN",
                        help="a ladder's name, for its newest run, or its run's id")
    parser.add_argument("--experiment", metavar="NAME", help="every run of it that logged a loss")
    parser.add_argument("--out", default=DEFAULT_FOLDER, metavar="FOLDER",
                        help=f"where the report is written (default: {DEFAULT_FOLDER})")
    parser.add_argument("--gpu-hour-price", metavar="PRICE",
                        help="of one hour of one GPU, in whichever currency")


def _run(call: Call) -> int:
    known = call.options
    price = None if known.gpu_hour_price is None else _price(known.gpu_hour_price)
    runs, ladders = _split(known.runs), _split(known.ladder)
    tell_loading("mlflow and matplotlib")
    from svend.pipeline.compare.comparison import compare
    from svend.pipeline.compare.selection import Wanted

    call.answer = compare(
        Wanted(runs, ladders, known.experiment or None), Path(known.out or DEFAULT_FOLDER), price
    )
    return 0


def _split(words: Sequence[str]) -> list[str]:
    """Return what is named, one by one or by commas: `mlflow run` passes one value."""
    return [part.strip() for word in words for part in word.split(",") if part.strip()]


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not (math.isfinite(price) and price >= 0):
        raise ConfigError(f"gpu-hour-price = {text}: must be a number, 0 or more")
    return price


COMPARE = Command(
    name="compare",
    summary="one report of runs or ladders",
    description="Hold runs beside one another, or the rungs of ladders: losses, fit, predictions "
    "and what came true, gates, planned and measured, benchmarks, cost.",
    makes="a folder with comparison.html, tables and figures, and a run that holds them too",
    notes="""\
a run is named by its MLflow id, or by as much of it as no other id begins with; a ladder stands for
its rungs, the newest attempt of each. With nothing named it is the newest ladder of the store.
""",
    examples=(
        "svend compare --experiment svend",
        "svend compare --ladder miniature --gpu-hour-price 2.50",
        "svend compare 3f2a91 b07c44 --out small-against-medium",
        "svend compare",
    ),
    answer="report, folder, run_id, left_out, and runs with every column of comparison.csv",
    add_options=_add_options,
    run=_run,
)
