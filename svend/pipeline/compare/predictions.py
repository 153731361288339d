"""The scaling law through the runs' horizons, and what was predicted beside what came true."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from svend.errors import UserError
from svend.planning.scaling_law import Point, ScalingLaw, backtest, fit_law, relative_error

# What must be alike for losses to be held against one another, and what it is called.
COMPARED = {
    "data_fingerprint": "data fingerprint", "tokenizer_sha256": "tokenizer",
    "schedule": "schedule", "heldout": "held-out sample",
}
NOT_AT_ITS_END = "not at its end"
DIGEST_CHARACTERS = 12
NO_HORIZONS = ("no run logged horizons (horizon/heldout_loss), the points of equally decayed "
               "schedules that a law is fitted to; the rungs of a ladder log them")


@dataclass(frozen=True)
class Fit:
    """A law and the points that it is fitted to, or why there is none.

    tested: how well each rung is predicted from others, as scaling_law.backtest has it.
    """

    points: list[Point]
    law: ScalingLaw | None
    why_not: str
    tested: pd.DataFrame


def fit_runs(frame: pd.DataFrame, curves: pd.DataFrame) -> Fit:
    """Fit the law to the horizons of the runs, if they can be held against one another."""
    horizons = curves[curves["kind"] == "horizon"].dropna(subset=["tokens", "loss"])
    parameters = frame.set_index("run")["matrix_parameters"]
    points = [
        Point(float(parameters[row["run"]]), float(row["tokens"]), float(row["loss"]),
              str(row["run"]))
        for row in horizons.to_dict("records") if math.isfinite(parameters[row["run"]])
    ]
    if not points:
        return Fit([], None, NO_HORIZONS, pd.DataFrame())
    fitted = frame[frame["run"].isin({point.rung for point in points})]
    others = differences(fitted)
    if others:
        return Fit(points, None, f"the runs differ in {' and '.join(others)}", pd.DataFrame())
    try:
        return Fit(points, fit_law(points), "", backtest(points))
    except UserError as error:
        return Fit(points, None, str(error), pd.DataFrame())


def differences(frame: pd.DataFrame) -> dict[str, dict[str, list[str]]]:
    """Return what differs between runs: which runs have which value, by what it is called."""
    found = {}
    for column, name in COMPARED.items():
        having: dict[str, list[str]] = {}
        for run, value in zip(frame["run"], frame[column], strict=True):
            having.setdefault(shown_value(column, value), []).append(str(run))
        if len(having) > 1:
            found[name] = having
    return found


def shown_value(column: str, value: object) -> str:
    """Return a compared value as a person reads it; a digest is cut short."""
    if not isinstance(value, str):
        return "not logged"
    digest = column in ("data_fingerprint", "tokenizer_sha256")
    return value[:DIGEST_CHARACTERS] if digest else value


def came_true(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each run that a ladder predicted: what was, and where the loss came out.

    What is predicted is the loss at the end of the plan. Measured is that of the horizon there, or
    the held-out loss of a run without horizons that finished.
    """
    rows = frame[frame["predicted_loss"].notna()]
    at_end = rows["horizon_tokens"] >= rows["planned_tokens"]
    finished = rows["horizon_tokens"].isna() & (rows["status"] == "FINISHED")
    measured = rows["horizon_loss"].where(at_end, rows["heldout_loss"].where(finished))
    return pd.DataFrame({
        "run": rows["run"], "predicted": rows["predicted_loss"], "low": rows["predicted_low"],
        "high": rows["predicted_high"], "measured": measured,
        "error": relative_error_of(measured, rows["predicted_loss"]),
        "came_true": [
            _where(loss, low, high) for loss, low, high in zip(
                measured, rows["predicted_low"], rows["predicted_high"], strict=True)
        ],
        "verdict": rows["ladder_verdict"].fillna("none yet"),
    })


def relative_error_of(measured: pd.Series, predicted: pd.Series) -> list[float]:
    """Return by which share of the prediction each measured loss lies above it."""
    return [relative_error(m, p) for m, p in zip(measured, predicted, strict=True)]


def _where(loss: float, low: float, high: float) -> str:
    if math.isnan(loss):
        return NOT_AT_ITS_END
    if math.isnan(low) or math.isnan(high):
        return "no interval"
    return "inside" if low <= loss <= high else "above" if loss > high else "below"


def span(points: Sequence[Point]) -> tuple[float, float]:
    """Return the fewest and the most tokens of the points."""
    tokens = [point.tokens for point in points]
    return min(tokens), max(tokens)
