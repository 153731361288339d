"""`svend predict`: the scaling law of any table of losses, and what it lets expect."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from svend.errors import ConfigError

HELP = """\
the table has a row per measurement: parameters (of blocks and head), tokens, a loss in nats per
token, and where a size has several runs, what tells them apart: run, rung, size,
chinchilla_multiple, rerun or seed. Of each run the row with the most tokens counts.

examples:
  python -m svend predict ladder.csv --parameters 1.3e9 --tokens 2.6e10
  python -m svend predict ladder.csv --parameters 3e9 --tokens 6e10 --loss c4_cross_entropy --json
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("table", metavar="TABLE.csv")
    parser.add_argument("--parameters", required=True, metavar="N", help="of the model to come")
    parser.add_argument("--tokens", required=True, metavar="D", help="that it is to be trained on")
    parser.add_argument("--loss", metavar="COLUMN",
                        help="the loss; default: the one column that ends in loss or cross_entropy")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(known: argparse.Namespace) -> None:
    """Print the prediction, the law and its backtest. Raises UserError where there can be none."""
    parameters = _positive("parameters", known.parameters)
    tokens = _positive("tokens", known.tokens)
    from svend.planning.loss_table import read_points
    from svend.planning.scaling_law import backtest, predict

    points = read_points(Path(known.table), known.loss)
    found = predict(points, parameters, tokens)
    table = backtest(points)
    if known.json:
        told = {**asdict(found), "points": len(points), "backtest": table.to_dict("records")}
        print(json.dumps(told, indent=1))
        return
    from svend.pipeline.ladder.display import backtest_table
    from svend.pipeline.report import make_console

    console = make_console()
    console.print(f"{len(points)} points of {len({p.rung for p in points})} sizes: "
                  f"L(N, D) = {found.law}", soft_wrap=True)
    console.print(backtest_table(table))
    console.print(f"N = {parameters:.4g}, D = {tokens:.4g}: loss {found.loss:.4f} "
                  f"({found.low:.4f} to {found.high:.4f} with 95%)", soft_wrap=True)


def _positive(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} = {text}: must be a number above 0, such as 1.3e9")
    return value
