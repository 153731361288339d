"""What a run shows a person: the plan, the progress, the verdicts, what to do next."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from svend.data.corpus import Corpus
from svend.data.stream import PackedSequences
from svend.pipeline.config import Parametrisation, PipelineConfig, format_count
from svend.pipeline.hyperparameters import Carried
from svend.pipeline.infrastructure import CheckResult
from svend.pipeline.progress import TerminalBar
from svend.pipeline.validation import Decision
from svend.planning.memory import MemoryPlan
from svend.planning.plan import RunPlan, RunSize
from svend.tracking.pages import is_local, run_page, scales_page, ui_command
from svend.tracking.registry import RegisteredVersion

# A line per step and every verdict at DEBUG, under the name that users know.
run_logger = logging.getLogger("svend.pipeline.runner")
COMPILING = "compiling one block for all"
# For a time that a person can scale to a device of their own.
EXAMPLE_FLOPS = 1e14


def show_plan(
    console: Console,
    config: PipelineConfig,
    plan: RunPlan,
    corpus: Corpus,
    sequences: PackedSequences,
    device: str,
    carried: Sequence[Carried] = (),
    sharing: str = "",
    own_model: str = "",
) -> None:
    """Print what the run will do and cost, before it does.

    sharing: the processes that share it, where there are several. own_model: what a factory made,
    where one did.
    """
    training, memory = config.training, plan.memory
    compiled = "compiled blocks" if plan.compile else "not compiled"
    table = _plan_table(config, plan, own_model)
    table.add_row(
        "",
        f"{len(corpus.train):,} train and {len(corpus.heldout):,} held-out documents, "
        f"tokenizer of {corpus.tokenizer.size:,} entries ({corpus.tokenizer.origin})",
    )
    mix = sequences.tokens_by_kind(len(sequences))
    shares = ", ".join(f"{kind} {n / sum(mix.values()):.0%}" for kind, n in mix.items())
    table.add_row(
        "", f"by tokens {shares}; an epoch is {len(sequences):,} sequences, "
        f"{sequences.padding:.1%} padding",
    )
    left_out = {
        "that share text with an evaluation set": sum(c.leaked_documents for c in corpus.counts),
        "that repeat another": sum(c.duplicate_documents for c in corpus.counts),
        "that are broken": sum(c.dropped_rows for c in corpus.counts),
        f"longer than {training.data.max_seq_length} tokens": sequences.dropped_documents,
    }
    for reason, count in left_out.items():
        if count:
            table.add_row("", f"{count:,} documents left out {reason}")
    _add_size(table, config, plan)
    table.add_row("device", f"{device}; {training.precision.value}, {compiled}")
    if sharing:
        table.add_row("processes", sharing)
    table.add_row("matrix peak", f"{plan.peak_flops / 1e9:,.0f} GFLOP/s, measured just now")
    table.add_row("peak memory", _memory_text(memory, plan.available_bytes))
    table.add_row("time", f"about {format_seconds(plan.seconds)}")
    meanwhile = "while training goes on" if plan.saves_in_background else (
        "while training waits, for memory is short"
    )
    table.add_row("checkpoints", f"every {training.save_steps:,} steps, saved {meanwhile}")
    console.print(table)
    if carried:
        console.print(hyperparameters_table(carried))


def show_preview(
    console: Console,
    config: PipelineConfig,
    size: RunSize,
    memory: MemoryPlan,
    available_bytes: int,
    device: str,
    carried: Sequence[Carried],
    own_model: str = "",
) -> None:
    """Print what of a run's plan is known where nothing is measured."""
    table = _plan_table(config, size, own_model)
    _add_size(table, config, size)
    table.add_row("device", f"{device}; {config.training.precision.value}")
    fits = "" if memory.total <= available_bytes else ": does not fit here"
    table.add_row("peak memory", _memory_text(memory, available_bytes) + fits)
    table.add_row(
        "time", f"not measured; {format_seconds(size.flops / EXAMPLE_FLOPS)} at "
        f"{EXAMPLE_FLOPS / 1e12:g} TFLOP/s sustained",
    )
    console.print(table)
    if carried:
        console.print(hyperparameters_table(carried))


