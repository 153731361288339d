"""A benchmark as a person reads it: a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from svend.bench.figures import begin_figure, write_figure
from svend.bench.train import Comparison


def comparison_table(comparison: Comparison) -> Table:
    """Return the table of one shape; `ours` is how many times as fast as the line Svend is."""
    table = Table(
        title=f"{comparison.scale} {comparison.shape} "
              f"(matrix peak {comparison.matmul_peak_flops / 1e9:,.0f} GFLOP/s)",
        title_justify="left",
    )
    for heading in ("", "tok/s", "ours", "GFLOP/s", "peak", "GB", "cold s", "warm s"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for timing in comparison.timings:
        table.add_row(
            timing.contestant, f"{timing.median:,.0f}", f"{timing.ratio_to_ours:.2f}x",
            f"{timing.flops_per_second / 1e9:,.0f}", f"{timing.peak_fraction:.2f}",
            f"{timing.peak_memory_gb:.2f}", f"{timing.cold_first_step_seconds:.1f}",
            f"{timing.warm_first_step_seconds:.1f}",
        )
    return table


def plot_comparisons(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw tokens per second of every contestant at every shape, as bars."""
    figure, axes = begin_figure((3.2 * len(comparisons), 3.4), columns=len(comparisons))
    for axis, comparison in zip(axes[0], comparisons, strict=True):
        names = [timing.contestant for timing in comparison.timings]
        medians = [timing.median for timing in comparison.timings]
        bars = axis.bar(names, medians, color=["tab:blue" if n.startswith("svend") else "tab:gray"
                                               for n in names])
        axis.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axis.set_title(f"{comparison.scale} {comparison.shape}", fontsize=10)
        axis.tick_params(axis="x", rotation=45)
    axes[0][0].set_ylabel("tokens per second")
    write_figure(figure, path, dpi=150)
