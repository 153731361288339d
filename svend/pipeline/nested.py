"""What makes a run part of something larger: a trial of a sweep, a rung of a ladder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from svend.pipeline.job import Job
from svend.pipeline.validation import Measurement, ValidationResult
from svend.tracking.registry import RegisteredVersion
from svend.training.state import Horizon


@dataclass(kw_only=True)
class NestedRun:
    """A run below a parent; what it is part of hears of it as it goes, and may end it.

    registers: whether it leaves a version in the registry. gates_full: whether it must pass FULL.
    Every method may raise a UserError, which ends the run with that reason.
    """

    parent_run_id: str
    name: str
    registers: bool = True
    gates_full: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)

    def begun(self, run_id: str) -> None:
        """Hear of the MLflow run as soon as there is one."""

    def prepared(self, job: Job) -> None:
        """Look at what is to be trained, on what, before the first step."""

    def judge(self, step: int, loss: float) -> None:
        """Hear of a held-out loss; raise TrialPruned to end the run without a failure."""

    def reached(self, job: Job, horizon: Horizon) -> None:
        """Hear of a horizon, the run's end included."""

    def measurements(self) -> Mapping[str, Measurement]:
        """Return what FULL is also decided on."""
        return {}

    def decided(
        self, job: Job, verdict: ValidationResult | None, registered: RegisteredVersion | None
    ) -> None:
        """Hear of FULL's verdict and of the version, before the run counts as ended."""
