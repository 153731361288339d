"""The gates of a run: decided on its weights, put on record, and, under strict, in its way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from rich.console import Console

from svend.errors import GateFailure
from svend.evaluation.heldout import HeldoutLoss
from svend.evaluation.measurement import Measurement
from svend.pipeline.checkpoints import Checkpoint
from svend.pipeline.job import Job
from svend.pipeline.nested import NestedRun
from svend.pipeline.record import passed_levels, record_verdicts, undecided
from svend.pipeline.replica import count_nonfinite
from svend.pipeline.report import run_logger
from svend.pipeline.run_evaluation import evaluate_heldout
from svend.pipeline.saving import finish_save
from svend.pipeline.validation import Evidence, GateLevel, PipelineValidator, ValidationResult

# The levels that are about training itself.
STOPPING = (GateLevel.QUICK, GateLevel.STANDARD)


class Gatekeeper:
    """Decides the levels of a run as it goes, and records each verdict with what it rests on.

    Under strict, a failure of QUICK or STANDARD stops the run by GateFailure; FULL and PRODUCTION
    decide what comes after it. nested: what may have more for FULL to be decided on.
    """

    def __init__(
        self, validator: PipelineValidator, console: Console, nested: NestedRun | None
    ) -> None:
        self._validator = validator
        self._console = console
        self._nested = nested

    def gate_quick(self, job: Job) -> None:
        """Decide QUICK on the last accepted step: what a skipped one measured moved no weight."""
        accepted = job.state.guard.last_accepted()
        if accepted is None:
            return
        loss, _ = accepted
        evidence = Evidence(job.state.step, None, job.corpus.fingerprint, job.tracked.run_id)
        self._record(job, [self._decide_quick(job, loss, evidence)])

    def decide(
        self, job: Job, measured: HeldoutLoss, gradient_norm: float
    ) -> tuple[ValidationResult, ...]:
        """Decide QUICK and STANDARD on the model's weights."""
        evidence = Evidence(job.state.step)
        quick = self._decide_quick(job, measured.loss, evidence)
        standard = self._validator.decide(
            GateLevel.STANDARD,
            {**measured.measurements(), "gradient_norm": Measurement(gradient_norm)},
            evidence,
        )
        return quick, standard

    def decide_full(
        self, job: Job, measurements: Mapping[str, Measurement]
    ) -> tuple[ValidationResult, ...]:
        """Decide FULL, and PRODUCTION where each of its metrics was measured."""
        if self._nested is not None:
            measurements = {**measurements, **self._nested.measurements()}
        levels = [GateLevel.FULL]
        if all(gate.metric_name in measurements
               for gate in self._validator.gates[GateLevel.PRODUCTION] if gate.required):
            levels.append(GateLevel.PRODUCTION)
        evidence = Evidence(job.state.step)
        verdicts = tuple(self._validator.decide(level, measurements, evidence) for level in levels)
        job.full_verdict = verdicts[0]
        return verdicts

    def decide_if_undecided(self, job: Job) -> None:
        """Decide on the checkpoint just loaded if the process was killed before it could.

        A gate that failed under strict validation still stands.
        """
        checkpoint = next(
            c for c in job.manager.list_checkpoints() if c.step == job.state.step
        )
        if not checkpoint.metrics:
            return  # saved by an interruption, between evaluations
        rows, gates = job.folder.read_verdicts(checkpoint.weights_sha256), self._validator.gates
        if undecided(gates, rows, STOPPING):
            norm = checkpoint.metrics["gradient_norm"]
            self.record(job, checkpoint, self.decide(job, evaluate_heldout(job), norm))
        elif self._validator.strict and GateLevel.STANDARD not in passed_levels(gates, rows):
            raise GateFailure(
                f"the checkpoint at step {checkpoint.step} failed its gate; begin another run, "
                "with other settings or thresholds"
            )

    def settle(self, job: Job) -> None:
        """Wait for the checkpoint on its way, and record the verdicts with the hash it got."""
        saved = finish_save(job)
        if saved is not None:
            self.record(job, *saved)

    def record(
        self, job: Job, checkpoint: Checkpoint, verdicts: Iterable[ValidationResult]
    ) -> None:
        """Put verdicts on a checkpoint on record."""
        evidence = Evidence(
            checkpoint.step, checkpoint.weights_sha256, job.corpus.fingerprint, job.tracked.run_id
        )
        self._record(job, [replace(verdict, evidence=evidence) for verdict in verdicts])

    def require_full(self, job: Job) -> None:
        """Under strict, raise GateFailure where the run had to pass FULL and did not."""
        verdict = job.full_verdict
        if (verdict is not None and not verdict.passed
                and self._nested is not None and self._nested.gates_full):
            self._fail(_failure_line(verdict))

    def _decide_quick(self, job: Job, loss: float, evidence: Evidence) -> ValidationResult:
        measurements = {
            "loss": Measurement(loss),
            "nonfinite_parameters": Measurement(job.call(count_nonfinite)),
        }
        return self._validator.decide(GateLevel.QUICK, measurements, evidence)

    def _record(self, job: Job, verdicts: list[ValidationResult]) -> None:
        """Keep verdicts in the run folder and in MLflow, then act on those that failed."""
        job.folder.append_verdict([row for verdict in verdicts for row in verdict.rows()])
        for verdict in verdicts:
            run_logger.debug("%s", verdict.summary())
            job.tracked.log_metrics(
                {f"gate/{verdict.level.value}/{result.gate.name}": float(result.passed)
                 for result in verdict.gates},
                verdict.evidence.step or 0,
            )
            for warning in verdict.warnings:
                self._console.print(f"warning: {verdict.level.name} gate {warning}")
        for verdict in verdicts:
            if verdict.passed:
                continue
            if verdict.level not in STOPPING:
                failures = "; ".join(verdict.failures)
                self._console.print(f"{verdict.level.value}: not passed: {failures}")
                continue
            if self._validator.strict:
                self.settle(job)
                record_verdicts(job.tracked, job.folder.read_verdicts())
            self._fail(_failure_line(verdict))

    def _fail(self, line: str) -> None:
        if self._validator.strict:
            raise GateFailure(line)
        self._console.print(f"warning: {line}")


def _failure_line(verdict: ValidationResult) -> str:
    step, failures = verdict.evidence.step, "; ".join(verdict.failures)
    return f"{verdict.level.name} gate failed at step {step}: {failures}"
