"""The figures of a comparison, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd

from svend.pipeline.compare.predictions import Fit, came_true, span
from svend.pipeline.compare.runs import benchmark_names
from svend.planning.scaling_law import predict

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# 830 pixels wide, with letters that are still read where it is shown on a phone at 360.
SIZE_INCHES, DOTS_PER_INCH = (5.2, 3.9), 160
MOST_IN_LEGEND = 10
LONGEST_NAME = 24  # characters; a longer one leaves a figure no room
TRAIN_POINTS = 400  # of a curve; more than that no one sees
LAW_POINTS = 12
BEYOND = 2.0  # the law is drawn up to so many times the tokens that were measured


@dataclass(frozen=True)
class Figure:
    """A figure that was drawn. `text` says what is seen, for those who do not see it too."""

    name: str
    title: str
    text: str


@dataclass(frozen=True)
class Comparison:
    """What figures and page are made of."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    gates: pd.DataFrame
    fit: Fit
    left_out: list[str]
    gpu_hour_price: float | None


def draw_figures(comparison: Comparison, folder: Path) -> list[Figure]:
    """Draw all for which something was logged into a folder; return those in the page's order."""
    figures = []
    for figure, draw in DRAWN.items():
        canvas, axis = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
        try:
            if draw(axis, comparison):
                _save(canvas, folder / f"{figure.name}.png")
                figures.append(figure)
        finally:
            plt.close(canvas)
    return figures


def _save(canvas: Canvas, path: Path) -> None:
    # Without the time and the version: equal comparisons give equal files.
    canvas.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})


def _colours(runs: pd.DataFrame) -> dict[str, tuple[float, ...]]:
    """Return a colour for each run: by the order of size, dark to light."""
    names = [str(run) for run in runs["run"]]
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.8, len(names)))
    return {name: tuple(shade) for name, shade in zip(names, shades, strict=True)}


def _words(text: str) -> str:
    """Return a name as matplotlib shows it: no formula, no letter that its font lacks, not long."""
    short = text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3]}..."
    return short.encode("latin-1", "replace").decode("latin-1").replace("$", r"\$").lstrip("_")


def _legend(axis: Axes, entries: int) -> None:
    if entries <= MOST_IN_LEGEND:
        axis.legend(fontsize=8, frameon=False)