def _plan_table(config: PipelineConfig, size: RunSize, own_model: str = "") -> Table:
    model, training = config.model, config.training
    assert model is not None  # set by PipelineConfig.resolve
    data = training.data
    title = "Plan: own model" if own_model else f"Plan: {model.name}"
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    table.add_row("scale", f"{training.model_scale.value}, preset {config.preset}")
    if own_model:
        table.add_row("model", own_model)
    table.add_row("parameters", f"{size.parameters:,} ({format_count(size.parameters)})")
    table.add_row("data", f"{data.recipe}: {', '.join(data.sources)} ({data.purpose})")
    return table


def _add_size(table: Table, config: PipelineConfig, size: RunSize) -> None:
    training = config.training
    table.add_row(
        "steps",
        f"{size.total_steps:,} of {size.tokens_per_step:,} tokens "
        f"({training.batch_size} x {training.gradient_accumulation_steps} sequences "
        f"of {training.data.max_seq_length})",
    )
    table.add_row("tokens", f"{size.tokens:,}")
    if training.parametrisation is Parametrisation.COMPLETEP:
        table.add_row(
            "parametrisation",
            f"CompleteP, base {training.base_width} wide, {training.base_depth} deep, heads of "
            f"{training.base_head_size}",
        )
    table.add_row("FLOPs", f"{size.flops:.2e} ({size.flops_per_token:.2e} per token)")


def _memory_text(memory: MemoryPlan, available_bytes: int) -> str:
    return f"about {memory.total / 1e9:.1f} GB of {available_bytes / 1e9:.1f} GB available"


def show_checks(console: Console, results: Iterable[CheckResult]) -> list[CheckResult]:
    """Print each check as it is decided; return them all."""
    shown = []
    for result in results:
        mark = "[green]pass[/green]" if result.passed else "[bold red]FAIL[/bold red]"
        console.print(f"{mark}  {result.name:<20}  ", end="")
        console.print(result.detail, markup=False, soft_wrap=True)
        shown.append(result)
    return shown


