"""What comes after a run's last step: its best checkpoint evaluated, registered and reported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from svend.device import peak_bytes
from svend.pipeline.branches import horizon_at, record_horizon
from svend.pipeline.checkpoints import Checkpoint
from svend.pipeline.gatekeeper import Gatekeeper
from svend.pipeline.job import Job
from svend.pipeline.nested import NestedRun
from svend.pipeline.record import (
    describe_end,
    describe_run,
    measurement_rows,
    record_verdicts,
)
from svend.pipeline.registration import register_version
from svend.pipeline.replica import load_weights
from svend.pipeline.report import show_measured, show_next_steps, verdict_table
from svend.pipeline.run_evaluation import evaluate_benchmarks
from svend.pipeline.saving import consolidate
from svend.pipeline.tags import NOTE_TAG
from svend.pipeline.validation import Evidence, GateLevel, PipelineValidator
from svend.tracking.registry import RegisteredVersion
from svend.tracking.store_errors import told_by_the_store


def conclude_run(
    job: Job,
    validator: PipelineValidator,
    gatekeeper: Gatekeeper,
    nested: NestedRun | None,
    console: Console,
    is_stopped: Callable[[], bool],
) -> RegisteredVersion | None:
    """Evaluate the best checkpoint, register it with the levels that it passed, and report."""
    _record_end(job, nested)
    best = job.manager.best()
    if best is not None:
        best = consolidate(job, best)
        _evaluate_best(job, best, gatekeeper, nested, console, is_stopped)
    record_verdicts(job.tracked, job.folder.read_verdicts())
    measured_gb, measured_seconds = _record_cost(job)
    registered = None
    if best is not None and (nested is None or nested.registers):
        rows = job.folder.read_verdicts(best.weights_sha256)
        registered = _register(job, best, validator, rows)
        _describe_end(job, best, rows, registered)
        _show_verdicts(best, validator, rows, console)
    show_measured(
        console, job.plan, measured_gb, measured_seconds, job.start_seconds, job.spent_seconds
    )
    if nested is not None:
        nested.decided(job, job.full_verdict, registered)
    job.folder.mark_finished()
    show_next_steps(
        console, job.tracked.tracking_uri, job.tracked.experiment_id, job.tracked.run_id,
        job.folder.path, registered,
    )
    return registered


def _record_end(job: Job, nested: NestedRun | None) -> None:
    """Put on record what the run's end says of the scaling law, and whether the loss fell."""
    slope_bound = job.state.trend.slope_bound()
    if math.isfinite(slope_bound):
        job.tracked.log_metrics({"train/loss_slope_bound": slope_bound}, job.state.step)
    end = job.manager.list_checkpoints()[-1]
    horizon = horizon_at(job, job.state.step, end.metrics["loss"])
    record_horizon(job, horizon)
    if nested is not None:
        nested.reached(job, horizon)


def _evaluate_best(
    job: Job, best: Checkpoint, gatekeeper: Gatekeeper, nested: NestedRun | None,
    console: Console, is_stopped: Callable[[], bool],
) -> None:
    """Measure the benchmarks on the best checkpoint, and decide the levels they suffice for."""
    if best.step != job.state.step:
        job.call(load_weights, best.path)
        console.print(f"benchmarks: on {best.checkpoint_id}, the best")
    job.measured = {}
    measurements = evaluate_benchmarks(job, console, is_stopped)
    if measurements is None and nested is not None and nested.gates_full:
        measurements = {}
    verdicts = () if measurements is None else gatekeeper.decide_full(job, measurements)
    gatekeeper.record(job, best, verdicts)


def _record_cost(job: Job) -> tuple[float, float]:
    """Log the memory and the time that the run took; return GB and seconds."""
    measured_gb = peak_bytes(job.device) / 1e9
    measured_seconds = time.monotonic() - job.started_seconds
    job.spent_seconds["data"] = job.state.stream.waited_seconds
    job.tracked.log_metrics(
        {
            "measured/peak_memory_gb": measured_gb,
            "measured/seconds": measured_seconds,
            "measured/start_seconds": job.start_seconds,
            **{f"measured/{part}_seconds": spent for part, spent in job.spent_seconds.items()},
        },
        job.state.step,
    )
    return measured_gb, measured_seconds


def _register(
    job: Job, best: Checkpoint, validator: PipelineValidator, rows: list[dict[str, Any]]
) -> RegisteredVersion | None:
    # What a version rests on is in the store before it is.
    job.tracked.flush(job.config.tracking_wait_seconds)
    with told_by_the_store(f"{job.model_name}, trained and saved but not registered"):
        return register_version(job, best, validator, rows, measurement_rows(
            job.measured, job.config,
            Evidence(
                best.step, best.weights_sha256, job.corpus.fingerprint, job.tracked.run_id
            ),
        ))


def _describe_end(
    job: Job, best: Checkpoint, rows: list[dict[str, Any]], registered: RegisteredVersion | None
) -> None:
    version = None if registered is None else f"{registered.name} version {registered.version}"
    job.tracked.set_tags({NOTE_TAG: "\n\n".join((
        describe_end(best.step, best.metrics["loss"], rows, version),
        describe_run(job.config, job.plan, job.corpus),
    ))})


def _show_verdicts(
    best: Checkpoint, validator: PipelineValidator, rows: list[dict[str, Any]], console: Console
) -> None:
    console.print(verdict_table(rows, f"Verdicts on {best.checkpoint_id}, the best"))
    decided = {row["level"] for row in rows}
    for level in (GateLevel.FULL, GateLevel.PRODUCTION):
        needed = ", ".join(gate.metric_name for gate in validator.gates[level])
        if level.value not in decided:
            console.print(f"{level.value}: not decided; needs {needed}")
