"""Gates, and the verdicts that they give: each a piece of evidence, not a log line."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import nn

from svend.data.stream import Batch
from svend.errors import ConfigError
from svend.evaluation.heldout import measure_heldout_loss
from svend.evaluation.measurement import Measurement
from svend.models.shards import count_nonfinite
from svend.pipeline.config import GatesConfig, Precision, ValidationGate

__all__ = ["Decision", "Evidence", "GateLevel", "GateResult", "Gates", "Measurement",
           "PipelineValidator", "ValidationGate", "ValidationResult"]

# A gate that so many times the samples would not decide is at its threshold.
MOST_SAMPLES_FACTOR = 1e6
COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
               "==": operator.eq}


class GateLevel(Enum):
    """The four levels, from the most lenient to the strictest; each is a stage in the registry."""

    QUICK = "quick"
    STANDARD = "standard"
    FULL = "full"
    PRODUCTION = "production"


Metrics = Mapping[str, float | Measurement]
Gates = Mapping[GateLevel, Sequence[ValidationGate]]


@dataclass(frozen=True)
class Evidence:
    """What was measured, on what, by which run."""

    step: int | None = None
    checkpoint_sha256: str | None = None
    data_fingerprint: str | None = None
    run_id: str | None = None


class Decision(Enum):
    """What a gate decides; only PASS opens it."""

    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class GateResult:
    """One gate's decision. A metric that was not measured is a failure, named as such.

    Without `confidence` the measured value decides. With it, the bound of the one-sided interval
    on the threshold's side does: the gate passes if the whole interval satisfies it, fails if none
    of it does, and is else undecided. A value that is no sample, such as a count of weights,
    decides by itself.
    """

    gate: ValidationGate
    measurement: Measurement | None
    confidence: float | None = None

    @property
    def passed(self) -> bool:
        return self.decision is Decision.PASS

    @property
    def decision(self) -> Decision:
        if self.measurement is None or not math.isfinite(self.measurement.value):
            return Decision.FAIL
        satisfied = {
            self._satisfies(bound) for bound in self.bounds or (self.measurement.value,)
        }
        if len(satisfied) == 2:
            return Decision.UNDECIDED
        return Decision.PASS if satisfied == {True} else Decision.FAIL

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval's bounds that decide; None where the value does."""
        if self.measurement is None or self.confidence is None:
            return None
        return self._interval(self.measurement)

    @property
    def samples_needed(self) -> int | None:
        """About how many samples more would decide an undecided gate, if the value stays.

        None where none would, for the value is as good as the threshold.
        """
        measurement = self.measurement
        if measurement is None or measurement.sample_size is None:
            return None
        undecided, decided = 1.0, 2.0
        while not self._is_decided_by(measurement, decided):
            undecided, decided = decided, 2 * decided
            if decided > MOST_SAMPLES_FACTOR:
                return None
        for _ in range(20):
            middle = (undecided + decided) / 2
            if self._is_decided_by(measurement, middle):
                decided = middle
            else:
                undecided = middle
        return math.ceil((decided - 1) * measurement.sample_size)

    def _is_decided_by(self, measurement: Measurement, size_factor: float) -> bool:
        interval = self._interval(measurement, size_factor)
        return interval is not None and len({self._satisfies(bound) for bound in interval}) == 1

    def _interval(
        self, measurement: Measurement, size_factor: float = 1.0
    ) -> tuple[float, float] | None:
        """The interval whose bounds are each one-sided at the gate's confidence."""
        assert self.confidence is not None
        return measurement.interval_at(2 * self.confidence - 1, size_factor)

    def _satisfies(self, value: float) -> bool:
        return bool(COMPARISONS[self.gate.comparison](value, self.gate.threshold))

    @property
    def condition(self) -> str:
        """The gate's condition as text: `perplexity < 1000`."""
        return f"{self.gate.metric_name} {self.gate.comparison} {self.gate.threshold:g}"

    @property
    def failure(self) -> str:
        """Why the gate did not pass."""
        if self.measurement is None:
            return f"{self.gate.name}: {self.gate.metric_name} was not measured"
        if self.decision is Decision.UNDECIDED:
            more = self.samples_needed
            needs = f"needs about {more:,} more samples" if more else "no sample size would tell"
            return (
                f"{self.gate.name}: undecided at {_format(self.measurement)}, must be "
                f"{self.condition} with confidence {self.confidence:g}: {needs}"
            )
        return f"{self.gate.name}: {self.measurement.value:.4g}, must be {self.condition}"


