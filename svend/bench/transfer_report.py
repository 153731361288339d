"""What an experiment on transfer showed: best rates, how they shift, a table and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from svend.bench.figures import begin_figure, write_figure
from svend.bench.transfer import Result

# The most that the best rate may move, in factors of two, as a size becomes four times as large.
LARGEST_SHIFT = 0.5


@dataclass(frozen=True)
class Curve:
    """The loss of one model against the learning rate.

    rates: ascending. means, spreads: of the held-out loss over seeds, in nats per token, the
    spread as a standard deviation; infinite where a seed diverged. best_log2: of the best rate.
    best_spread: its standard deviation over seeds. at_edge: the lowest loss is at an end of the
    grid, where the best rate is only known to lie there or beyond.
    """

    parametrisation: str
    width: int
    depth: int
    rates: tuple[float, ...]
    means: tuple[float, ...]
    spreads: tuple[float, ...]
    best_log2: float
    best_spread: float
    best_loss: float
    at_edge: bool


@dataclass(frozen=True)
class Shift:
    """How far the best rate moves, in log2, per four times the size, fitted by least squares."""

    parametrisation: str
    varied: str
    per_four_times: float
    at_edge: bool

    @property
    def holds(self) -> bool:
        """Whether the rate transfers, as far as the grid can tell."""
        return abs(self.per_four_times) <= LARGEST_SHIFT and not self.at_edge


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float, bool]:
    """Return log2 of the best rate, the loss there, and whether it is at the edge of the grid.

    The vertex of the parabola through the lowest loss and its two neighbours, over log2 of the
    rate. Where the lowest is at an end or beside a run that diverged, it is that point.
    """
    lowest = min(range(len(losses)), key=lambda i: losses[i])
    at_edge = lowest in (0, len(losses) - 1)
    near = slice(max(0, lowest - 1), lowest + 2)
    x, y = np.log2(rates[near]), np.array(losses[near])
    if at_edge or not np.isfinite(y).all():
        return math.log2(rates[lowest]), losses[lowest], at_edge
    a, b, c = np.polyfit(x, y, 2)
    vertex = float(-b / (2 * a)) if a > 0 else math.log2(rates[lowest])
    return vertex, float(np.polyval((a, b, c), vertex)), False


def curves_of(results: Sequence[Result]) -> list[Curve]:
    """Return a curve for each model, by parametrisation, width and depth."""
    losses: dict[tuple[str, int, int], dict[float, dict[int, float]]] = {}
    for result in results:
        case = result.case
        model = losses.setdefault((case.parametrisation, case.width, case.depth), {})
        loss = math.inf if result.loss is None else result.loss
        model.setdefault(case.learning_rate, {})[case.seed] = loss
    return [_curve(*key, by_rate) for key, by_rate in sorted(losses.items())]


def _curve(
    parametrisation: str, width: int, depth: int, by_rate: dict[float, dict[int, float]]
) -> Curve:
    rates = sorted(by_rate)
    values = [list(by_rate[rate].values()) for rate in rates]
    means = [statistics.fmean(v) for v in values]
    spreads = [
        statistics.stdev(v) if len(v) > 1 and all(map(math.isfinite, v)) else
        (0.0 if all(map(math.isfinite, v)) else math.inf)
        for v in values
    ]
    best, best_loss, at_edge = best_rate(rates, means)
    seeds = sorted(set.intersection(*(set(by_rate[rate]) for rate in rates)))
    bests = [best_rate(rates, [by_rate[rate][seed] for rate in rates])[0] for seed in seeds]
    return Curve(
        parametrisation, width, depth, tuple(rates), tuple(means), tuple(spreads), best,
        statistics.stdev(bests) if len(bests) > 1 else 0.0, best_loss, at_edge,
    )


def shifts_of(curves: Sequence[Curve]) -> list[Shift]:
    """Return how the best rate shifts with width and with depth, where either varies."""
    shifts = []
    for parametrisation in sorted({curve.parametrisation for curve in curves}):
        own = [curve for curve in curves if curve.parametrisation == parametrisation]
        base = min(own, key=lambda curve: (curve.width, curve.depth))
        families = {
            "width": [curve for curve in own if curve.depth == base.depth],
            "depth": [curve for curve in own if curve.width == base.width],
        }
        for varied, family in families.items():
            if len(family) > 1:
                sizes = np.log2([getattr(curve, varied) for curve in family])
                slope = np.polyfit(sizes, [curve.best_log2 for curve in family], 1)[0]
                at_edge = any(curve.at_edge for curve in family)
                shifts.append(Shift(parametrisation, varied, float(2 * slope), at_edge))
    return shifts


def transferred_excess(curve: Curve, base: Curve) -> float:
    """Return how much more loss the base's best rate gives a model than its own best, as a share.

    The loss at that rate lies on the straight line between its neighbours on the grid.
    """
    at_base = float(np.interp(base.best_log2, np.log2(curve.rates), curve.means))
    lowest = min(curve.best_loss, at_base)
    return at_base / lowest - 1


def transfer_table(curves: Sequence[Curve]) -> Table:
    """Return the loss of each model at each rate, and where it is lowest."""
    table = Table(title="Held-out loss, mean over seeds (standard deviation)", title_justify="left")
    table.add_column("parametrisation", no_wrap=True)
    rates = sorted({rate for curve in curves for rate in curve.rates})
    for name in ("shape", *(f"{rate:g}" for rate in rates), "best rate", "loss", "excess"):
        table.add_column(name, justify="right", overflow="fold")
    for curve in curves:
        base = next(c for c in curves if c.parametrisation == curve.parametrisation)
        known = dict(zip(curve.rates, zip(curve.means, curve.spreads, strict=True), strict=True))
        losses = [
            "" if rate not in known else "diverged" if not math.isfinite(known[rate][0])
            else f"{known[rate][0]:.3f} ({known[rate][1]:.3f})"
            for rate in rates
        ]
        edge = " (edge)" if curve.at_edge else ""
        table.add_row(
            curve.parametrisation, f"{curve.width}x{curve.depth}", *losses,
            f"{2**curve.best_log2:.2g} (x{2**curve.best_spread:.2f}){edge}",
            f"{curve.best_loss:.3f}", f"{transferred_excess(curve, base):.1%}",
        )
    return table


def describe_shifts(shifts: Sequence[Shift]) -> list[str]:
    """Return a line for each shift, with whether the rate transfers."""
    lines = []
    for shift in shifts:
        told = "transfers" if shift.holds else "does not transfer"
        if shift.at_edge:
            told = "not known: a best rate is at the edge of the grid"
        lines.append(
            f"{shift.parametrisation}: the best rate moves by {shift.per_four_times:+.2f} factors "
            f"of two per four times the {shift.varied}; {told}"
        )
    return lines


def plot_transfer(curves: Sequence[Curve], path: Path) -> None:
    """Draw loss against rate, a panel for each parametrisation and for width and depth.

    Bands are a standard deviation over seeds to either side; a dot marks the best rate.
    """
    names = sorted({curve.parametrisation for curve in curves})
    base_width = min(curve.width for curve in curves)
    base_depth = min(curve.depth for curve in curves)
    figure, axes = begin_figure((4 * len(names), 6), 2, len(names), sharex=True, sharey=True)
    for column, name in enumerate(names):
        for row, (varied, fixed, value) in enumerate(
            (("width", "depth", base_depth), ("depth", "width", base_width))
        ):
            axis = axes[row][column]
            for curve in curves:
                if curve.parametrisation != name or getattr(curve, fixed) != value:
                    continue
                known = np.isfinite(curve.means)  # a line breaks where a seed diverged
                means, spreads = (
                    np.where(known, values, np.nan) for values in (curve.means, curve.spreads)
                )
                (line,) = axis.plot(curve.rates, means, label=f"{varied} {getattr(curve, varied)}")
                axis.fill_between(
                    curve.rates, means - spreads, means + spreads, color=line.get_color(), alpha=0.2
                )
                axis.plot(2**curve.best_log2, curve.best_loss, "o", color=line.get_color())
            axis.set_xscale("log", base=2)
            axis.legend(fontsize=8)
            axis.set_title(f"{name}, {varied}", fontsize=10)
        axes[1][column].set_xlabel("learning rate")
    for row in (0, 1):
        axes[row][0].set_ylabel("held-out loss")
    write_figure(figure, path)
