"""Losses of runs as a table, and the points of a scaling law in it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from svend.errors import UserError, reason_of
from svend.planning.scaling_law import Point

PARAMETERS, TOKENS = "parameters", "tokens"
LOSS_ENDINGS = ("loss", "cross_entropy")
# What tells the runs of one size apart.
RUN_COLUMNS = ("run", "rung", "size", "chinchilla_multiple", "rerun", "seed")


def read_points(path: Path, loss_column: str | None = None) -> list[Point]:
    """Return the end of each run in a CSV table, where its learning rate has decayed.

    The table has columns parameters and tokens, a loss, and any of RUN_COLUMNS; of each run the row
    with the most tokens counts. Raises UserError for a table without them, or with what is no
    number.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as CSV ({reason_of(error)})") from None
    loss_column = loss_column or _find_loss(table, path)
    for column in (PARAMETERS, TOKENS, loss_column):
        if column not in table:
            raise UserError(f"{path}: has no column {column}; it has {', '.join(table.columns)}")
        values = pd.to_numeric(table[column], errors="coerce")
        bad = ~((values > 0) & (values < float("inf")))
        if bad.any():
            row = bad.tolist().index(True)
            raise UserError(f"{path}: line {row + 2}: {column} = {table[column].iloc[row]}: must "
                            "be a number above 0")
        table[column] = values.astype(float)
    told_apart = [PARAMETERS, *(name for name in RUN_COLUMNS if name in table)]
    ends = table.sort_values(TOKENS).groupby(told_apart, sort=False, dropna=False).tail(1)
    return [
        Point(parameters, tokens, loss, f"{parameters:.4g}")
        for parameters, tokens, loss in zip(
            ends[PARAMETERS], ends[TOKENS], ends[loss_column], strict=True
        )
    ]


def _find_loss(table: pd.DataFrame, path: Path) -> str:
    found = [str(name) for name in table.columns if str(name).endswith(LOSS_ENDINGS)]
    if len(found) != 1:
        which = f"several: {', '.join(found)}" if found else f"none of {', '.join(table.columns)}"
        raise UserError(f"{path}: which column is the loss is not plain ({which}); name it with "
                        "--loss")
    return found[0]
