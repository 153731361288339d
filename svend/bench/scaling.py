"""How the step's speed and memory change with batch, length and depth."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from svend.bench.figures import begin_figure, write_figure
from svend.bench.spec import Spec
from svend.bench.train import Worker, make_spec
from svend.pipeline.config import ModelConfig
from svend.planning.flops import train_flops_per_token

ROUNDS, STEPS = 3, 2
# At a batch of 8 and 512 tokens unless varied. Long rows are fewer: every length has 4,096 tokens.
BATCHES = (1, 2, 4, 8, 16)
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
LAYERS = (2, 4, 8, 16)
TOKENS = 4096


@dataclass(frozen=True)
class Point:
    """One measurement: what was varied, the step's size, and what it took."""

    varied: str
    value: int
    tokens: int
    flops_per_token: int
    seconds: float
    peak_memory_gb: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def measure_scaling(
    model: ModelConfig, compiled: bool, report: Callable[[str], None]
) -> list[Point]:
    """Time our own step alone at each batch, length and depth, in a process of its own each."""
    cases = [("batch", n, model, n, 512) for n in BATCHES]
    cases += [("length", n, model, TOKENS // n, n) for n in LENGTHS]
    cases += [
        ("layers", n, dataclasses.replace(model, num_hidden_layers=n), 8, 512) for n in LAYERS
    ]
    points = []
    with tempfile.TemporaryDirectory() as cache:
        for varied, value, shaped, batch_size, length in cases:
            report(f"{varied} {value}")
            spec = make_spec(shaped, batch_size, length, None)
            seconds, peak_gb = _time(spec, compiled, cache)
            points.append(Point(
                varied, value, batch_size * length, train_flops_per_token(shaped, length),
                seconds, peak_gb,
            ))
    return points


def _time(spec: Spec, compiled: bool, cache: str) -> tuple[float, float]:
    worker = Worker("svend" if compiled else "svend-eager", sys.executable, spec, cache)
    try:
        worker.step(1)
        seconds = statistics.median(worker.step(STEPS)["seconds"] / STEPS for _ in range(ROUNDS))
        return seconds, worker.stop()["peak_bytes"] / 1e9
    finally:
        worker.kill()


def scaling_table(points: Sequence[Point]) -> Table:
    """Return a table with a line for each measurement."""
    table = Table(title="How the step scales", title_justify="left")
    for heading in ("varied", "", "tokens", "ms", "tok/s", "GFLOP/s", "GB"):
        table.add_column(
            heading, justify="left" if heading == "varied" else "right", overflow="fold"
        )
    for point in points:
        table.add_row(
            point.varied, f"{point.value:,}", f"{point.tokens:,}", f"{1e3 * point.seconds:,.0f}",
            f"{point.tokens_per_second:,.0f}",
            f"{point.tokens_per_second * point.flops_per_token / 1e9:,.0f}",
            f"{point.peak_memory_gb:.2f}",
        )
    return table


def plot_scaling(points: Sequence[Point], path: Path) -> None:
    """Draw speed and memory against each of the varied sizes."""
    kinds = list(dict.fromkeys(point.varied for point in points))
    figure, axes = begin_figure((3.4 * len(kinds), 5), 2, len(kinds), sharex="col")
    for column, kind in enumerate(kinds):
        of_kind = [point for point in points if point.varied == kind]
        values = [point.value for point in of_kind]
        above, below = axes[0][column], axes[1][column]
        above.plot(values, [point.tokens_per_second for point in of_kind], "o-")
        below.plot(values, [point.peak_memory_gb for point in of_kind], "o-", color="tab:orange")
        for axis in (above, below):
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
        below.set_xlabel(kind)
    axes[0][0].set_ylabel("tokens per second")
    axes[1][0].set_ylabel("peak memory, GB")
    write_figure(figure, path, dpi=150)


def to_json(points: Sequence[Point]) -> str:
    """Return the measurements as JSON."""
    return json.dumps([asdict(point) for point in points], indent=1)
