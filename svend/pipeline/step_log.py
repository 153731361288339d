"""What is logged of a run's steps, read from the device many at a time."""

from __future__ import annotations

import time

from rich.console import Console

from svend.errors import HealthError
from svend.pipeline.console import say
from svend.pipeline.divergence import StepReading
from svend.pipeline.health import HEALTH_TAG, HealthFigures, HealthMonitor
from svend.pipeline.job import Job
from svend.pipeline.report import run_logger
from svend.tracking.runs import MAX_TAG_LENGTH
from svend.training.health import HealthReading
from svend.training.loop import StepMetrics


class StepLog:
    """Keeps steps until they are read, then logs them and judges the looks at the run's health.

    health_failure: the error that is to end the run, once a look found what it may not go on with.
    """

    def __init__(self, job: Job, console: Console) -> None:
        self._job = job
        self._console = console
        self._health = HealthMonitor(job.config.health)
        self._pending: list[StepMetrics] = []

    @property
    def health_failure(self) -> HealthError | None:
        return self._health.failure

    def add(self, metrics: StepMetrics) -> None:
        """Keep a step; does not wait for the device."""
        self._pending.append(metrics)

    def read(self) -> tuple[list[StepReading], float]:
        """Read the steps kept from the device and log them; return them and tokens/s."""
        job, (pending, self._pending) = self._job, (self._pending, [])
        readings = [
            StepReading(
                metrics.step, float(metrics.loss), float(metrics.gradient_norm),
                int(metrics.skipped_steps), int(metrics.skipped_in_a_row),
            )
            for metrics in pending
        ]
        # After the reads, which wait for the device: the time is that of finished work.
        seconds = time.perf_counter() - pending[0].started_seconds
        tokens_per_second = len(pending) * job.plan.tokens_per_step / seconds
        with job.spending("tracking"):
            self._track(pending, readings, tokens_per_second)
        for reading in readings:
            job.state.trend.add(reading.step, reading.loss)
            if reading.skipped:
                self._console.print(f"step {reading.step}: skipped ({reading})")
        for metrics, reading in zip(pending, readings, strict=True):
            if metrics.health is not None and self.health_failure is None:
                self._judge_health(metrics, metrics.health, reading)
        return readings, tokens_per_second

    def _judge_health(
        self, metrics: StepMetrics, health: HealthReading, reading: StepReading
    ) -> None:
        """Log what a look saw, and warn of what is out of bounds."""
        job, figures = self._job, HealthFigures.read(health)
        with job.spending("tracking"):
            job.tracked.log_metrics(figures.metrics(), metrics.step)
        lines = self._health.judge(
            figures, metrics.step, metrics.learning_rate / job.config.training.learning_rate,
            reading.skipped_steps, skipped=reading.skipped,
        )
        for line in lines:
            say(self._console, f"warning: health at {line}")
        if lines:
            job.tracked.set_tags({HEALTH_TAG: self._health.summary[:MAX_TAG_LENGTH]})

    def _track(
        self, pending: list[StepMetrics], readings: list[StepReading], tokens_per_second: float
    ) -> None:
        job = self._job
        flops_per_second = tokens_per_second * job.plan.flops_per_token
        for metrics, reading in zip(pending, readings, strict=True):
            run_logger.debug(
                "step %d: loss %.4f, gradient norm %.3f, learning rate %.3g, %d tokens",
                metrics.step, reading.loss, reading.gradient_norm, metrics.learning_rate,
                metrics.tokens,
            )
            job.tracked.log_metrics(
                {
                    "train/loss": reading.loss,
                    "train/gradient_norm": reading.gradient_norm,
                    "train/skipped_steps": reading.skipped_steps,
                    "train/learning_rate": metrics.learning_rate,
                    "train/tokens": metrics.tokens,
                    "train/flops": float(metrics.step) * job.plan.tokens_per_step
                    * job.plan.flops_per_token,
                    "train/tokens_per_second": tokens_per_second,
                    "train/flops_per_second": flops_per_second,
                    "train/peak_fraction": flops_per_second / job.plan.peak_flops,
                },
                metrics.step,
            )
        job.tracked.log_metrics(
            {
                f"data/epochs/{job.corpus.counts[number].source}": epoch
                for number, epoch in job.state.stream.epochs_by_source().items()
            },
            pending[-1].step,
        )
