"""What became of ladders with planted faults, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from svend.bench.faults import Outcome
from svend.pipeline.console import make_console


def is_as_it_should(outcome: Outcome) -> bool:
    """Whether a fault was caught in its own rung, and a healthy ladder not stopped."""
    caught_at = outcome.ended_at if outcome.caught_by else ""
    return caught_at == outcome.planted_at and not outcome.caught_by.startswith("error")


def show_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Print a row per ladder: its errors against the predictions, and what stopped it where."""
    console = make_console()
    table = Table(title="Ladders with and without a fault", title_justify="left")
    for heading in ("fault", "seed", "errors of the rungs", "looks at the last", "ended at",
                    "at share", "stopped by"):
        table.add_column(heading, overflow="fold")
    for outcome in sorted(outcomes, key=lambda o: (o.fault != "none", o.fault, o.seed)):
        rungs = list(outcome.rungs.values())
        errors = [f"{rung['error']:+.2%}" for rung in rungs if rung["error"] is not None]
        looks = [f"{error:+.1%}" for error in rungs[-1]["looks"]] if rungs else []
        table.add_row(
            outcome.fault, str(outcome.seed), " ".join(errors), " ".join(looks), outcome.ended_at,
            f"{outcome.share:.0%}" if outcome.caught_by else "",
            outcome.caught_by or "not stopped",
        )
    console.print(table)
    right = sum(map(is_as_it_should, outcomes))
    console.print(f"{right} of {len(outcomes)} as it should be")