def _loss_against(column: str, unit: str) -> Callable[[Axes, Comparison], bool]:
    def draw(axis: Axes, comparison: Comparison) -> bool:
        curves = comparison.curves
        curves = curves[(curves[column] > 0) & np.isfinite(curves["loss"])]
        if curves.empty:
            return False
        for run, colour in _colours(comparison.runs).items():
            for kind, style in (
                ("train", {"linewidth": 0.8, "alpha": 0.35}),
                ("heldout", {"marker": "o", "markersize": 3.5, "linewidth": 1.4}),
                ("horizon", {"marker": "*", "markersize": 9, "linestyle": ""}),
            ):
                rows = curves[(curves["run"] == run) & (curves["kind"] == kind)]
                rows = rows.iloc[:: max(1, len(rows) // TRAIN_POINTS)]
                label = _words(run) if kind == "heldout" else None
                axis.plot(rows[column], rows["loss"], color=colour, label=label, **style)
        axis.set(xscale="log", xlabel=unit, ylabel="loss, nats per token")
        axis.grid(alpha=0.25)
        _legend(axis, len(comparison.runs))
        return True

    return draw


def _fit(axis: Axes, comparison: Comparison) -> bool:
    fit = comparison.fit
    if fit.law is None:
        return False
    first, last = span(fit.points)
    tokens = np.geomspace(first, last * BEYOND, LAW_POINTS)
    for run, colour in _colours(comparison.runs).items():
        points = [point for point in fit.points if point.rung == run]
        if not points:
            continue
        expected = [predict(fit.points, points[0].parameters, float(t)) for t in tokens]
        axis.fill_between(tokens, [e.low for e in expected], [e.high for e in expected],
                          color=colour, alpha=0.15, linewidth=0)
        axis.plot(tokens, [e.loss for e in expected], color=colour, linestyle="--", linewidth=1)
        axis.plot([p.tokens for p in points], [p.loss for p in points], "o", color=colour,
                  markersize=5, label=f"{_words(run)}, N = {points[0].parameters:.3g}")
    axis.set(xscale="log", xlabel="tokens", ylabel="held-out loss at the horizon")
    axis.grid(alpha=0.25)
    _legend(axis, len({point.rung for point in fit.points}))
    return True


def _predicted(axis: Axes, comparison: Comparison) -> bool:
    rows = came_true(comparison.runs).dropna(subset=["low", "high"])
    if rows.empty:
        return False
    places = range(len(rows))
    axis.errorbar(
        places, rows["predicted"], fmt="_", color="tab:gray", markersize=16, capsize=7,
        yerr=_bars(rows["predicted"], rows["low"], rows["high"]),
        label="predicted, 95% interval",
    )
    for state, colour in (("inside", "tab:green"), ("above", "tab:red"), ("below", "tab:blue")):
        of_state = [(place, loss) for place, loss, where in zip(
            places, rows["measured"], rows["came_true"], strict=True) if where == state]
        if of_state:
            axis.plot(*zip(*of_state, strict=True), "o", color=colour,
                      label=f"measured, {state} the interval" if state == "inside"
                      else f"measured, {state} it")
    _name_places(axis, rows["run"])
    axis.set_ylabel("held-out loss")
    axis.legend(fontsize=8, frameon=False)
    return True


def _planned(names: Sequence[tuple[str, str, str]]) -> Callable[[Axes, Comparison], bool]:
    """Return what draws measured over planned as bars beside a line at 1."""
    def draw(axis: Axes, comparison: Comparison) -> bool:
        runs = comparison.runs
        drawn = [(column, label, colour) for column, label, colour in names
                 if runs[column].notna().any()]
        if not drawn:
            return False
        width = 0.8 / len(drawn)
        for number, (column, label, colour) in enumerate(drawn):
            places = np.arange(len(runs)) - 0.4 + width * (number + 0.5)
            bars = axis.bar(places, runs[column].fillna(0), width, label=label, color=colour)
            axis.bar_label(bars, [f"{ratio:.2f}" if np.isfinite(ratio) else "not\nlogged"
                                  for ratio in runs[column]], fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.margins(y=0.2)
        _name_places(axis, runs["run"])
        axis.set_ylabel("measured / planned")
        axis.legend(fontsize=8, frameon=False, ncols=len(drawn))
        return True

    return draw


def _accuracy(axis: Axes, comparison: Comparison) -> bool:
    runs = comparison.runs
    names = [name for name in benchmark_names(runs)
             if runs[f"eval/{name}"].dropna().between(0, 1).all()
             and runs[f"eval/{name}/low_95"].notna().any()]
    if not names:
        return False
    colours = mpl.colormaps["tab10"]
    for number, name in enumerate(names):
        rows = runs.dropna(subset=[f"eval/{name}/low_95", f"eval/{name}/high_95"])
        offset = (number - (len(names) - 1) / 2) * 0.5 / len(names)
        value = rows[f"eval/{name}"]
        axis.errorbar(
            [list(runs["run"]).index(run) + offset for run in rows["run"]], value, fmt="o",
            yerr=_bars(value, rows[f"eval/{name}/low_95"], rows[f"eval/{name}/high_95"]),
            capsize=4, color=colours(number % 10), label=_words(name),
        )
    _name_places(axis, runs["run"])
    axis.set(ylabel="share, 95% interval", ylim=(-0.03, 1.03))
    axis.grid(axis="y", alpha=0.25)
    _legend(axis, len(names))
    return True


def _bars(value: pd.Series, low: pd.Series, high: pd.Series) -> list[pd.Series]:
    # Rounding may leave a bound on the wrong side of its value.
    return [(value - low).clip(lower=0), (high - value).clip(lower=0)]


def _name_places(axis: Axes, names: pd.Series) -> None:
    turned = len(names) > 3
    axis.set_xticks(range(len(names)), [_words(str(name)) for name in names],
                    rotation=45 if turned else 0, ha="right" if turned else "center")


DRAWN: dict[Figure, Callable[[Axes, Comparison], bool]] = {
    Figure("loss_by_tokens", "Loss against tokens",
           "Thin: training loss of a batch. Dots: held-out loss. Stars: held-out loss at horizons, "
           "where the learning rate has decayed; these count padding as tokens, as a plan does. "
           "Dark is the smallest model, light the largest."):
        _loss_against("tokens", "tokens"),
    Figure("loss_by_flops", "Loss against FLOPs",
           "The same losses against the model FLOPs that training has spent, by formula."):
        _loss_against("flops", "training FLOPs"),
    Figure("fit", "The law through the horizons",
           "Dots: held-out loss at horizons. Dashed: the fitted law at each model's N. Shaded: the "
           "95% prediction interval, on to twice the tokens that were measured."): _fit,
    Figure("predicted", "Predicted, and what came true",
           "Grey: the loss that was predicted before the rung was trained, with its 95% interval. "
           "Dots: the loss that was measured."): _predicted,
    Figure("planned", "Measured over planned",
           "1 is as planned. Above 1: faster than planned for speed, more than planned for memory "
           "and time."):
        _planned((("speed_ratio", "tokens/s", "tab:blue"),
                  ("memory_ratio", "peak memory", "tab:orange"),
                  ("seconds_ratio", "time", "tab:gray"))),
    Figure("accuracy", "Benchmarks",
           "Share of answers that are right, with the 95% interval."): _accuracy,
}