@dataclass(frozen=True)
class ValidationResult:
    """The verdict of one level: every gate's decision, and the evidence it rests on."""

    level: GateLevel
    gates: list[GateResult]
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def passed(self) -> bool:
        """Whether every required gate passed."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """The required gates that failed, each with its reason."""
        return [result.failure for result in self.gates
                if result.gate.required and not result.passed]

    @property
    def warnings(self) -> list[str]:
        """The advisory gates that failed, each with its reason."""
        return [result.failure for result in self.gates
                if not result.gate.required and not result.passed]

    def summary(self) -> str:
        """Return the verdict as a few lines of text."""
        verdict = "PASS" if self.passed else "FAIL"
        at_step = "" if self.evidence.step is None else f" at step {self.evidence.step}"
        lines = [f"{self.level.name} gate{at_step}: {verdict}"]
        for result in self.gates:
            mark = {Decision.PASS: "pass", Decision.UNDECIDED: "undecided"}.get(
                result.decision, "FAIL" if result.gate.required else "warn"
            )
            value = "not measured" if result.measurement is None else _format(result.measurement)
            lines.append(f"  {mark}  {result.gate.name}: {value} ({result.condition})")
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat record per gate, as it is tracked and stored."""
        rows = []
        for result in self.gates:
            measurement = result.measurement
            low, high = (measurement.interval if measurement and measurement.interval
                         else (None, None))
            low_bound, high_bound = result.bounds or (None, None)
            rows.append({
                "level": self.level.value,
                "gate": result.gate.name,
                "metric": result.gate.metric_name,
                "value": None if measurement is None else measurement.value,
                "low_95": low,
                "high_95": high,
                "low_bound": low_bound,
                "high_bound": high_bound,
                "sample_size": None if measurement is None else measurement.sample_size,
                "comparison": result.gate.comparison,
                "threshold": result.gate.threshold,
                "required": result.gate.required,
                "passed": result.passed,
                "decision": result.decision.value,
                "confidence": result.confidence,
                **dataclasses.asdict(self.evidence),
                **({} if measurement is None or measurement.data_fingerprint is None
                   else {"data_fingerprint": measurement.data_fingerprint}),
                **({} if measurement is None or measurement.run_id is None
                   else {"run_id": measurement.run_id}),
            })
        return rows


