"""`svend predict`: the scaling law of any table of losses, and what it lets expect."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from svend.command import Call, Command, tell
from svend.errors import ConfigError


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE.csv", help="a row per measurement")
    parser.add_argument("--parameters", required=True, metavar="N", help="of the model to come")
    parser.add_argument("--tokens", required=True, metavar="D", help="that it is to be trained on")
    parser.add_argument("--loss", metavar="COLUMN",
                        help="the loss (default: the one column that ends in loss or "
                             "cross_entropy)")


def _run(call: Call) -> int:
    known = call.options
    parameters = _positive("parameters", known.parameters)
    tokens = _positive("tokens", known.tokens)
    from svend.pipeline.console import make_console
    from svend.pipeline.ladder.backtest import backtest_table
    from svend.planning.loss_table import read_points
    from svend.planning.scaling_law import backtest, predict

    points = read_points(Path(known.table), known.loss)
    tell(f"fitting L(N, D) to {len(points)} points, and again without each size")
    found = predict(points, parameters, tokens)
    table = backtest(points)
    call.answer = {**asdict(found), "points": len(points), "backtest": table.to_dict("records")}
    console = make_console()
    console.print(f"{len(points)} points of {len({p.rung for p in points})} sizes: "
                  f"L(N, D) = {found.law}", soft_wrap=True)
    console.print(backtest_table(table))
    console.print(f"N = {parameters:.4g}, D = {tokens:.4g}: loss {found.loss:.4f} "
                  f"({found.low:.4f} to {found.high:.4f} with 95%)", soft_wrap=True)
    return 0


def _positive(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} = {text}: must be a number above 0, such as 1.3e9")
    return value


PREDICT = Command(
    name="predict",
    summary="the loss of a model to come, from a table of losses",
    description="Fit the scaling law L(N, D) on a table of losses, predict with an interval, and "
    "say how far each size would have been missed.",
    makes="nothing",
    notes="""\
the table has a row per measurement: parameters (of blocks and head), tokens, a loss in nats per
token, and where a size has several runs, what tells them apart: run, rung, size,
chinchilla_multiple, rerun or seed. Of each run the row with the most tokens counts.
""",
    examples=(
        "svend predict ladder.csv --parameters 1.3e9 --tokens 2.6e10",
        "svend predict ladder.csv --parameters 3e9 --tokens 6e10 --loss c4_cross_entropy --json",
    ),
    answer="loss, low, high, law, points, backtest; losses in nats per token",
    add_options=_add_options,
    run=_run,
)