class TrainingProgress(TerminalBar):
    """A progress bar on a terminal; a plain line every few seconds elsewhere.

    compiles_after: the step behind which the blocks are compiled, None where they are not.
    """

    def __init__(
        self, console: Console, total_steps: int, first_step: int, compiles_after: int | None = None
    ) -> None:
        super().__init__(
            console, BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}"),
            _StatusColumn(self), transient=False,
        )
        self._total = total_steps
        self._first = first_step
        self._started = time.monotonic()
        self._compiles_after = compiles_after
        self._status = COMPILING if compiles_after == first_step else ""
        self._task = self._bar.add_task("training", total=total_steps, completed=first_step)

    def advance(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        """Show a step; loss and speed stay as last known where None."""
        now = time.monotonic()
        if loss is not None and tokens_per_second is not None:
            done = step - self._first
            left = (now - self._started) / max(1, done) * (self._total - step)
            self._status = (
                f"loss {loss:.3f}  {tokens_per_second:,.0f} tok/s  {format_seconds(left)} left"
            )
        if step == self._compiles_after:
            self._status = f"{self._status}  {COMPILING}".lstrip()
        self._bar.update(self._task, completed=step)
        self.show_line(f"step {step}/{self._total}  {self._status}",
                       at_once=step in (1, self._total))

    @property
    def status(self) -> str:
        return self._status


class _StatusColumn(ProgressColumn):
    def __init__(self, progress: TrainingProgress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:  # noqa: ARG002
        return Text(self._progress.status, no_wrap=True)


def verdict_table(rows: Iterable[dict[str, Any]], title: str) -> Table:
    """Return gate decisions as a table."""
    table = Table(title=title, title_justify="left")
    for name in ("level", "gate", "verdict"):
        table.add_column(name, no_wrap=True)
    for name in ("value", "95% interval", "n"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("must be", no_wrap=True)
    for row in rows:
        verdict = Text(_verdict_text(row), style="green" if row["passed"] else "bold red")
        table.add_row(
            row["level"],
            row["gate"],
            verdict,
            _value_text(row),
            _interval_text(row),
            "" if row["sample_size"] is None else f"{row['sample_size']:,}",
            f"{row['comparison']} {row['threshold']:g}",
        )
    return table


def verdicts_html(rows: Sequence[dict[str, Any]]) -> str:
    """Return gate decisions as a page that MLflow's artifact viewer shows, newest first."""
    table = pd.DataFrame(
        {
            "step": row["step"],
            "level": row["level"],
            "gate": row["gate"],
            "verdict": _verdict_text(row),
            "value": _value_text(row),
            "95% interval": _interval_text(row),
            "n": "" if row["sample_size"] is None else f"{row['sample_size']:,}",
            "must be": f"{row['metric']} {row['comparison']} {row['threshold']:g}",
            "checkpoint": (row["checkpoint_sha256"] or "")[:12],
        }
        for row in reversed(rows)
    )
    style = (
        "body{font:13px sans-serif}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:3px 8px;text-align:left}"
    )
    body = table.to_html(index=False)
    body = body.replace("<td>FAIL</td>", '<td style="background:#f8c8c8">FAIL</td>')
    body = body.replace("<td>pass</td>", '<td style="background:#d4efd4">pass</td>')
    return f"<!doctype html><meta charset=utf-8><style>{style}</style>{body}"


def hyperparameters_table(carried: Sequence[Carried]) -> Table:
    """Return what a sweep's values became at this run's size, and why, as a table."""
    table = Table(title="Hyperparameters, carried from a sweep", title_justify="left")
    for name in ("key", "found", "here", "why"):
        table.add_column(name, overflow="fold")
    for row in carried:
        table.add_row(row.key, format_value(row.found), format_value(row.here), row.why)
    return table


def format_value(value: Any) -> str:
    """Return a setting's value as people read it: a float to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_measured(
    console: Console,
    plan: RunPlan,
    peak_memory_gb: float,
    seconds: float,
    start_seconds: float,
    spent_seconds: Mapping[str, float],
) -> None:
    """Print what the run took beside what the plan said, and what its training waited for."""
    planned_gb = plan.memory.total / 1e9
    console.print(f"peak memory {peak_memory_gb:.2f} GB (planned {planned_gb:.2f})")
    console.print(f"time {format_seconds(seconds)} (planned {format_seconds(plan.seconds)})")
    waited = ", ".join(f"{part} {spent / seconds:.2%}" for part, spent in spent_seconds.items())
    console.print(f"first step after {start_seconds:.1f} s; of the time {waited}")


def show_next_steps(
    console: Console,
    tracking_uri: str,
    experiment_id: str,
    run_id: str,
    folder: Path,
    registered: RegisteredVersion | None,
) -> None:
    """Print where everything is and the next command to type."""
    local = is_local(tracking_uri)
    url = run_page(tracking_uri, experiment_id, run_id)
    lines = [("checkpoints", str(folder.absolute()))]
    if registered is not None:
        stages = ", ".join(f"@{alias}" for alias in registered.aliases) or "no level passed"
        lines.append(("registered", f"{registered.name} version {registered.version} ({stages})"))
    if local:
        lines.append(("see the run", ui_command(tracking_uri)))
    lines.append(("" if local else "see the run", url))
    lines.append(("all runs", scales_page(tracking_uri, experiment_id, as_charts=False)))
    for label, text in lines:
        console.print(f"[bold]{label:<12}[/bold] {text}", soft_wrap=True)


def _verdict_text(row: dict[str, Any]) -> str:
    if row["decision"] != Decision.FAIL.value:
        return str(row["decision"])
    return "FAIL" if row["required"] else "warn"


def _value_text(row: dict[str, Any]) -> str:
    return "not measured" if row["value"] is None else f"{row['value']:.4g}"


def _interval_text(row: dict[str, Any]) -> str:
    return "" if row["low_95"] is None else f"{row['low_95']:.4g} to {row['high_95']:.4g}"


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: 45 s, 7 min, 3.5 h, 2.1 days."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86400:.1f} days"
