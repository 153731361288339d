"""How far a scaling law was off where it had not looked, as a table."""

from __future__ import annotations

import pandas as pd
from rich.table import Table

from svend.pipeline.config import format_count


def backtest_table(backtest: pd.DataFrame) -> Table:
    """Return how far the law was off at each size that it had not seen, at each horizon."""
    table = Table(title="Each size predicted from the others", title_justify="left")
    for heading in ("parameters", "tokens", "measured", "predicted", "95% interval", "error",
                    "error from below"):
        table.add_column(heading, justify="right", overflow="fold")
    rows = backtest.to_dict("records")
    below = {(row["parameters"], row["tokens"], row["measured"]): row["error"]
             for row in rows if row["fitted_on"] == "below"}
    for row in rows:
        if row["fitted_on"] == "others":
            error = below.get((row["parameters"], row["tokens"], row["measured"]))
            table.add_row(
                format_count(int(row["parameters"])), format_count(int(row["tokens"])),
                f"{row['measured']:.4f}", f"{row['predicted']:.4f}",
                f"{row['low']:.4f} to {row['high']:.4f}", f"{row['error']:+.2%}",
                "" if error is None else f"{error:+.2%}",
            )
    return table
