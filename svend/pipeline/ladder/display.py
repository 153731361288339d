"""What a ladder shows a person: its plan, and where it stands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from svend.device import available_bytes, describe_device, resolve_device, resolve_precision
from svend.pipeline.config import ModelScale, PipelineConfig, Precision, format_count
from svend.pipeline.ladder.options import Ladder
from svend.pipeline.ladder.standing import Attempt, Standing, State
from svend.pipeline.report import format_seconds
from svend.planning.plan import (
    RunSize,
    choose_micro_batch,
    predict_memory_on,
    size_run,
)
from svend.planning.probe import measure_matmul_peak, measure_micro_batch_seconds
from svend.planning.scaling_law import Point, Prediction, predict, why_too_few

# A rung whose micro-batch is estimated to take longer is not timed but reckoned from the others.
LONGEST_PROBE_SECONDS = 20.0
# Of the peak of matrix products, where no rung below could be timed.
ASSUMED_UTILISATION = 0.3


@dataclass(frozen=True)
class RungPlan:
    """A rung's figures before it is trained; seconds None where the data decide its length."""

    scale: ModelScale
    model: str
    parameters: int
    size: RunSize | None
    memory_gb: float
    fits: bool
    seconds: float | None
    measured: bool
    predicted: Prediction | None

    def record(self) -> dict[str, Any]:
        """Return the plan as figures, with their units in their names."""
        size, predicted = self.size, self.predicted
        return {
            "scale": self.scale, "model": self.model, "parameters": self.parameters,
            "steps": size and size.total_steps, "tokens": size and size.tokens,
            "memory_gb": self.memory_gb, "fits": self.fits, "seconds": self.seconds,
            "seconds_measured": self.measured,
            "predicted_loss_nats": predicted and predicted.loss,
            "predicted_low_nats": predicted and predicted.low,
            "predicted_high_nats": predicted and predicted.high,
        }


def plan_rungs(
    ladder: Ladder, history: Sequence[Attempt],
    advance: Callable[[int, int], None] = lambda *_: None,
) -> list[RungPlan]:
    """Return the plan of each rung, on this machine, before anything is trained.

    history: rungs that are there, below and of this ladder, to predict losses from. advance: is
    called with how many are planned, and how many there are.
    """
    points = [point for attempt in history for point in attempt.points()]
    plans: list[RungPlan] = []
    utilisation: float | None = None
    for scale, config in ladder.rungs.items():
        advance(len(plans), len(ladder.rungs))
        plan, utilisation = _plan_rung(scale, config, points, utilisation)
        plans.append(plan)
    advance(len(plans), len(plans))
    return plans


def _plan_rung(
    scale: ModelScale, config: PipelineConfig, points: Sequence[Point], utilisation: float | None
) -> tuple[RungPlan, float | None]:
    """Return a rung's plan, and the share of the device's peak that it, or one below, reaches."""
    training, model = config.training, config.model
    assert model is not None  # resolved
    device = resolve_device(training.device)
    training = replace(training, precision=resolve_precision(training.precision, device))
    training = choose_micro_batch(model, training, device)
    memory = predict_memory_on(model, training, device)
    available = available_bytes(device)
    size = (None if training.max_steps is None
            else size_run(training, model, training.max_steps))
    seconds, measured = None, False
    if size is not None:
        peak = _peak(training.precision, device)
        micro_flops = size.flops_per_token * size.tokens_per_step
        micro_flops //= training.gradient_accumulation_steps
        share = utilisation or ASSUMED_UTILISATION
        if memory.total <= available and micro_flops / (share * peak) < LONGEST_PROBE_SECONDS:
            micro_seconds, update_seconds = measure_micro_batch_seconds(model, training, device)
            step_seconds = (training.gradient_accumulation_steps * micro_seconds + update_seconds)
            utilisation = size.flops_per_token * size.tokens_per_step / step_seconds / peak
            measured = True
        branches = sum(b.end - b.start for b in training.branches(size.total_steps))
        flops = size.flops * (1 + branches / size.total_steps)
        seconds = flops / ((utilisation or ASSUMED_UTILISATION) * peak)
    predicted = None
    if size is not None and why_too_few(points) is None:
        predicted = predict(points, float(model.num_matrix_parameters()), float(size.tokens))
    return RungPlan(
        scale, model.name, model.num_parameters(), size, memory.total / 1e9,
        memory.total <= available, seconds, measured, predicted,
    ), utilisation


