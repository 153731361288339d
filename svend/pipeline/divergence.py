"""What becomes of a run whose steps are skipped one after another, or whose weights are not finite.

It goes back to the last good checkpoint and leaves out the data up to there, once; then it fails.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from svend.errors import DivergenceError
from svend.pipeline.checkpoints import Checkpoint
from svend.pipeline.job import Job
from svend.pipeline.record import record_verdicts
from svend.pipeline.replica import count_nonfinite, examine, leave_out, load_state

DIVERGENCE_FILE, REWIND_FILE = "divergence.json", "rewind.json"
REWIND_TAG = "svend.rewind"


@dataclass(frozen=True)
class StepReading:
    """A step as read from the device."""

    step: int
    loss: float
    gradient_norm: float
    skipped_steps: int
    skipped_in_a_row: int

    @property
    def skipped(self) -> bool:
        return self.skipped_in_a_row > 0

    def __str__(self) -> str:
        return f"loss {self.loss:.4g}, gradient norm {self.gradient_norm:.4g}"


@dataclass(frozen=True)
class Divergence:
    """Where a run diverged, and by what it is known."""

    at: StepReading
    reason: str
    readings: Sequence[StepReading]


def find_divergence(
    job: Job, readings: Sequence[StepReading], *, look_at_weights: bool
) -> Divergence | None:
    """Return where the steps just read show that the run diverged, None if they do not.

    It is the first step that makes the configured number of skipped ones in a row, which does not
    depend on when steps are read.
    """
    for reading in readings:
        if reading.skipped_in_a_row >= job.config.training.divergence_patience:
            reason = f"{reading.skipped_in_a_row} steps skipped in a row ({reading})"
            return Divergence(reading, reason, readings)
    if look_at_weights:
        count = job.call(count_nonfinite)
        if count:
            last = readings[-1]
            return Divergence(last, f"{count:,} weights are not finite ({last})", readings)
    return None


def find_good_checkpoint(job: Job) -> Checkpoint | None:
    """Return the newest checkpoint to go back to, None if there is none."""
    return next(filter(_is_good, reversed(job.manager.list_checkpoints())), None)


def go_back(job: Job, divergence: Divergence, checkpoint: Checkpoint) -> dict[str, float]:
    """Load the last good checkpoint, and have the stream go on behind the offending data.

    Returns the metrics to save it with again, which makes the decision last. Leaves evidence and a
    tag in the run.
    """
    state, step = job.state, divergence.at.step
    _log_evidence(job, divergence, REWIND_FILE)
    reached = _first_sequence_after(job, step)
    job.call(load_state, job.manager.find_latest(_is_good).path)
    count = job.call(count_nonfinite)
    if count:
        raise DivergenceError(
            f"training diverged at step {step}: {divergence.reason}; the checkpoint of step "
            f"{state.step} holds {count:,} weights that are not finite; begin another run"
        )
    left_out = state.stream.next_sequence
    job.call(leave_out, reached)
    # What is trained now has other values: it is logged, under the same steps as before.
    job.tracked.go_back(state.step)
    job.evaluated_step = job.saved_step = state.step
    job.tracked.set_tags({
        REWIND_TAG: f"from step {step} to step {state.step}; sequences {left_out} to {reached - 1} "
        f"left out; {divergence.reason}"
    })
    job.tracked.log_metrics({"train/rewinds": 1.0}, state.step)
    return dict(checkpoint.metrics)


def fail(job: Job, divergence: Divergence, why_not_back: str) -> DivergenceError:
    """Leave the evidence in the run, and return the error that ends it."""
    _log_evidence(job, divergence, DIVERGENCE_FILE)
    record_verdicts(job.tracked, job.folder.read_verdicts())
    return DivergenceError(
        f"training diverged at step {divergence.at.step}: {divergence.reason}; {why_not_back}; "
        f"{DIVERGENCE_FILE} in the run has the norms by weight and the data; begin another run "
        "with a lower training.learning_rate, or without these data"
    )


def _is_good(checkpoint: Checkpoint) -> bool:
    """Whether its weights were measured and found well.

    What an interruption saved was not: its weights may be those that steps are skipped for.
    """
    return math.isfinite(checkpoint.metrics.get("loss", math.nan))


def _log_evidence(job: Job, divergence: Divergence, name: str) -> None:
    training, at = job.config.training, divergence.at
    size, count = training.batch_size, training.gradient_accumulation_steps
    first = _first_sequence_after(job, at.step) - size * count
    firsts = [first + size * number for number in range(count)]
    examination = job.call(examine, size, firsts)
    evidence = {
        "step": at.step,
        "reason": divergence.reason,
        "learning_rate": training.learning_rate * job.state.rate_factor,
        "data_fingerprint": job.corpus.fingerprint,
        "steps": [asdict(reading) for reading in divergence.readings],
        "micro_batches": [
            {
                "loss": loss,
                "sequences": [
                    {"sequence": number, "documents": _documents(job, number)}
                    for number in range(start, start + size)
                ],
            }
            for start, loss in zip(firsts, examination.losses, strict=True)
        ],
        "parameters": [asdict(norms) for norms in examination.parameters],
    }
    job.tracked.log_text(json.dumps(_plain(evidence), indent=1) + "\n", name)


def _documents(job: Job, sequence: int) -> list[dict[str, Any]]:
    return [
        {"source": job.corpus.counts[source].source, "document": document}
        for source, document in job.sequences.documents(sequence)
    ]


def _first_sequence_after(job: Job, step: int) -> int:
    """Return where the stream stood after a step that was trained just now."""
    training = job.config.training
    per_step = training.batch_size * training.gradient_accumulation_steps
    return job.state.stream.next_sequence - (job.state.step - step) * per_step


def _plain(value: Any) -> Any:
    """Return a tree with text in place of the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
