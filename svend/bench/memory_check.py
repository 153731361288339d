"""One comparison of a predicted with a real peak, and the table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from svend.pipeline.config import TrainingConfig

TOLERANCE = 0.1


@dataclass(frozen=True)
class MemoryCheck:
    """Predicted and real peak, in bytes, of one model and its settings."""

    name: str
    training: TrainingConfig
    predicted_bytes: int
    real_bytes: int

    @property
    def deviation(self) -> float:
        """How far the prediction is off, as a share of what was real; above 0: too much."""
        return self.predicted_bytes / self.real_bytes - 1


def judge(checks: Sequence[MemoryCheck], in_runs: Sequence[MemoryCheck]) -> tuple[bool, str]:
    """Return whether predictions are within tolerance and no run holds more than planned, and why.

    in_runs: what runs' plans say, allocator's share included, and what their processes hold.
    """
    worst = max((check.deviation for check in checks), key=abs)
    told = f"worst deviation {worst:+.1%}, allowed {TOLERANCE:.0%}"
    off = [check.deviation for check in in_runs]
    if in_runs:
        told += (f"\na run's plan is {min(off):+.1%} to {max(off):+.1%} off what the run holds, "
                 "allowed from 0%")
    return abs(worst) <= TOLERANCE and min(off, default=0.0) >= 0, told


def describe_checkpointing(training: TrainingConfig) -> str:
    """Return none, or the policy by which a block is computed again."""
    if not training.gradient_checkpointing:
        return "none"
    return training.gradient_checkpointing_policy.value


def memory_table(
    title: str, real: str, checks: Sequence[MemoryCheck], in_runs: Sequence[MemoryCheck] = ()
) -> Table:
    """Return a table with a line for each check; `real` says how the peak was found.

    in_runs: of the same settings, what a run's plan says and what its process holds.
    """
    table = Table(title=title, title_justify="left")
    compared = [checks, in_runs] if in_runs else [checks]
    figures = ["predicted GB", f"{real} GB", "off", "planned GB", "run GB", "off"]
    for heading in ("model", "a step", "compute, weights, moments", "recomputed",
                    *figures[:3 * len(compared)]):
        table.add_column(
            heading, justify="right" if heading in figures else "left", overflow="fold"
        )
    for check, *others in zip(*compared, strict=True):
        training = check.training
        precisions = (training.precision, training.weight_precision, training.moment_precision)
        table.add_row(
            check.name,
            f"{training.gradient_accumulation_steps} of "
            f"{training.batch_size}x{training.data.max_seq_length}",
            ", ".join(precision.value for precision in precisions),
            describe_checkpointing(training),
            *(figure for one in (check, *others) for figure in (
                f"{one.predicted_bytes / 1e9:.3f}", f"{one.real_bytes / 1e9:.3f}",
                f"{one.deviation:+.1%}",
            )),
        )
    return table
