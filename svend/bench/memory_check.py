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


def worst_deviation(checks: Sequence[MemoryCheck]) -> float:
    """Return the deviation that is farthest from 0."""
    return max((check.deviation for check in checks), key=abs)


def describe_checkpointing(training: TrainingConfig) -> str:
    """Return none, or the policy by which a block is computed again."""
    if not training.gradient_checkpointing:
        return "none"
    return training.gradient_checkpointing_policy.value


def memory_table(title: str, real: str, checks: Sequence[MemoryCheck]) -> Table:
    """Return a table with a line for each check; `real` says how the peak was found."""
    table = Table(title=title, title_justify="left")
    for heading in ("model", "batch", "precision", "weights", "moments", "checkpointing",
                    "predicted GB", f"{real} GB", "off"):
        numeric = heading.endswith(("GB", "off", "batch"))
        table.add_column(heading, justify="right" if numeric else "left")
    for check in checks:
        training = check.training
        table.add_row(
            check.name, f"{training.batch_size}x{training.data.max_seq_length}",
            training.precision.value, training.weight_precision.value,
            training.moment_precision.value, describe_checkpointing(training),
            f"{check.predicted_bytes / 1e9:.3f}", f"{check.real_bytes / 1e9:.3f}",
            f"{check.deviation:+.1%}",
        )
    return table