@functools.cache
def _peak(precision: Precision, device: torch.device) -> float:
    return measure_matmul_peak(precision, device)


def show_plan(console: Console, ladder: Ladder, name: str, plans: Sequence[RungPlan]) -> None:
    """Print a ladder's whole plan: per rung size, tokens, memory, time, hours, predicted loss."""
    device = describe_device(resolve_device(
        ladder.rungs[ladder.config.start].training.device))
    table = Table(title=f"Ladder {name}, on one {device}", title_justify="left")
    for heading, right in (("rung", False), ("model", False), ("parameters", True),
                           ("tokens", True), ("memory", True), ("time", True),
                           ("device hours", True), ("predicted loss", False)):
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    total = 0.0
    for plan in plans:
        total, found = total + (plan.seconds or 0.0), plan.predicted
        table.add_row(
            plan.scale.value, plan.model, format_count(plan.parameters),
            "by the data" if plan.size is None else format_count(plan.size.tokens),
            f"{plan.memory_gb:.1f} GB" + ("" if plan.fits else ", does not fit"),
            "not known" if plan.seconds is None
            else ("" if plan.measured else "about ") + format_seconds(plan.seconds),
            "" if plan.seconds is None else f"{plan.seconds / 3600:,.2f}",
            "known after the rungs below" if found is None
            else f"{found.loss:.4f} ({found.low:.4f} to {found.high:.4f})",
        )
    console.print(table)
    console.print(
        f"together {format_seconds(total)}; branches to the horizons are counted, evaluations are "
        "not; 'about': reckoned from the share of the peak that the rung below reaches, or from "
        f"{ASSUMED_UTILISATION:.0%} of it where none was timed",
        soft_wrap=True,
    )


def standing_table(standing: Standing, ladder: Ladder | None = None) -> Table:
    """Return how every attempt ended, what was predicted, and which rungs are to come."""
    table = Table(title=f"Ladder {standing.name}", title_justify="left")
    for heading, right in (("rung", False), ("model", False), ("state", False), ("loss", True),
                           ("predicted", True), ("error", True), ("trend", False),
                           ("version", False), ("time", True)):
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for attempt in standing.attempts:
        predicted, loss = attempt.predicted, attempt.loss
        table.add_row(
            attempt.scale.value + ("" if attempt.number == 1 else f", attempt {attempt.number}"),
            attempt.model, _state_text(attempt),
            "" if loss is None else f"{loss:.4f}",
            "" if predicted is None else f"{predicted.loss:.4f}",
            "" if attempt.error is None else f"{attempt.error:+.2%}",
            attempt.trend.value, (attempt.version or "").rpartition("/")[2],
            format_seconds(attempt.seconds),
        )
    for scale, config in {} if ladder is None else ladder.rungs.items():
        if standing.newest(scale) is None:
            table.add_row(scale.value, config.model.name if config.model else "", "to come")
    return table


def show_standing(console: Console, standing: Standing) -> None:
    """Print where a ladder stands, and why it does not go on, if it does not."""
    console.print(standing_table(standing))
    for attempt in standing.attempts:
        if attempt.reason:
            console.print(f"{attempt.scale.value}: {attempt.reason}", soft_wrap=True)
        if attempt.override is not None:
            told = attempt.override
            console.print(f"{attempt.scale.value}: overridden by {told.by} at {told.at}: "
                          f"{told.reason}", soft_wrap=True)


def _state_text(attempt: Attempt) -> str:
    if attempt.override is not None:
        return "failed, overridden"
    if attempt.state is State.RUNNING and attempt.looks:
        return f"running, {len(attempt.looks)} looks"
    return attempt.state.value