class PipelineValidator:
    """Decides gates and keeps the history of its verdicts.

    strict: whether the runner stops at a required gate that fails. custom_gates: gates of one's
    own, decided at FULL. gates: the built-in ones (default: `conf/gates/guide.yaml`). thresholds:
    replacements for the built-in thresholds, by gate name or by `min_` or `max_` and a metric;
    they touch QUICK, STANDARD and FULL, never PRODUCTION.
    """

    def __init__(
        self,
        strict: bool = True,
        custom_gates: Iterable[ValidationGate] = (),
        gates: GatesConfig | None = None,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        self.strict = strict
        self.history: list[ValidationResult] = []
        built_in = gates or GatesConfig()
        self.confidence = built_in.confidence
        self._gates = {level: list(getattr(built_in, level.value)) for level in GateLevel}
        self._gates[GateLevel.FULL] += list(custom_gates)
        for name, threshold in (thresholds or {}).items():
            self._set_threshold(name, threshold)

    @property
    def gates(self) -> Gates:
        """The gates of each level, custom ones and replaced thresholds included."""
        return self._gates

    def decide(
        self,
        level: GateLevel,
        measurements: Mapping[str, Measurement],
        evidence: Evidence = Evidence(),
    ) -> ValidationResult:
        """Decide a level's gates on these measurements, by metric name."""
        results = [GateResult(gate, measurements.get(gate.metric_name), self.confidence)
                   for gate in self._gates[level]]
        verdict = ValidationResult(level, results, evidence)
        self.history.append(verdict)
        return verdict

    def validate_quick(self, model: nn.Module, loss: float, step: int) -> ValidationResult:
        """Decide QUICK: is the loss sane, is every weight finite?"""
        measurements = {
            "loss": Measurement(loss),
            "nonfinite_parameters": Measurement(count_nonfinite(model)),
        }
        return self.decide(GateLevel.QUICK, measurements, Evidence(step=step))

    def validate_standard(
        self,
        model: nn.Module,
        eval_dataloader: Iterable[Batch] | None = None,
        metrics: Metrics | None = None,
        step: int | None = None,
    ) -> ValidationResult:
        """Decide STANDARD: loss and perplexity on held-out batches, gradient norm from `metrics`.

        `metrics` are values measured elsewhere, by metric name; they win over the batches'.
        """
        return self._measure_and_decide(GateLevel.STANDARD, model, eval_dataloader, metrics, step)

    def validate_full(
        self,
        model: nn.Module,
        eval_dataloader: Iterable[Batch] | None = None,
        metrics: Metrics | None = None,
        step: int | None = None,
    ) -> ValidationResult:
        """Decide FULL, with the custom gates, as `validate_standard` does STANDARD."""
        return self._measure_and_decide(GateLevel.FULL, model, eval_dataloader, metrics, step)

    def validate_production(
        self,
        model: nn.Module,
        eval_dataloader: Iterable[Batch] | None = None,
        metrics: Metrics | None = None,
        step: int | None = None,
    ) -> ValidationResult:
        """Decide PRODUCTION, as `validate_standard` does STANDARD."""
        return self._measure_and_decide(
            GateLevel.PRODUCTION, model, eval_dataloader, metrics, step
        )

    def _measure_and_decide(
        self,
        level: GateLevel,
        model: nn.Module,
        eval_dataloader: Iterable[Batch] | None,
        metrics: Metrics | None,
        step: int | None,
    ) -> ValidationResult:
        measurements: dict[str, Measurement] = {
            "nonfinite_parameters": Measurement(count_nonfinite(model))
        }
        if eval_dataloader is not None:
            device = next(model.parameters()).device
            measured = measure_heldout_loss(model, eval_dataloader, Precision.FP32, device)
            measurements |= measured.measurements()
        for name, value in (metrics or {}).items():
            measurements[name] = value if isinstance(value, Measurement) else Measurement(value)
        return self.decide(level, measurements, Evidence(step=step))

    def print_summary(self) -> None:
        """Print every verdict so far."""
        for verdict in self.history:
            print(verdict.summary())

    def _set_threshold(self, name: str, threshold: float) -> None:
        bounds = {"min_": (">", ">="), "max_": ("<", "<=")}
        found = False
        for level in (GateLevel.QUICK, GateLevel.STANDARD, GateLevel.FULL):
            for index, gate in enumerate(self._gates[level]):
                # max_loss is about training that works: QUICK's bound only catches explosions.
                bounded = level is not GateLevel.QUICK and any(
                    name == prefix + gate.metric_name and gate.comparison in signs
                    for prefix, signs in bounds.items()
                )
                if name == gate.name or bounded:
                    self._gates[level][index] = dataclasses.replace(gate, threshold=threshold)
                    found = True
        if not found:
            known = sorted({gate.name for level in (GateLevel.QUICK, GateLevel.STANDARD,
                                                    GateLevel.FULL) for gate in self._gates[level]})
            raise ConfigError(
                f"training.validation_gates.{name}: no such gate below production; known: "
                f"{', '.join(known)}, or min_ or max_ with a metric's name"
            )


def _format(measurement: Measurement) -> str:
    text = f"{measurement.value:.4g}"
    if measurement.interval is not None:
        low, high = measurement.interval
        text += f" [{low:.4g}, {high:.4g}]"
    return text
